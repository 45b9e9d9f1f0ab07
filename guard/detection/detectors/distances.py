"""Squared Euclidean distances that are fast and still exact: rounding is bounded, and repaired where it could show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from guard.types import Float32Array, Float64Array, FloatArray, IntArray

#: float64 numbers per temporary array: 256 KiB, so that three of them stay in the cache of one core.
CACHED_NUMBERS = 1 << 15
#: Up to this many columns, differences are as fast as a matrix product and need no repair.
FEW_COLUMNS = 16
#: Largest relative error of a squared distance that the matrix product may leave.
SQUARED_ERROR = 1e-10

#: Below this many, one matrix-vector product each beats a matrix product, for which BLAS rearranges its operands.
FEW_QUERIES = 8

#: Longer queries, in radii, have no square in float32.
_TOO_LONG = 1e15
_LARGEST_32 = float(np.finfo(np.float32).max)
_HALF_EPSILON_32 = float(np.finfo(np.float32).eps) / 2
_HALF_EPSILON_64 = float(np.finfo(np.float64).eps) / 2


def pair_distances(queries: Float64Array, rows: IntArray, references: FloatArray, columns: IntArray) -> Float64Array:
    """Return |queries[rows[i]] - references[columns[i]]|^2 for each i, by differences in float64, shape (n_pairs,)."""
    squared = np.empty(len(rows))
    step = max(1, CACHED_NUMBERS // max(1, queries.shape[1]))
    for start in range(0, len(rows), step):
        pairs = slice(start, start + step)
        chosen = queries if len(queries) == 1 else queries[rows[pairs]]
        difference = references[columns[pairs]] - chosen  # (n_pairs, d)
        np.einsum("ij,ij->i", difference, difference, out=squared[pairs])
    return squared


class PairDistances:
    """Squared distances of chosen pairs, in float64: the serving hot path.

    By |x|^2 - 2 x.y + |y|^2; where that cancels, so that the error could exceed `SQUARED_ERROR`, and in few columns, by
    differences.

    Parameters
    ----------
    references : ndarray of shape (n, d)
    """

    def __init__(self, references: FloatArray) -> None:
        self._references = references
        self._few_columns = references.shape[1] <= FEW_COLUMNS
        self._norms: Float64Array = np.einsum("ij,ij->i", references, references, dtype=np.float64)
        self._largest_norm = float(self._norms.max(initial=0.0))
        self._trusted = _trusted_share(references.shape[1])

    def __call__(self, queries: Float64Array, rows: IntArray, columns: IntArray) -> Float64Array:
        """Return |queries[rows[i]] - references[columns[i]]|^2 for each i, shape (n_pairs,); rows must ascend."""
        if self._few_columns:
            return pair_distances(queries, rows, self._references, columns)
        norms = np.einsum("ij,ij->i", queries, queries)
        squared = np.empty(len(columns))
        bounds = [0, *rows.searchsorted(np.arange(1, len(queries))).tolist(), len(columns)]
        for query, (first, last) in zip(queries, pairwise(bounds), strict=True):
            chosen = self._references.take(columns[first:last], axis=0).astype(np.float64, copy=False)
            chosen.dot(query, out=squared[first:last])
        squared *= -2.0
        squared += self._norms[columns]
        norms = norms[rows]
        squared += norms
        doubtful = squared < self._trusted * (self._largest_norm + norms)
        if doubtful.any():
            squared[doubtful] = pair_distances(queries, rows[doubtful], self._references, columns[doubtful])
        return squared

    def of_one(self, query: Float64Array, columns: IntArray) -> Float64Array:
        """Return the same for a single query of shape (d,): fewer calls, for a lone request."""
        if self._few_columns:
            return pair_distances(query[np.newaxis], columns, self._references, columns)  # one query: rows are not read
        chosen = self._references.take(columns, axis=0).astype(np.float64, copy=False)
        norm = float(query.dot(query))
        squared: Float64Array = chosen.dot(query)
        squared *= -2.0
        squared += self._norms[columns]
        squared += norm
        doubtful = squared < self._trusted * (self._largest_norm + norm)
        if doubtful.any():
            again = columns[doubtful]
            squared[doubtful] = pair_distances(query[np.newaxis], again, self._references, again)  # as above
        return squared


class Preselector:
    """Finds the few references that can be among the nearest, by one product in float32.

    References are centred and divided by their largest distance to the centre, so every length is in radii. With
    x the query, y a reference and u the unit roundoff of float32, h(y) = |y|^2 / 2 - x.y grows with the distance and
    is computed with an error of at most E = (d + 16) u (1 + |x|) / (1 - (d + 16) u) whatever the order of summation
    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). So every one of the k nearest has a computed
    h of at most the k-th smallest computed h plus 2 E; what lies beyond needs no exact distance.

    Parameters
    ----------
    references : ndarray of shape (n, d)
        Clean references, of one class or of several, all of a class together.
    spans : sequence of (first, last), optional
        Where each class stands; default is one class.
    """

    def __init__(self, references: FloatArray, spans: Sequence[tuple[int, int]] | None = None) -> None:
        n_references, n_columns = references.shape
        self._spans = [(0, n_references)] if spans is None else list(spans)
        self._centres: Float64Array = np.empty((len(self._spans), n_columns))
        self._per_radius: Float64Array = np.ones((len(self._spans), 1))
        self._half_norms: Float32Array = np.empty(n_references, dtype=np.float32)
        self._scaled: Float32Array = np.empty((n_references, n_columns), dtype=np.float32)
        for place, (first, last) in enumerate(self._spans):
            span = slice(first, last)
            self._centres[place] = references[span].mean(axis=0, dtype=np.float64)
            scaled = references[span] - self._centres[place]
            radius = float(np.sqrt(np.einsum("ij,ij->i", scaled, scaled).max()))
            if radius > 1e-150:
                self._per_radius[place] = 1.0 / radius
                scaled *= self._per_radius[place]
            self._half_norms[span] = 0.5 * np.einsum("ij,ij->i", scaled, scaled)
            self._scaled[span] = scaled
        roundings = (n_columns + 16) * _HALF_EPSILON_32
        self._slack = 2.0 * roundings / (1.0 - roundings)

    def __call__(
        self, queries: Float64Array, n_nearest: int, left_out: IntArray | None = None, places: IntArray | None = None
    ) -> tuple[IntArray, IntArray]:
        """Return (rows, columns) of all pairs that can be among the nearest, ordered by row and then by column.

        Parameters
        ----------
        queries : ndarray of shape (m, d), float64
        n_nearest : int
            Neighbours wanted per query, fewer than there are.
        left_out : ndarray of shape (m,), optional
            The column to leave out in each row, for queries that are references themselves.
        places : ndarray of shape (m,), optional
            Which of the spans each query is compared with, and columns are counted from; default is the first.
        """
        at = np.zeros(1, dtype=np.int64) if places is None else places
        scaled = queries - self._centres[at]
        scaled *= self._per_radius[at]
        lengths = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
        if not lengths.max(initial=0.0) < _TOO_LONG:  # for float32: every reference stays a candidate
            is_far = ~(lengths < _TOO_LONG)
            scaled[is_far], lengths[is_far] = 0.0, _LARGEST_32
        ranks = self._ranks(scaled.astype(np.float32), places)  # (m, most references of a class)
        if left_out is not None:
            ranks[np.arange(len(left_out)), left_out] = np.inf
        limits = np.partition(ranks, n_nearest - 1, axis=1)[:, n_nearest - 1] + self._slack * (1.0 + lengths)
        rows, columns = np.nonzero(ranks <= limits.astype(np.float32)[:, np.newaxis])
        return rows, columns

    def of_one(self, query: Float64Array, n_nearest: int, place: int) -> IntArray:
        """Return the same columns, ascending, for a single query of shape (d,): fewer calls, for a lone request."""
        scaled = query - self._centres[place]
        scaled *= self._per_radius[place]
        length = math.sqrt(scaled.dot(scaled))
        first, last = self._spans[place]
        if not length < _TOO_LONG:
            return np.arange(last - first)
        ranks = self._half_norms[first:last] - self._scaled[first:last].dot(scaled.astype(np.float32))  # (n,)
        ordered = ranks.copy()
        ordered.partition(n_nearest - 1)
        limit = ordered.item(n_nearest - 1) + self._slack * (1.0 + length)
        possible: IntArray = (ranks <= limit).nonzero()[0]
        return possible

    def _ranks(self, scaled: Float32Array, places: IntArray | None) -> Float32Array:
        """Return h for every query, shape (m, most references of a class); infinite where a class has no more."""
        if places is None:
            first, last = self._spans[0]
            return self._half_norms[first:last] - _products(scaled, self._scaled[first:last])
        spans = [self._spans[place] for place in places.tolist()]
        ranks = np.full((len(scaled), max(last - first for first, last in spans)), np.inf, dtype=np.float32)
        for query, row, (first, last) in zip(scaled, ranks, spans, strict=True):
            np.subtract(self._half_norms[first:last], self._scaled[first:last].dot(query), out=row[: last - first])
        return ranks


def _products(queries: Float32Array, references: Float32Array) -> Float32Array:
    if len(queries) >= FEW_QUERIES:
        return queries @ references.T
    products: Float32Array = np.matmul(references, queries[:, :, np.newaxis])[:, :, 0]
    return products


class AllDistances:
    """Squared distances to every reference at once, in float64.

    In few dimensions by differences. In many by |x|^2 - 2 x.y + |y|^2 on centred data, which cancels where x and y
    nearly coincide: wherever the error could exceed `SQUARED_ERROR`, the distance is computed again by differences.

    Parameters
    ----------
    references : ndarray of shape (n, d)
    """

    def __init__(self, references: FloatArray) -> None:
        self._references = references
        self._few_columns = references.shape[1] <= FEW_COLUMNS
        if self._few_columns:
            self._columns: Float64Array = np.ascontiguousarray(
                references.T, dtype=np.float64
            )  # (d, n): sums run along n
        else:
            self._centre = _centre_on_grid(references)
            self._centred: Float64Array = references - self._centre
            self._norms: Float64Array = np.einsum("ij,ij->i", self._centred, self._centred)
        self._trusted = _trusted_share(references.shape[1])

    def __call__(self, queries: Float64Array) -> Float64Array:
        """Return squared distances of shape (m, n) for queries of shape (m, d), float64."""
        if self._few_columns:
            return self._by_differences(queries)
        centred = queries - self._centre
        norms = np.einsum("ij,ij->i", centred, centred)
        size = self._norms + norms[:, np.newaxis]  # (m, n)
        squared = (-2.0 * centred) @ self._centred.T
        squared += size
        size *= self._trusted
        cancelled = squared < size
        if cancelled.any():
            rows, columns = np.nonzero(cancelled)
            squared[rows, columns] = pair_distances(queries, rows, self._references, columns)
        return squared

    def _by_differences(self, queries: Float64Array) -> Float64Array:
        squared = np.empty((len(queries), len(self._references)))
        step = max(1, CACHED_NUMBERS // self._columns.size)
        for start in range(0, len(queries), step):
            rows = slice(start, start + step)
            difference = queries[rows, :, np.newaxis] - self._columns  # (m, d, n)
            np.einsum("ijk,ijk->ik", difference, difference, out=squared[rows])
        return squared


def _trusted_share(n_columns: int) -> float:
    """Return the share of |x|^2 + |y|^2 from which |x|^2 - 2 x.y + |y|^2 has a relative error of `SQUARED_ERROR`."""
    return (n_columns + 4) * _HALF_EPSILON_64 / SQUARED_ERROR


def _centre_on_grid(references: FloatArray) -> Float64Array:
    """Return the mean rounded to a power of two about as coarse as the spread.

    Whole numbers less such a centre are still whole numbers, so their distances and ties stay exact.
    """
    mean: Float64Array = references.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(np.mean(np.square(references - mean))))
    grid = 2.0 ** np.ceil(np.log2(spread)) if spread > 0.0 else 1.0
    return np.round(mean / grid) * grid
