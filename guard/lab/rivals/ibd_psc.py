"""IBD-PSC: a triggered image keeps its label when the last batch-norm layers are amplified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from guard.errors import DataError, NotApplicableError
from guard.lab.rivals.base import Rival, executed_layers
from guard.types import Float32Array, Float64Array, IntArray


class IbdPsc(Rival):
    """Mean probability of the suspect model's answer in copies of it with amplified parameters: PSC of [1]_.

    Copy k has weight and bias of its last k batch-norm layers multiplied by omega, which is the same as omega times
    their outputs. k starts where more than the share xi of the clean images gets a wrong label, and goes on for n
    copies: PSC(x) = 1/n sum_k p_k(C(x) | x). Chosen where the paper leaves it open: the last layers are those that run
    last; where fewer than n counts are left, the last n count; where no k reaches xi, too.

    Parameters
    ----------
    seed : int
        Without influence: nothing is drawn.
    factor : float
        omega, > 1.
    copies : int
        n, >= 1. As in the paper, 5.
    error_rate : float
        xi, in (0, 1).

    References
    ----------
    .. [1] Hou et al. (2024), IBD-PSC: Input-level Backdoor Detection via Parameter-oriented Scaling Consistency
       (arXiv 2405.09786), section 3 and its Algorithm 1; omega = 1.5, n = 5, xi = 0.6.
    """

    title = "IBD-PSC"
    source = "Hou et al. 2024, arXiv 2405.09786"

    def __init__(self, *, seed: int = 0, factor: float = 1.5, copies: int = 5, error_rate: float = 0.6) -> None:
        super().__init__(seed=seed)
        if not factor > 1.0 or copies < 1 or not 0.0 < error_rate < 1.0:
            raise DataError(
                f"factor must be > 1, copies >= 1 and error_rate in (0, 1), got {factor}, {copies} and {error_rate}."
            )
        self.factor, self.copies, self.error_rate = factor, copies, error_rate

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        layers = executed_layers(self.network, images[:1])
        self._norms = [layer.module for layer in layers if isinstance(layer.module, _BatchNorm)]
        if not self._norms:
            raise NotApplicableError(
                "IBD-PSC amplifies batch-norm layers, and the suspect model runs none. Leave it out for this network."
            )
        start = 1
        while start < len(self._norms) and self._error_rate(start, images, labels) <= self.error_rate:
            start += 1
        start = max(1, min(start, len(self._norms) - self.copies + 1))
        #: How many of the last layers each copy amplifies.
        self.depths = tuple(range(start, min(start + self.copies, len(self._norms) + 1)))

    def _error_rate(self, depth: int, images: Float32Array, labels: IntArray) -> float:
        with amplified(self._norms[-depth:], self.factor):
            return float((self.network.logits(images).argmax(axis=1) != labels).mean())

    def _score(self, images: Float32Array) -> Float64Array:
        rows, answers = np.arange(len(images)), self.network.logits(images).argmax(axis=1)
        confidences = []
        for depth in self.depths:
            with amplified(self._norms[-depth:], self.factor):
                confidences.append(self.network.probabilities(images)[rows, answers])
        scores: Float64Array = np.mean(confidences, axis=0)
        return scores


@contextmanager
def amplified(layers: Sequence[nn.Module], factor: float) -> Iterator[None]:
    """Multiply the outputs of some layers meanwhile."""
    handles = [layer.register_forward_hook(lambda _layer, _args, output: factor * output) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
