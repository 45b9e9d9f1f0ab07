"""From scores to p-values: split-conformal ranks, cross-fitting folds, and tails that reach beyond the sample."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np

from guard.arrays import require
from guard.errors import DataError
from guard.types import AnyArray, BoolArray, Float64Array, IntArray

#: Quantile from which a score's tail is described by a generalised Pareto distribution.
TAIL_START = 0.9
_BODY_KNOTS = 33
_MAX_SHAPE = 0.9  # a shape of 1 has no mean
_HUGE = 1e30  # stands for infinity where a finite number is needed
_LEAST_SCALE = 1e-12  # a tenth of the least mean excess, and less
_MAX_LEVEL = 10.0  # surprise at the last knot, -log(1 - 0.9), and room for later versions


def images_needed(false_positive_rate: float) -> int:
    """Return how many clean images a rate needs: the smallest n with 1 / (n + 1) <= rate."""
    return math.ceil(1 / false_positive_rate - 1e-9) - 1


def check_rate(false_positive_rate: float, n_clean: int, n_copies: int = 0) -> None:
    """Refuse a rate that the clean sample cannot show.

    Parameters
    ----------
    false_positive_rate : float
    n_clean : int
        Clean images, without copies of others.
    n_copies : int
        These copies; for the error.

    Raises
    ------
    DataError
        If the rate is below 1 / (n_clean + 1).
    """
    needed = images_needed(false_positive_rate)
    if n_clean < needed:
        raise DataError(
            f"false_positive_rate={false_positive_rate:g} needs at least {needed} clean images, got {n_clean}"
            f"{f' and {n_copies} copies of them' if n_copies else ''}. Raise the rate or add images."
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


def stratified_folds(labels: IntArray, folds: int, seed: int, groups: IntArray | None = None) -> IntArray:
    """Assign every row to one of `folds` parts, each class spread evenly; shape (n,), values in [0, folds).

    Rows of one number in `groups`, shape (n,), fall into one part: that of the first of them.
    """
    if groups is not None:
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        order = np.sort(first)
        return stratified_folds(labels[order], folds, seed)[np.searchsorted(order, first)[group]]
    rng = np.random.default_rng(seed)
    part = np.empty(len(labels), dtype=np.int64)
    offset = 0
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        part[rows] = (np.arange(len(rows)) + offset) % folds
        offset += len(rows)  # so that small classes do not all fall into the first parts
    return part


@dataclass(frozen=True)
class SurpriseMap:
    """Turns the raw scores of several detectors into surprise: -log of an estimated p-value.

    Up to the 90 % quantile the map is the empirical distribution (linear between knots); beyond it a generalised Pareto
    tail. So a score far outside the clean sample is more surprising than one just outside, which ranks cannot say, and
    one strong detector can win. Only an ordering is taken from it: validity comes from the conformal rank of the
    combined score.

    All classes share the map of a detector. One per predicted class would let the attacker's class set its own bar:
    in a backdoored network clean inputs near that class are unusual too, its clean scores reach higher, and what is
    normalised by them hides the attack (docs/detection.md has the figures).

    Attributes
    ----------
    knots : ndarray of shape (n_detectors, n_knots), float64
        Scores at the quantile levels, ascending.
    levels : ndarray of shape (n_knots,), float64
        Surprise at the knots, from 0 to -log(1 - 0.9).
    scale, shape : ndarray of shape (n_detectors,), float64
        Generalised Pareto tail above the last knot.

    References
    ----------
    .. [1] Hosking, Wallis (1987), Parameter and quantile estimation for the generalized Pareto distribution.
    """

    knots: Float64Array
    levels: Float64Array
    scale: Float64Array
    shape: Float64Array

    @classmethod
    def fit(cls, scores: Float64Array) -> Self:
        """Learn from clean out-of-fold scores, shape (n, n_detectors)."""
        if len(scores) == 0:
            raise DataError("calibration needs at least one clean score, got none.")
        scores = np.clip(scores, -_HUGE, _HUGE)
        quantiles = np.linspace(0, TAIL_START, _BODY_KNOTS)
        knots = np.quantile(scores, quantiles, axis=0).T
        scale, shape = np.empty(len(knots)), np.empty(len(knots))
        for detector, (first, *_, last) in enumerate(knots):
            excess = scores[:, detector] - last
            excess = excess[(excess > 0) & (scores[:, detector] < _HUGE)]  # infinite ones have no size to learn from
            mean_excess = excess.mean() if len(excess) else max((last - first) * 0.1, 1e-9)
            shape[detector] = _pareto_shape(excess / mean_excess)
            scale[detector] = mean_excess * (1 - shape[detector])
        return cls(knots, -np.log1p(-quantiles), scale, shape)

    def surprise(self, scores: Float64Array) -> Float64Array:
        """Return surprise per row and detector, shape (n, n_detectors), float64, >= 0; higher = more suspicious."""
        if len(scores) == 1:
            return np.array([self._of_one(scores[0].tolist())])
        low, width, level, rise = self._pieces
        values = np.minimum(scores, _HUGE)
        reached: IntArray = np.add.reduce(self.knots <= values[:, :, np.newaxis], axis=2)
        reached += self._firsts
        body: Float64Array = values - low.take(reached)
        width = width.take(reached)
        np.maximum(body, 0.0, out=body)
        np.minimum(body, width, out=body)
        body /= width
        body *= rise.take(reached)
        body += level.take(reached)
        excess: Float64Array = values - self.knots[:, -1]
        np.maximum(excess, 0.0, out=excess)
        excess /= self.scale
        excess *= self._least_shape
        np.log1p(excess, out=excess)
        excess /= self._least_shape
        body += excess
        return body

    def _of_one(self, scores: list[float]) -> list[float]:
        """Return the same of a single row, number by number: quicker than so many calls on few numbers."""
        surprises = []
        for score, (knots, low, width, level, rise), scale, shape in zip(scores, *self._of_detectors, strict=True):
            value = _HUGE if score > _HUGE else score
            reached = bisect_right(knots, value)
            surprise = level[reached]
            if reached:
                beyond = value - low[reached]
                surprise += (width[reached] if beyond > width[reached] else beyond) / width[reached] * rise[reached]
            if reached == len(knots):
                surprise += math.log1p((value - knots[-1]) / scale * shape) / shape
            surprises.append(surprise)
        return surprises

    @cached_property
    def _of_detectors(self) -> tuple[list[tuple[list[float], ...]], list[float], list[float]]:
        """Knots and pieces, scale and shape of each detector, for `_of_one`."""
        pieces = zip(*(array.tolist() for array in (self.knots, *self._pieces)), strict=True)
        return list(pieces), self.scale.tolist(), self._least_shape.tolist()

    @cached_property
    def _pieces(self) -> tuple[Float64Array, Float64Array, Float64Array, Float64Array]:
        """Start and width, level and rise of the line on which a score lies that has reached so many knots."""
        n_detectors, n_knots = self.knots.shape
        left = np.clip(np.arange(-1, n_knots), 0, n_knots - 2)
        low, high = self.knots[:, left], self.knots[:, left + 1]
        shape = (n_detectors, n_knots + 1)
        level = np.broadcast_to(self.levels[left], shape).copy()
        rise = np.broadcast_to(self.levels[left + 1] - self.levels[left], shape).copy()
        return np.ascontiguousarray(low), np.maximum(high - low, 1e-300), level, rise

    @cached_property
    def _firsts(self) -> IntArray:
        n_detectors, n_knots = self.knots.shape
        return np.arange(0, n_detectors * (n_knots + 1), n_knots + 1)

    @cached_property
    def _least_shape(self) -> Float64Array:
        return np.maximum(self.shape, 1e-9)

    def arrays(self) -> dict[str, AnyArray]:
        """Return the map as arrays."""
        return {"knots": self.knots, "levels": self.levels, "scale": self.scale, "shape": self.shape}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, AnyArray]) -> Self:
        """Return the map from what `arrays` returned; DataError if that is none."""
        knots = require(arrays, "knots", (None, None), low=-_HUGE, high=_HUGE, ascending=True)
        n_detectors, n_knots = knots.shape
        if n_detectors < 1 or n_knots < 2:
            raise DataError(f"array knots must have at least 1 row and 2 columns, got shape {knots.shape}.")
        levels = require(arrays, "levels", (n_knots,), low=0.0, high=_MAX_LEVEL, ascending=True)
        if levels[0] == levels[-1]:
            raise DataError("array levels must rise from the first knot to the last, and is constant.")
        scale = require(arrays, "scale", (n_detectors,), low=_LEAST_SCALE, high=_HUGE)
        return cls(knots, levels, scale, require(arrays, "shape", (n_detectors,), low=0.0, high=_MAX_SHAPE))


def largest_surprises(n_detectors: int, n: int) -> Float64Array:
    """Return what the combined surprise of n clean inputs can be at most, ascending, shape (n,).

    At most k of n clean inputs surprise any of d detectors by more than log(d * n / k), and none is combined to more;
    twice that is allowed, as the tail is an estimate.
    """
    bounds: Float64Array = 1.0 + 2.0 * np.log(n_detectors * n / np.arange(n, 0, -1))
    return bounds


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


def fired(surprise: Float64Array, mode: str, false_positive_rate: float) -> BoolArray:
    """Return which detectors would have flagged the input by themselves.

    Parameters
    ----------
    surprise : ndarray of any shape, float64
        From `guard.detection.fusion.Fusion.surprise`.
    mode : str
        `"paper"`: a detector fires beyond its own threshold. Else surprise is -log of a p-value, and it fires where
        that p-value is at most `false_positive_rate`.
    false_positive_rate : float
        The requested one, in (0, 1).
    """
    beyond: BoolArray = surprise > 0 if mode == "paper" else surprise >= -np.log(false_positive_rate)
    return beyond
