"""Exact local outlier factors of new points against many classes at once (Breunig et al. 2000), in NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise

import numpy as np

from guard.detection.detectors.distances import AllDistances, PairDistances, Preselector, pair_distances
from guard.types import BoolArray, Float64Array, FloatArray, IntArray

#: Added to every mean reachability distance, as scikit-learn does, so that duplicates have a finite density.
DENSITY_FLOOR = 1e-10
#: Classes up to this size are compared whole; above it, candidates are selected first.
SMALL_CLASS = 64
#: Distances held at once, per temporary array.
HELD_DISTANCES = 1 << 20
#: Stands for "no reference here"; its root is finite, and zero times it is zero.
FAR_AWAY = float(np.finfo(np.float64).max)


class ClassReferences:
    """Clean vectors of every class with their k-distance and local reachability density.

    Classes with fewer than two vectors cannot be compared with: they are left out, and every factor against them is
    infinite. Vectors are kept in groups of classes of about the same size, so that a group is one padded block of
    distances that wastes less than half of its places, however uneven the classes are.

    Parameters
    ----------
    vectors : ndarray of shape (n, d)
        References, all vectors of a class together, classes in the order that `order_for_storage` gives.
    labels : ndarray of shape (n,)
        Class of each vector.
    k_distances, densities : ndarray of shape (n,), float64
        Distance to the k-th nearest other vector of the class, and local reachability density (Definitions 3 and 6).
    n_classes : int
        Number of classes, those without vectors included.
    n_neighbors : int
        k; in a class of n vectors at most n - 1 is used.

    References
    ----------
    .. [1] Breunig, Kriegel, Ng, Sander (2000), LOF: identifying density-based local outliers, SIGMOD.
    """

    def __init__(
        self,
        vectors: FloatArray,
        labels: IntArray,
        k_distances: Float64Array,
        densities: Float64Array,
        n_classes: int,
        n_neighbors: int,
    ) -> None:
        self.vectors = vectors
        self.labels = labels
        self.k_distances = k_distances
        self.densities = densities
        self.n_classes = n_classes
        self.n_neighbors = n_neighbors
        self._sizes: IntArray = np.bincount(labels, minlength=n_classes)
        self._starts: IntArray = np.zeros(n_classes, dtype=np.int64)
        self._n_nearest: IntArray = np.minimum(n_neighbors, self._sizes - 1)
        self._place_of_large: IntArray = np.full(n_classes, -1)
        self._large_spans: list[tuple[int, int]] = []
        for first, last in _runs(labels):
            self._starts[labels[first]] = first
            if last - first > max(SMALL_CLASS, n_neighbors):
                self._place_of_large[labels[first]] = len(self._large_spans)
                self._large_spans.append((first, last))

    @classmethod
    def fit(cls, vectors: FloatArray, labels: IntArray, n_classes: int, n_neighbors: int) -> ClassReferences:
        """Learn k-distances and densities from clean vectors (n, d) and their labels (n,), in any order."""
        order = order_for_storage(labels, n_classes)
        vectors, labels = vectors[order], labels[order]
        k_distances = np.empty(len(order))
        densities = np.empty(len(order))
        for first, last in _runs(labels):
            nearest, distances = _nearest_others(vectors[first:last], n_neighbors)
            own_k_distances = distances[:, -1]
            reach = np.maximum(distances, own_k_distances[nearest])
            k_distances[first:last] = own_k_distances
            densities[first:last] = 1.0 / (reach.mean(axis=1) + DENSITY_FLOOR)
        return cls(vectors, labels, k_distances, densities, n_classes, n_neighbors)

    def factors_of_class(self, queries: FloatArray, classes: IntArray) -> Float64Array:
        """Return the local outlier factor of each query against one class of its own.

        Parameters
        ----------
        queries : ndarray of shape (m, d)
        classes : ndarray of shape (m,)
            Class to compare each query with.

        Returns
        -------
        factors : ndarray of shape (m,), float64
            About 1 inside the class, larger outside; infinite for a class without references.
        """
        factors = np.full(len(queries), np.inf)
        sizes = self._sizes[classes]
        known = classes.argsort(kind="stable")  # one class after the other: its references are in the cache then
        known = known[sizes[known] > 0]
        for rows in _portions(known, int(sizes.max(initial=0))):
            if len(rows) == 1:
                factors[rows] = self._factor(queries[rows[0]].astype(np.float64), int(classes[rows[0]]))
            else:
                factors[rows] = self._factors_of_known(queries[rows].astype(np.float64), classes[rows])
        return factors

    def factors_of_all(self, queries: FloatArray) -> Float64Array:
        """Return the local outlier factor of each query against every class.

        Parameters
        ----------
        queries : ndarray of shape (m, d)

        Returns
        -------
        factors : ndarray of shape (m, n_classes), float64
            Infinite in the columns of classes without references.
        """
        factors = np.full((len(queries), self.n_classes), np.inf)
        for rows in _portions(np.arange(len(queries)), len(self.vectors)):
            squared = self._all_distances(queries[rows].astype(np.float64, copy=False))
            for group in self._groups:
                factors[rows[:, np.newaxis], group.classes] = group.factors(squared)
        return factors

    def warm_up(self, every_class: bool) -> None:
        """Build what the first query would build: the blocks for one class each, or those for all classes."""
        _ = (self._all_distances, self._groups) if every_class else (self._preselector, self._pair_distances)

    def _factor(self, query: Float64Array, label: int) -> float:
        """Return the factor of one query, shape (d,), against one class that has references."""
        n_nearest, place = int(self._n_nearest[label]), int(self._place_of_large[label])
        nearest = self._preselector.of_one(query, n_nearest, place) if place >= 0 else np.arange(self._sizes[label])
        nearest += self._starts[label]
        squared = self._pair_distances.of_one(query, nearest)
        if len(nearest) > n_nearest:  # of equally far references the first are taken
            chosen = squared.argsort(kind="stable")[:n_nearest]
            nearest, squared = nearest[chosen], squared[chosen]
        reach = np.maximum(np.sqrt(squared), self.k_distances[nearest])
        mean_density = float(self.densities[nearest].sum()) / n_nearest
        return mean_density * (float(reach.sum()) / n_nearest + DENSITY_FLOOR)

    def _factors_of_known(self, queries: Float64Array, classes: IntArray) -> Float64Array:
        rows, columns = self._candidates(queries, classes)
        squared = self._pair_distances(queries, rows, columns)
        n_nearest = self._n_nearest[classes]
        lasts = n_nearest.cumsum()
        if len(columns) > lasts[-1]:  # of equally far references the first are taken
            chosen = _first_of_each_row(np.lexsort((squared, rows)), rows, n_nearest)
            columns, squared = columns[chosen], squared[chosen]
        reach = np.maximum(np.sqrt(squared), self.k_distances[columns])
        mean_reach = np.add.reduceat(reach, lasts - n_nearest) / n_nearest
        mean_density = np.add.reduceat(self.densities[columns], lasts - n_nearest) / n_nearest
        factors: Float64Array = mean_density * (mean_reach + DENSITY_FLOOR)
        return factors

    def _candidates(self, queries: Float64Array, classes: IntArray) -> tuple[IntArray, IntArray]:
        """Return (rows, columns) of all pairs that can be among the nearest, ordered by row and then by column."""
        is_large = self._place_of_large[classes] >= 0
        if not is_large.any():
            return _whole_classes(np.arange(len(classes)), self._starts[classes], self._sizes[classes])
        if is_large.all():
            rows, columns = self._preselector(queries, self.n_neighbors, places=self._place_of_large[classes])
            columns += self._starts[classes[rows]]
            return rows, columns
        small, large = np.flatnonzero(~is_large), np.flatnonzero(is_large)
        parts = [(part, *self._candidates(queries[part], classes[part])) for part in (small, large)]
        rows = np.concatenate([part[rows] for part, rows, _ in parts])
        columns = np.concatenate([columns for _, _, columns in parts])
        order = rows.argsort(kind="stable")
        return rows[order], columns[order]

    @cached_property
    def _preselector(self) -> Preselector:
        return Preselector(self.vectors, self._large_spans)

    @cached_property
    def _pair_distances(self) -> PairDistances:
        return PairDistances(self.vectors)

    @cached_property
    def _all_distances(self) -> AllDistances:
        return AllDistances(self.vectors)

    @cached_property
    def _groups(self) -> list[_ClassGroup]:
        present = self.labels[[first for first, _ in _runs(self.labels)]]
        kinds = _size_kinds(self._sizes[present])
        return [
            _ClassGroup(
                present[kinds == kind],
                int(self._starts[present[kinds == kind][0]]),
                self._sizes[present[kinds == kind]],
                self._n_nearest[present[kinds == kind]],
                self.k_distances,
                self.densities,
            )
            for kind in np.unique(kinds)
        ]


class _ClassGroup:
    """Classes of similar size whose distances are handled as one block, (n_group_classes, largest size)."""

    def __init__(
        self,
        classes: IntArray,
        start: int,
        sizes: IntArray,
        n_nearest: IntArray,
        k_distances: Float64Array,
        densities: Float64Array,
    ) -> None:
        self.classes = classes
        self._columns = slice(start, start + int(sizes.sum()))
        self._is_filled = np.arange(sizes.max()) < sizes[:, np.newaxis]
        self._is_full = bool(self._is_filled.all())
        self._n_nearest = n_nearest
        self._same_n_nearest = bool((n_nearest == n_nearest[0]).all())
        self._k_distances = self._block(k_distances[np.newaxis], 0.0)[0]
        self._densities = self._block(densities[np.newaxis], 0.0)[0]

    def factors(self, squared: Float64Array) -> Float64Array:
        """Return factors (m, n_group_classes) from the squared distances to all references, (m, n)."""
        block = self._block(squared, FAR_AWAY)  # (m, n_group_classes, largest size)
        if self._same_n_nearest:
            last = int(self._n_nearest[0]) - 1
            farthest = np.partition(block, last, axis=-1)[..., last]
        else:
            farthest = np.sort(block, axis=-1)[:, np.arange(len(self.classes)), self._n_nearest - 1]
        is_near = block <= farthest[..., np.newaxis]
        if np.count_nonzero(is_near) != len(block) * self._n_nearest.sum():
            self._resolve_ties(block, is_near)
        near = is_near.astype(np.float64)
        reach = np.sqrt(block)
        np.maximum(reach, self._k_distances, out=reach)
        mean_reach = np.einsum("ijk,ijk->ij", reach, near) / self._n_nearest
        mean_density = np.einsum("jk,ijk->ij", self._densities, near) / self._n_nearest
        factors: Float64Array = mean_density * (mean_reach + DENSITY_FLOOR)
        return factors

    def _block(self, values: Float64Array, padding: float) -> Float64Array:
        filled = values[:, self._columns]
        if self._is_full:
            return filled.reshape(len(values), *self._is_filled.shape)
        block = np.full((len(values), *self._is_filled.shape), padding)
        block[:, self._is_filled] = filled
        return block

    def _resolve_ties(self, block: Float64Array, is_near: BoolArray) -> None:
        """Keep the first of equally far references where more than k are as near as the k-th."""
        rows, classes = np.nonzero(is_near.sum(axis=-1) > self._n_nearest)
        places = block[rows, classes].argsort(axis=-1, kind="stable").argsort(axis=-1)
        is_near[rows, classes] = places < self._n_nearest[classes, np.newaxis]


def order_for_storage(labels: IntArray, n_classes: int) -> IntArray:
    """Return the order in which `ClassReferences` keeps vectors: by size of class, by class, then as given.

    Vectors of classes with fewer than two are left out.
    """
    sizes = np.bincount(labels, minlength=n_classes)[labels]
    order = np.lexsort((labels, _size_kinds(sizes)))
    return order[sizes[order] >= 2]


def _size_kinds(sizes: IntArray) -> IntArray:
    return np.frexp(sizes)[1].astype(np.int64)  # sizes 2-3, 4-7, 8-15, ... are of one kind each


def _runs(labels: IntArray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(labels[1:] != labels[:-1]) + 1
    bounds = [0, *edges.tolist(), len(labels)]
    return list(pairwise(bounds)) if len(labels) else []


def _portions(rows: IntArray, n_distances_per_row: int) -> Iterator[IntArray]:
    step = max(1, HELD_DISTANCES // max(1, n_distances_per_row))
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _whole_classes(rows: IntArray, starts: IntArray, sizes: IntArray) -> tuple[IntArray, IntArray]:
    firsts = np.cumsum(sizes) - sizes
    columns = np.arange(sizes.sum()) + np.repeat(starts - firsts, sizes)
    return np.repeat(rows, sizes), columns


def _first_of_each_row(order: IntArray, rows: IntArray, counts: IntArray) -> IntArray:
    """Return the first `counts[i]` places of `order` in each row i, where `order` sorts pairs by row."""
    lengths = np.bincount(rows, minlength=len(counts))
    _, places = _whole_classes(np.arange(len(counts)), np.cumsum(lengths) - lengths, counts)
    return order[places]


def _nearest_others(vectors: FloatArray, n_neighbors: int) -> tuple[IntArray, Float64Array]:
    """Return the nearest other vectors of each, (n, k), and their distances in ascending order, (n, k)."""
    n = len(vectors)
    k = min(n_neighbors, n - 1)
    nearest = np.empty((n, k), dtype=np.int64)
    distances = np.empty((n, k))
    preselector = Preselector(vectors)
    for portion in _portions(np.arange(n), n):
        queries = vectors[portion].astype(np.float64)
        rows, columns = preselector(queries, k, portion)
        squared = pair_distances(queries, rows, vectors, columns)
        chosen = _first_of_each_row(np.lexsort((squared, rows)), rows, np.full(len(portion), k))
        nearest[portion] = columns[chosen].reshape(-1, k)
        distances[portion] = np.sqrt(squared[chosen]).reshape(-1, k)
    return nearest, distances
