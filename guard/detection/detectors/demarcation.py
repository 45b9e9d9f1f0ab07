"""A line between the anomalies of the traffic and clean inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from guard.arrays import require
from guard.detection.detectors.base import NO_LABEL, Joins, OverDepths, Reads, Shows, Source, check_columns
from guard.errors import DataError, NotFittedError
from guard.types import FEATURES, Activations, AnyArray, Float64Array, IntArray

_MAX_ITER = 20_000


@dataclass
class Demarcation:
    """Linear support vector machine between purified anomalies and clean inputs, on the features of one depth.

    The binary classifier of RAID [1]_. It knows what was seen in the traffic, where the other detectors know only what
    clean images look like; it is blind to a trigger that was not among the anomalies, and so joins the others instead
    of replacing them. Its false alarms are bounded as theirs are, by calibration on clean images out of fold.

    Both classes weigh the same, however few the anomalies are. Features are standardised by the clean inputs; the
    standardisation is folded into the weights afterwards, so that a fitted one is a vector and a number.

    Parameters
    ----------
    depth : str
        Where to look: `"features"` or the name of a depth.
    softness : float
        C of the machine times the number of features, > 0: the smaller, the wider the margin.

    References
    ----------
    .. [1] Fu et al. (2022), A Feature-Based On-Line Detector to Remove Adversarial-Backdoors by Iterative Demarcation,
       IEEE Access 10. Only its abstract was at hand: the kernel and the anomaly detector are choices of ours.
    """

    joins: ClassVar[Joins] = "with_anomalies"
    learns_from: ClassVar[frozenset[Source]] = frozenset({Source.CLEAN, Source.ANOMALY})
    reads: ClassVar[Reads] = "activations"
    shows: ClassVar[Shows] = "resemblance"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES
    softness: float = 0.5

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn from clean inputs and from anomalies of the traffic, whose label is `NO_LABEL`; shape (n,).

        Raises
        ------
        DataError
            If there is none of one of the two, or a value is not finite.
        """
        from sklearn.svm import LinearSVC  # here, because scoring does without: a server loads less

        is_anomaly = np.asarray(labels) == NO_LABEL
        n_anomalies = int(is_anomaly.sum())
        if n_anomalies in (0, len(is_anomaly)):
            n_clean = len(is_anomaly) - n_anomalies
            raise DataError(f"a line needs inputs on both sides, got {n_clean} clean, {n_anomalies} anomalies.")
        features = activations.require_finite(self.depth).astype(np.float64)
        mean, spread = features[~is_anomaly].mean(axis=0), features[~is_anomaly].std(axis=0)
        # A feature that is constant on clean inputs may be the trigger's own: it keeps its unit, the mean spread.
        usual = float(spread.mean()) or 1.0
        scale = np.maximum(spread, 0.1 * usual)
        cost = self.softness / features.shape[1]
        machine = LinearSVC(C=cost, class_weight="balanced", dual="auto", max_iter=_MAX_ITER, random_state=0)
        machine.fit((features - mean) / scale, is_anomaly)
        self.weights_: Float64Array = machine.coef_[0] / scale
        self.offset_ = float(machine.intercept_[0] - mean @ self.weights_)
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return the signed distance from the line in margins, shape (n,), float64; above 0 = with the anomalies.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns differs from `fit`.
        """
        if not hasattr(self, "weights_"):
            raise NotFittedError("Demarcation is not fitted. Call fit(activations, labels) first.")
        features = activations.at(self.depth)
        check_columns(self.depth, features, len(self.weights_))
        scores: Float64Array = features.astype(np.float64) @ self.weights_ + self.offset_
        return scores

    def state(self) -> dict[str, AnyArray]:
        """Return weights and offset."""
        return {"weights": self.weights_, "offset": np.array([self.offset_])}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted one from what `state` returned; DataError if that is none."""
        machine = cls(**settings)
        machine.weights_ = np.ascontiguousarray(require(state, "weights", (None,)), dtype=np.float64)
        machine.offset_ = float(require(state, "offset", (1,))[0])
        if not machine.weights_.any():
            raise DataError("array weights must hold a line, and is zero.")
        return machine
