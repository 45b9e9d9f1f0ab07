"""One model of the zoo with its images and both guards, and one thing to measure of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.attacks.poisoning import Poisoned
from guard.lab.zoo.collection import Zoo
from guard.lab.zoo.splits import load_split
from guard.statistics.calibration import stratified_folds
from guard.statistics.evaluation import attack_success_rate, clean_accuracy
from guard.suspect.model import SuspectModel
from guard.types import Activations, BoolArray, IntArray

Record = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to measure of a model: `kind` is a key of `STUDIES`.

    Attributes
    ----------
    kind : str
    noise_std : float
        Of the augmented copy of the validation images; 0 = none.
    validation_quarters : int
        How many quarters of the validation images the guard gets, 1 to 4.
    """

    kind: str
    noise_std: float = 0.0
    validation_quarters: int = 4

    @property
    def label(self) -> str:
        """A short name for files and people."""
        noise = f"-noise{self.noise_std:g}" if self.noise_std else ""
        return f"{self.kind}{noise}" + (f"-{25 * self.validation_quarters}percent" * (self.validation_quarters < 4))


class Guards(NamedTuple):
    """A guard of each mode, fitted on the same images, at the same clean loss."""

    paper: Guard
    calibrated: Guard


class Subject:
    """One zoo model with its images; activations are computed when first asked for."""

    def __init__(self, zoo: Zoo, name: str) -> None:
        self.card = zoo.card(name)
        self.suspect = SuspectModel(zoo.load(name))
        self.split = load_split(self.card.data_set)
        self._guards: dict[tuple[float, int], Guards] = {}

    @functools.cached_property
    def validation(self) -> Activations:
        """Of the clean validation images."""
        return self.suspect.activations(self.split.validation.images)

    def noisy(self, std: float) -> Activations:
        """Of the validation images with Gaussian noise, drawn as `Guard.fit` does."""
        images = self.split.validation.images
        noise = np.random.default_rng(self.card.seed).normal(0, std, images.shape)
        return self.suspect.activations((images + noise).astype(np.float32))

    @functools.cached_property
    def clean(self) -> Activations:
        """Of the clean test images."""
        return self.suspect.activations(self.split.test.images)

    @functools.cached_property
    def triggered_sets(self) -> list[Poisoned]:
        """The test images with the trigger, one set per trigger."""
        return self.card.restore_attack().test_sets(self.split.test.images, self.split.test.labels)

    @functools.cached_property
    def triggered(self) -> list[tuple[Activations, Poisoned]]:
        """Of the test images with the trigger, one set per trigger."""
        return [(self.suspect.activations(test_set.images), test_set) for test_set in self.triggered_sets]

    def guards(self, noise_std: float, quarters: int) -> Guards:
        """Return both guards, fitted once."""
        if (noise_std, quarters) not in self._guards:
            self._guards[noise_std, quarters] = self._fit(noise_std, quarters)
        return self._guards[noise_std, quarters]

    def _fit(self, noise_std: float, quarters: int) -> Guards:
        labels = self.split.validation.labels
        rows = validation_rows(labels, quarters, self.card.seed)
        noisy = self.noisy(noise_std)[rows] if noise_std else None
        return fit_at_same_clean_loss(self.validation[rows], labels[rows], noisy, noise_std, self.card.seed)


def validation_rows(labels: IntArray, quarters: int, seed: int) -> IntArray:
    """Return the rows of so many quarters of the validation images, every class evenly."""
    return np.flatnonzero(stratified_folds(labels, 4, seed) < quarters)


def fit_at_same_clean_loss(
    activations: Activations, labels: IntArray, noisy: Activations | None, noise_std: float, seed: int
) -> Guards:
    """Fit the published guard, and ours at the rate of false alarms that the published one has on these clean images.

    The rate is measured out of fold. Where it is lower than n images can show, ours asks for 1 / (n + 1).
    """
    settings = {"seed": seed, "image_noise_std": noise_std}
    paper = Guard.fit_activations(activations, labels, GuardConfig(mode="paper", **settings), noisy=noisy)
    rate = max(paper.realised_false_positive_rate, 1.0 / (len(labels) + 1))
    config = GuardConfig(mode="calibrated", false_positive_rate=rate, **settings)
    return Guards(paper, Guard.fit_activations(activations, labels, config, noisy=noisy))


def rates_on_rest(subject: Subject, guarded: Guard, rest: BoolArray) -> dict[str, Any]:
    """Return clean accuracy and attack success on some of the test images, clean and triggered; fractions."""
    clean, labels = subject.clean[rest], subject.split.test.labels[rest]
    triggered = [(activations, entry, rest[entry.source_rows]) for activations, entry in subject.triggered]
    return {
        "clean_accuracy": clean_accuracy(clean.predicted_labels, labels, guarded.scores(clean).is_poisoned),
        "attack_success": [
            attack_success_rate(
                activations.predicted_labels[rows],
                entry.labels[rows],
                entry.true_labels[rows],
                guarded.scores(activations[rows]).is_poisoned,
            )
            for activations, entry, rows in triggered
        ],
    }
