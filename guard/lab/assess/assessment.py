"""Plant known triggers in copies of the user's model, fit a guard to each copy, and count what it catches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard.arrays import check_range
from guard.config import GuardConfig
from guard.detection.copies import copy_groups
from guard.detection.cross_fitting import Progress
from guard.detection.pipeline import Guard
from guard.errors import ConfigError, DataError, SuspectModelError
from guard.lab.assess.known_triggers import DEFAULT_ATTACKS, attack_to_plant, check_names, why_unfit
from guard.lab.assess.planting import Images, Planted, PlantingSettings, Prepare, in_batches, plant
from guard.lab.assess.report import CONTROL, AssessmentReport, SplitSizes, Trial
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.triggers import check_unit_images
from guard.statistics.calibration import images_needed, stratified_folds
from guard.statistics.evaluation import attack_success_rate, auroc, clean_accuracy, wilson_interval
from guard.suspect.digest import weights_digest
from guard.suspect.model import SuspectModel
from guard.suspect.split_points import SplitPoints
from guard.types import Activations, AnyArray, BoolArray, Float32Array, IntArray

#: Tenths of the images: to plant with, to say when that may stop, to fit the guard, to test.
_TENTHS = (3, 1, 4, 2)
_FEWEST_TO_PLANT, _FEWEST_TO_TEST = 50, 20
#: Below this share of right answers a person is warned: a clean image that the model gets wrong looks like an attack.
_POOR_ACCURACY = 0.7


def assess(
    suspect: SuspectModel,
    clean_images: Float32Array,
    clean_labels: IntArray,
    config: GuardConfig | None = None,
    *,
    attacks: Sequence[str] = DEFAULT_ATTACKS,
    seeds: Sequence[int] = (0, 1, 2),
    planting: PlantingSettings | None = None,
    preprocess: Prepare | None = None,
    progress: Progress | None = None,
) -> AssessmentReport:
    """Estimate what the guard would catch on this model, for known triggers.

    Of copies among the images the first is used, see `copy_groups`. For every seed the images are split anew into four
    parts, and for every trigger a copy of the model is fine-tuned on the first until the trigger works. A guard is
    fitted to the copy on clean images of the third part, and tried on clean and triggered images of the fourth. The
    same without any trigger is the control. The model itself is not changed, and no guard is ever fitted on a triggered
    image.

    Parameters
    ----------
    suspect : SuspectModel
    clean_images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Pixels, before the user's own preprocessing: that is where a trigger goes.
    clean_labels : ndarray of shape (n,), int
        True labels, 0-based.
    config : GuardConfig, optional
        Settings of the guards; each seed replaces its own.
    attacks : sequence of str
        Names in `KNOWN_ATTACKS`. Those that cannot be put on such images are skipped, and the report says so.
    seeds : sequence of int
        Each draws everything anew: the split, the target label, the poisoned images, the trigger, the folds.
    planting : PlantingSettings, optional
    preprocess : callable, optional
        Turns pixel images into what the model takes, one row each; None if that is the same.
    progress : callable, optional
        Called with a line of text and the share done.

    Returns
    -------
    report : AssessmentReport

    Raises
    ------
    ConfigError
        If a trigger is unknown, or seeds are missing or repeated.
    DataError
        If images or labels break a rule or are too few, or no trigger can be put on them.
    SuspectModelError
        If the model cannot be copied or split, or was changed meanwhile.
    """
    config, planting = config or GuardConfig(), planting or PlantingSettings()
    names = list(dict.fromkeys(attacks))
    pixels, labels = np.asarray(clean_images), np.asarray(clean_labels)
    _check(names, seeds, pixels, labels)
    n, distinct = len(labels), np.unique(copy_groups(pixels.astype(np.float32), labels), return_index=True)[1]
    pixels, labels = pixels[distinct], labels[distinct]
    split = _split_sizes(len(labels), config, n - len(labels))
    skipped = {name: why for name in names if (why := why_unfit(name, pixels))}
    names = [name for name in names if name not in skipped]
    if not names:
        raise DataError(f"no trigger can be put on these images. {next(iter(skipped.values()))}")
    bench = _Bench.set_up(suspect, pixels, labels.astype(np.int64), config, planting, in_batches(preprocess))
    trials, samples = _run_all(bench, names, seeds, progress)
    if weights_digest(suspect.module) != bench.digest:
        raise SuspectModelError("the suspect model's weights changed during the assessment. Who else uses this module?")
    return AssessmentReport(
        trials=tuple(trial for name in trials for trial in trials[name]),
        split=split,
        seeds=tuple(seeds),
        mode=config.mode,
        requested_false_positive_rate=config.false_positive_rate,
        clean_images=len(labels),
        clean_accuracy=bench.accuracy,
        weights_digest=bench.digest,
        skipped=skipped,
        warnings=tuple(_warnings(bench, trials[CONTROL], n - len(labels))),
        samples=samples,
    )


def images_needed_to_assess(config: GuardConfig) -> int:
    """Return how many clean images an assessment needs at least: each part must have enough."""
    fitting = max(images_needed(config.false_positive_rate), 2 * config.fewest_folds)
    smallest = (_FEWEST_TO_PLANT, 1, fitting, _FEWEST_TO_TEST)
    n = max(least * sum(_TENTHS) // tenths for least, tenths in zip(smallest, _TENTHS, strict=True))
    while any(size < least for size, least in zip(_part_sizes(n), smallest, strict=True)):
        n += 1
    return n


@dataclass(frozen=True, slots=True, eq=False)
class _Bench:
    """What all trials share: the model, the images, the settings."""

    suspect: SuspectModel
    points: SplitPoints
    digest: str
    pixels: Float32Array
    inputs: Float32Array  # what the model takes
    labels: IntArray
    answers: IntArray
    n_classes: int
    config: GuardConfig
    planting: PlantingSettings
    prepare: Prepare

    @classmethod
    def set_up(
        cls,
        suspect: SuspectModel,
        pixels: Float32Array,
        labels: IntArray,
        config: GuardConfig,
        planting: PlantingSettings,
        prepare: Prepare,
    ) -> _Bench:
        digest = weights_digest(suspect.module)
        inputs = prepare(pixels)
        activations = suspect.activations(inputs)
        n_classes = activations.logits.shape[1]
        check_range(labels, n_classes)
        points = suspect.split_points
        assert points is not None  # the forward pass has located them
        answers = activations.predicted_labels
        return cls(suspect, points, digest, pixels, inputs, labels, answers, n_classes, config, planting, prepare)

    @property
    def accuracy(self) -> float:
        return clean_accuracy(self.answers, self.labels)

    def images(self, rows: IntArray) -> Images:
        return Images(self.pixels[rows], self.labels[rows])


class _Round:
    """One seed: its split, its target label, and the control that every trigger is compared with."""

    def __init__(self, bench: _Bench, seed: int) -> None:
        self.bench = bench
        self.seed = seed
        self.config = bench.config.replace(seed=seed)
        tenth = stratified_folds(bench.labels, sum(_TENTHS), seed)
        part = np.repeat(np.arange(len(_TENTHS)), _TENTHS)[tenth]
        self.to_plant, self.to_monitor, self.to_fit, self.to_test = (
            np.flatnonzero(part == number) for number in range(len(_TENTHS))
        )
        classes = np.unique(bench.labels)
        self.target_label = int(np.random.default_rng(0).permutation(classes)[seed % len(classes)])
        self.held_out = np.concatenate([self.to_fit, self.to_test])  # more of them, for a steadier clean accuracy
        self.accuracy_before = clean_accuracy(bench.answers[self.held_out], bench.labels[self.held_out])
        self.control: tuple[SuspectModel, Guard] | None = None  # until it has run; none if no guard can be fitted to it

    def run_control(self, report: Progress) -> Trial:
        """Fine-tune without a trigger, and keep that copy and its guard to compare with."""
        started = time.perf_counter()
        planted, copy, held_out = self._plant(None, report)
        about = self._about(CONTROL, planted, held_out, started)
        try:
            guard = self._fit(copy, report)
        except DataError as error:  # fine-tuning has destroyed it
            return Trial(**about, why_not=f"no guard can be fitted to this copy: {error}")
        clean = held_out[len(self.to_fit) :]
        self.control = (copy, guard)
        alarms = guard.scores(clean).is_poisoned
        return Trial(**about, **_of_clean(clean, self.bench.labels[self.to_test], alarms))

    def run(self, name: str, report: Progress) -> tuple[Trial, Float32Array]:
        """Plant one trigger, and see what a guard catches.

        Returns
        -------
        trial : Trial
        sample : ndarray of shape (2, channels, height, width)
            One test image without and with the trigger.
        """
        started, bench = time.perf_counter(), self.bench
        to_plant, test = bench.images(self.to_plant), bench.images(self.to_test)
        share = bench.planting.poisoned_share
        attack = attack_to_plant(name, self.target_label, self.seed, bench.n_classes, to_plant.labels, share)
        (triggered,) = attack.test_sets(test.pixels, test.labels)
        sample = np.stack([test.pixels[triggered.source_rows[0]], triggered.images[0]])
        planted, copy, held_out = self._plant(attack, report)
        clean = held_out[len(self.to_fit) :]
        inputs = bench.prepare(triggered.images)
        poisoned = copy.activations(inputs)
        truth = (poisoned.predicted_labels, triggered.labels, triggered.true_labels)
        about = self._about(name, planted, held_out, started) | {
            "target_label": attack.target_label,
            "attack_success_unguarded": attack_success_rate(*truth),
        }
        why_not = _why_not_planted(bench.planting, about)
        if why_not:
            return Trial(**about, why_not=why_not), sample
        try:
            guard = self._fit(copy, report)
        except DataError as error:
            return Trial(**about, why_not=f"no guard can be fitted to this copy: {error}"), sample
        of_clean, of_poisoned = guard.scores(clean), guard.scores(poisoned)
        flagged = of_poisoned.is_poisoned
        bare_alarms = None
        if self.control is not None:
            bare, bare_guard = self.control
            bare_alarms = float(bare_guard.scores(bare.activations(inputs)).is_poisoned.mean())
        trial = Trial(
            **about | {"seconds": time.perf_counter() - started},
            **_of_clean(clean, test.labels, of_clean.is_poisoned),
            planted=True,
            attack_success_guarded=attack_success_rate(*truth, flagged),
            true_positive_rate=float(flagged.mean()),
            true_positive_interval=wilson_interval(int(flagged.sum()), len(flagged)),
            auroc=auroc(
                np.concatenate([of_clean.combined, of_poisoned.combined]),
                np.arange(len(clean) + len(poisoned)) >= len(clean),
            ),
            flagged_without_backdoor=bare_alarms,
        )
        return trial, sample

    def _plant(self, attack: Attack | None, report: Progress) -> tuple[Planted, SuspectModel, Activations]:
        """Return a fine-tuned copy, ready to be watched, and what it makes of the clean images held out."""
        bench = self.bench
        planted = plant(
            bench.suspect.module,
            attack,
            bench.images(self.to_plant),
            bench.images(self.to_monitor),
            bench.prepare,
            bench.planting,
            seed=self.seed,
            progress=lambda share: report("fine-tuning a copy", 0.7 * share),
        )
        copy = SuspectModel(planted.network)
        copy.use_split_points(bench.points)
        return planted, copy, copy.activations(bench.inputs[self.held_out])

    def _fit(self, copy: SuspectModel, report: Progress) -> Guard:
        report("fitting a guard to the copy", 0.7)
        return Guard.fit(copy, self.bench.inputs[self.to_fit], self.bench.labels[self.to_fit], self.config)

    def _about(self, name: str, planted: Planted, held_out: Activations, started: float) -> dict[str, Any]:
        """Return what is said of every trial, planted or not."""
        return {
            "attack": name,
            "seed": self.seed,
            "clean_accuracy_before": self.accuracy_before,
            "clean_accuracy_after": clean_accuracy(held_out.predicted_labels, self.bench.labels[self.held_out]),
            "epochs_run": planted.epochs_run,
            "learning_rate": planted.learning_rate,
            "seconds": time.perf_counter() - started,
        }


def _run_all(
    bench: _Bench, names: Sequence[str], seeds: Sequence[int], progress: Progress | None
) -> tuple[dict[str, list[Trial]], dict[str, Float32Array]]:
    """Return the trials of every trigger and of the control, and a sample image of every trigger, see `_Round.run`."""
    steps = _Steps(len(seeds) * (1 + len(names)), progress)
    trials: dict[str, list[Trial]] = {name: [] for name in [*names, CONTROL]}
    samples: dict[str, Float32Array] = {}
    for seed in seeds:
        trial_round = _Round(bench, seed)
        trials[CONTROL].append(trial_round.run_control(steps.begin(f"no trigger, seed {seed}")))
        for name in names:
            trial, sample = trial_round.run(name, steps.begin(f"{name}, seed {seed}"))
            trials[name].append(trial)
            samples.setdefault(name, sample)
    return trials, samples


def _of_clean(clean: Activations, labels: IntArray, alarms: BoolArray) -> dict[str, Any]:
    return {
        "clean_accuracy_guarded": clean_accuracy(clean.predicted_labels, labels, alarms),
        "realised_false_positive_rate": float(alarms.mean()),
        "false_positive_interval": wilson_interval(int(alarms.sum()), len(alarms)),
    }


def _why_not_planted(planting: PlantingSettings, about: Mapping[str, Any]) -> str:
    success = about["attack_success_unguarded"]
    loss = about["clean_accuracy_before"] - about["clean_accuracy_after"]
    if success < planting.required_success:
        return f"attack success {success:.3f} is below {planting.required_success:g}"
    if loss > planting.allowed_accuracy_loss + 1e-9:
        return f"clean accuracy fell by {loss:.3f}, more than {planting.allowed_accuracy_loss:g}"
    return ""


class _Steps:
    """Turns the progress of one trial into that of all of them."""

    def __init__(self, number: int, progress: Progress | None) -> None:
        self._number = number
        self._begun = 0
        self._progress = progress

    def begin(self, title: str) -> Progress:
        done = self._begun
        self._begun += 1

        def report(text: str, share: float) -> None:
            if self._progress is not None:
                self._progress(f"{title}: {text}", (done + share) / self._number)

        return report


def _part_sizes(n: int) -> list[int]:
    tenth = np.bincount(np.arange(n) % sum(_TENTHS), minlength=sum(_TENTHS))  # as stratified_folds deals
    return [int(part.sum()) for part in np.split(tenth, np.cumsum(_TENTHS)[:-1])]


def _split_sizes(n: int, config: GuardConfig, n_copies: int) -> SplitSizes:
    needed = images_needed_to_assess(config)
    if n < needed:
        raise DataError(
            f"assessing at false_positive_rate={config.false_positive_rate:g} needs at least {needed} clean images, "
            f"got {n}{f' and {n_copies} copies of them' if n_copies else ''}: they are split in parts to plant "
            "triggers with, to fit the guard, and to test. "
            "Raise the rate or add images."
        )
    return SplitSizes(*_part_sizes(n))


def _check(names: Sequence[str], seeds: Sequence[int], pixels: AnyArray, labels: AnyArray) -> None:
    check_names(names)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ConfigError(f"seeds must be one or more different whole numbers >= 0, got {list(seeds)}.")
    check_unit_images(pixels)
    if labels.shape != (len(pixels),) or not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"labels must be {len(pixels)} integers, one per image, got {labels.dtype} {labels.shape}.")
    if len(np.unique(labels)) < 2:
        raise DataError("all images are of one class, so no attack can change an answer. Add images of others.")


def _warnings(bench: _Bench, controls: Sequence[Trial], n_copies: int) -> Iterator[str]:
    if n_copies:
        yield f"{n_copies} images are copies of others, and were left out: they would be on both sides of the split."
    if bench.accuracy < _POOR_ACCURACY:
        yield (
            f"the suspect model gets only {100 * bench.accuracy:.1f} % of these labels right. To the guard a clean "
            "image that the model gets wrong looks like an attack, so it will be poor. Are the classes in the model's "
            "order, and the images preprocessed as it wants?"
        )
    missing = bench.n_classes - len(np.unique(bench.labels))
    if missing:
        yield (
            f"{missing} of the model's {bench.n_classes} classes have no images here: none of them was attacked, and "
            "the guard knows none of them. Add images."
        )
    loss = max(trial.clean_accuracy_before - trial.clean_accuracy_after for trial in controls)
    if loss > bench.planting.allowed_accuracy_loss:
        yield (
            f"fine-tuning alone, without any trigger, cost a copy {100 * loss:.1f} points of clean accuracy: the "
            "copies are not much like your model. Add images."
        )
