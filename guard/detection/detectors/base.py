"""The contract that every detector keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from guard.types import Activations, AnyArray, Float64Array, IntArray


@runtime_checkable
class Detector(Protocol):
    """Learns what clean activations look like, and scores how far new ones are from that.

    A detector is a dataclass whose fields are its settings and nothing else: the constructor stores, `fit` learns.
    Learned values end in an underscore. A detector sees activations only, never images.

    Attributes
    ----------
    learns_from_poisoned : bool
        Whether `fit` is also given poisoned inputs that a person has labelled, with their true labels. True for one
        that learns which features belong to which label; False for one that learns what clean inputs look like, and
        would take the trigger for a normal sight.
    """

    learns_from_poisoned: ClassVar[bool]

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn from activations and their true labels, shape (n,); return self."""

    def score(self, activations: Activations) -> Float64Array:
        """Return one score per row, shape (n,), float64; higher = more suspicious, no unit."""

    def state(self) -> dict[str, AnyArray]:
        """Return everything that `fit` learned, as arrays."""

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted detector from what `state` returned and the settings it was made with."""
