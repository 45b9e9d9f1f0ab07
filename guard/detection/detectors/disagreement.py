"""Graded disagreement between the suspect model and a decision head trained on true labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import numpy as np

from guard.detection.detectors.base import (
    WHAT_IS_CLEAN,
    WHAT_IS_WHAT,
    Joins,
    OverDepths,
    Reads,
    Shows,
    Source,
    check_columns,
)
from guard.detection.heads.decision_head import DecisionHead
from guard.detection.heads.head_training import portions_of_heads
from guard.types import BACKUP, FEATURES, Activations, AnyArray, Float32Array, Float64Array, IntArray


@dataclass
class HeadDisagreement:
    """How strongly a replacement head contradicts the suspect model's answer.

    For the suspect's label s and the head's logits z the score is max over j != s of z_j, less z_s: the log-ratio of
    the head's best other label to the suspect's. Above 0 the head would answer otherwise (the yes/no rule of the
    Fusion paper, arXiv 2011.02526, eq. 12); below 0 it agrees, the more surely the lower.

    Parameters
    ----------
    depth : str
        Where the head reads: `"features"` or a depth's name.
    feature_noise_std : float
        See `DecisionHead.noise_std`.
    stops_early : bool
        See `DecisionHead.stops_early`; a guard decides it for all its heads.
    seed : int
        See `DecisionHead.seed`.
    """

    joins: ClassVar[Joins] = "once"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_WHAT
    reads: ClassVar[Reads] = "activations"
    shows: ClassVar[Shows] = "contradiction"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES
    feature_noise_std: float = 0.0
    stops_early: bool = True
    seed: int = 0
    head_: DecisionHead = field(default_factory=DecisionHead, init=False, repr=False)

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Train the head on activations and true labels, shape (n,)."""
        self.head_ = self._fresh_head().fit(activations.at(self.depth), labels, activations.logits.shape[1])
        return self

    def fit_parts(self, activations: Activations, labels: IntArray, parts: Sequence[IntArray]) -> list[Self]:
        """Return detectors with these settings, each fitted on some of the rows: what `fit` gives, in less time."""
        features, n_classes = activations.at(self.depth), activations.logits.shape[1]
        fitted = []
        for head in self._fresh_head().fit_parts(features, labels, n_classes, parts):
            fitted.append(replace(self))
            fitted[-1].head_ = head
        return fitted

    def portions(self, n_parts: int, activations: Activations) -> list[range]:
        """Cut so many parts into portions that `fit_parts` is to be given at once."""
        return portions_of_heads(n_parts, activations.at(self.depth).shape[1], activations.logits.shape[1])

    def _fresh_head(self) -> DecisionHead:
        return DecisionHead(noise_std=self.feature_noise_std, stops_early=self.stops_early, seed=self.seed)

    def score(self, activations: Activations) -> Float64Array:
        """Return the log-ratio per row, shape (n,), float64; higher = more suspicious.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of features or of classes differs from `fit`.
        """
        return disagreement_with(self.logits(activations), activations)

    def logits(self, activations: Activations) -> Float32Array:
        """Return the head's own logits, shape (n, n_classes)."""
        return self.head_.logits(activations.at(self.depth))

    def state(self) -> dict[str, AnyArray]:
        """Return the head's layers."""
        return self.head_.state()

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted detector from what `state` returned."""
        detector = cls(**settings)
        detector.head_ = DecisionHead.from_state(state)
        return detector


@dataclass
class BackupDisagreement:
    """How strongly a backup, a network beside the suspect model, contradicts the suspect's answer.

    The same log-ratio as `HeadDisagreement`, of logits that the activations already hold under `BACKUP`: those of
    clean reference inputs from backups that had not learned from them. So there is nothing left to fit. Costs one pass
    of the backup for every input.
    """

    joins: ClassVar[Joins] = "with_backup"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_CLEAN
    reads: ClassVar[Reads] = "activations"
    shows: ClassVar[Shows] = "contradiction"
    over_depths: ClassVar[OverDepths] = "averaged"

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn nothing; refuse activations without the backup's logits (DataError)."""
        activations.at(BACKUP)
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return the log-ratio per row, shape (n,), float64; higher = more suspicious, infinite if not finite."""
        scores = disagreement_with(activations.at(BACKUP), activations)
        return np.where(np.isfinite(scores), scores, np.inf)

    def state(self) -> dict[str, AnyArray]:
        """Return nothing: the backup itself is kept beside the detectors."""
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return the detector."""
        return cls(**settings)


def disagreement_with(head_logits: Float32Array, activations: Activations) -> Float64Array:
    """Return `disagreement` of a head with the suspect model, shape (n,), float64.

    Raises
    ------
    DataError
        If they know different numbers of classes.
    """
    check_columns("logits", activations.logits, head_logits.shape[1])
    return disagreement(head_logits, activations.predicted_labels)


def disagreement(head_logits: Float32Array, suspect_labels: IntArray) -> Float64Array:
    """Return max over j != s of z_j, less z_s, per row: shape (n,), float64; above 0 = the head answers otherwise."""
    rows = np.arange(len(head_logits))
    others = head_logits.astype(np.float64)
    of_suspect = others[rows, suspect_labels]
    others[rows, suspect_labels] = -np.inf
    best: Float64Array = others.max(axis=1) - of_suspect
    return best
