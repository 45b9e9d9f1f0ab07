"""The contract that every detector keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self, runtime_checkable

from guard.errors import DataError
from guard.types import Activations, AnyArray, Float64Array, IntArray

#: When a detector is part of a guard in `calibrated` mode: always, once for everything or once per depth; or only
#: where the activations hold a backup's logits, where there are anomalies of the traffic to learn from, or where the
#: settings ask for verdicts at several depths.
Joins = Literal["once", "once_per_depth", "with_backup", "with_anomalies", "with_early_verdicts"]
#: What a detector looks at: activations as they are, or the leading or the trailing columns of every depth, whitened
#: (`guard.detection.whitening`), where the guard has whitened spaces.
Reads = Literal["activations", "leading", "trailing"]
#: What a high score says: an input is unlike the clean ones, is like those of another class than the answer, or is like
#: anomalies of the traffic.
Shows = Literal["novelty", "contradiction", "resemblance"]
#: What becomes of the scores of one kind at several depths: their mean, or how unusual they are beside each other.
OverDepths = Literal["averaged", "compared"]
#: Label of an anomaly of the traffic: nobody has said what it shows.
NO_LABEL = -1


class Source(IntEnum):
    """Where an input that detectors may learn from is from."""

    #: The user's clean images, and noisy copies of them.
    CLEAN = 0
    #: A person called it poisoned, and named another class than the network's answer.
    POISONED = 1
    #: The guard flagged it, and a person called it clean.
    FALSE_ALARM = 2
    #: Of the traffic, poisoned or thought to be; its label is `NO_LABEL`.
    ANOMALY = 3


#: For detectors that learn what clean inputs look like, and would take a trigger for a normal sight.
WHAT_IS_CLEAN = frozenset({Source.CLEAN, Source.FALSE_ALARM})
#: For detectors that learn which features belong to which label.
WHAT_IS_WHAT = frozenset({Source.CLEAN, Source.POISONED})


class Kind(NamedTuple):
    """What a combination must know of a detector: the name of its kind, and what `Detector` says of the others."""

    name: str
    shows: Shows = "novelty"
    over_depths: OverDepths = "averaged"


@runtime_checkable
class Detector(Protocol):
    """Learns what clean activations look like, and scores how far new ones are from that.

    A detector is a dataclass whose fields are its settings and nothing else: the constructor stores, `fit` learns.
    Learned values end in an underscore. A detector sees activations only, never images.

    Attributes
    ----------
    joins : Joins
        When it is part of a guard. One that joins once per depth has a setting `depth`.
    learns_from : frozenset of Source
        Which inputs `fit` is given: `WHAT_IS_CLEAN`, `WHAT_IS_WHAT`, or a choice of its own.
    reads : Reads
        What `fit` and `score` are given.
    shows : Shows
        What a high score says.
    over_depths : OverDepths
        How its scores at several depths become one.
    """

    joins: ClassVar[Joins]
    learns_from: ClassVar[frozenset[Source]]
    reads: ClassVar[Reads]
    shows: ClassVar[Shows]
    over_depths: ClassVar[OverDepths]

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn from activations and their true labels, shape (n,); return self."""

    def score(self, activations: Activations) -> Float64Array:
        """Return one score per row, shape (n,), float64; higher = more suspicious, no unit."""

    def state(self) -> dict[str, AnyArray]:
        """Return everything that `fit` learned, as arrays."""

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted detector from what `state` returned and the settings it was made with."""


@runtime_checkable
class FitsParts(Protocol):
    """A detector that is cheaper to fit on several parts of the same inputs at once, as cross-fitting needs it."""

    def fit_parts(self, activations: Activations, labels: IntArray, parts: Sequence[IntArray]) -> list[Self]:
        """Return detectors with these settings, each fitted on the rows of one part, in this order."""

    def portions(self, n_parts: int, activations: Activations) -> list[range]:
        """Cut so many parts into portions, each to be fitted at once."""


def check_columns(name: str, rows: AnyArray, fitted: int) -> None:
    """Refuse logits, or features of a depth, with other columns than `fit` saw, with DataError."""
    if rows.shape[1] != fitted:
        same = "Is it the same suspect model?" if name == "logits" else "Is the split layer the same?"
        raise DataError(f"{name} have {rows.shape[1]} columns, fit saw {fitted}. {same}")
