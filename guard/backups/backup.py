"""One backup: a second opinion on images, made from clean ones, and kept as arrays beside a short description."""

from __future__ import annotations

import difflib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from guard.backups.clean_set import CleanSet, check_images
from guard.backups.defective import DefectiveSettings, make_defective, train_defective
from guard.backups.network import backup_cnn
from guard.backups.purify import METHODS, purify
from guard.backups.training import Report, copy_network, predict_logits
from guard.errors import BundleError, ConfigError
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
    network : Module
        In eval mode.
    description : dict
        Ready for JSON: what `restore` needs to build the network again, and its clean accuracy on images held out.
    seconds : float
        That its training took; 0 for one that was restored.
    """

    kind: str
    network: nn.Module
    description: dict[str, Any]
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
            `DefectiveSettings`, or those of the method in `guard.backups.purify.METHODS`.
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
            return cls(kind, done.twin, about, time.perf_counter() - started)
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
        return cls(kind, network, about, time.perf_counter() - started)

    def logits(self, images: Float32Array) -> Float32Array:
        """Return logits, shape (n, n_classes), of images (n, channels, height, width)."""
        return predict_logits(self.network, images)

    def arrays(self) -> dict[str, AnyArray]:
        """Return all weights and buffers, by name."""
        return {name: tensor.detach().cpu().numpy() for name, tensor in self.network.state_dict().items()}

    @classmethod
    def restore(cls, description: Mapping[str, Any], arrays: Mapping[str, AnyArray], module: nn.Module | None) -> Self:
        """Return the backup from its description and arrays.

        Parameters
        ----------
        description, arrays
            As `train` and `arrays` gave them.
        module : Module or None
            The suspect model, whose architecture a twin has; a defective network needs none.

        Raises
        ------
        BundleError
            If a twin has no suspect model to be built on, or description and arrays do not fit.
        """
        kind = str(description.get("kind"))
        if kind not in BACKUP_KINDS:
            raise BundleError(f"unknown backup {kind!r}: known are {', '.join(BACKUP_KINDS)}. Upgrade backdoor-guard.")
        if kind != DEFECTIVE and module is None:
            raise BundleError(f"backup {kind!r} is a twin of the suspect model: load the bundle with a suspect model.")
        try:
            network = _defective(description, 0) if kind == DEFECTIVE or module is None else copy_network(module)
            network.load_state_dict({name: torch.tensor(array) for name, array in arrays.items()})
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            line = " ".join(str(error).split())[:160]
            raise BundleError(
                f"backup {kind!r} cannot be built again ({line}). Fit again with this version."
            ) from error
        return cls(kind, network.eval(), dict(description))


def check_kind(kind: str) -> None:
    """Refuse what is no kind of backup; ConfigError names the closest known one."""
    if kind not in BACKUP_KINDS:
        close = difflib.get_close_matches(kind, BACKUP_KINDS, n=1)
        hint = f"Did you mean {close[0]!r}?" if close else f"Known are {', '.join(BACKUP_KINDS)}."
        raise ConfigError(f"there is no backup {kind!r}. {hint}")


def _defective(about: Mapping[str, Any], seed: int) -> nn.Module:
    channels, height, width = about["image_shape"]
    network = backup_cnn(about["n_classes"], channels, (height, width), seed)
    return make_defective(
        network,
        about["keep_probability"],
        image_shape=(channels, height, width),
        variant=about["variant"],
        seed=seed,
    )
