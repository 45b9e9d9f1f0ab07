"""Local outlier factors and relative distances of all depths at once: the serving hot path.

What detectors of one depth each do one after the other is done here in blocks of shape (n_depths, ...). Scores equal
theirs but for rounding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from guard.detection.detectors.local_outlier_factor import DENSITY_FLOOR, ClassReferences
from guard.detection.detectors.relative_distance import LEAST_SQUARED, RelativeDistance
from guard.types import BoolArray, Float32Array, Float64Array, IntArray

#: Ranks held at once: 256 KiB of float32, so that they stay in the cache of one core.
_HELD_RANKS = 1 << 16
#: Longer queries, in radii, have no square in float32.
_TOO_LONG = 1e15
_HALF_EPSILON_32 = float(np.finfo(np.float32).eps) / 2


class StackedReferences:
    """References of all depths for `PerClassLof` with `compare="predicted"`.

    One product in float32 ranks all references of the predicted class at every depth, with the error bound of
    `Preselector`. Where the bound leaves as many candidates as neighbours are wanted, these are the nearest, and their
    distances are computed in float64. All other rows, about one in a hundred, are left to
    `ClassReferences.factors_of_class`.

    Parameters
    ----------
    references : sequence of ClassReferences
        One per depth, of the same images: labels, classes and neighbours are those of the first.
    n_columns : int
        Columns of the queries; references of fewer get zeros.
    """

    def __init__(self, references: Sequence[ClassReferences], n_columns: int) -> None:
        labels, n_classes = references[0].labels, references[0].n_classes
        n_depths, n = len(references), len(labels)
        self._references = tuple(references)
        self._sizes: IntArray = np.bincount(labels, minlength=n_classes)
        self._n_nearest: IntArray = np.minimum(references[0].n_neighbors, self._sizes - 1)
        self._starts: IntArray = np.zeros(n_classes, dtype=np.int64)
        vectors = np.zeros((n_depths, n, n_columns), dtype=np.float32)
        for block, one in zip(vectors, references, strict=True):
            block[:, : one.vectors.shape[1]] = one.vectors
        self._vectors = vectors.reshape(-1, n_columns)
        self._firsts = np.arange(0, n_depths * n, n)[:, np.newaxis]  # of each depth among all vectors
        self._k_distances = np.concatenate([one.k_distances for one in references])
        self._densities = np.concatenate([one.densities for one in references])
        self._centres: Float64Array = np.zeros((n_depths, n_classes, n_columns))
        self._per_radius: Float64Array = np.ones((n_depths, n_classes, 1))
        # Each (n_depths, n_columns + 1, size of the class): negative columns, below them half of the squared lengths.
        self._blocks: list[Float32Array] = [np.empty((n_depths, n_columns + 1, 0), np.float32)] * n_classes
        edges = np.flatnonzero(np.diff(labels)) + 1
        for first, last in pairwise([0, *edges.tolist(), n]):
            label = int(labels[first])
            self._starts[label] = first
            centres = vectors[:, first:last].mean(axis=1, dtype=np.float64)  # (n_depths, n_columns)
            scaled = vectors[:, first:last] - centres[:, np.newaxis]
            radii = np.sqrt(np.einsum("ijk,ijk->ij", scaled, scaled).max(axis=1))
            per_radius = np.where(radii > 1e-150, 1.0 / np.maximum(radii, 1e-150), 1.0)[:, np.newaxis]
            scaled *= per_radius[:, np.newaxis]
            half_norms = 0.5 * np.einsum("ijk,ijk->ij", scaled, scaled)
            self._centres[:, label], self._per_radius[:, label] = centres, per_radius
            self._blocks[label] = np.concatenate(
                [-scaled.transpose(0, 2, 1), half_norms[:, np.newaxis]], axis=1, dtype=np.float32, casting="same_kind"
            )
        roundings = (n_columns + 17) * _HALF_EPSILON_32
        self._slack = 2.0 * roundings / (1.0 - roundings)

    def factors(self, queries: Float32Array, classes: IntArray) -> Float64Array:
        """Return the local outlier factor of each query against one class of its own, at every depth.

        Parameters
        ----------
        queries : ndarray of shape (n_depths, m, n_columns), float32
        classes : ndarray of shape (m,)

        Returns
        -------
        factors : ndarray of shape (n_depths, m), float64
            Infinite for a class without references.
        """
        if len(classes) == 1:
            label = int(classes[0])
            if self._sizes[label]:
                return self._factors(queries, classes, [(label, 0, 1)], int(self._n_nearest[label]))
            return np.full((len(queries), 1), np.inf)
        factors = np.full((len(queries), len(classes)), np.inf)
        for rows, runs, n_nearest in self._portions(classes):
            factors[:, rows] = self._factors(queries[:, rows], classes[rows], runs, n_nearest)
        return factors

    def _portions(self, classes: IntArray) -> Iterator[tuple[IntArray, list[tuple[int, int, int]], int]]:
        """Yield rows, their runs of one class as (class, first, last), and how many neighbours all of them have."""
        n_nearest = self._n_nearest[classes]
        order = np.lexsort((classes, n_nearest))
        order = order[self._sizes[classes[order]] > 0]
        edges = np.flatnonzero(np.diff(n_nearest[order])) + 1
        for same in np.split(order, edges):
            largest = int(self._sizes[classes[same]].max(initial=1))
            step = max(1, _HELD_RANKS // (largest * len(self._references)))
            for start in range(0, len(same), step):
                rows = same[start : start + step]
                labels = classes[rows].tolist()
                bounds = [0, *(place for place in range(1, len(labels)) if labels[place] != labels[place - 1])]
                runs = [(labels[first], first, last) for first, last in pairwise([*bounds, len(labels)])]
                yield rows, runs, int(n_nearest[rows[0]])

    def _factors(
        self, queries: Float32Array, classes: IntArray, runs: list[tuple[int, int, int]], n_nearest: int
    ) -> Float64Array:
        """Return factors of rows in runs of one class, (n_depths, m)."""
        n_depths, m, n_columns = queries.shape
        exact = queries.astype(np.float64)
        scaled = exact - self._centres.take(classes, axis=1)
        scaled *= self._per_radius.take(classes, axis=1)
        lengths = np.sqrt(np.einsum("ijk,ijk->ij", scaled, scaled))  # (n_depths, m)
        if not lengths.max() < _TOO_LONG:
            return self._factors_one_by_one(queries, classes)
        extended = np.empty((n_depths, m, n_columns + 1), dtype=np.float32)
        extended[:, :, :-1] = scaled
        extended[:, :, -1] = 1.0
        if len(runs) == 1:
            ranks: Float32Array = np.matmul(extended, self._blocks[runs[0][0]])
        else:
            width = max(self._blocks[label].shape[2] for label, _, _ in runs)
            ranks = np.full((n_depths, m, width), np.inf, dtype=np.float32)
            for label, first, last in runs:
                block = self._blocks[label]
                np.matmul(extended[:, first:last], block, out=ranks[:, first:last, : block.shape[2]])
        ordered = ranks.copy()
        ordered.partition(n_nearest - 1)
        lengths += 1.0
        lengths *= self._slack
        lengths += ordered[:, :, n_nearest - 1]
        is_near = ranks <= lengths.astype(np.float32)[:, :, np.newaxis]
        starts = self._starts[classes]
        if np.count_nonzero(is_near) == n_depths * m * n_nearest:
            return self._factors_of_nearest(exact, starts, is_near, n_nearest)
        clear = (np.count_nonzero(is_near, axis=2) == n_nearest).all(axis=0)
        factors = np.empty((n_depths, m))
        factors[:, clear] = self._factors_of_nearest(exact[:, clear], starts[clear], is_near[:, clear], n_nearest)
        factors[:, ~clear] = self._factors_one_by_one(queries[:, ~clear], classes[~clear])
        return factors

    def _factors_of_nearest(
        self, queries: Float64Array, starts: IntArray, is_near: BoolArray, n_nearest: int
    ) -> Float64Array:
        """Return factors (n_depths, m) from which references from `starts` on are the nearest, (n_depths, m, width)."""
        n_depths, m, width = is_near.shape
        shifts = self._firsts + starts - np.arange(0, is_near.size, width).reshape(n_depths, m)
        places = is_near.ravel().nonzero()[0].reshape(n_depths, m, n_nearest)
        places += shifts[:, :, np.newaxis]
        difference = self._vectors.take(places, axis=0) - queries[:, :, np.newaxis]  # (n_depths, m, n_nearest, columns)
        reach = np.sqrt(np.einsum("ijkl,ijkl->ijk", difference, difference))
        np.maximum(reach, self._k_distances.take(places), out=reach)
        factors: Float64Array = np.add.reduce(reach, axis=2)
        factors /= n_nearest
        factors += DENSITY_FLOOR
        factors *= np.add.reduce(self._densities.take(places), axis=2)
        factors /= n_nearest
        return factors

    def _factors_one_by_one(self, queries: Float32Array, classes: IntArray) -> Float64Array:
        return np.stack(
            [
                one.factors_of_class(rows[:, : one.vectors.shape[1]], classes)
                for one, rows in zip(self._references, queries, strict=True)
            ]
        )


class StackedMeans:
    """Class means of all depths for `RelativeDistance`.

    Parameters
    ----------
    detectors : sequence of RelativeDistance
        One per depth, fitted; the classes that had images are those of the first.
    n_columns : int
        Columns of the queries; means of fewer get zeros.
    """

    def __init__(self, detectors: Sequence[RelativeDistance], n_columns: int) -> None:
        n_depths, n_present = len(detectors), len(detectors[0].means_)
        self._centres: Float64Array = np.zeros((n_depths, 1, n_columns))
        self._minus_twice: Float64Array = np.zeros((n_depths, n_columns, n_present + 1))
        self._norms: Float64Array = np.full((n_depths, 1, n_present + 1), np.inf)  # of the classes without a mean, too
        for place, one in enumerate(detectors):
            width = len(one.centre_)
            self._centres[place, 0, :width] = one.centre_
            self._minus_twice[place, :width, :-1] = -2.0 * one.centred_.T
            self._norms[place, 0, :-1] = one.norms_
        places = detectors[0].places_
        self._places: IntArray = np.where(places >= 0, places, n_present)

    def scores(self, queries: Float32Array, classes: IntArray) -> Float64Array:
        """Return `RelativeDistance.score` of queries (n_depths, m, n_columns) at every depth, (n_depths, m)."""
        centred = queries - self._centres
        squared = np.matmul(centred, self._minus_twice)  # less the squared length of the query
        squared += self._norms
        n_depths, m, n_means = squared.shape
        own = np.arange(0, squared.size, n_means).reshape(n_depths, m) + self._places.take(classes)
        flat = squared.reshape(-1)
        nearest = np.empty((2, n_depths, m))  # the mean of the predicted class, and the nearest other one
        nearest[0] = flat.take(own)
        flat[own] = np.inf
        np.minimum.reduce(squared, axis=2, out=nearest[1])
        nearest += np.einsum("ijk,ijk->ij", centred, centred)
        np.maximum(nearest, LEAST_SQUARED, out=nearest)
        np.log(nearest, out=nearest)
        scores: Float64Array = nearest[0] - nearest[1]
        scores *= 0.5
        return scores
