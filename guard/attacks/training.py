"""Train a small classifier on one machine without a GPU: whole-set tensor indexing, Adam, one-cycle learning rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError
from guard.types import AnyArray, Float32Array, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Goal:
    """Accuracy to reach on held-out images; training stops when all goals are met.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64
        The labels that the network should give; for a backdoor, the attacker's.
    at_least : float
        Share of the images that must get their label, in (0, 1].
    """

    images: Float32Array
    labels: IntArray
    at_least: float

    def __post_init__(self) -> None:
        if not 0.0 < self.at_least <= 1.0:
            raise DataError(f"at_least must be in (0, 1], got {self.at_least}.")


@dataclass(frozen=True, slots=True)
class EpochReport:
    """What `progress` is called with after every epoch.

    Attributes
    ----------
    epoch, epochs : int
        This epoch, counted from 1, and how many there will be at most.
    loss : float
        Mean cross-entropy over the epoch, in nats.
    reached : mapping of str to float
        Accuracy on each goal after this epoch, in [0, 1].
    """

    epoch: int
    epochs: int
    loss: float
    reached: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How a training went.

    Attributes
    ----------
    epochs_run : int
    seconds : float
        Wall-clock time of the training, goals included.
    losses : tuple of float
        Mean cross-entropy of each epoch, in nats.
    reached : mapping of str to float
        Accuracy on each goal at the end, in [0, 1].
    stopped_early : bool
        True if all goals were met before the last epoch.
    """

    epochs_run: int
    seconds: float
    losses: tuple[float, ...]
    reached: Mapping[str, float] = field(default_factory=dict)
    stopped_early: bool = False


def train_classifier(
    module: nn.Module,
    images: Float32Array,
    labels: IntArray,
    *,
    epochs: int,
    batch_size: int = 64,
    learning_rate: float = 4e-3,
    weight_decay: float = 0.0,
    seed: int,
    n_threads: int | None = None,
    goals: Mapping[str, Goal] | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> TrainingReport:
    """Train a module in place with cross-entropy, Adam and a one-cycle learning rate, and leave it in eval mode.

    The same start weights, data, settings, seed and thread count give the same weights again. The global random state
    of torch is left as it was found. Runs where the module's parameters are.

    Parameters
    ----------
    module : nn.Module
        Takes float32 (n, channels, height, width), gives logits (n, n_classes).
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64
    epochs : int
        Passes over the data, >= 1; the learning rate falls to almost 0 by the last.
    batch_size : int
        Images per step, >= 1.
    learning_rate : float
        Highest learning rate of the cycle, > 0.
    weight_decay : float
        As Adam takes it, >= 0.
    seed : int
        Orders the data, and seeds what is random inside the module (dropout).
    n_threads : int, optional
        CPU threads while training, >= 1; afterwards torch has as many as before. None leaves them alone. For a small
        network 1 is wise: two threads that wait for each other at every step took 40 times as long, once, on two cores
        that other programs used too.
    goals : mapping of str to Goal, optional
        Measured after every epoch; when all are met, training stops.
    progress : callable, optional
        Called with an `EpochReport` after every epoch.

    Raises
    ------
    DataError
        If an argument breaks a rule, or the loss is no longer finite.

    References
    ----------
    .. [1] Smith, Topin (2018), Super-Convergence (arXiv 1708.07120): the one-cycle schedule.
    """
    _check(images, labels, epochs, batch_size, learning_rate, weight_decay)
    if n_threads is not None and n_threads < 1:
        raise DataError(f"n_threads must be >= 1, got {n_threads}.")
    goals = dict(goals or {})
    started = time.perf_counter()
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    x = _tensor(images).to(device, memory_format=torch.channels_last)
    y = _tensor(labels).to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter less time on CPU
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=epochs * -(-len(images) // batch_size)
    )
    losses: list[float] = []
    reached: dict[str, float] = {}
    with _threads(n_threads), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        order = torch.Generator().manual_seed(seed)
        try:
            for epoch in range(1, epochs + 1):
                module.train()
                losses.append(_run_epoch(module, x, y, batch_size, optimizer, schedule, order))
                module.eval()
                reached = {name: accuracy(module, goal.images, goal.labels) for name, goal in goals.items()}
                if progress is not None:
                    progress(EpochReport(epoch, epochs, losses[-1], dict(reached)))
                if goals and all(reached[name] >= goal.at_least for name, goal in goals.items()):
                    break
        finally:
            module.eval()
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as safetensors wants it
    seconds = time.perf_counter() - started
    return TrainingReport(len(losses), seconds, tuple(losses), reached, stopped_early=len(losses) < epochs)


def accuracy(module: nn.Module, images: Float32Array, labels: IntArray, batch_size: int = 500) -> float:
    """Return the share of images that the module gives their label, in [0, 1]."""
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"accuracy needs as many labels as images, and at least one, got {len(labels)}, {len(images)}.")
    return float((predict_labels(module, images, batch_size) == labels).mean())


def predict_labels(module: nn.Module, images: Float32Array, batch_size: int = 500) -> IntArray:
    """Return the module's most likely label per image, shape (n,), int64; the module's mode is left as it is."""
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        batches = torch.split(_tensor(images), batch_size)
        parts = [module(batch.to(device)).argmax(dim=1).cpu() for batch in batches]
    return torch.cat(parts).numpy().astype(np.int64, copy=False)


@contextmanager
def _threads(n_threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if n_threads is not None:
        torch.set_num_threads(n_threads)
    try:
        yield
    finally:
        if n_threads is not None:
            torch.set_num_threads(before)


def _tensor(array: AnyArray) -> Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of read-only memory


def _run_epoch(
    module: nn.Module,
    x: Tensor,  # (n, channels, height, width)
    y: Tensor,  # (n,)
    batch_size: int,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    order: torch.Generator,
) -> float:
    total = 0.0
    for rows in torch.split(torch.randperm(len(x), generator=order).to(x.device), batch_size):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(module(x[rows]), y[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        total += loss.item() * len(rows)
    if not np.isfinite(total):
        raise DataError("the training loss is no longer finite. Lower learning_rate or look for bad images.")
    return total / len(x)


def _check(
    images: Float32Array, labels: IntArray, epochs: int, batch_size: int, learning_rate: float, weight_decay: float
) -> None:
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0:
        raise DataError(
            f"images must be float32 (n, channels, height, width) with n >= 1, got {images.dtype} {images.shape}."
        )
    if labels.dtype != np.int64 or labels.shape != (len(images),):
        raise DataError(f"labels must be int64 of shape ({len(images)},), got {labels.dtype} {labels.shape}.")
    if epochs < 1 or batch_size < 1:
        raise DataError(f"epochs and batch_size must be >= 1, got {epochs} and {batch_size}.")
    if not learning_rate > 0.0 or not weight_decay >= 0.0:
        raise DataError(f"learning_rate must be > 0 and weight_decay >= 0, got {learning_rate} and {weight_decay}.")
