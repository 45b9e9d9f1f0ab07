"""Squared Euclidean distances that are fast and still exact: rounding is bounded, and repaired where it could show."""

from __future__ import annotations

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
        Clean references of one class.
    """

    def __init__(self, references: FloatArray) -> None:
        self._centre: Float64Array = references.mean(axis=0, dtype=np.float64)
        scaled = references - self._centre
        radius = float(np.sqrt(np.einsum("ij,ij->i", scaled, scaled).max()))
        self._per_radius = 1.0 / radius if radius > 1e-150 else 1.0
        scaled *= self._per_radius
        self._half_norms: Float32Array = (0.5 * np.einsum("ij,ij->i", scaled, scaled)).astype(np.float32)
        self._scaled: Float32Array = scaled.astype(np.float32)
        roundings = (references.shape[1] + 16) * _HALF_EPSILON_32
        self._slack = 2.0 * roundings / (1.0 - roundings)

    def __call__(self, queries: Float64Array, n_nearest: int, own: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Return (rows, columns) of all pairs that can be among the nearest, ordered by row and then by column.

        Parameters
        ----------
        queries : ndarray of shape (m, d), float64
        n_nearest : int
            Neighbours wanted per query.
        own : ndarray of shape (m,), optional
            The column to leave out in each row, for queries that are references themselves.
        """
        scaled = (queries - self._centre) * self._per_radius
        lengths = np.sqrt(np.einsum("ij,ij->i", scaled, scaled))
        if not lengths.max() < 1e15:  # too far away for float32: every reference stays a candidate
            possible = np.ones((len(queries), len(self._scaled)), dtype=np.bool_)
        else:
            ranks = self._half_norms - self._products(scaled.astype(np.float32))  # (m, n)
            if own is not None:
                ranks[np.arange(len(own)), own] = np.inf
            limits = np.partition(ranks, n_nearest - 1, axis=1)[:, n_nearest - 1] + self._slack * (1.0 + lengths)
            possible = ranks <= limits.astype(np.float32)[:, np.newaxis]
        if own is not None:
            possible[np.arange(len(own)), own] = False
        rows, columns = np.nonzero(possible)
        return rows, columns

    def _products(self, scaled: Float32Array) -> Float32Array:
        products: Float32Array
        if len(scaled) < FEW_QUERIES:
            products = np.matmul(self._scaled, scaled[:, :, np.newaxis])[:, :, 0]
        else:
            products = scaled @ self._scaled.T
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
        self._trusted = (references.shape[1] + 4) * _HALF_EPSILON_64 / SQUARED_ERROR

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


def _centre_on_grid(references: FloatArray) -> Float64Array:
    """Return the mean rounded to a power of two about as coarse as the spread.

    Whole numbers less such a centre are still whole numbers, so their distances and ties stay exact.
    """
    mean: Float64Array = references.mean(axis=0, dtype=np.float64)
    spread = float(np.sqrt(np.mean(np.square(references - mean))))
    grid = 2.0 ** np.ceil(np.log2(spread)) if spread > 0.0 else 1.0
    return np.round(mean / grid) * grid
