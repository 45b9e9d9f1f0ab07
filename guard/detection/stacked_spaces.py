"""The whitened spaces of all depths as one: the serving hot path."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guard.detection.whitening import RANK, WhitenedSpace
from guard.types import Float32Array, Float64Array

#: Longer rows, squared, may hold numbers that a space cuts off.
_LONG = 1e30


class StackedSpaces:
    """Whitens the features of all depths together; results equal those of each space but for rounding.

    Parameters
    ----------
    spaces : sequence of WhitenedSpace
        One per depth.
    """

    def __init__(self, spaces: Sequence[WhitenedSpace]) -> None:
        self._widths = tuple(len(space.mean) for space in spaces)
        self._edges = np.cumsum((0, *self._widths[:-1]))
        self._mean = np.concatenate([space.mean for space in spaces])
        self._scale = np.concatenate([space.scale for space in spaces])
        self._components = [
            (slice(first, first + width), space.components)
            for first, width, space in zip(self._edges.tolist(), self._widths, spaces, strict=True)
        ]
        counts = [space.components.shape[1] for space in spaces]
        ranks = [space.rank for space in spaces]
        trailing = max(count - rank for count, rank in zip(counts, ranks, strict=True))
        # Leading columns first, up to RANK, then trailing ones; depths with fewer of either get zeros there.
        self._rotation: Float64Array = np.zeros((len(spaces), max(counts), RANK + trailing))
        for rotation, space, count, rank in zip(self._rotation, spaces, counts, ranks, strict=True):
            rotation[:count, :rank] = space.rotation[:, :rank]
            rotation[:count, RANK : RANK + count - rank] = space.rotation[:, rank:]
        self._are_full = min(counts) == max(counts)
        self._has_rest = np.array([[width > count] for width, count in zip(self._widths, counts, strict=True)])
        self._rest = np.stack([space.rest for space in spaces])

    def __call__(self, features: Sequence[Float32Array]) -> tuple[Float32Array, Float64Array] | None:
        """Return leading columns and the lengths of the trailing ones, or None where shapes or numbers are not for it.

        Parameters
        ----------
        features : sequence of ndarray of shape (n, d_k)
            One per depth; None where the widths are not those of the spaces, a value is not finite, or a row is so long
            that a space would cut it off.

        Returns
        -------
        leading : ndarray of shape (n_depths, n, RANK), float32
        lengths : ndarray of shape (n_depths, n), float64
        """
        if tuple(one.shape[1] for one in features) != self._widths:
            return None
        standard = np.concatenate(features, axis=1, dtype=np.float32, casting="same_kind")
        with np.errstate(over="ignore"):
            standard -= self._mean
            standard /= self._scale
            exact = standard.astype(np.float64)
            squares = np.add.reduceat(np.square(exact), self._edges, axis=1).T  # (n_depths, n)
        if not squares.max(initial=0.0) < _LONG:
            return None
        n_depths, n_components, _ = self._rotation.shape
        shape = (n_depths, len(exact), n_components)
        inner: Float64Array = np.empty(shape) if self._are_full else np.zeros(shape)
        for part, (columns, components) in zip(inner, self._components, strict=True):
            np.matmul(exact[:, columns], components, out=part[:, : components.shape[1]])
        white = np.matmul(inner, self._rotation).astype(np.float32)
        left = squares - np.einsum("ijk,ijk->ij", inner, inner)
        left *= self._has_rest
        rest = (np.sqrt(np.maximum(left, 0.0)) / self._rest).astype(np.float32).astype(np.float64)
        trailing = white[:, :, RANK:].astype(np.float64)
        lengths = np.einsum("ijk,ijk->ij", trailing, trailing)
        lengths += np.square(rest)
        return white[:, :, :RANK], np.sqrt(lengths, out=lengths)
