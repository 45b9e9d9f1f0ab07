"""Graded disagreement between the suspect model and heads at several depths, of which the deepest at hand speaks."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from guard.detection.detectors.base import WHAT_IS_WHAT, Joins, OverDepths, Reads, Shows, Source
from guard.detection.detectors.disagreement import disagreement_with
from guard.detection.heads.anytime import AnytimeHeads
from guard.types import FEATURES, Activations, AnyArray, Float64Array, IntArray


@dataclass
class AnytimeDisagreement:
    """How strongly heads that were trained together contradict the suspect model's answer.

    The log-ratio of `HeadDisagreement`, by the deepest of `AnytimeHeads` that may be asked.

    Parameters
    ----------
    depths : tuple of str
        Where the heads read, in the order of execution; `"features"` is the split layer.
    seed : int
        Of the heads' training.
    """

    joins: ClassVar[Joins] = "with_early_verdicts"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_WHAT
    reads: ClassVar[Reads] = "activations"
    shows: ClassVar[Shows] = "contradiction"
    over_depths: ClassVar[OverDepths] = "averaged"

    depths: tuple[str, ...] = (FEATURES,)
    seed: int = 0
    heads_: AnytimeHeads = field(default_factory=AnytimeHeads, init=False, repr=False)

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Train the heads on activations and true labels, shape (n,)."""
        features = [activations.at(depth) for depth in self.depths]
        self.heads_ = AnytimeHeads(seed=self.seed).fit(features, labels, activations.logits.shape[1])
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return the log-ratio per row, shape (n,), float64; higher = more suspicious.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of features differs from `fit`.
        """
        logits = self.heads_.logits([activations.at(depth) for depth in self.depths])
        return disagreement_with(logits, activations)

    def up_to(self, n_depths: int) -> Self:
        """Return the same detector, asked for the first depths only; shares the heads."""
        early = copy.copy(self)
        early.depths = self.depths[:n_depths]
        return early

    def state(self) -> dict[str, AnyArray]:
        """Return the heads' layers."""
        return self.heads_.state()

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted detector from what `state` returned."""
        detector = cls(**settings)
        detector.heads_ = AnytimeHeads.from_state(state)
        return detector
