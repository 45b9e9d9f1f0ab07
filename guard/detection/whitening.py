"""A space of few dimensions in which the clean images of one class form a round cloud of unit spread."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import numpy as np

from guard.arrays import require
from guard.detection.detectors.base import check_columns
from guard.errors import DataError
from guard.types import FEATURES, AnyArray, Float32Array, Float64Array, FloatArray, IntArray

#: Principal components that are looked at, and images that each of them takes; all else is one number, the last column.
_COMPONENTS, _IMAGES_EACH = 128, 4
#: Leading directions, those that tell classes apart; half of all where that is less.
RANK = 16
#: Share of the mean variance within classes that every direction gets, so that no direction counts without bound.
_SHRINKAGE = 0.1
_LEAST_SCALE = 1e-30
_FARTHEST = np.float32(1e15)  # in standard deviations; what is longer has no square in float32
_HELD_ROWS = 256  # in double precision
_WHITENED_ROWS = 1024  # at once
_ITERATIONS = 4  # of the subspace
_EXTRA = 8  # columns more than wanted while iterating


@dataclass(frozen=True, slots=True, eq=False)
class WhitenedSpace:
    """Features of one depth, whitened by how much they vary within classes, and ordered by how much between them.

    Features are standardised and projected on their principal components: 128 at most, and one for each four images, as
    fewer tell no covariance. There the covariance within classes, shrunk towards its mean by a tenth, is made the
    identity, and the directions are turned so that the first ones spread most over all images: Fisher's linear
    discriminants [1]_. The 16 leading directions tell classes apart; the trailing ones hardly do. What the components
    leave out is the last trailing column: its length, in units of the mean spread within classes there. So the squared
    length of a whole row is (nearly) a squared Mahalanobis distance.

    Attributes
    ----------
    mean, scale : ndarray of shape (d,), float32
        Standardise the features; a feature that does not vary has the mean scale of those that do.
    components : ndarray of shape (d, m), float64
        Orthonormal. In double precision, so that equal images have equal rows wherever they stand in a batch.
    rotation : ndarray of shape (m, m), float64
        From components to whitened directions.
    rest : ndarray of shape (1,), float32
        Standard deviation within classes outside the components, of each standardised feature; > 0.

    References
    ----------
    .. [1] Fisher (1936), The use of multiple measurements in taxonomic problems; Rao (1948) for several classes.
       Subspace iteration: Halko, Martinsson, Tropp (2011), Finding structure with randomness, algorithm 4.4.
    """

    mean: Float32Array
    scale: Float32Array
    components: Float64Array
    rotation: Float64Array
    rest: Float32Array

    @classmethod
    def fit(cls, features: FloatArray, labels: IntArray) -> Self:
        """Learn from clean features of shape (n, d) and their true labels of shape (n,), >= 0.

        Raises
        ------
        DataError
            If a value is not finite.
        """
        rows = features.astype(np.float32, copy=False)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = rows.mean(axis=0, dtype=np.float64)
            spread = _standard_deviations(rows, mean)
        if not np.isfinite(spread).all():
            raise DataError("features must be finite: a NaN or an infinity was found.")
        varies = spread > 1e-6 * spread.max(initial=0.0)
        scale = np.where(varies, spread, spread[varies].mean() if varies.any() else 1.0)
        mean, scale = mean.astype(np.float32), np.maximum(scale, _LEAST_SCALE).astype(np.float32)
        standard = rows - mean
        standard /= scale
        principal = _principal_components(standard)
        d, m = principal.shape
        inner = (standard @ principal).astype(np.float64)
        of_class, counts = _class_means(standard, labels)[1:]
        # Of all d features, within classes: mean square less that of the class means.
        squares = np.einsum("ij,ij->", standard, standard, dtype=np.float64)
        variance = float(squares - counts @ np.einsum("ij,ij->i", of_class, of_class, dtype=np.float64)) / len(rows)
        place, of_class, _ = _class_means(inner, labels)
        centred = inner - of_class[place]
        within = centred.T @ centred / len(rows)
        left = max(variance - float(within.trace()), 0.0) / max(1, d - m)
        prior = max(variance / d, 1e-6)
        within = (1 - _SHRINKAGE) * within + _SHRINKAGE * prior * np.eye(m)
        values, vectors = np.linalg.eigh(within)
        whiten = vectors / np.sqrt(values)
        white = inner @ whiten
        _, turn = np.linalg.eigh(white.T @ white)
        rotation = np.ascontiguousarray((whiten @ turn)[:, ::-1])
        rest = np.sqrt((1 - _SHRINKAGE) * left + _SHRINKAGE * prior)
        return cls(mean, scale, principal.astype(np.float64), rotation, np.array([rest], dtype=np.float32))

    def __call__(self, features: FloatArray) -> tuple[Float32Array, Float32Array]:
        """Return the leading and the trailing columns of whitened features, shape (n, r) and (n, m + 1 - r), float32.

        Raises
        ------
        DataError
            If the number of columns differs from `fit`.
        """
        check_columns(FEATURES, features, len(self.mean))
        if len(features) <= _WHITENED_ROWS:
            return self._whitened(features)
        rank, m = self.rank, len(self.rotation)
        lead = np.empty((len(features), rank), dtype=np.float32)
        trail = np.empty((len(features), m + 1 - rank), dtype=np.float32)
        for start in range(0, len(features), _WHITENED_ROWS):
            rows = slice(start, start + _WHITENED_ROWS)
            lead[rows], trail[rows] = self._whitened(features[rows])
        return lead, trail

    def _whitened(self, features: FloatArray) -> tuple[Float32Array, Float32Array]:
        with np.errstate(over="ignore"):
            standard = features.astype(np.float32, copy=False) - self.mean
            standard /= self.scale
        np.clip(standard, -_FARTHEST, _FARTHEST, out=standard)
        exact = standard.astype(np.float64)
        inner = exact.dot(self.components)
        white = inner.dot(self.rotation)
        left = np.einsum("ij,ij->i", exact, exact) - np.einsum("ij,ij->i", inner, inner)
        if inner.shape[1] == exact.shape[1]:
            left[:] = 0.0  # but for rounding
        rest = np.sqrt(np.maximum(left, 0.0)) / self.rest
        white = white.astype(np.float32)
        return white[:, : self.rank], np.column_stack([white[:, self.rank :], rest.astype(np.float32)])

    @property
    def rank(self) -> int:
        """Number of leading columns."""
        return min(RANK, (len(self.rotation) + 1) // 2)

    def state(self) -> dict[str, AnyArray]:
        """Return everything that was learned, as arrays."""
        return {part.name: getattr(self, part.name) for part in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray]) -> Self:
        """Return a space from what `state` returned; DataError if its arrays do not fit together."""
        d = len(require(state, "mean", (None,)))
        m = require(state, "components", (d, None)).shape[1]
        require(state, "scale", (d,), low=_LEAST_SCALE / 2)
        require(state, "rotation", (m, m))
        require(state, "rest", (1,), low=_LEAST_SCALE)
        if not (state["components"].any() and state["rotation"].any()):
            raise DataError("arrays components and rotation must not be zero everywhere.")
        mean, scale, rest = (state[name].astype(np.float32) for name in ("mean", "scale", "rest"))
        components, rotation = (np.ascontiguousarray(state[name], np.float64) for name in ("components", "rotation"))
        return cls(mean, scale, components, rotation, rest)


def _standard_deviations(rows: Float32Array, mean: Float64Array) -> Float64Array:
    """Return `rows.std(axis=0, dtype=np.float64)`, bit by bit, of rows (n, d) and their means; holds few rows twice."""
    held = np.zeros((_HELD_ROWS + 1, rows.shape[1]))  # first the sum so far
    for start in range(0, len(rows), _HELD_ROWS):
        part = rows[start : start + _HELD_ROWS]
        squares = held[1 : len(part) + 1]
        np.subtract(part, mean, out=squares)
        np.square(squares, out=squares)
        held[0] = np.add.reduce(held[: len(part) + 1], axis=0)
    spread: Float64Array = np.sqrt(held[0] / len(rows))
    return spread


def _principal_components(standard: Float32Array) -> Float32Array:
    """Return the leading principal components of standardised rows (n, d) as orthonormal columns."""
    n, d = standard.shape
    wanted = min(_COMPONENTS, max(1, n // _IMAGES_EACH))
    if d <= wanted:
        return np.eye(d, dtype=np.float32)
    basis = np.random.default_rng(0).normal(size=(d, min(d, wanted + _EXTRA))).astype(np.float32)
    for _ in range(_ITERATIONS):
        basis, _ = np.linalg.qr(standard.T @ (standard @ basis))
    inner = standard @ basis
    _, turn = np.linalg.eigh((inner.T @ inner).astype(np.float64))
    return np.ascontiguousarray(basis @ turn[:, ::-1][:, :wanted].astype(np.float32))


def _class_means(rows: FloatArray, labels: IntArray) -> tuple[IntArray, FloatArray, IntArray]:
    """Return the class of each row (n, d) as a place in [0, n_classes), the means of classes, and their rows."""
    from scipy.sparse import csr_array  # here, as a server loads less without

    _, place, counts = np.unique(labels, return_inverse=True, return_counts=True)
    shares = csr_array(((1.0 / counts[place]).astype(rows.dtype), (place, np.arange(len(rows)))))
    return place, shares @ rows, counts
