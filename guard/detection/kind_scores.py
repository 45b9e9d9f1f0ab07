"""One score per kind of detector, from the detectors of that kind that look at several depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from guard.arrays import require
from guard.detection.detectors.base import Kind
from guard.types import AnyArray, BoolArray, Float64Array, IntArray

#: Share of the mean variance that every direction of a covariance over depths gets.
_SHRINKAGE = 0.1
_LEAST_VARIANCE = 1e-6
_LARGEST = 1e9  # entry of a stored matrix


@dataclass(frozen=True, slots=True, eq=False)
class KindScores:
    """Makes one score of the normal scores z of each kind's detectors, one detector per depth.

    A kind whose depths are averaged scores the mean of softplus(z) = log(1 + exp(z)): a depth below its median says
    next to nothing. A kind whose depths are compared scores the Mahalanobis distance of its z from those of clean
    inputs: where a clean input is unusual at one depth it is at all of them, and a pattern blended into an image is
    unusual at the first ones only.

    Attributes
    ----------
    kinds : ndarray of shape (n_detectors,), int64
        Number of the kind of each detector, in [0, n_kinds).
    is_contradiction : ndarray of shape (n_kinds,), bool
        Kinds that contradict the suspect's answer; the others see what is novel.
    centre : ndarray of shape (n_detectors,), float64
        Mean z of clean inputs.
    whiten : ndarray of shape (n_detectors, n_detectors), float64
        Makes the z of each compared kind uncorrelated, of unit variance; zero elsewhere.
    """

    kinds: IntArray
    is_contradiction: BoolArray
    centre: Float64Array
    whiten: Float64Array

    @classmethod
    def fit(cls, z: Float64Array, kinds: Sequence[Kind]) -> Self:
        """Learn from z of clean inputs, shape (n, n_detectors), finite, and the kind of each detector."""
        known = list(dict.fromkeys(kinds))
        numbers = np.array([known.index(kind) for kind in kinds], dtype=np.int64)
        centre, whiten = z.mean(axis=0), np.zeros((len(kinds), len(kinds)))
        for number, kind in enumerate(known):
            if kind.over_depths != "compared":
                continue
            of_kind = np.flatnonzero(numbers == number)
            from_centre = z[:, of_kind] - centre[of_kind]
            covariance = from_centre.T @ from_centre / len(z)
            prior = max(float(covariance.trace()) / len(of_kind), _LEAST_VARIANCE)
            values, vectors = np.linalg.eigh((1 - _SHRINKAGE) * covariance + _SHRINKAGE * prior * np.eye(len(of_kind)))
            whiten[np.ix_(of_kind, of_kind)] = vectors / np.sqrt(values)
        return cls(numbers, np.array([kind.shows == "contradiction" for kind in known]), centre, whiten)

    def __call__(self, z: Float64Array) -> Float64Array:
        """Return one score per row and kind, shape (n, n_kinds), float64, >= 0; higher = more suspicious."""
        is_of_kind = self.kinds[:, np.newaxis] == np.arange(len(self.is_contradiction))
        is_averaged = ~self.whiten.any(axis=1, keepdims=True)
        averaged = is_of_kind * is_averaged / is_of_kind.sum(axis=0)
        distances = np.square((z - self.centre) @ self.whiten) @ is_of_kind
        scores: Float64Array = np.logaddexp(0.0, z) @ averaged + np.sqrt(distances)
        return scores

    def arrays(self) -> dict[str, AnyArray]:
        """Return everything that was learned, as arrays."""
        return {
            "kinds": self.kinds,
            "is_contradiction": self.is_contradiction.astype(np.int64),
            "centre": self.centre,
            "whiten": self.whiten,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, AnyArray], n_detectors: int) -> Self:
        """Return them from what `arrays` returned; DataError if these are none."""
        contradicts = require(arrays, "is_contradiction", (None,), kind="i", low=0, high=1)
        kinds = require(arrays, "kinds", (n_detectors,), kind="i", low=0, high=len(contradicts) - 1)
        centre = require(arrays, "centre", (n_detectors,), low=-_LARGEST, high=_LARGEST)
        whiten = require(arrays, "whiten", (n_detectors, n_detectors), low=-_LARGEST, high=_LARGEST)
        return cls(kinds, contradicts == 1, centre, whiten)
