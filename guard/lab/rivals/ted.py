"""TED: how the input moves among clean images from layer to layer, as ranks of the nearest one of its class."""

from __future__ import annotations

from typing import NamedTuple, Self

import numpy as np

from guard.detection.detectors.distances import AllDistances
from guard.errors import DataError
from guard.lab.rivals.base import Rival, executed_layers, weighted_layers
from guard.suspect.model import SuspectModel
from guard.types import Activations, Float32Array, Float64Array, IntArray

_CHUNK = 500  # rows whose distances are computed together


class Nearest(NamedTuple):
    """Where the nearest clean image of an input's class is.

    Attributes
    ----------
    ranks : ndarray of shape (n,), float64
        1 if it is the nearest of all clean images; their number plus 1 if there is none of the class.
    distances : ndarray of shape (n,), float64
        Infinite if there is none.
    """

    ranks: Float64Array
    distances: Float64Array


class Ted(Rival):
    """Ranks of the nearest clean image of the predicted class through all layers, and a PCA outlier detector on them.

    In every layer the clean images that the suspect model gets right are ordered by their Euclidean distance from the
    input, and K_l is the place of the first one that has the input's predicted label. What is normal for (K_1 .. K_L)
    is learned from the clean images themselves, each compared with all others.

    Chosen where [1]_ leaves it open: layers are the outputs of all convolutions and fully connected layers, pooled to
    512 numbers where they have more (`guard.suspect.split_points.pool_features`). The outlier score is the one of [2]_
    with all components, sum_i y_i^2 / lambda_i; as ranks that are always 1 have no variance, standard deviations of
    the n trajectories count as at least 1 / sqrt(n), and 1 / n is added to the variances of the standardised ones.

    References
    ----------
    .. [1] Mo et al. (2024), Robust Backdoor Detection for Deep Learning via Topological Evolution Dynamics
       (arXiv 2312.02673), section 4.
    .. [2] Shyu et al. (2003), A novel anomaly detection scheme based on principal component classifier.
    """

    title = "TED"
    source = "Mo et al. 2024, arXiv 2312.02673"

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        layers = weighted_layers(executed_layers(self.network, images[:1]))
        names = [layer.name for layer in layers if layer.positions]
        self._watched = SuspectModel(self.network.module, depths=names)
        activations = self._watched.activations(images)
        is_right = activations.predicted_labels == labels
        if not is_right.any():
            raise DataError(
                f"{self.title} compares with clean images that the suspect model gets right, and it gets none of the "
                f"{len(labels)} clean images right. Check the order of the classes."
            )
        self._references, self._labels = activations[is_right], labels[is_right]
        self._outliers = PcaOutliers.fit(self._trajectories(self._references, are_references=True))

    def _score(self, images: Float32Array) -> Float64Array:
        return self._outliers.score(self._trajectories(self._watched.activations(images)))

    def _trajectories(self, activations: Activations, are_references: bool = False) -> Float64Array:
        """Return ranks (n, n_layers); references are compared with all others but themselves."""
        answers = activations.predicted_labels
        ranks = []
        for name, queries in activations.depths.items():
            nearest = nearest_of_class(queries, answers, self._references.at(name), self._labels, are_references)
            if are_references:
                self._learn_layer(name, nearest)
            ranks.append(self._ranks(name, nearest, answers))
        return np.stack(ranks, axis=1)

    def _learn_layer(self, name: str, nearest: Nearest) -> None:
        """See where in a layer every reference has its nearest other one of the same class."""

    def _ranks(self, name: str, nearest: Nearest, answers: IntArray) -> Float64Array:
        """Return the ranks in a layer, shape (n,)."""
        return nearest.ranks


class PcaOutliers(NamedTuple):
    """How far rows are from what is normal: squared coordinates along principal components, by their variances."""

    centre: Float64Array
    spread: Float64Array
    axes: Float64Array  # one component a column
    variances: Float64Array

    @classmethod
    def fit(cls, rows: Float64Array) -> Self:
        """Learn from normal rows (n, d)."""
        n = len(rows)
        centre = rows.mean(axis=0)
        spread = np.maximum(rows.std(axis=0), 1.0 / np.sqrt(n))
        standardised = (rows - centre) / spread
        variances, axes = np.linalg.eigh(standardised.T @ standardised / n)
        return cls(centre, spread, axes, np.maximum(variances, 0.0) + 1.0 / n)

    def score(self, rows: Float64Array) -> Float64Array:
        """Return sum_i y_i^2 / lambda_i for rows (m, d), shape (m,)."""
        coordinates = ((rows - self.centre) / self.spread) @ self.axes
        scores: Float64Array = np.sum(coordinates**2 / self.variances, axis=1)
        return scores


def nearest_of_class(
    queries: Float32Array, classes: IntArray, references: Float32Array, labels: IntArray, are_references: bool
) -> Nearest:
    """Find the nearest reference of each query's class, and its place among all references.

    Parameters
    ----------
    queries : ndarray of shape (n, d)
    classes : ndarray of shape (n,), int
    references : ndarray of shape (m, d)
    labels : ndarray of shape (m,), int
    are_references : bool
        Whether query i is reference i, which then is not compared with itself.
    """
    ranks, squared, squares = np.empty(len(queries)), np.empty(len(queries)), AllDistances(references)
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        apart = squares(queries[rows].astype(np.float64))
        if are_references:
            apart[np.arange(len(apart)), start + np.arange(len(apart))] = np.inf
        same = np.where(classes[rows, np.newaxis] == labels, apart, np.inf)
        squared[rows] = same.min(axis=1, initial=np.inf)
        ranks[rows] = 1 + (apart < squared[rows, np.newaxis]).sum(axis=1)
    return Nearest(ranks, np.sqrt(squared))
