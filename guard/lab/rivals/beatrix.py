"""Beatrix: how channels of a feature map go together, in Gram matrices of high orders, against those of the class."""

from __future__ import annotations

from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError
from guard.lab.rivals.base import Rival, executed_layers
from guard.types import Float32Array, Float64Array, IntArray

_CHUNK = 128  # images whose Gram matrices are computed together
_MOST = 500  # clean images of a class whose Gram matrices are kept at a time


class Band(NamedTuple):
    """What is normal for the Gram entries of one order, each of shape (n_entries,).

    Attributes
    ----------
    lower, upper : ndarray
        Median less and plus k times the median absolute deviation.
    floor : float
        What a bound counts at least where something is divided by it.
    """

    lower: Float64Array
    upper: Float64Array
    floor: float

    @classmethod
    def fit(cls, entries: Float64Array, width: float) -> Self:
        """Learn from entries (n, n_entries) of clean images; `width` is k."""
        medians = np.median(entries, axis=0)
        deviations = np.median(np.abs(entries - medians), axis=0)
        floor = float(np.abs(medians).mean()) or np.finfo(np.float64).tiny
        return cls(medians - width * deviations, medians + width * deviations, floor)

    def deviation(self, entries: Float64Array) -> Float64Array:
        """Return the sum of relative distances from the band for entries (m, n_entries), shape (m,)."""
        below = np.maximum(self.lower - entries, 0.0) / np.maximum(np.abs(self.lower), self.floor)
        above = np.maximum(entries - self.upper, 0.0) / np.maximum(np.abs(self.upper), self.floor)
        deviation: Float64Array = (below + above).sum(axis=1)
        return deviation


class Beatrix(Rival):
    """Deviations of Gram matrices of the orders 1 to 8 from medians and MADs of the predicted class.

    Of a feature map F (channels x positions) the order p has G_p = (F^p (F^p)^T)^(1/p), powers element by element. Of
    each entry on and above the diagonal, median and median absolute deviation over the clean images of a class give
    the band [median - k MAD, median + k MAD]; outside, the entry's deviation is its distance from the band, as a share
    of the bound that it passed. The score is the sum over entries and orders.

    Chosen where [1]_ leaves it open: the feature map is the last one of more than one position (tokens are positions),
    or what the last layer but one gives, where there is none; roots keep the sign; a bound that something is divided by
    counts at least as much as the mean absolute median of its class and order, because units that never fire have the
    band [0, 0]; a class with fewer than two clean images has the band of all classes; of more than 500 images of a
    class, 500 are drawn.

    Parameters
    ----------
    seed : int
        Of the images of large classes.
    orders : int
        Highest order, >= 1; 8 as in the paper.
    width : float
        k, > 0; 10 as in the paper.

    References
    ----------
    .. [1] Ma et al. (2023), The "Beatrix" Resurrections: Robust Backdoor Detection via Gram Matrices
       (arXiv 2209.11715), section V.
    """

    title = "Beatrix"
    source = "Ma et al. 2023, arXiv 2209.11715"

    def __init__(self, *, seed: int = 0, orders: int = 8, width: float = 10.0) -> None:
        super().__init__(seed=seed)
        if orders < 1 or not width > 0.0:
            raise DataError(f"orders must be >= 1 and width > 0, got {orders} and {width}.")
        self.orders, self.width = orders, width

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        layers = [layer for layer in executed_layers(self.network, images[:1]) if layer.positions]
        maps = [layer for layer in layers if layer.positions > 1] or layers[-2:-1] or layers
        self._layer: nn.Module = maps[-1].module
        features, _ = self._features(images)
        rng = np.random.default_rng(self.seed)
        rows = [rng.permutation(np.flatnonzero(labels == label))[:_MOST] for label in range(self.n_classes)]
        everywhere = rng.permutation(len(images))[:_MOST]
        rows = [some if len(some) > 1 else everywhere for some in rows]
        self._bands = [
            [Band.fit(gram_entries(features[some], order), self.width) for order in range(1, self.orders + 1)]
            for some in rows
        ]

    def _score(self, images: Float32Array) -> Float64Array:
        features, answers = self._features(images)
        scores = np.zeros(len(images))
        for label in np.unique(answers):
            of_class = np.flatnonzero(answers == label)
            for start in range(0, len(of_class), _CHUNK):
                some = of_class[start : start + _CHUNK]
                for order, band in enumerate(self._bands[label], start=1):
                    scores[some] += band.deviation(gram_entries(features[some], order))
        return scores

    def _features(self, images: Float32Array) -> tuple[Float32Array, IntArray]:
        """Return feature maps (n, channels, positions) and the suspect model's answers (n,)."""
        parts: list[Tensor] = []

        def take(_layer: nn.Module, _args: Any, output: Tensor) -> None:
            parts.append(_as_map(output.detach().float()).cpu())

        handle = self._layer.register_forward_hook(take)
        try:
            answers = self.network.logits(images).argmax(axis=1)
        finally:
            handle.remove()
        return torch.cat(parts).numpy(), answers


def gram_entries(features: Float32Array, order: int) -> Float64Array:
    """Return (F^p (F^p)^T)^(1/p) on and above the diagonal.

    Parameters
    ----------
    features : ndarray of shape (n, channels, positions)
    order : int
        p, >= 1.

    Returns
    -------
    entries : ndarray of shape (n, channels (channels + 1) / 2), float64
        Row by row of the upper triangle.
    """
    rows, columns = np.triu_indices(features.shape[1])
    entries = np.empty((len(features), len(rows)))
    for start in range(0, len(features), _CHUNK):
        powers = features[start : start + _CHUNK].astype(np.float64) ** order
        products = (powers @ powers.transpose(0, 2, 1))[:, rows, columns]
        entries[start : start + _CHUNK] = np.sign(products) * np.abs(products) ** (1.0 / order)
    return entries


def _as_map(output: Tensor) -> Tensor:
    """Return a layer's output as (n, channels, positions); tokens (n, positions, channels) are turned."""
    return output.transpose(1, 2) if output.ndim == 3 else output.flatten(2) if output.ndim == 4 else output[..., None]
