"""One backup: a second opinion on images, made from clean ones, and kept as arrays beside a short description."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from guard.backups.backup_training import Report, copy_network, predict_logits
from guard.backups.clean_set import CleanSet, check_images
from guard.backups.defective import DefectiveSettings, make_defective, train_defective
from guard.backups.network import backup_cnn
from guard.backups.purified_twin import METHODS, purify
from guard.errors import BundleError, ConfigError, did_you_mean
from guard.statistics.calibration import stratified_folds
from guard.suspect.recording import device_of
from guard.types import AnyArray, Float32Array, IntArray

DEFECTIVE = "defective"
#: Every kind of backup: a network of its own, or a purified twin of the suspect model.
BACKUP_KINDS = (DEFECTIVE, *METHODS)


@dataclass(frozen=True, slots=True, eq=False)
class Backup:
    """A network that gives a second opinion.

    Attributes
    ----------
    kind : str
        One of `BACKUP_KINDS`.
    network : Module or None
        In eval mode; None for a twin that was restored without the suspect model, which can only be stored again.
    description : dict
        Ready for JSON: what `restore` needs to build the network again, its clean accuracy on images held out, and its
        cost in multiply-adds per image beside that of the suspect model.
    stored : mapping of str to ndarray
        Weights and buffers of a backup without a network, by name.
    seconds : float
        That its training took; 0 for one that was restored.
    """

    kind: str
    network: nn.Module | None
    description: dict[str, Any]
    stored: Mapping[str, AnyArray] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def train(
        cls,
        kind: str,
        module: nn.Module,
        clean_images: Float32Array,
        clean_labels: IntArray,
        *,
        settings: Any = None,
        seed: int = 0,
        progress: Report | None = None,
    ) -> Self:
        """Make a backup from clean images.

        Parameters
        ----------
        kind : str
        module : Module
            The suspect model; not changed. A defective network takes nothing from it but the number of classes.
        clean_images : ndarray of shape (n, channels, height, width), float32
            What the suspect model takes; at least five of every class.
        clean_labels : ndarray of shape (n,), int
        settings : object, optional
            `DefectiveSettings`, or those of the method in `guard.backups.purified_twin.METHODS`.
        seed : int
        progress : callable, optional

        Raises
        ------
        ConfigError
            If there is no such kind, or the settings are of another one.
        DataError, SuspectModelError
            As `purify` and `train_defective` raise them.
        """
        check_kind(kind)
        started = time.perf_counter()
        if kind != DEFECTIVE:
            done = purify(module, clean_images, clean_labels, kind, settings=settings, seed=seed, progress=progress)
            about = {"kind": kind, "clean_accuracy": done.report.clean_accuracy_after}
            about["cost"] = _cost(done.twin, module, clean_images[:1])
            return cls(kind, done.twin, about, seconds=time.perf_counter() - started)
        chosen = DefectiveSettings() if settings is None else settings
        if not isinstance(chosen, DefectiveSettings):
            raise ConfigError(f"backup 'defective' takes DefectiveSettings, got {type(settings).__name__}.")
        images = np.asarray(clean_images)
        check_images(images)
        n_classes = predict_logits(copy_network(module), images[:1]).shape[1]
        clean = CleanSet.split(images, clean_labels, n_classes, seed)
        about = {
            "kind": kind,
            "n_classes": n_classes,
            "image_shape": list(images.shape[1:]),
            "keep_probability": chosen.keep_probability,
            "variant": chosen.variant,
        }
        network = _defective(about, seed)
        report = train_defective(network, clean, chosen.fit, seed=seed, progress=progress)
        about["clean_accuracy"] = report.held_out_accuracy
        about["cost"] = _cost(network, module, images[:1])
        return cls(kind, network.to(device_of(module)), about, seconds=time.perf_counter() - started)

    def logits(self, images: Float32Array | Tensor) -> Float32Array:
        """Return logits, shape (n, n_classes), of images (n, channels, height, width).

        Raises
        ------
        BundleError
            If it is a twin that was restored without the suspect model.
        """
        if self.network is None:
            raise BundleError(
                f"backup {self.kind!r} is a twin of the suspect model: load the bundle with a suspect model to ask it."
            )
        return predict_logits(self.network, images)

    def arrays(self) -> dict[str, AnyArray]:
        """Return all weights and buffers, by name."""
        if self.network is None:
            return dict(self.stored)
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()}

    @classmethod
    def restore(cls, description: Mapping[str, Any], arrays: Mapping[str, AnyArray], module: nn.Module | None) -> Self:
        """Return the backup from its description and arrays.

        Parameters
        ----------
        description, arrays
            As `train` and `arrays` gave them.
        module : Module or None
            The suspect model, whose architecture a twin has and on whose device the backup goes. A defective network
            needs none; a twin without it can be stored again, not asked.

        Raises
        ------
        BundleError
            If the kind is unknown, or description and arrays do not fit.
        """
        kind = str(description.get("kind"))
        if kind not in BACKUP_KINDS:
            raise BundleError(f"unknown backup {kind!r}: known are {', '.join(BACKUP_KINDS)}. Upgrade backdoor-guard.")
        if kind != DEFECTIVE and module is None:
            return cls(kind, None, dict(description), dict(arrays))
        try:
            network = _defective(description, 0) if kind == DEFECTIVE or module is None else copy_network(module)
            network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())[:160]
            raise BundleError(
                f"backup {kind!r} cannot be built again ({line}). Fit again with this version."
            ) from error
        return cls(kind, network.eval() if module is None else network.to(device_of(module)).eval(), dict(description))


def cross_fitted_logits(
    kind: str,
    module: nn.Module,
    clean_images: Float32Array,
    clean_labels: IntArray,
    *,
    folds: int,
    settings: Any = None,
    seed: int = 0,
    groups: IntArray | None = None,
    progress: Report | None = None,
) -> Float32Array:
    """Return logits of the clean images, shape (n, n_classes), each by a backup that has not learned from it.

    One backup is trained per fold, on the others; images of one number in `groups`, shape (n,), are in one fold. Other
    parameters and errors as for `Backup.train`.
    """
    part = stratified_folds(clean_labels, folds, seed, groups)
    logits: Float32Array | None = None
    for fold in range(folds):
        learn, hold = part != fold, part == fold
        backup = Backup.train(kind, module, clean_images[learn], clean_labels[learn], settings=settings, seed=seed)
        answers = backup.logits(clean_images[hold])
        logits = np.empty((len(part), answers.shape[1]), dtype=np.float32) if logits is None else logits
        logits[hold] = answers
        if progress is not None:
            progress((fold + 1) / folds)
    assert logits is not None  # there are folds
    return logits


def check_kind(kind: str) -> None:
    """Refuse what is no kind of backup; ConfigError names the closest known one."""
    if kind not in BACKUP_KINDS:
        raise ConfigError(f"there is no backup {kind!r}. {did_you_mean(kind, BACKUP_KINDS)}")


def _cost(network: nn.Module, suspect: nn.Module, image: Float32Array) -> dict[str, int]:
    return {"multiply_adds": _multiply_adds(network, image), "suspect_multiply_adds": _multiply_adds(suspect, image)}


def _multiply_adds(module: nn.Module, image: Float32Array) -> int:
    """Count those of one forward pass in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        predict_logits(copy_network(module), image)
    return int(counter.get_total_flops()) // 2


def _defective(about: Mapping[str, Any], seed: int) -> nn.Module:
    channels, height, width = about["image_shape"]
    network = backup_cnn(about["n_classes"], channels, (height, width), seed)
    return make_defective(
        network, about["keep_probability"], image_shape=(channels, height, width), variant=about["variant"], seed=seed
    )
