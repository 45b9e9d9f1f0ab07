"""PSBD: with dropout, a clean image's prediction shifts to another label, and a triggered one's stays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from torch import nn

from guard.errors import DataError, NotApplicableError
from guard.lab.rivals.base import Rival, executed_layers, weighted_layers
from guard.types import Float32Array, Float64Array, IntArray

#: Dropout rates that are tried, in order.
RATES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


class Psbd(Rival):
    """Prediction shift uncertainty (PSU): by how much dropout takes from the probability of the predicted label.

    PSU(x) = p_c(x) - 1/k sum_i p_c(x; dropout i), c the suspect model's answer without dropout; the score is -PSU. The
    dropout rate is the lowest at which the predictions of the asked share of the clean images shift to another label,
    on average over the k passes, so that what does not shift stands out.

    Chosen where [1]_ leaves it open, or as what is known of it here: k is 3 and the share 0.8; dropout is in front of
    every convolution and fully connected layer but the first, on single units, the others divided by the kept share;
    each of the k passes has masks of its own, which all images share, so that a score does not depend on the batch.
    [1]_ looks for poisoned *training* images and may compare their shifts with those of clean ones; here only clean
    images are there to choose the rate.

    Parameters
    ----------
    seed : int
        Of the masks.
    runs : int
        k, >= 1.
    shift_share : float
        In (0, 1). The highest rate is taken where none reaches it.

    References
    ----------
    .. [1] Li et al. (2024), PSBD: Prediction Shift Uncertainty Unlocks Backdoor Detection (arXiv 2406.05826),
       section 4.
    """

    title = "PSBD"
    source = "Li et al. 2024, arXiv 2406.05826"

    def __init__(self, *, seed: int = 0, runs: int = 3, shift_share: float = 0.8) -> None:
        super().__init__(seed=seed)
        if runs < 1 or not 0.0 < shift_share < 1.0:
            raise DataError(f"runs must be >= 1 and shift_share in (0, 1), got {runs} and {shift_share}.")
        self.runs, self.shift_share = runs, shift_share

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        layers = weighted_layers(executed_layers(self.network, images[:1]))
        self._dropped = [layer.module for layer in layers[1:]]
        if not self._dropped:
            raise NotApplicableError(
                "PSBD puts dropout between layers, and the suspect model has one only. Leave it out."
            )
        answers = self.network.logits(images).argmax(axis=1)
        for self.rate in RATES:
            shifted = [logits.argmax(axis=1) != answers for logits in self._with_dropout(images)]
            if np.mean(shifted) >= self.shift_share:
                break

    def _score(self, images: Float32Array) -> Float64Array:
        rows, probabilities = np.arange(len(images)), self.network.probabilities(images)
        answers = probabilities.argmax(axis=1)
        kept = [softmax(logits, axis=1)[rows, answers] for logits in self._with_dropout(images)]
        scores: Float64Array = np.mean(kept, axis=0) - probabilities[rows, answers]
        return scores

    def _with_dropout(self, images: Float32Array) -> Iterator[Float64Array]:
        """Yield the logits of every run."""
        for run in range(self.runs):
            with self._dropout(run):
                yield self.network.logits(images)

    @contextmanager
    def _dropout(self, run: int) -> Iterator[None]:
        handles = [
            layer.register_forward_pre_hook(partial(self._drop, np.random.SeedSequence([self.seed, run, number])))
            for number, layer in enumerate(self._dropped)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _drop(self, seeds: np.random.SeedSequence, _layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        draws = np.random.default_rng(seeds).random(args[0].shape[1:], dtype=np.float32)
        mask = torch.from_numpy((draws >= self.rate) / np.float32(1.0 - self.rate)).to(args[0])
        return (args[0] * mask, *args[1:])
