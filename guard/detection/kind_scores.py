"""One score per kind of detector, from the detectors of that kind that look at several depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Self, get_args

import numpy as np

from guard.arrays import require
from guard.detection.detectors.base import Kind, Shows
from guard.errors import DataError
from guard.types import AnyArray, BoolArray, Float64Array, IntArray

#: What detectors may say, in the order of the stored numbers.
SHOWS: tuple[Shows, ...] = get_args(Shows)
#: Share of the mean variance that every direction of a covariance over depths gets.
_SHRINKAGE = 0.1
_LEAST_VARIANCE = 1e-6
_LARGEST = 1e9  # entry of a stored matrix


@dataclass(frozen=True, eq=False)
class KindScores:
    """Makes one score of those of each kind's detectors, of which there is one per depth.

    A kind whose depths are averaged scores their mean. A kind whose depths are compared scores the Mahalanobis distance
    of its scores from those of clean inputs: where a clean input is unusual at one depth it is at all of them, and a
    pattern blended into an image is unusual at the first ones only.

    Attributes
    ----------
    kinds : ndarray of shape (n_detectors,), int64
        Number of the kind of each detector, in [0, n_kinds).
    shows : ndarray of shape (n_kinds,), int64
        What a high score of each kind says, as a place in `SHOWS`.
    centre : ndarray of shape (n_detectors,), float64
        Mean scores of clean inputs.
    whiten : ndarray of shape (n_detectors, n_detectors), float64
        Makes the scores of each compared kind uncorrelated, of unit variance; zero elsewhere.
    """

    kinds: IntArray
    shows: IntArray
    centre: Float64Array
    whiten: Float64Array

    @classmethod
    def fit(cls, scores: Float64Array, kinds: Sequence[Kind]) -> Self:
        """Learn from scores of clean inputs, shape (n, n_detectors), finite, and the kind of each detector."""
        known, numbers, shows = _numbered(kinds)
        centre, whiten = scores.mean(axis=0), np.zeros((len(kinds), len(kinds)))
        for number, kind in enumerate(known):
            if kind.over_depths != "compared":
                continue
            of_kind = np.flatnonzero(numbers == number)
            from_centre = scores[:, of_kind] - centre[of_kind]
            covariance = from_centre.T @ from_centre / len(scores)
            prior = max(float(covariance.trace()) / len(of_kind), _LEAST_VARIANCE)
            values, vectors = np.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * prior * np.eye(len(of_kind)))
            whiten[np.ix_(of_kind, of_kind)] = vectors / np.sqrt(values)
        return cls(numbers, shows, centre, whiten)

    def are_of(self, kinds: Sequence[Kind]) -> bool:
        """Return whether this was learned from detectors of these kinds."""
        known, numbers, shows = _numbered(kinds)
        is_compared = np.array([kind.over_depths == "compared" for kind in known])[numbers]
        found = (self.kinds, self.shows, self.whiten.any(axis=1))
        return all(map(np.array_equal, found, (numbers, shows, is_compared)))

    def __call__(self, scores: Float64Array) -> Float64Array:
        """Return one score per row and kind, shape (n, n_kinds), float64, >= 0; higher = more suspicious."""
        averaged, is_of_kind = self._sums
        from_centre = (scores - self.centre).dot(self.whiten)
        distances = np.square(from_centre, out=from_centre).dot(is_of_kind)
        of_kinds: Float64Array = scores.dot(averaged)
        of_kinds += np.sqrt(distances, out=distances)
        return of_kinds

    @cached_property
    def _sums(self) -> tuple[Float64Array, Float64Array]:
        """Matrices (n_detectors, n_kinds) that make means of averaged kinds, and sums over the detectors of a kind."""
        is_averaged = ~self.whiten.any(axis=1, keepdims=True)
        averaged = self.is_of_kind * is_averaged / self.is_of_kind.sum(axis=0)
        return averaged, self.is_of_kind.astype(np.float64)

    def any_of_kind(self, is_so: BoolArray) -> BoolArray:
        """Return what holds for any detector of a kind, shape (n, n_kinds), of what holds for detectors."""
        return np.asarray(is_so @ self.is_of_kind, dtype=np.bool_)

    @cached_property
    def is_of_kind(self) -> BoolArray:
        """Whether a detector is of a kind, shape (n_detectors, n_kinds)."""
        return np.asarray(self.kinds[:, np.newaxis] == np.arange(len(self.shows)), dtype=np.bool_)

    @cached_property
    def is_resemblance(self) -> BoolArray:
        """Which kinds see what resembles anomalies of the traffic, shape (n_kinds,)."""
        return np.asarray(self.shows == SHOWS.index("resemblance"), dtype=np.bool_)

    @cached_property
    def has_resemblance(self) -> bool:
        """Whether any kind does."""
        return bool(self.is_resemblance.any())

    @cached_property
    def weights(self) -> Float64Array:
        """Weight of each kind in a mean over what they show, and there over their detectors; shape (n_kinds,).

        Zero for a kind that sees resemblance: what no anomaly has shown yet must not look better for it.
        """
        counts = np.where(self.is_resemblance, 0, np.bincount(self.kinds))
        of_shows = np.bincount(self.shows, counts, minlength=len(SHOWS))
        shares = counts / np.maximum(of_shows[self.shows], 1)
        return np.asarray(shares / np.count_nonzero(of_shows), dtype=np.float64)

    def arrays(self) -> dict[str, AnyArray]:
        """Return everything that was learned, as arrays."""
        return {
            "kinds": self.kinds,
            "shows": self.shows,
            "centre": self.centre,
            "whiten": self.whiten,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, AnyArray], n_detectors: int) -> Self:
        """Return them from what `arrays` returned; DataError if these are none."""
        shows = require(arrays, "shows", (None,), kind="i", low=0, high=len(SHOWS) - 1)
        kinds = require(arrays, "kinds", (n_detectors,), kind="i", low=0, high=len(shows) - 1)
        centre = require(arrays, "centre", (n_detectors,), low=-_LARGEST, high=_LARGEST)
        whiten = require(arrays, "whiten", (n_detectors, n_detectors), low=-_LARGEST, high=_LARGEST)
        if len(np.unique(kinds)) < len(shows):
            raise DataError("array kinds must name a detector of every kind in array shows.")
        is_compared = np.isin(kinds, kinds[whiten.any(axis=1)])
        joined = np.stack([whiten.any(axis=0), whiten.any(axis=1)])
        if whiten[kinds[:, np.newaxis] != kinds].any() or (joined != is_compared).any():
            raise DataError("array whiten must join all detectors of a kind, or none, and never two kinds.")
        return cls(kinds, shows, centre, whiten)


def _numbered(kinds: Sequence[Kind]) -> tuple[list[Kind], IntArray, IntArray]:
    """Return the different kinds in order, the number of the kind of each detector, and what each kind shows."""
    known = list(dict.fromkeys(kinds))
    numbers = np.array([known.index(kind) for kind in kinds], dtype=np.int64)
    return known, numbers, np.array([SHOWS.index(kind.shows) for kind in known], dtype=np.int64)
