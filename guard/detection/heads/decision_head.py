"""The replacement decision head: a small classifier on the suspect model's features, trained on right labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch.nn import functional
from torch.optim.adam import adam

from guard.arrays import check_range, require
from guard.errors import DataError, NotFittedError
from guard.types import AnyArray, Float32Array, FloatArray, IntArray

_LAYERS = ("weight_1", "bias_1", "weight_2", "bias_2", "weight_3", "bias_3")
_HOLD_OUT = 0.1  # share of the clean data that decides when to stop
_MIN_HOLD_OUT = 10  # fewer held-out rows say nothing; then all epochs run


def holds_out_enough(labels: IntArray) -> bool:
    """Whether a tenth of each class, of labels of shape (n,), is enough to decide when training stops."""
    return int((_HOLD_OUT * np.bincount(labels)).astype(np.int64).sum()) >= _MIN_HOLD_OUT


def hidden_widths(n_features: int, n_classes: int) -> tuple[int, int]:
    """Choose the two hidden widths: about twice the geometric mean of input and output, and half of that.

    The paper says only that the widths vary with the data set; 512 features and 10 classes give (144, 72), 512 and 43
    give (304, 152).
    """
    first = int(np.clip(16 * round(2 * np.sqrt(n_features * n_classes) / 16), 32, 512))
    return first, max(first // 2, 32)


@dataclass
class DecisionHead:
    """Classifier with two hidden layers on features, g in the Fusion paper (arXiv 2011.02526, "New decision function").

    Trained with cross-entropy and Adam; a stratified tenth of the data decides when to stop. Inputs are standardised;
    the standardisation is folded into the first layer afterwards, so that a fitted head is three matrices.

    Parameters
    ----------
    max_epochs, patience : int
        Training ends after `max_epochs`, or `patience` epochs without a lower hold-out loss.
    batch_size : int
        Rows per step.
    learning_rate, weight_decay : float
        Adam's; no unit.
    noise_std : float
        Gaussian noise on the standardised inputs while training, in standard deviations of each feature; 0 = none.
    stops_early : bool
        False: all epochs run, however many rows are held out. Heads that are compared with each other must end alike.
    seed : int
        Seeds initial weights, batches, hold-out and noise; the global generators are not touched.
    """

    max_epochs: int = 60
    patience: int = 4
    batch_size: int = 256
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4
    noise_std: float = 0.0
    stops_early: bool = True
    seed: int = 0
    layers_: dict[str, Float32Array] = field(default_factory=dict, init=False, repr=False)

    def fit(self, features: FloatArray, labels: IntArray, n_classes: int) -> Self:
        """Train on clean features.

        Parameters
        ----------
        features : ndarray of shape (n, d)
            Features at one depth, not normalised.
        labels : ndarray of shape (n,), int
            True labels in [0, n_classes).
        n_classes : int
            Width of the output.

        Raises
        ------
        DataError
            If shapes do not agree, a value is not finite, or a label is out of range.
        """
        features = features.astype(np.float32, copy=False)
        if features.ndim != 2 or len(features) != len(labels) or len(features) == 0:
            raise DataError(
                f"features {features.shape} and labels {np.shape(labels)} must have the same, non-zero length."
            )
        check_range(labels, n_classes)
        with np.errstate(invalid="ignore"):
            mean, spread = features.mean(axis=0), features.std(axis=0)
        if not np.isfinite(mean).all():  # both survive a mean
            raise DataError("features must be finite: a NaN or an infinity was found.")
        scale = np.where(spread > 1e-6 * max(float(spread.max()), 1e-30), spread, 1.0).astype(np.float32)
        inputs = torch.from_numpy((features - mean) / scale)
        targets = torch.from_numpy(np.array(labels, dtype=np.int64))
        with one_thread():
            weights = self._train(inputs, targets, n_classes)
        arrays = [tensor.detach().numpy() for tensor in weights]
        first = arrays[0] / scale[:, None]  # (d, h1)
        arrays[0], arrays[1] = first, arrays[1] - mean @ first
        self.layers_ = {
            name: np.ascontiguousarray(array, dtype=np.float32) for name, array in zip(_LAYERS, arrays, strict=True)
        }
        return self

    def _train(self, inputs: torch.Tensor, targets: torch.Tensor, n_classes: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        widths = (inputs.shape[1], *hidden_widths(inputs.shape[1], n_classes), n_classes)
        weights: list[torch.Tensor] = []
        for fan_in, fan_out in pairwise(widths):
            bound = (6.0 / fan_in) ** 0.5 if fan_out != n_classes else (3.0 / fan_in) ** 0.5  # He, for ReLU
            weights.append((torch.rand(fan_in, fan_out, generator=generator) * 2 - 1) * bound)
            weights.append(torch.zeros(fan_out))
        for tensor in weights:
            tensor.requires_grad_(True)
        train, held_out = _split(targets, generator)
        optimize = _Adam(weights, self.learning_rate, self.weight_decay)
        best, best_loss, waited = [tensor.detach().clone() for tensor in weights], float("inf"), 0
        for _ in range(self.max_epochs):
            order = train[torch.randperm(len(train), generator=generator)]
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = inputs[rows]
                if self.noise_std:
                    batch = batch + self.noise_std * torch.randn(batch.shape, generator=generator)
                loss = functional.cross_entropy(_forward(batch, weights), targets[rows])
                optimize(torch.autograd.grad(loss, weights))
            if not self.stops_early or len(held_out) < _MIN_HOLD_OUT:
                best = [tensor.detach().clone() for tensor in weights]
                continue
            with torch.no_grad():
                held_out_loss = float(functional.cross_entropy(_forward(inputs[held_out], weights), targets[held_out]))
            if held_out_loss < best_loss - 1e-4:
                best, best_loss, waited = [tensor.detach().clone() for tensor in weights], held_out_loss, 0
            else:
                waited += 1
                if waited >= self.patience:
                    break
        return best

    def logits(self, features: FloatArray) -> Float32Array:
        """Return the head's own logits, shape (n, n_classes), float32.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns differs from `fit`.
        """
        layers = self.layers_
        if not layers:
            raise NotFittedError("DecisionHead is not fitted. Call fit(features, labels, n_classes) before logits().")
        weight = layers["weight_1"]
        if features.shape[1] != weight.shape[0]:
            raise DataError(
                f"features have {features.shape[1]} columns, fit saw {weight.shape[0]}. Is the split layer the same?"
            )
        # dot, not @: the same product, with half the overhead on one row
        hidden: Float32Array = features.astype(np.float32, copy=False).dot(weight)
        hidden += layers["bias_1"]
        np.maximum(hidden, 0, out=hidden)
        hidden = hidden.dot(layers["weight_2"])
        hidden += layers["bias_2"]
        np.maximum(hidden, 0, out=hidden)
        hidden = hidden.dot(layers["weight_3"])
        hidden += layers["bias_3"]
        return hidden

    def state(self) -> dict[str, AnyArray]:
        """Return the three layers as arrays."""
        return dict(self.layers_)

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray]) -> Self:
        """Return a fitted head from what `state` returned; DataError if its layers do not fit together."""
        head = cls()
        width: int | None = None
        for weight, bias in zip(_LAYERS[::2], _LAYERS[1::2], strict=True):
            width = require(state, weight, (width, None)).shape[1]
            require(state, bias, (width,))
            if not state[weight].any():
                raise DataError(f"array {weight} must not be zero everywhere.")
        head.layers_ = {name: np.ascontiguousarray(state[name], dtype=np.float32) for name in _LAYERS}
        return head


class _Adam:
    """torch's Adam as a function: the same steps as `torch.optim.Adam`, whose first use alone takes two seconds."""

    def __init__(self, weights: list[torch.Tensor], learning_rate: float, weight_decay: float) -> None:
        self._weights = weights
        self._means = [torch.zeros_like(weight) for weight in weights]
        self._squares = [torch.zeros_like(weight) for weight in weights]
        self._steps = [torch.tensor(0.0) for _ in weights]
        self._learning_rate, self._weight_decay = learning_rate, weight_decay

    @torch.no_grad()
    def __call__(self, gradients: Sequence[torch.Tensor]) -> None:
        adam(
            self._weights,
            list(gradients),
            self._means,
            self._squares,
            [],
            self._steps,
            foreach=True,
            lr=self._learning_rate,
            weight_decay=self._weight_decay,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )


@contextmanager
def one_thread() -> Iterator[None]:
    """Train on one thread: the matrices are small, and threads that wait for each other stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _forward(batch: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    first, bias_1, second, bias_2, third, bias_3 = weights
    hidden = torch.relu(torch.addmm(bias_1, batch, first))
    hidden = torch.relu(torch.addmm(bias_2, hidden, second))
    return torch.addmm(bias_3, hidden, third)


def _split(targets: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hold out a tenth of each class; a class with fewer than ten rows keeps all of them for training."""
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for label in torch.unique(targets):
        rows = torch.nonzero(targets == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out[rows[: int(_HOLD_OUT * len(rows))]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
