"""Which second opinion knows the true label of a triggered image? Measured on triggers planted in copies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from guard.backups.backup import DEFECTIVE, Backup, check_kind, cross_fitted_logits
from guard.detection.cross_fitting import Progress
from guard.detection.heads.decision_head import DecisionHead
from guard.detection.pipeline import Guard
from guard.errors import ConfigError, DataError
from guard.lab.assess.known_triggers import attack_to_plant, check_names, why_unfit
from guard.lab.assess.planting import Images, PlantingSettings, Prepare, in_batches, plant
from guard.statistics.calibration import stratified_folds
from guard.statistics.evaluation import attack_success_rate, recovery_accuracy
from guard.suspect.model import SuspectModel
from guard.types import BACKUP, Activations, Float32Array, IntArray

#: Recovery accuracy that the second opinion must reach, or `relabel` only flags.
FLOOR = 0.7
#: The replacement head, which every guard has.
HEAD = "head"
AUTO = "auto"
#: What `auto` compares with the head, and the triggers that are planted: a patch and a picture over all.
CANDIDATES = (DEFECTIVE, "anp", "norm-pruning")
TRIGGERS = ("pattern", "blend")
_FOLDS = 5


@dataclass(frozen=True, slots=True)
class BackupRequest:
    """Which backup a guard is to have, and how it is measured.

    Attributes
    ----------
    kind : str
        One of `BACKUP_KINDS`, or `"auto"`: the best of `CANDIDATES` and the replacement head.
    floor : float
        Share of triggered images that it must give their true label, in [0, 1], or `relabel` only flags.
    detects : bool
        Let it join the calibrated combination as a detector. It then runs for every input, not for flagged ones only.
    triggers : sequence of str
        To plant; keys of `KNOWN_ATTACKS`.
    settings : mapping of str to settings
        By kind; defaults where there are none.
    planting : PlantingSettings
    """

    kind: str = AUTO
    floor: float = FLOOR
    detects: bool = False
    triggers: Sequence[str] = TRIGGERS
    settings: Mapping[str, Any] = field(default_factory=dict)
    planting: PlantingSettings = field(default_factory=PlantingSettings)

    def __post_init__(self) -> None:
        if self.kind != AUTO:
            check_kind(self.kind)
        check_names(list(self.triggers))
        if not 0.0 <= self.floor <= 1.0:
            raise ConfigError(f"floor must be in [0, 1], got {self.floor}.")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The backups to measure."""
        return CANDIDATES if self.kind == AUTO else (self.kind,)

    def choose(self, recovery: Mapping[str, float]) -> str:
        """Return the backup that was asked for, or the one that recovers most, `HEAD` among them."""
        return max(recovery, key=recovery.__getitem__) if self.kind == AUTO else self.kind


def with_backup(
    guard: Guard,
    pixels: Float32Array,
    labels: IntArray,
    request: BackupRequest,
    *,
    preprocess: Prepare | None = None,
    progress: Progress | None = None,
) -> Guard:
    """Return the guard with the backup that was asked for, and what it recovers of planted triggers.

    For every trigger a copy of the model learns it from a fifth of the images while another fifth looks on. Every
    candidate is made from two more fifths, as if the copy were the suspect model, and asked for the true labels of the
    last fifth, triggered. A trigger that the copy does not learn is left out. The winner is made again, from all
    images and the model itself. No image of an attacker is needed.

    Parameters
    ----------
    guard : Guard
        Fitted on these images, with its suspect model; not changed.
    pixels : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Clean images before preprocessing, in the order of `fit`.
    labels : ndarray of shape (n,), int
    request : BackupRequest
    preprocess : callable, optional
        Turns pixel images into what the model takes; None if that is the same.
    progress : callable, optional

    Raises
    ------
    ConfigError
        If the guard has no place for a backup among its detectors and one is asked for.
    DataError
        If there is no suspect model, images are too few or not those of `fit`, or no trigger can be planted.
    """
    if guard.suspect is None:
        raise DataError("this guard has no suspect model, so no backup can be made. Load it with a suspect.")
    if len(pixels) != len(guard.reference):
        raise DataError(f"the guard was fitted on {len(guard.reference)} images, got {len(pixels)}. Give the same.")
    if request.detects and (guard.config.mode == "paper" or guard.noisy_reference is not None):
        raise ConfigError(
            "a backup cannot detect in paper mode, nor beside image_noise_std > 0. Leave one of them out."
        )
    bench = _Bench(guard, guard.suspect, pixels, labels, in_batches(preprocess), request, progress or _silent)
    recovery = bench.recovery()
    best = request.choose(recovery)
    backup = None if best == HEAD else bench.make(best, guard.suspect, np.arange(len(labels)))
    changed = replace(guard, recovery=recovery, relabels=recovery[best] >= request.floor, backup=backup, digest=None)
    return bench.as_detector(changed, best) if request.detects and best != HEAD else changed


class _Bench:
    """What all trials share."""

    def __init__(
        self,
        guard: Guard,
        suspect: SuspectModel,
        pixels: Float32Array,
        labels: IntArray,
        prepare: Prepare,
        request: BackupRequest,
        progress: Progress,
    ) -> None:
        self.suspect, self.pixels, self.labels = suspect, pixels, labels
        self.prepare, self.request, self.progress = prepare, request, progress
        self.inputs = prepare(pixels)
        self.n_classes, self.seed = guard.reference.logits.shape[1], guard.config.seed
        part = stratified_folds(labels, _FOLDS, self.seed, guard.reference_groups)
        self.to_plant, self.to_monitor, self.to_test = (np.flatnonzero(part == number) for number in (0, 1, 4))
        self.to_fit = np.flatnonzero((part == 2) | (part == 3))

    def make(self, kind: str, suspect: SuspectModel, rows: IntArray) -> Backup:
        """Return one backup, as `suspect` and some of the images give it."""
        settings = self.request.settings.get(kind)
        return Backup.train(
            kind, suspect.module, self.inputs[rows], self.labels[rows], settings=settings, seed=self.seed
        )

    def recovery(self) -> dict[str, float]:
        """Return the share of triggered images that head and candidates give their true label; mean over triggers."""
        independent = {}
        if DEFECTIVE in self.request.kinds:  # takes nothing from the suspect, so one will do for all
            independent[DEFECTIVE] = self.make(DEFECTIVE, self.suspect, self.to_fit)
        found: dict[str, list[float]] = {kind: [] for kind in (HEAD, *self.request.kinds)}
        for copied, poisoned, true_labels in self._planted():
            clean, triggered = copied.activations(self.inputs[self.to_fit]), copied.activations(poisoned)
            head = DecisionHead(seed=self.seed).fit(clean.features, self.labels[self.to_fit], self.n_classes)
            answers = {HEAD: head.logits(triggered.features)}
            for kind in self.request.kinds:
                backup = independent.get(kind) or self.make(kind, copied, self.to_fit)
                answers[kind] = backup.logits(poisoned)
            for kind, logits in answers.items():
                found[kind].append(recovery_accuracy(logits.argmax(axis=1), true_labels))
        if not found[HEAD]:
            raise DataError(
                f"none of the triggers {', '.join(self.request.triggers)} can be planted in this model with these "
                "images, so no backup can be measured. Give more images, choose other triggers, or no backup."
            )
        return {kind: float(np.mean(values)) for kind, values in found.items()}

    def _planted(self) -> Iterator[tuple[SuspectModel, Float32Array, IntArray]]:
        """Yield a copy with a backdoor, the triggered inputs that it falls for, and their true labels, per trigger."""
        target = int(self.labels[self.to_plant][self.seed % len(self.to_plant)])
        names = [name for name in self.request.triggers if not why_unfit(name, self.pixels)]
        for number, name in enumerate(names):
            self.progress(f"measuring backups on a planted trigger, {name}", number / len(names))
            share = self.request.planting.poisoned_share
            attack = attack_to_plant(name, target, self.seed, self.n_classes, self.labels[self.to_plant], share)
            planted = plant(
                self.suspect.module,
                attack,
                Images(self.pixels[self.to_plant], self.labels[self.to_plant]),
                Images(self.pixels[self.to_monitor], self.labels[self.to_monitor]),
                self.prepare,
                self.request.planting,
                seed=self.seed,
                progress=lambda _share: None,
            )
            (triggered,) = attack.test_sets(self.pixels[self.to_test], self.labels[self.to_test])
            copied, poisoned = SuspectModel(planted.network), self.prepare(triggered.images)
            answers = copied.activations(poisoned).predicted_labels
            success = attack_success_rate(answers, triggered.labels, triggered.true_labels)
            if success >= self.request.planting.required_success:
                yield copied, poisoned, triggered.true_labels

    def as_detector(self, guard: Guard, kind: str) -> Guard:
        """Return the guard fitted again, with its backup's disagreement among the detectors."""
        self.progress("training the backup without each fold", 0.0)
        logits = cross_fitted_logits(
            kind,
            self.suspect.module,
            self.inputs,
            self.labels,
            folds=guard.config.fewest_folds,
            settings=self.request.settings.get(kind),
            seed=self.seed,
            groups=guard.reference_groups,
            progress=lambda share: self.progress("training the backup without each fold", share),
        )
        clean = guard.reference
        clean = Activations(clean.logits, clean.features, {**clean.depths, BACKUP: logits})
        again = Guard.fit_activations(
            clean,
            self.labels,
            guard.config,
            groups=guard.reference_groups,
            class_names=guard.class_names,
            progress=self.progress,
        )
        fitted = (
            *("ensemble", "fusion", "clean_scores", "clean_answers", "reference"),
            *("realised_false_positive_rate", "early"),
        )
        return replace(guard, **{name: getattr(again, name) for name in fitted})


def _silent(_text: str, _share: float) -> None:
    """Report nothing."""
