"""Training of replacement heads: several at once, on parts of the same data, which gives what one by one gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adam import adam

from guard.types import IntArray

_HOLD_OUT = 0.1  # share of the clean data that decides when to stop
_MIN_HOLD_OUT = 10  # fewer held-out rows say nothing; then all epochs run
_LEAST_GAIN = 1e-4  # of the hold-out loss
#: Weights, gradients and moments of the heads that are trained at once: what a core's cache holds.
_BYTES_AT_ONCE = 8 << 20
_MOST_AT_ONCE = 11  # so that the folds of a fit keep two cores busy


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """How heads are trained; the fields are those of `DecisionHead`."""

    max_epochs: int
    patience: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    noise_std: float
    stops_early: bool
    seed: int


@dataclass(eq=False, slots=True)
class _Run:
    """One head in training: its part of the data, its random numbers, and the best weights so far.

    Attributes
    ----------
    mean, scale : Tensor of shape (d,), float32
        Standardise the inputs.
    train, held_out : Tensor of int64
        Rows of the shared features.
    best : list of Tensor
        Six: weight and bias of each layer, as `train_heads` returns them.
    """

    mean: Tensor
    scale: Tensor
    generator: torch.Generator
    train: Tensor
    held_out: Tensor
    stops_early: bool
    best: list[Tensor]
    best_loss: float = float("inf")
    waited: int = 0

    def __post_init__(self) -> None:
        self.stops_early = self.stops_early and len(self.held_out) >= _MIN_HOLD_OUT


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


def portions_of_heads(n_heads: int, n_features: int, n_classes: int) -> list[range]:
    """Cut heads into portions to be trained at once; one fills a portion if it fills a core's cache by itself."""
    widths = (n_features, *hidden_widths(n_features, n_classes), n_classes)
    weights = sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(widths))
    most = min(_MOST_AT_ONCE, max(1, _BYTES_AT_ONCE // (4 * 4 * weights)))
    n_portions = -(-n_heads // most)
    bounds = [n_heads * place // n_portions for place in range(n_portions + 1)]
    return [range(first, last) for first, last in pairwise(bounds)]


def train_heads(
    features: Tensor,
    targets: Tensor,
    n_classes: int,
    parts: Sequence[Tensor],
    standards: Sequence[tuple[Tensor, Tensor]],
    plan: TrainingPlan,
) -> list[list[Tensor]]:
    """Train one head on each part of the data, with cross-entropy and Adam.

    Heads with as many batches an epoch go in step, as stacked matrices. Which heads are trained together changes
    their weights by rounding at most.

    Parameters
    ----------
    features : Tensor of shape (n, d), float32
    targets : Tensor of shape (n,), int64
    parts : sequence of Tensor of int64
        Rows that each head learns from.
    standards : sequence of (Tensor, Tensor) of shape (d,), float32
        Mean and scale of each part.

    Returns
    -------
    weights : list of list of Tensor
        Of each head weight and bias of three layers, for standardised inputs; weights are of shape (in, out), that of
        the last layer (n_classes, in).
    """
    widths = (features.shape[1], *hidden_widths(features.shape[1], n_classes), n_classes)
    runs, fresh = [], []
    for rows, (mean, scale) in zip(parts, standards, strict=True):
        generator = torch.Generator().manual_seed(plan.seed)
        fresh.append(_fresh_weights(widths, generator))
        train, held_out = _split(targets[rows], generator)
        runs.append(_Run(mean, scale, generator, rows[train], rows[held_out], plan.stops_early, fresh[-1]))
    batches = [-(-len(run.train) // plan.batch_size) for run in runs]
    with one_thread():
        for n_batches in sorted(set(batches)):
            chosen = [place for place, n in enumerate(batches) if n == n_batches]
            weights = [torch.stack(layer) for layer in zip(*(fresh[place] for place in chosen), strict=True)]
            _train_in_step([runs[place] for place in chosen], weights, features, targets, plan)
    return [run.best for run in runs]


def _train_in_step(
    runs: list[_Run], weights: list[Tensor], features: Tensor, targets: Tensor, plan: TrainingPlan
) -> None:
    """Train heads whose epochs have as many batches, weights stacked along the first axis, until all have ended."""
    optimize = _Adam(weights, plan.learning_rate, plan.weight_decay)
    for _ in range(plan.max_epochs):
        orders = [run.train[torch.randperm(len(run.train), generator=run.generator)] for run in runs]
        for batch in zip(*(torch.split(order, plan.batch_size) for order in orders), strict=True):
            optimize(_gradients(runs, weights, features, targets, batch, plan.noise_std))
        going_on = []
        for place, run in enumerate(runs):
            if run.stops_early:
                own = [layer[place] for layer in weights]
                logits = _forward((features[run.held_out] - run.mean) / run.scale, own)
                loss = float(functional.cross_entropy(logits, targets[run.held_out]))
                run.waited += 1
                if loss < run.best_loss - _LEAST_GAIN:
                    run.best, run.best_loss, run.waited = [layer.clone() for layer in own], loss, 0
            if not (run.stops_early and run.waited >= plan.patience):
                going_on.append(place)
        if len(going_on) < len(runs):
            runs = [runs[place] for place in going_on]
            weights = optimize.keep(torch.tensor(going_on, dtype=torch.int64))
        if not runs:
            return
    for place, run in enumerate(runs):
        if not run.stops_early:
            run.best = [layer[place].clone() for layer in weights]


def _gradients(
    runs: Sequence[_Run],
    weights: Sequence[Tensor],
    features: Tensor,
    targets: Tensor,
    batch: Sequence[Tensor],
    noise_std: float,
) -> list[Tensor]:
    """Return the gradients of the mean cross-entropy of each head on its rows of a batch, stacked like the weights."""
    sizes = [len(rows) for rows in batch]
    if len(set(sizes)) > 1:  # the last batch of an epoch: heads with as many rows go together
        together = [torch.empty_like(layer) for layer in weights]
        for size in sorted(set(sizes)):
            chosen = torch.tensor([place for place, n in enumerate(sizes) if n == size])
            some = [layer[chosen] for layer in weights]
            places = chosen.tolist()
            found = _gradients(
                [runs[p] for p in places], some, features, targets, [batch[p] for p in places], noise_std
            )
            for layer, gradient in zip(together, found, strict=True):
                layer[chosen] = gradient
        return together
    rows = torch.stack(list(batch))
    n_heads, n = rows.shape
    inputs = features.index_select(0, rows.flatten()).view(n_heads, n, -1)
    inputs -= torch.stack([run.mean for run in runs]).unsqueeze(1)
    inputs /= torch.stack([run.scale for run in runs]).unsqueeze(1)
    if noise_std:
        noise = [torch.randn(inputs.shape[1:], generator=run.generator) for run in runs]
        inputs = inputs + noise_std * torch.stack(noise)
    first, bias_1, second, bias_2, third, bias_3 = weights
    hidden_1 = torch.baddbmm(bias_1.unsqueeze(1), inputs, first).relu_()
    hidden_2 = torch.baddbmm(bias_2.unsqueeze(1), hidden_1, second).relu_()
    # Classes are rows from here on: products and a softmax over few columns take several times as long.
    slope_3 = torch.baddbmm(bias_3.unsqueeze(2), third, hidden_2.mT).softmax(dim=1)
    slope_3.scatter_add_(1, targets[rows].unsqueeze(1), torch.full((n_heads, 1, n), -1.0)).div_(n)
    slope_2 = torch.bmm(slope_3.mT, third)
    third_gradients = [torch.bmm(slope_3, hidden_2), slope_3.sum(2)]
    slope_2 *= hidden_2.sign_()  # of a ReLU's output: its derivative
    slope_1 = torch.bmm(slope_2, second.mT)
    second_gradients = [torch.bmm(hidden_1.mT, slope_2), slope_2.sum(1)]
    slope_1 *= hidden_1.sign_()
    return [torch.bmm(inputs.mT, slope_1), slope_1.sum(1), *second_gradients, *third_gradients]


class _Adam:
    """torch's Adam as a function: the same steps as `torch.optim.Adam`, whose first use alone takes two seconds."""

    def __init__(self, weights: list[Tensor], learning_rate: float, weight_decay: float) -> None:
        self._weights = weights
        self._means = [torch.zeros_like(weight) for weight in weights]
        self._squares = [torch.zeros_like(weight) for weight in weights]
        self._steps = [torch.tensor(0.0) for _ in weights]
        self._learning_rate, self._weight_decay = learning_rate, weight_decay

    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Change the weights by a step along gradients of the same shapes."""
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

    def keep(self, places: Tensor) -> list[Tensor]:
        """Forget all but the chosen heads of the stack, and return their weights."""
        stacks = (self._weights, self._means, self._squares)
        self._weights, self._means, self._squares = ([tensor[places] for tensor in stack] for stack in stacks)
        return self._weights


@contextmanager
def one_thread() -> Iterator[None]:
    """Train on one thread: the matrices are small, and threads that wait for each other stall on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fresh_weights(widths: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    weights: list[Tensor] = []
    for fan_in, fan_out in pairwise(widths):
        bound = (6.0 / fan_in) ** 0.5 if fan_out != widths[-1] else (3.0 / fan_in) ** 0.5  # He, for ReLU
        weights.append((torch.rand(fan_in, fan_out, generator=generator) * 2 - 1) * bound)
        weights.append(torch.zeros(fan_out))
    weights[4] = weights[4].mT.contiguous()
    return weights


def _forward(batch: Tensor, weights: list[Tensor]) -> Tensor:
    first, bias_1, second, bias_2, third, bias_3 = weights
    hidden = torch.relu(torch.addmm(bias_1, batch, first))
    hidden = torch.relu(torch.addmm(bias_2, hidden, second))
    return torch.addmm(bias_3, hidden, third.mT)


def _split(targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Hold out a tenth of each class; a class with fewer than ten rows keeps all of them for training."""
    held_out = torch.zeros(len(targets), dtype=torch.bool)
    for label in torch.unique(targets):
        rows = torch.nonzero(targets == label).flatten()
        rows = rows[torch.randperm(len(rows), generator=generator)]
        held_out[rows[: int(_HOLD_OUT * len(rows))]] = True
    return torch.nonzero(~held_out).flatten(), torch.nonzero(held_out).flatten()
