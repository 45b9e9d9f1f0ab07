"""From scores to p-values: split-conformal ranks, cross-fitting folds, and tails that reach beyond the sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray, BoolArray, Float64Array, IntArray

#: Quantile from which a score's tail is described by a generalised Pareto distribution.
TAIL_START = 0.9
_BODY_KNOTS = 33
_MAX_SHAPE = 0.9  # a shape of 1 has no mean
_HUGE = 1e30  # stands for infinity where a finite number is needed


def images_needed(false_positive_rate: float) -> int:
    """Return how many clean images a rate needs: the smallest n with 1 / (n + 1) <= rate."""
    return math.ceil(1 / false_positive_rate - 1e-9) - 1


def check_rate(false_positive_rate: float, n_clean: int) -> None:
    """Refuse a rate that the clean sample cannot show.

    Raises
    ------
    DataError
        If the rate is below 1 / (n_clean + 1).
    """
    needed = images_needed(false_positive_rate)
    if n_clean < needed:
        raise DataError(
            f"false_positive_rate={false_positive_rate:g} needs at least {needed} clean images, got {n_clean}. "
            "Raise the rate or add images."
        )


def conformal_p_values(scores: Float64Array, sorted_clean_scores: Float64Array) -> Float64Array:
    """Return p = (1 + #{clean >= score}) / (n + 1) per score.

    Parameters
    ----------
    scores : ndarray of shape (m,), float64
        Higher = more suspicious.
    sorted_clean_scores : ndarray of shape (n,), float64, ascending
        Scores of clean inputs that the detector was not fitted on.

    Returns
    -------
    p_values : ndarray of shape (m,), float64, in [1 / (n + 1), 1]

    References
    ----------
    .. [1] Vovk, Gammerman, Shafer (2005), Algorithmic Learning in a Random World; Papadopoulos et al. (2002) for the
       split form.
    """
    n = len(sorted_clean_scores)
    at_least = n - np.searchsorted(sorted_clean_scores, scores, side="left")
    return np.asarray((1.0 + at_least) / (n + 1.0), dtype=np.float64)


def stratified_folds(labels: IntArray, folds: int, seed: int) -> IntArray:
    """Assign every row to one of `folds` parts, each class spread evenly; shape (n,), values in [0, folds)."""
    rng = np.random.default_rng(seed)
    part = np.empty(len(labels), dtype=np.int64)
    offset = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        part[rows] = (np.arange(len(rows)) + offset) % folds
        offset += len(rows)  # so that small classes do not all fall into the first parts
    return part


def classes_with_own_map(predicted_labels: IntArray, n_classes: int, min_images: int) -> BoolArray:
    """Return which predicted classes have clean images enough for a map of their own, shape (n_classes,).

    Asked once, of all clean images: maps fitted on some of the folds must group classes as the final one does, or the
    scores that they calibrate with are not the scores that new inputs get.
    """
    enough: BoolArray = np.bincount(predicted_labels, minlength=n_classes) >= min_images
    return enough


@dataclass(frozen=True)
class SurpriseMap:
    """Turns the raw scores of several detectors into surprise: -log of an estimated p-value, per predicted class.

    A class with enough clean scores has a map of its own, the others share the pooled one. Up to the 90 % quantile the
    map is the empirical distribution (linear between knots); beyond it a generalised Pareto tail, whose shape is
    pooled over classes. So a score far outside the clean sample is more surprising than one just outside, which ranks
    cannot say, and one strong detector can win. Only an ordering is taken from it: validity comes from the conformal
    rank of the combined score.

    Attributes
    ----------
    group_of_class : ndarray of shape (n_classes,), int64
        Row of the other arrays for each predicted class; 0 = pooled.
    knots : ndarray of shape (n_groups, n_detectors, n_knots), float64
        Scores at the quantile levels, ascending.
    levels : ndarray of shape (n_knots,), float64
        Surprise at the knots, from 0 to -log(1 - 0.9).
    scale, shape : ndarray of shape (n_groups, n_detectors), float64
        Generalised Pareto tail above the last knot.

    References
    ----------
    .. [1] Hosking, Wallis (1987), Parameter and quantile estimation for the generalized Pareto distribution.
    """

    group_of_class: IntArray
    knots: Float64Array
    levels: Float64Array
    scale: Float64Array
    shape: Float64Array

    @classmethod
    def fit(cls, scores: Float64Array, predicted_labels: IntArray, own_map: BoolArray) -> Self:
        """Learn from clean out-of-fold scores, shape (n, n_detectors), and the suspect's labels, shape (n,).

        `own_map`, shape (n_classes,), says which classes get a map of their own; one without a score here is pooled.
        """
        if len(scores) == 0:
            raise DataError("calibration needs at least one clean score, got none.")
        scores = np.clip(scores, -_HUGE, _HUGE)
        group_of_class = np.zeros(len(own_map), dtype=np.int64)
        groups: list[BoolArray] = [np.ones(len(scores), dtype=bool)]
        for label in np.flatnonzero(own_map):
            rows = predicted_labels == label
            if rows.any():
                group_of_class[label] = len(groups)
                groups.append(rows)
        quantiles = np.linspace(0, TAIL_START, _BODY_KNOTS)
        knots = np.stack([np.quantile(scores[rows], quantiles, axis=0).T for rows in groups])
        mean_excess = np.empty(knots.shape[:2])
        relative: list[list[Float64Array]] = [[] for _ in range(scores.shape[1])]
        for group, rows in enumerate(groups):
            for detector in range(scores.shape[1]):
                excess = scores[rows, detector] - knots[group, detector, -1]
                excess = excess[excess > 0]
                spread = knots[group, detector, -1] - knots[group, detector, 0]
                mean_excess[group, detector] = excess.mean() if len(excess) else max(spread * 0.1, 1e-9)
                if group > 0 or len(groups) == 1:
                    relative[detector].append(excess / mean_excess[group, detector])
        pooled = np.array([_pareto_shape(np.concatenate(parts)) for parts in relative])
        shape = np.broadcast_to(pooled, mean_excess.shape).copy()
        return cls(group_of_class, knots, -np.log1p(-quantiles), mean_excess * (1 - shape), shape)

    def surprise(self, scores: Float64Array, predicted_labels: IntArray) -> Float64Array:
        """Return surprise per row and detector, shape (n, n_detectors), float64, >= 0; higher = more suspicious."""
        group = self.group_of_class[predicted_labels]
        knots = self.knots[group].reshape(scores.size, len(self.levels))  # (n * n_detectors, n_knots)
        values = np.minimum(scores, _HUGE).ravel()
        cells = np.arange(values.size)
        left = (knots <= values[:, np.newaxis]).sum(axis=1) - 1
        left = np.minimum(np.maximum(left, 0), len(self.levels) - 2)
        low, level = knots[cells, left], self.levels[left]
        left += 1
        width = np.maximum(knots[cells, left] - low, 1e-300)
        share = np.minimum(np.maximum((values - low) / width, 0.0), 1.0)
        body = level + share * (self.levels[left] - level)
        excess = np.maximum(values - knots[:, -1], 0.0) / self.scale[group].ravel()
        shape = np.maximum(self.shape[group], 1e-9).ravel()
        result: Float64Array = body + np.log1p(shape * excess) / shape
        return result.reshape(scores.shape)

    def arrays(self) -> dict[str, AnyArray]:
        """Return the map as arrays."""
        return {
            "group_of_class": self.group_of_class,
            "knots": self.knots,
            "levels": self.levels,
            "scale": self.scale,
            "shape": self.shape,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, AnyArray]) -> Self:
        """Return the map from what `arrays` returned."""
        return cls(**{name: arrays[name] for name in ("group_of_class", "knots", "levels", "scale", "shape")})


def _pareto_shape(relative_excess: Float64Array) -> float:
    """Estimate the shape of a generalised Pareto tail by probability-weighted moments, within [0, 0.9]."""
    n = len(relative_excess)
    if n < 10:
        return 0.0  # too few to tell from an exponential tail
    ordered = np.sort(relative_excess)
    mean = ordered.mean()
    weighted = float((ordered * (1 - (np.arange(1, n + 1) - 0.35) / n)).mean())
    if mean - 2 * weighted <= 0:
        return 0.0
    return float(np.clip(2 - mean / (mean - 2 * weighted), 0.0, _MAX_SHAPE))
