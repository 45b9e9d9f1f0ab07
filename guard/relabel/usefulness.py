"""Which undecided inputs would teach most: one of each kind first, and few of one kind, however many came of it."""

from __future__ import annotations

import numpy as np

from guard.types import Float32Array, Float64Array, IntArray


def usefulness(groups: IntArray, features: Float32Array) -> Float64Array:
    """Return how much an answer about each input would tell, shape (n,), > 0; higher = ask first.

    The k-th input of a group of m look-alikes gets sqrt(m) / k, one that is like no other gets 1: an answer stands for
    its look-alikes, and the next one of them says less. Within a group the input nearest to the centre comes first,
    then always the one that is farthest from all before it [1]_. Looks alone count, neither p-value nor whether an
    input was flagged: an audit must not be told by its place.

    Parameters
    ----------
    groups : ndarray of shape (n,), int64
        As `refresh_groups` sets them; 0 = none.
    features : ndarray of shape (n, d), float32

    References
    ----------
    .. [1] Gonzalez (1985), Clustering to minimize the maximum intercluster distance; Sener and Savarese (2018), Active
       learning for convolutional neural networks: a core-set approach.
    """
    useful = np.ones(len(groups))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    for group in np.unique(groups[groups > 0]):
        rows = np.flatnonzero(groups == group)
        useful[rows[_spread(directions[rows])]] = np.sqrt(len(rows)) / np.arange(1, len(rows) + 1)
    return useful


def _spread(rows: Float32Array) -> IntArray:
    """Return the rows' numbers, the one nearest to the centre first, then always the farthest from those before."""
    order = np.empty(len(rows), dtype=np.int64)
    order[0] = np.linalg.norm(rows - rows.mean(axis=0), axis=1).argmin()
    nearest = np.linalg.norm(rows - rows[order[0]], axis=1)
    for place in range(1, len(rows)):
        nearest[order[:place]] = -1.0  # copies are as near as the row itself, and still come once
        order[place] = nearest.argmax()
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[order[place]], axis=1))
    return order
