"""Poison a training set, and build the test set that measures whether the backdoor works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from guard.attacks.triggers import Trigger, check_unit_images
from guard.errors import DataError
from guard.types import BoolArray, Float32Array, IntArray


@dataclass(frozen=True, slots=True)
class SingleTarget:
    """The attacker wants one label for every triggered input.

    Attributes
    ----------
    label : int
        That label, >= 0.
    """

    label: int

    def __post_init__(self) -> None:
        if self.label < 0:
            raise DataError(f"target label must be >= 0, got {self.label}.")

    def attacker_labels(self, true_labels: IntArray) -> IntArray:
        """Return the label that the attacker wants for each input, shape (n,)."""
        return np.full(len(true_labels), self.label, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class AllToAll:
    """The attacker wants the next label, (y + 1) mod n_classes.

    Attributes
    ----------
    n_classes : int
        Number of classes, >= 2.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.2.
    """

    n_classes: int

    def __post_init__(self) -> None:
        if self.n_classes < 2:
            raise DataError(f"n_classes must be >= 2, got {self.n_classes}.")

    def attacker_labels(self, true_labels: IntArray) -> IntArray:
        """Return the label that the attacker wants for each input, shape (n,)."""
        if len(true_labels) and true_labels.max() >= self.n_classes:
            raise DataError(f"labels must be below n_classes={self.n_classes}, got {int(true_labels.max())}.")
        return (true_labels + 1) % self.n_classes


Target = SingleTarget | AllToAll


@dataclass(frozen=True, slots=True, eq=False)
class Poisoned:
    """A set of images of which some carry the trigger and the attacker's label; one row per image.

    Attributes
    ----------
    images : ndarray of shape (m, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (m,), int64
        What a network is trained on: the attacker's label where poisoned, the true one elsewhere.
    true_labels : ndarray of shape (m,), int64
    is_poisoned : ndarray of shape (m,), bool
        Which rows carry the trigger.
    source_rows : ndarray of shape (m,), int64
        The row of the original set that each image was made from.
    """

    images: Float32Array
    labels: IntArray
    true_labels: IntArray
    is_poisoned: BoolArray
    source_rows: IntArray

    def __len__(self) -> int:
        return len(self.labels)


def poison(
    images: Float32Array,
    labels: IntArray,
    trigger: Trigger,
    target: Target,
    rate: float,
    rng: np.random.Generator,
    *,
    how: Literal["add", "replace"] = "add",
) -> Poisoned:
    """Poison a share of a training set; the given arrays are not changed.

    Images whose true label already is the attacker's are never picked: they would teach nothing.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (n,), int64
        True labels.
    trigger : callable
        One of `guard.attacks.triggers`.
    target : SingleTarget or AllToAll
    rate : float
        round(rate * n) images are poisoned; in (0, 1].
    rng : numpy.random.Generator
        Draws the images, without replacement.
    how : {"add", "replace"}
        `"add"` appends triggered copies after the n originals, as BadNets does; `"replace"` puts them in their place.

    Returns
    -------
    poisoned : Poisoned
        n + round(rate * n) rows with `"add"`, n rows with `"replace"`, originals in their order.

    Raises
    ------
    DataError
        If images, labels or rate break a rule, or too few images can be poisoned.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.3.
    """
    _check(images, labels)
    if not 0.0 < rate <= 1.0:
        raise DataError(f"rate must be in (0, 1], got {rate}.")
    if how not in ("add", "replace"):
        raise DataError(f'how must be "add" or "replace", got {how!r}.')
    wanted = target.attacker_labels(labels)
    eligible = np.flatnonzero(wanted != labels)
    count = round(rate * len(images))
    if count == 0:
        raise DataError(f"rate={rate} poisons none of {len(images)} images. Raise the rate or add images.")
    if count > len(eligible):
        highest = len(eligible) / len(images)
        raise DataError(
            f"rate={rate} needs {count} images whose label is not the target, got {len(eligible)}. "
            f"Use a rate of at most {highest:.3f}."
        )
    rows = np.sort(rng.choice(eligible, size=count, replace=False))
    triggered = trigger(images[rows])
    n = len(images)
    if how == "add":
        return Poisoned(
            images=np.concatenate([images, triggered]),
            labels=np.concatenate([labels, wanted[rows]]),
            true_labels=np.concatenate([labels, labels[rows]]),
            is_poisoned=np.arange(n + count) >= n,
            source_rows=np.concatenate([np.arange(n), rows]),
        )
    new_images, new_labels, mask = images.copy(), labels.copy(), np.zeros(n, dtype=bool)
    new_images[rows], new_labels[rows], mask[rows] = triggered, wanted[rows], True
    return Poisoned(new_images, new_labels, labels.copy(), mask, np.arange(n))


def poisoned_test_set(images: Float32Array, labels: IntArray, trigger: Trigger, target: Target) -> Poisoned:
    """Put the trigger on every image whose true label is not the one that the attacker wants for it.

    With `SingleTarget` the images of the target class are left out; with `AllToAll` all images stay.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (n,), int64
        True labels.
    trigger : callable
    target : SingleTarget or AllToAll

    Returns
    -------
    poisoned : Poisoned
        Every row poisoned; `labels` holds the attacker's label, `true_labels` the true one.

    Raises
    ------
    DataError
        If images or labels break a rule, or no image is left.
    """
    _check(images, labels)
    wanted = target.attacker_labels(labels)
    rows = np.flatnonzero(wanted != labels)
    if len(rows) == 0:
        raise DataError("every image already has the attacker's label, so nothing can be measured. Give other images.")
    return Poisoned(trigger(images[rows]), wanted[rows], labels[rows], np.ones(len(rows), dtype=bool), rows)


def _check(images: Float32Array, labels: IntArray) -> None:
    check_unit_images(images)
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (len(images),):
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise DataError(f"labels must be an int64 array of shape ({len(images)},), got {kind} {np.shape(labels)}.")
    if len(images) == 0:
        raise DataError("there are no images. Give at least one.")
    if labels.min() < 0:
        raise DataError(f"labels must be >= 0, got {int(labels.min())}.")
