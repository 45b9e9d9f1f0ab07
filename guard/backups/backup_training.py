"""Train a backup on few clean images: augmentation, early stopping, pruned weights that stay away, distillation."""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from guard.backups.augmentation import Augmentation
from guard.backups.clean_set import CleanSet, check_images
from guard.errors import DataError, SuspectModelError
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of
from guard.types import Float32Array, FloatArray, IntArray

#: Called with the share done, in [0, 1].
Report = Callable[[float], None]


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a network learns from a `CleanSet`.

    Attributes
    ----------
    epochs : int
        Passes over the images at most, >= 1; the learning rate falls along a cosine to almost 0 by the last.
    patience : int
        Epochs without a lower loss on the held-out images after which training ends, >= 1.
    batch_size : int
        Images per step, >= 1.
    learning_rate, weight_decay : float
        AdamW's; > 0 and >= 0.
    augmentation : Augmentation or None
    """

    epochs: int = 60
    patience: int = 15
    batch_size: int = 64
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    augmentation: Augmentation | None = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        if min(self.epochs, self.patience, self.batch_size) < 1:
            raise DataError(
                f"epochs, patience and batch_size must be >= 1, got {self.epochs}, {self.patience}, {self.batch_size}."
            )
        if not self.learning_rate > 0.0 or not self.weight_decay >= 0.0:
            raise DataError(
                f"learning_rate must be > 0 and weight_decay >= 0, got {self.learning_rate} and {self.weight_decay}."
            )


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Images without a true label, and what another network said of them, for distillation.

    Only unflagged inputs belong here: a triggered one would teach the attacker's label.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    logits : ndarray of shape (n, n_classes)
    weight : float
        Of their loss beside that of the labelled images, > 0.
    temperature : float
        By which both logits are divided, > 0.
    """

    images: Float32Array
    logits: FloatArray
    weight: float = 0.5
    temperature: float = 2.0

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.logits.ndim != 2 or len(self.logits) != len(self.images) or not np.isfinite(self.logits).all():
            raise DataError(
                f"logits must be finite, of shape ({len(self.images)}, n_classes), one row per image, got shape "
                f"{self.logits.shape}."
            )
        if not (self.weight > 0.0 and self.temperature > 0.0):
            raise DataError(f"weight and temperature must be > 0, got {self.weight} and {self.temperature}.")


@dataclass(frozen=True, slots=True)
class FitReport:
    """How a training went.

    Attributes
    ----------
    epochs_run, best_epoch : int
        Counted from 1; the weights are those of the best epoch. 0 is best where no epoch was better than the start.
    held_out_accuracy : float
        Of the best epoch, on held-out images, a fraction.
    seconds : float
    """

    epochs_run: int
    best_epoch: int
    held_out_accuracy: float
    seconds: float


def fit_network(
    module: nn.Module,
    clean: CleanSet,
    settings: FitSettings,
    *,
    seed: int,
    keep: Mapping[str, Tensor] | None = None,
    freeze_statistics: bool = False,
    traffic: Traffic | None = None,
    progress: Report | None = None,
) -> FitReport:
    """Train a module in place, give it the weights of its best epoch, and leave it in eval mode.

    Best is the lowest loss on the held-out images. The global random state of torch is left as it was found.

    Parameters
    ----------
    module : Module
        Takes float32 (n, channels, height, width), gives logits.
    clean : CleanSet
    settings : FitSettings
    seed : int
        Of the order, the augmentation and what is random inside the module.
    keep : mapping of str to bool Tensor, optional
        Of some parameters, by name, the entries that may change; the others stay as they are.
    freeze_statistics : bool
        Leave the running statistics of batch normalisation alone: a few hundred images would spoil them.
    traffic : Traffic, optional
        To distil from as well.
    progress : callable, optional

    Raises
    ------
    DataError
        If the loss is no longer finite, or the traffic's logits do not fit.
    """
    started = time.perf_counter()
    run = _Run(module, clean, settings, seed, keep or {}, freeze_statistics, traffic)
    least, best_epoch, epoch = np.inf, 0, 0
    best = copy.deepcopy(module.state_dict())
    try:
        with torch.random.fork_rng(devices=[run.device] if run.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for epoch in range(1, settings.epochs + 1):
                run.learn(epoch)
                held_out = predict_logits(module, clean.held_out_images)
                loss = float(F.cross_entropy(torch.from_numpy(held_out), torch.tensor(clean.held_out_labels)))
                if loss < least:
                    least, best_epoch, best = loss, epoch, copy.deepcopy(module.state_dict())
                if progress is not None:
                    progress(epoch / settings.epochs)
                if epoch - best_epoch >= settings.patience:
                    break
    finally:
        run.end()
        module.load_state_dict(best)
    if not best_epoch:
        raise DataError("training diverged: no epoch had a finite loss on the held-out images. Lower learning_rate.")
    reached = accuracy_of(module, clean.held_out_images, clean.held_out_labels)
    return FitReport(epoch, best_epoch, reached, time.perf_counter() - started)


class _Run:
    """What one training of a module needs in every step: optimiser, order of the images, entries that stay."""

    def __init__(
        self,
        module: nn.Module,
        clean: CleanSet,
        settings: FitSettings,
        seed: int,
        keep: Mapping[str, Tensor],
        freeze_statistics: bool,
        traffic: Traffic | None,
    ) -> None:
        if traffic is not None and (columns := traffic.logits.shape[1]) != clean.n_classes:
            raise DataError(f"the traffic's logits have {columns} columns for {clean.n_classes} classes.")
        self.module, self.settings, self.freeze_statistics, self.traffic = module, settings, freeze_statistics, traffic
        self.device = device_of(module)
        self.order = torch.Generator().manual_seed(seed)
        self.x, self.y = torch.tensor(clean.images), torch.tensor(clean.labels)
        parameters = dict(module.named_parameters())
        self.kept = [  # parameter, entries that may change, values of the others
            (parameters[name], mask.to(self.device), parameters[name].detach().clone()) for name, mask in keep.items()
        ]
        self.handles = [
            parameter.register_hook(functools.partial(torch.mul, mask))  # type: ignore[no-untyped-call]
            for parameter, mask, _ in self.kept
        ]
        rate, decay = settings.learning_rate, settings.weight_decay
        self.optimizer = torch.optim.AdamW(module.parameters(), rate, weight_decay=decay)
        steps = settings.epochs * -(-len(self.x) // settings.batch_size)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=steps)

    def learn(self, epoch: int) -> None:
        """Go once over the images; leaves the module in eval mode. DataError if the loss is no longer finite."""
        self.module.train()
        for inner in self.module.modules():
            if self.freeze_statistics and isinstance(inner, _BatchNorm):
                inner.eval()
        for rows in torch.split(torch.randperm(len(self.x), generator=self.order), self.settings.batch_size):
            images = self._augmented(self.x[rows])
            if len(rows) == 1 and not self.freeze_statistics:
                continue  # batch normalisation has no variance of one row
            loss = F.cross_entropy(self._logits(images), self.y[rows].to(self.device))
            if self.traffic is not None:
                loss = loss + self.traffic.weight * self._distillation(self.traffic)
            if not torch.isfinite(loss):
                raise DataError(
                    f"training diverged in epoch {epoch}: the loss is no longer finite. Lower learning_rate "
                    f"(now {self.settings.learning_rate:g}), or look for bad images."
                )
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            self.schedule.step()
            with torch.no_grad():  # undo what weight decay did to entries that must not change
                for parameter, mask, value in self.kept:
                    parameter.copy_(torch.where(mask, parameter, value))
        self.module.eval()

    def end(self) -> None:
        """Leave the module in eval mode, without hooks and gradients."""
        for handle in self.handles:
            handle.remove()
        self.module.zero_grad(set_to_none=True)
        self.module.eval()

    def _augmented(self, images: Tensor) -> Tensor:
        augmentation = self.settings.augmentation
        return (images if augmentation is None else augmentation(images, self.order)).to(self.device)

    def _logits(self, images: Tensor) -> Tensor:
        return logits_of(self.module(images), output_place(self.module))

    def _distillation(self, traffic: Traffic) -> Tensor:
        """Return how far the module is from what the other network said of some of its images."""
        rows = torch.randint(len(traffic.images), (self.settings.batch_size,), generator=self.order).numpy()
        logits = self._logits(self._augmented(torch.tensor(traffic.images[rows]))) / traffic.temperature
        said = torch.tensor(traffic.logits[rows]).float().to(self.device)
        wanted = F.softmax(said / traffic.temperature, dim=1)
        return F.kl_div(F.log_softmax(logits, dim=1), wanted, reduction="batchmean") * traffic.temperature**2


def predict_logits(module: nn.Module, images: Float32Array | Tensor, batch_size: int = 256) -> Float32Array:
    """Return a module's logits, shape (n, n_classes), float32; its mode and the images are left as they are."""
    device = device_of(module)
    parts = []
    with torch.no_grad():
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            if isinstance(batch, Tensor):
                copied = batch.detach().to(device, torch.float32, copy=True)
            else:
                copied = torch.tensor(np.asarray(batch, dtype=np.float32)).to(device)
            parts.append(logits_of(module(copied), output_place(module)).float().cpu())
    return torch.cat(parts).numpy()


def accuracy_of(module: nn.Module, images: Float32Array, labels: IntArray) -> float:
    """Return the share of images that get their label, a fraction."""
    return float((predict_logits(module, images).argmax(axis=1) == labels).mean())


def copy_network(module: nn.Module) -> nn.Module:
    """Return a float32 copy in eval mode whose parameters can be trained, without the hooks of a guard that watches.

    Raises
    ------
    SuspectModelError
        If the network cannot be copied.
    """
    twin = _deep_copy(module)
    for inner in twin.modules():
        for hooks in (inner._forward_pre_hooks, inner._forward_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__module__", "").startswith("guard.")]:
                del hooks[key]
    for parameter in twin.float().parameters():
        parameter.requires_grad_()
    return twin.eval()


def _deep_copy(module: nn.Module, attempts: int = 3) -> nn.Module:
    try:
        return copy.deepcopy(module)
    except Exception as error:
        if attempts > 1 and isinstance(error, RuntimeError):  # a server may be putting its hooks on just now
            return _deep_copy(module, attempts - 1)
        raise SuspectModelError(
            f"the suspect model cannot be copied, so no twin can be made: {type(error).__name__}: {error}."
        ) from error
