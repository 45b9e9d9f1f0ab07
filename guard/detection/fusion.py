"""One score from many detectors: the published rule, and the calibrated combination."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
from scipy.special import ndtri_exp

from guard.arrays import require
from guard.detection.detectors.base import Kind
from guard.detection.kind_scores import SHOWS, KindScores
from guard.errors import NotFittedError
from guard.statistics.calibration import SurpriseMap, largest_surprises
from guard.statistics.confidence import confidence, fit_temperature
from guard.types import AnyArray, BoolArray, Float64Array, FloatArray, IntArray

#: Local outlier factor above which scikit-learn, and with it the paper, calls a point novel.
NOVELTY_OFFSET = 1.5
_KIND = "kind."  # before the names of arrays that map the scores of kinds
#: Arrays that older versions did not have, beside those of kinds.
_WHOLE = frozenset({"temperature", "kinds", "shows", "centre", "whiten"})
#: log(1 + exp z) that one in ten clean inputs exceeds.
_RESEMBLING = 1.5
_NOVELTY, _CONTRADICTION = SHOWS.index("novelty"), SHOWS.index("contradiction")


class Fusion(Protocol):
    """Turns raw detector scores into one score per input, and says which inputs are poisoned."""

    def fit(self, raw: Float64Array, logits: FloatArray, labels: IntArray, kinds: Sequence[Kind] | None = None) -> Self:
        """Learn from clean out-of-fold scores, shape (n, n_detectors), and the suspect's answers to the same inputs.

        Parameters
        ----------
        raw : ndarray of shape (n, n_detectors), float64
        logits : ndarray of shape (n, n_classes)
            The suspect model's own.
        labels : ndarray of shape (n,), int
            True labels.
        kinds : sequence of Kind, optional
            Of the detectors, in order; without it each is of a kind of its own, which sees what is novel.
        """

    def surprise(self, raw: Float64Array) -> Float64Array:
        """Return how unusual each detector's score is, shape (n, n_detectors); comparable across detectors."""

    def combine(self, surprise: Float64Array, logits: FloatArray) -> Float64Array:
        """Return one score per input, shape (n,), higher = more suspicious.

        Parameters
        ----------
        surprise : ndarray of shape (n, n_detectors), float64
            What `surprise` returned.
        logits : ndarray of shape (n, n_classes)
            The suspect model's own.
        """

    def largest_scores(self, n: int, n_detectors: int) -> Float64Array:
        """Return what the combined scores of n clean inputs can be at most, ascending, shape (n,)."""

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return which inputs are poisoned, shape (n,)."""

    def arrays(self) -> dict[str, AnyArray]:
        """Return what `fit` learned."""

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """Take back what `arrays` returned."""


@dataclass
class CalibratedFusion:
    """All detectors at once, at the false-positive rate that was asked for.

    Each detector's score becomes surprise, -log of its estimated p-value p among clean inputs, and then log(1 + exp z),
    with z the normal score, the quantile of the standard normal distribution that is exceeded with probability p. The
    detectors of one kind make one score of theirs (`KindScores`), of which z is taken in the same way. With N the mean
    of log(1 + exp z)^2 over the kinds that see what is novel, C that over the kinds that contradict the suspect's
    answer, in both of which a kind counts once for each of its detectors, and c the suspect's own probability of its
    answer, the combination is

        sqrt((N * ((1 + c) / 2)^2 + C * max(c, 1 / 2)^2) / 2)

    In a guard that has learned from anomalies of the traffic, max(0, r - 3 / 2)^2 is added below the root, with r the
    log(1 + exp z) of the kind that sees what resembles them: it adds where it exceeds that of nine in ten clean inputs,
    and takes nothing away from triggers that nobody has seen yet.

    Below its median a kind says next to nothing, far above it as much as z. The factors are there because clean inputs
    that the suspect gets wrong contradict the heads as triggered ones do, but the suspect is seldom sure of them. They
    are at least a half, so that an attacker gains little by making the network unsure. docs/detection.md has what this
    was compared with.

    Attributes
    ----------
    surprise_map_ : SurpriseMap or None
        Of the detectors.
    kind_scores_ : KindScores or None
        None for a guard of an older version: its combination is the root mean square of surprise, without a factor.
    kind_map_ : SurpriseMap or None
        Of the kinds; None with `kind_scores_`.
    temperature_ : float or None
        Of the suspect's probabilities, see `fit_temperature`; None with `kind_scores_`.
    """

    surprise_map_: SurpriseMap | None = None
    kind_scores_: KindScores | None = None
    kind_map_: SurpriseMap | None = None
    temperature_: float | None = None

    def fit(self, raw: Float64Array, logits: FloatArray, labels: IntArray, kinds: Sequence[Kind] | None = None) -> Self:
        """See `Fusion.fit`."""
        self.surprise_map_ = SurpriseMap.fit(raw)
        graded = _graded(self.surprise_map_.surprise(raw))
        # Infinite scores, as of a class of few images, rank highest and have no size to learn from.
        is_infinite = raw == np.inf
        largest = np.where(is_infinite, 0.0, graded).max(axis=0, initial=0.0)
        sized = np.where(is_infinite, largest, graded)
        self.kind_scores_ = KindScores.fit(sized, kinds or [Kind(str(place)) for place in range(raw.shape[1])])
        of_kinds = np.where(self.kind_scores_.any_of_kind(is_infinite), np.inf, self.kind_scores_(sized))
        self.kind_map_ = SurpriseMap.fit(of_kinds)
        self.temperature_ = fit_temperature(logits, labels)
        return self

    def surprise(self, raw: Float64Array) -> Float64Array:
        """See `Fusion.surprise`."""
        if self.surprise_map_ is None:
            raise NotFittedError("CalibratedFusion is not fitted. Call fit(raw, logits, labels) first.")
        return self.surprise_map_.surprise(raw)

    def combine(self, surprise: Float64Array, logits: FloatArray) -> Float64Array:
        """See `Fusion.combine`."""
        if self.kind_scores_ is None or self.kind_map_ is None or self.temperature_ is None:
            older: Float64Array = np.sqrt(np.square(surprise).mean(axis=1))
            return older
        kinds = self.kind_scores_
        graded = _graded(self.surprise_of_kinds(surprise))
        sure = confidence(logits, self.temperature_)
        factors = np.ones((len(SHOWS), len(sure)))
        factors[_NOVELTY] += sure
        factors[_NOVELTY] *= 0.5
        np.maximum(sure, 0.5, out=factors[_CONTRADICTION])
        squared = np.multiply(graded, factors.take(kinds.shows, axis=0).T, order="C")
        mean = np.square(squared, out=squared).dot(kinds.weights)
        if kinds.has_resemblance:
            resembling = np.maximum(graded[:, kinds.is_resemblance] - _RESEMBLING, 0.0)
            mean += np.square(resembling).sum(axis=1)
        combined: Float64Array = np.sqrt(mean, out=mean)
        return combined

    def surprise_of_kinds(self, surprise: Float64Array) -> Float64Array:
        """Return the surprise of each kind from that of the detectors, shape (n, n_kinds); NotFittedError without."""
        if self.kind_scores_ is None or self.kind_map_ is None:
            raise NotFittedError("this CalibratedFusion knows no kinds. Call fit(raw, logits, labels, kinds) first.")
        return self.kind_map_.surprise(self.kind_scores_(_graded(surprise)))

    def largest_scores(self, n: int, n_detectors: int) -> Float64Array:
        """See `Fusion.largest_scores`: no mean is above what all together allow, and no factor above 1."""
        if self.kind_scores_ is None:
            return largest_surprises(n_detectors, n)
        largest = _graded(largest_surprises(len(self.kind_scores_.shows), n))
        return np.hypot(largest, largest) if self.kind_scores_.has_resemblance else largest

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return p <= false_positive_rate."""
        return p_values <= false_positive_rate

    def arrays(self) -> dict[str, AnyArray]:
        """See `Fusion.arrays`."""
        arrays = self.surprise_map_.arrays() if self.surprise_map_ is not None else {}
        if self.kind_scores_ is None or self.kind_map_ is None or self.temperature_ is None:
            return arrays
        of_kinds = {
            **self.kind_scores_.arrays(),
            **{_KIND + name: part for name, part in self.kind_map_.arrays().items()},
        }
        return {**arrays, **of_kinds, "temperature": np.array([self.temperature_])}

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """See `Fusion.restore`."""
        self.surprise_map_ = SurpriseMap.from_arrays(arrays)
        if any(name in _WHOLE or name.startswith(_KIND) for name in arrays):  # all of it, or it is not sound
            self.temperature_ = float(require(arrays, "temperature", (1,), low=1e-30, high=1e30)[0])
            self.kind_scores_ = KindScores.from_arrays(arrays, len(self.surprise_map_.knots))
            self.kind_map_ = SurpriseMap.from_arrays(
                {name.removeprefix(_KIND): part for name, part in arrays.items() if name.startswith(_KIND)}
            )
            require({"knots": self.kind_map_.knots}, "knots", (len(self.kind_scores_.shows), None))
        return self


def _graded(surprise: Float64Array) -> Float64Array:
    """Return softplus of normal scores, shape of `surprise`, >= 0."""
    normal = ndtri_exp(-surprise)
    graded: Float64Array = np.logaddexp(0.0, np.negative(normal, out=normal), out=normal)
    return graded


@dataclass
class PaperFusion:
    """Eq. 13 of arXiv 2011.02526: poisoned if novel to every class, or if the two heads disagree.

    Detectors are, in this order, the novelty (local outlier factor on norms, least over classes) and the graded
    disagreement of the replacement head. Surprise is how far each is beyond its own threshold, and the combined score
    the larger of the two: above 0 exactly where the published rule says poisoned. The requested false-positive rate
    has no influence; that is how the paper has it.
    """

    def fit(self, raw: Float64Array, logits: FloatArray, labels: IntArray, kinds: Sequence[Kind] | None = None) -> Self:
        """Learn nothing: both thresholds are the paper's."""
        return self

    def surprise(self, raw: Float64Array) -> Float64Array:
        """Return novelty less 1.5, and disagreement as it is."""
        beyond: Float64Array = raw - np.array([NOVELTY_OFFSET, 0.0])
        return beyond

    def combine(self, surprise: Float64Array, logits: FloatArray) -> Float64Array:
        """Return the larger of the two."""
        combined: Float64Array = surprise.max(axis=1)
        return combined

    def largest_scores(self, n: int, n_detectors: int) -> Float64Array:
        """Return infinity: nothing bounds them."""
        return np.full(n, np.inf)

    def decide(self, combined: Float64Array, p_values: Float64Array, false_positive_rate: float) -> BoolArray:
        """Return eq. 13."""
        return combined > 0

    def arrays(self) -> dict[str, AnyArray]:
        """Nothing was learned."""
        return {}

    def restore(self, arrays: Mapping[str, AnyArray]) -> Self:
        """Nothing to take back."""
        return self


def new_fusion(mode: str) -> Fusion:
    """Return the unfitted fusion of a mode, `"calibrated"` or `"paper"`."""
    return PaperFusion() if mode == "paper" else CalibratedFusion()
