"""Purified twins: copies of the suspect model from which a backdoor was pruned or trained away, and how that went."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from guard.backups.anp import AnpSettings, prune_adversarially
from guard.backups.backup_training import Report, accuracy_of, copy_network, predict_logits
from guard.backups.clean_set import CleanSet, check_images
from guard.backups.last_layer import LastLayerSettings, retrain_last_layer
from guard.backups.pruning import FinePruningSettings, NormPruningSettings, prune_by_activation, prune_by_norm
from guard.backups.purification import CurvePoint, Purification
from guard.errors import ConfigError, DataError, did_you_mean
from guard.suspect.digest import weights_digest
from guard.types import Float32Array, IntArray

#: Name -> class of its settings, and what does it to a copy.
METHODS: dict[str, tuple[type[Any], Callable[..., Purification]]] = {
    "anp": (AnpSettings, prune_adversarially),
    "norm-pruning": (NormPruningSettings, prune_by_norm),
    "fine-pruning": (FinePruningSettings, prune_by_activation),
    "rtll": (LastLayerSettings, retrain_last_layer),
}


@dataclass(frozen=True, slots=True, eq=False)
class Probe:
    """More images to measure a network on; a method never sees them.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64
        Counted is who gets these: with the attacker's labels of triggered images that is the attack success rate, with
        their true labels the recovery accuracy.
    """

    images: Float32Array
    labels: IntArray

    def __post_init__(self) -> None:
        check_images(self.images)
        if self.labels.shape != (len(self.images),):
            raise DataError(f"a probe needs {len(self.images)} labels, one per image, got {self.labels.shape}.")

    def share(self, module: nn.Module) -> float:
        """Return the share of the images that get their label, a fraction."""
        return accuracy_of(module, self.images, self.labels)


@dataclass(frozen=True, slots=True)
class PurifyReport:
    """How a network was purified; rates are fractions, clean accuracy is of images that were held out.

    Attributes
    ----------
    method, settings, seed
        What was asked for.
    images, held_out : int
        Clean images that were learned from, and measured on.
    clean_accuracy_before, clean_accuracy_after : float
    per_class_before, per_class_after : tuple of float
        The same for each class.
    probes_before, probes_after : mapping of str to float
    units, pruned : int
        Neurons that the method looked at, and that it removed.
    curve : tuple of CurvePoint
        Clean accuracy and probes against threshold or share, before any fine-tuning; empty where there is none.
    seconds : float
    suspect_digest, twin_digest : str
        SHA-256 of the weights.
    notes : tuple of str
    """

    method: str
    settings: Mapping[str, Any]
    seed: int
    images: int
    held_out: int
    clean_accuracy_before: float
    clean_accuracy_after: float
    per_class_before: tuple[float, ...]
    per_class_after: tuple[float, ...]
    units: int
    pruned: int
    seconds: float
    suspect_digest: str
    twin_digest: str
    probes_before: Mapping[str, float] = field(default_factory=dict)
    probes_after: Mapping[str, float] = field(default_factory=dict)
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Purified:
    """A purified copy, in eval mode, and the report."""

    twin: nn.Module
    report: PurifyReport


def purify(
    module: nn.Module,
    clean_images: Float32Array,
    clean_labels: IntArray,
    method: str = "anp",
    *,
    settings: Any = None,
    seed: int = 0,
    probes: Mapping[str, Probe] | None = None,
    progress: Report | None = None,
) -> Purified:
    """Return a copy of a network from which a method has taken the backdoor, as far as it can.

    A fifth of each class is held out to measure the clean accuracy, and to say when fine-tuning ends. No method needs
    a triggered image. The network itself is never changed.

    Parameters
    ----------
    module : Module
        Takes float32 images (n, channels, height, width), gives logits.
    clean_images : ndarray of shape (n, channels, height, width), float32
        What the network takes, after any preprocessing; at least five of every class.
    clean_labels : ndarray of shape (n,), int
        True labels, 0-based.
    method : str
        A key of `METHODS`.
    settings : object, optional
        Of the class that belongs to the method; its defaults if left out.
    seed : int
    probes : mapping of str to Probe, optional
        Measured before, after, and along the curve.
    progress : callable, optional
        Called with the share done.

    Raises
    ------
    ConfigError
        If there is no such method, or the settings are of another one.
    DataError
        If images or labels break a rule, a class has too few images, or training diverges.
    SuspectModelError
        If the network cannot be copied, or the method does not fit it.
    """
    settings, run = _method(method, settings)
    started = time.perf_counter()
    images = np.asarray(clean_images)
    check_images(images)
    probes = probes or {}
    if "clean_accuracy" in probes:
        raise DataError("no probe can be named 'clean_accuracy': that is measured already. Choose another name.")
    before, twin = copy_network(module), copy_network(module)
    clean = CleanSet.split(images, clean_labels, predict_logits(before, images[:1]).shape[1], seed)

    def measure(network: nn.Module) -> dict[str, float]:
        right = accuracy_of(network, clean.held_out_images, clean.held_out_labels)
        return {"clean_accuracy": right, **{name: probe.share(network) for name, probe in probes.items()}}

    outcome = run(twin, clean, settings, seed, measure, progress or (lambda _share: None))
    twin.eval()
    seconds = time.perf_counter() - started
    rates_before, rates_after = measure(before), measure(twin)
    report = PurifyReport(
        method=method,
        settings=dataclasses.asdict(settings),
        seed=seed,
        images=len(clean.labels),
        held_out=len(clean.held_out_labels),
        clean_accuracy_before=rates_before.pop("clean_accuracy"),
        clean_accuracy_after=rates_after.pop("clean_accuracy"),
        per_class_before=_per_class(before, clean),
        per_class_after=_per_class(twin, clean),
        units=outcome.units,
        pruned=outcome.pruned,
        seconds=seconds,
        suspect_digest=weights_digest(module),
        twin_digest=weights_digest(twin),
        probes_before=rates_before,
        probes_after=rates_after,
        curve=outcome.curve,
        notes=outcome.notes,
    )
    return Purified(twin, report)


def _method(name: str, settings: Any) -> tuple[Any, Callable[..., Purification]]:
    """Return a method, and its settings: those given, or its defaults."""
    if name not in METHODS:
        raise ConfigError(f"there is no method {name!r}. {did_you_mean(name, METHODS)}")
    settings_class, run = METHODS[name]
    settings = settings_class() if settings is None else settings
    if not isinstance(settings, settings_class):
        raise ConfigError(
            f"method {name!r} takes {settings_class.__name__} as its settings, got {type(settings).__name__}."
        )
    return settings, run


def _per_class(network: nn.Module, clean: CleanSet) -> tuple[float, ...]:
    right = predict_logits(network, clean.held_out_images).argmax(axis=1) == clean.held_out_labels
    return tuple(float(right[clean.held_out_labels == label].mean()) for label in range(clean.n_classes))
