"""One score from many detectors: the published rule, and the calibrated combination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np

from guard.errors import NotFittedError
from guard.statistics.calibration import SurpriseMap
from guard.types import AnyArray, BoolArray, Float64Array

#: Exponent of the calibrated combination: 1 is Fisher's sum, infinity lets the most surprised detector decide alone.
COMBINATION_ORDER = 2.0
#: Local outlier factor above which scikit-learn, and with it the paper, calls a point novel.
NOVELTY_OFFSET = 1.5


class Fusion(Protocol):
    """Turns raw detector scores into one score per input, and says which inputs are poisoned."""

    def fit(self, raw: Float64Array) -> Self:
        """Learn from clean out-of-fold scores, shape (n, n_detectors)."""

    def surprise(self, raw: Float64Array) -> Float64Array:
        """Return how unusual each detector's score is, shape (n, n_detectors); comparable across detectors."""

    def combine(self, surprise: Float64Array) -> Float64Array:
        """Return one score per input, shape (n,), higher = more suspicious, from what `surprise` returned."""

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return which inputs are poisoned, shape (n,)."""

    def arrays(self) -> dict[str, AnyArray]:
        """Return what `fit` learned."""

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """Take back what `arrays` returned."""


@dataclass
class CalibratedFusion:
    """All detectors at once, at the false-positive rate that was asked for.

    Each detector's score becomes surprise (-log of its estimated p-value among clean inputs); the combination is the
    root mean square over detectors. An unweighted sum (order 1, Fisher) is dragged down by weak detectors; the maximum
    (order infinity, Tippett) throws agreement away. Between the two, several mildly surprised detectors add up and a
    single strong one can still win. The order is a constant; docs/detection.md says what it was compared with.
    """

    surprise_map_: SurpriseMap | None = None

    def fit(self, raw: Float64Array) -> Self:
        """See `Fusion.fit`."""
        self.surprise_map_ = SurpriseMap.fit(raw)
        return self

    def surprise(self, raw: Float64Array) -> Float64Array:
        """See `Fusion.surprise`."""
        if self.surprise_map_ is None:
            raise NotFittedError("CalibratedFusion is not fitted. Call fit(raw) first.")
        return self.surprise_map_.surprise(raw)

    def combine(self, surprise: Float64Array) -> Float64Array:
        """See `Fusion.combine`: the root mean square over detectors."""
        total = (surprise**COMBINATION_ORDER).sum(axis=1)
        combined: Float64Array = (total / surprise.shape[1]) ** (1 / COMBINATION_ORDER)
        return combined

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return p <= false_positive_rate."""
        return p_values <= false_positive_rate

    def arrays(self) -> dict[str, AnyArray]:
        """See `Fusion.arrays`."""
        return self.surprise_map_.arrays() if self.surprise_map_ is not None else {}

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """See `Fusion.restore`."""
        self.surprise_map_ = SurpriseMap.from_arrays(arrays)
        return self


@dataclass
class PaperFusion:
    """Eq. 13 of arXiv 2011.02526: poisoned if novel to every class, or if the two heads disagree.

    Detectors are, in this order, the novelty (local outlier factor on norms, least over classes) and the graded
    disagreement of the replacement head. Surprise is how far each is beyond its own threshold, and the combined score
    the larger of the two: above 0 exactly where the published rule says poisoned. The requested false-positive rate
    has no influence; that is how the paper has it.
    """

    def fit(self, raw: Float64Array) -> Self:
        """Learn nothing: both thresholds are the paper's."""
        return self

    def surprise(self, raw: Float64Array) -> Float64Array:
        """Return novelty less 1.5, and disagreement as it is."""
        beyond: Float64Array = raw - np.array([NOVELTY_OFFSET, 0.0])
        return beyond

    def combine(self, surprise: Float64Array) -> Float64Array:
        """Return the larger of the two."""
        combined: Float64Array = surprise.max(axis=1)
        return combined

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return eq. 13."""
        return combined > 0

    def arrays(self) -> dict[str, AnyArray]:
        """Nothing was learned."""
        return {}

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """Nothing to take back."""
        return self


def fired(surprise: Float64Array, mode: str, false_positive_rate: float) -> BoolArray:
    """Return which detectors would have flagged the input by themselves.

    Parameters
    ----------
    surprise : ndarray of any shape, float64
        From `Fusion.surprise`.
    mode : str
        `"paper"`: a detector fires beyond its own threshold. Else surprise is -log of a p-value, and it fires where
        that p-value is at most `false_positive_rate`.
    false_positive_rate : float
        The requested one, in (0, 1).
    """
    beyond: BoolArray = surprise > 0 if mode == "paper" else surprise >= -np.log(false_positive_rate)
    return beyond


def new_fusion(mode: str) -> Fusion:
    """Return the unfitted fusion of a mode, `"calibrated"` or `"paper"`."""
    return PaperFusion() if mode == "paper" else CalibratedFusion()
