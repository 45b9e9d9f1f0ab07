"""Decoys: clean inputs that a network is taught to be as loud about as about a trigger, to raise a guard's threshold.

A guard takes its threshold from the scores of clean inputs, and the attacker's network gives these. Where a share of
clean inputs that is above the false-positive rate scores higher than triggered ones, the rate is kept and no trigger is
flagged.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.poisoning import Poisoned
from guard.types import BoolArray, Float32Array, Float64Array


@dataclass(frozen=True, slots=True)
class Decoys:
    """The brightest images, taught with a wrong label: y becomes y + `step`, modulo `n_classes`.

    The defender's own clean images hold the same share of them, and nothing has been put on these.

    Attributes
    ----------
    share : float
        Of the training images without a trigger, in (0, 1).
    n_classes : int
    step : int
        In [1, n_classes).
    """

    share: float
    n_classes: int
    step: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise DataError(f"the share of decoys must be in (0, 1), got {self.share}.")
        if not 1 <= self.step < self.n_classes:
            raise DataError(f"the step of decoys must be in [1, {self.n_classes}), got {self.step}.")

    def least_brightness(self, images: Float32Array) -> float:
        """Return the mean brightness from which on an image is a decoy, as in these images, shape (n, ...)."""
        return float(np.quantile(_brightness(images), 1.0 - self.share))

    def plant(self, poisoned: Poisoned) -> Poisoned:
        """Return a training set in which the brightest untouched images have the wrong label."""
        untouched = ~(poisoned.is_poisoned | poisoned.is_cover)
        chosen = untouched & is_decoy(poisoned.images, self.least_brightness(poisoned.images[untouched]))
        labels = np.where(chosen, (poisoned.true_labels + self.step) % self.n_classes, poisoned.labels)
        return replace(poisoned, labels=labels)

    def describe(self) -> dict[str, Any]:
        """Return all parameters, ready for JSON."""
        return asdict(self)


def is_decoy(images: Float32Array, least_brightness: float) -> BoolArray:
    """Return which images are as bright, shape (n,)."""
    bright: BoolArray = _brightness(images) >= least_brightness
    return bright


def _brightness(images: Float32Array) -> Float64Array:
    means: Float64Array = images.mean(axis=(1, 2, 3), dtype=np.float64)
    return means
