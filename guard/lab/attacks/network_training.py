"""Train a small classifier: whole-set tensor indexing, a schedule, augmentation, checkpoints, an early stop."""

from __future__ import annotations

import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError
from guard.files import whole_file
from guard.suspect.recording import device_of
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
        Wall-clock time of the training, goals included; of all parts, where it was interrupted and resumed.
    losses : tuple of float
        Mean cross-entropy of each epoch, in nats.
    reached : mapping of str to float
        Accuracy on each goal at the end, in [0, 1].
    stopped_early : bool
        True if all goals were met, and had settled, before the last epoch.
    """

    epochs_run: int
    seconds: float
    losses: tuple[float, ...]
    reached: Mapping[str, float] = field(default_factory=dict)
    stopped_early: bool = False


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """Everything about a training that is no data; together with a seed it repeats it.

    Attributes
    ----------
    epochs : int
        Passes over the data, >= 1; the learning rate falls to almost 0 by the last.
    batch_size : int
        Images per step, >= 1.
    optimizer : {"adam", "sgd"}
        `"sgd"` has Nesterov momentum of 0.9.
    schedule : {"one_cycle", "cosine"}
        Of the learning rate: up and down, or down from the start, as suits weights that are trained already.
    learning_rate : float
        The highest, > 0.
    weight_decay : float
        As the optimiser takes it, >= 0.
    precision : {"float32", "bfloat16"}
        Of the forward pass; weights stay float32. bfloat16 halves the time on processors that have it.
    settled_epochs : int
        Training stops early once all goals are met and none has moved by more than `settled_tolerance` over this many
        epochs, >= 0; 0 stops at once.
    settled_tolerance : float
        A difference of accuracies, > 0.
    """

    epochs: int
    batch_size: int = 64
    optimizer: Literal["adam", "sgd"] = "adam"
    schedule: Literal["one_cycle", "cosine"] = "one_cycle"
    learning_rate: float = 4e-3
    weight_decay: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    settled_epochs: int = 0
    settled_tolerance: float = 0.003

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise DataError(f"epochs and batch_size must be >= 1, got {self.epochs} and {self.batch_size}.")
        if not self.learning_rate > 0.0 or not self.weight_decay >= 0.0:
            raise DataError(
                f"learning_rate must be > 0 and weight_decay >= 0, got {self.learning_rate} and {self.weight_decay}."
            )
        for name, known in (("optimizer", _OPTIMIZERS), ("schedule", _SCHEDULES), ("precision", _PRECISIONS)):
            if getattr(self, name) not in known:
                raise DataError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.settled_epochs < 0 or not self.settled_tolerance > 0.0:
            raise DataError(
                f"settled_epochs must be >= 0 and settled_tolerance > 0, "
                f"got {self.settled_epochs} and {self.settled_tolerance}."
            )


_OPTIMIZERS = ("adam", "sgd")
_SCHEDULES = ("one_cycle", "cosine")
_PRECISIONS = ("float32", "bfloat16")

#: Called before every epoch with a generator of its own; gives the images that this epoch sees, in the same order.
Redraw = Callable[[np.random.Generator], Float32Array]
#: Takes logits (n, n_classes), the labels trained on, (n,), and the rows of the training set, (n,); gives one number.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def train_classifier(
    module: nn.Module,
    images: Float32Array,
    labels: IntArray,
    settings: TrainingSettings,
    *,
    seed: int,
    n_threads: int | None = None,
    goals: Mapping[str, Goal] | None = None,
    redraw: Redraw | None = None,
    loss: Loss | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[EpochReport], None] | None = None,
) -> TrainingReport:
    """Train a module in place with cross-entropy, or another loss, and leave it in eval mode.

    The same start weights, data, settings, seed and thread count give the same weights again, interrupted or not. The
    global random state of torch is left as it was found. Runs where the module's parameters are.

    Parameters
    ----------
    module : nn.Module
        Takes float32 (n, channels, height, width), gives logits (n, n_classes).
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64
    settings : TrainingSettings
    seed : int
        Orders the data, and seeds `redraw` and what is random inside the module (dropout).
    n_threads : int, optional
        CPU threads while training, >= 1; afterwards torch has as many as before. None leaves them alone. For a small
        network 1 is wise: two threads that wait for each other at every step took 40 times as long, once, on two cores
        that other programs used too.
    goals : mapping of str to Goal, optional
        Measured after every epoch; when all are met and have settled, training stops.
    redraw : callable, optional
        Takes a generator, returns the images of the coming epoch, shape as `images`: augmentation.
    loss : callable, optional
        In the place of cross-entropy: of the batch whose forward pass was the latest. What it remembers by itself is
        not in the checkpoint.
    checkpoint : path, optional
        Written after every epoch. If it is there already, training goes on from it; delete it when done. Its folder
        must exist. It is read without unpickling code.
    progress : callable, optional
        Called with an `EpochReport` after every epoch.

    Raises
    ------
    DataError
        If an argument breaks a rule, `redraw` gives other shapes, the checkpoint is damaged or of another training, or
        the loss is no longer finite.

    References
    ----------
    .. [1] Smith, Topin (2018), Super-Convergence (arXiv 1708.07120): the one-cycle schedule.
    """
    _check(images, labels, seed, n_threads, checkpoint)
    goals = dict(goals or {})
    started = time.perf_counter()
    device = device_of(module)
    x, y = _tensor(images).to(device, memory_format=torch.channels_last), _tensor(labels).to(device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter less time on CPU
    run = _Run(module, settings, -(-len(images) // settings.batch_size), seed)
    with _threads(n_threads), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        checksums = [zlib.crc32(np.ascontiguousarray(array).data) for array in (images, labels)]
        fingerprint = [str(asdict(settings)), seed, list(images.shape), checksums, list(goals)]
        if loss is not None:
            fingerprint.append(type(loss).__name__)
        if checkpoint is not None and checkpoint.exists():
            run.restore(checkpoint, fingerprint)
        before = run.seconds
        try:
            while run.epoch < settings.epochs and not run.is_done(goals):
                run.epoch += 1
                if redraw is not None:
                    drawn = _redrawn(redraw, images.shape, [seed, run.epoch])
                    x = _tensor(drawn).to(device, memory_format=torch.channels_last)
                run.losses.append(_run_epoch(run, x, y, loss))
                module.eval()
                reached = {name: accuracy(module, goal.images, goal.labels) for name, goal in goals.items()}
                run.history.append(reached)
                run.seconds = before + time.perf_counter() - started
                if checkpoint is not None:
                    run.save(checkpoint, fingerprint)
                if progress is not None:
                    progress(EpochReport(run.epoch, settings.epochs, run.losses[-1], dict(reached)))
        finally:
            module.eval()
            module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as safetensors wants it
    seconds = before + time.perf_counter() - started
    reached = run.history[-1] if run.history else {}
    return TrainingReport(run.epoch, seconds, tuple(run.losses), reached, stopped_early=run.epoch < settings.epochs)


class _Run:
    """What changes while a network is trained: all of it goes into the checkpoint."""

    def __init__(self, module: nn.Module, settings: TrainingSettings, steps_per_epoch: int, seed: int) -> None:
        self.module = module
        self.device = device_of(module)
        self.settings = settings
        self.optimizer = _optimizer(module, settings)
        self.schedule = _schedule(self.optimizer, settings, settings.epochs * steps_per_epoch)
        self.order = torch.Generator().manual_seed(seed)
        self.epoch = 0
        self.seconds = 0.0
        self.losses: list[float] = []
        self.history: list[dict[str, float]] = []

    def is_done(self, goals: Mapping[str, Goal]) -> bool:
        """All goals are met, and none has moved lately."""
        if not goals or not self.history:
            return False
        now, span = self.history[-1], self.history[-1 - self.settings.settled_epochs :]
        if len(span) <= self.settings.settled_epochs or any(now[name] < goal.at_least for name, goal in goals.items()):
            return False
        moved = (max(values) - min(values) for values in ([then[name] for then in span] for name in goals))
        return all(distance <= self.settings.settled_tolerance for distance in moved)

    def save(self, path: Path, fingerprint: list[Any]) -> None:
        state = {
            "fingerprint": fingerprint,
            "module": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "order": self.order.get_state(),
            "random": torch.get_rng_state(),
            "gpu_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "counts": [self.epoch, self.seconds, self.losses, self.history],
        }
        with whole_file(path) as file:
            torch.save(state, file)

    def restore(self, path: Path, fingerprint: list[Any]) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not compare checksums
            if damaged is not None:
                raise zipfile.BadZipFile(damaged)
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state["fingerprint"]
            if found == fingerprint:
                self._take(state)
        except Exception as error:  # what a damaged file raises has no end: pickle, zip, key, type, value errors
            raise DataError(
                f"checkpoint {path} cannot be read ({type(error).__name__}). Delete it to start anew."
            ) from error
        if found != fingerprint:
            raise DataError(f"checkpoint {path} is of another training: {found}, not {fingerprint}. Delete it.")

    def _take(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.order.set_state(state["order"])
        torch.set_rng_state(state["random"])
        if self.device.type == "cuda" and state["gpu_random"] is not None:
            torch.cuda.set_rng_state(state["gpu_random"], self.device)
        self.epoch, self.seconds, self.losses, self.history = state["counts"]


def _optimizer(module: nn.Module, settings: TrainingSettings) -> torch.optim.Optimizer:
    # float(): a NumPy number would be pickled into the checkpoint, which then could not be read.
    rate, decay = float(settings.learning_rate), float(settings.weight_decay)
    if settings.optimizer == "adam":
        return torch.optim.Adam(module.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _schedule(
    optimizer: torch.optim.Optimizer, settings: TrainingSettings, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if settings.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=float(settings.learning_rate), total_steps=steps)


def accuracy(module: nn.Module, images: Float32Array, labels: IntArray, batch_size: int = 100) -> float:
    """Return the share of images that the module gives their label, in [0, 1]."""
    if len(images) == 0 or len(images) != len(labels):
        raise DataError(f"accuracy needs as many labels as images, and at least one, got {len(labels)}, {len(images)}.")
    return float((predict_labels(module, images, batch_size) == labels).mean())


def predict_labels(module: nn.Module, images: Float32Array, batch_size: int = 100) -> IntArray:
    """Return the module's most likely label per image, shape (n,), int64; the module's mode is left as it is."""
    device = device_of(module)
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


def _redrawn(redraw: Redraw, shape: tuple[int, ...], seed: list[int]) -> Float32Array:
    drawn = redraw(np.random.default_rng(seed))
    if drawn.shape != shape or drawn.dtype != np.float32:
        raise DataError(f"redraw must give float32 {shape}, got {drawn.dtype} {drawn.shape}.")
    return drawn


def _run_epoch(run: _Run, x: Tensor, y: Tensor, loss_of: Loss | None) -> float:
    """Go once over x, (n, channels, height, width), and y, (n,); return the mean loss."""
    run.module.train()
    total = torch.zeros((), device=x.device)
    half = run.settings.precision == "bfloat16"
    for rows in torch.split(torch.randperm(len(x), generator=run.order).to(x.device), run.settings.batch_size):
        run.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=half):
            logits = run.module(x[rows])
            loss = nn.functional.cross_entropy(logits, y[rows]) if loss_of is None else loss_of(logits, y[rows], rows)
        loss.backward()  # type: ignore[no-untyped-call]
        run.optimizer.step()
        run.schedule.step()
        total += loss.detach() * len(rows)
    if not torch.isfinite(total):
        raise DataError("the training loss is no longer finite. Lower learning_rate or look for bad images.")
    return total.item() / len(x)


def _check(images: Float32Array, labels: IntArray, seed: int, n_threads: int | None, checkpoint: Path | None) -> None:
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0:
        raise DataError(
            f"images must be float32 (n, channels, height, width) with n >= 1, got {images.dtype} {images.shape}."
        )
    if labels.dtype != np.int64 or labels.shape != (len(images),):
        raise DataError(f"labels must be int64 of shape ({len(images)},), got {labels.dtype} {labels.shape}.")
    if n_threads is not None and n_threads < 1:
        raise DataError(f"n_threads must be >= 1, got {n_threads}.")
    if seed < 0:
        raise DataError(f"seed must be >= 0, got {seed}.")
    if checkpoint is not None and not checkpoint.parent.is_dir():
        raise DataError(f"checkpoint {checkpoint} has no folder to be in. Make {checkpoint.parent}.")
