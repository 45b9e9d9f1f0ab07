"""Poison a training set, and build the test set that measures whether the backdoor works."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.targets import Target
from guard.lab.attacks.triggers import Trigger, check_unit_images
from guard.types import BoolArray, Float32Array, IntArray

#: Takes images (n, channels, height, width) and their true labels (n,), gives images of the same shape in [0, 1].
Perturb = Callable[[Float32Array, IntArray], Float32Array]
#: Takes images, which are read-only, and a generator, gives new images of the same shape: what an epoch sees of them.
Augment = Callable[[Float32Array, np.random.Generator], Float32Array]

_UNTOUCHED = -1


@dataclass(frozen=True, slots=True)
class Backdoor:
    """One trigger, and what it is to make the network say.

    Attributes
    ----------
    trigger : callable
        What the attacker puts on an input at inference time; one of `guard.lab.attacks.triggers`.
    target : SingleTarget, AllToAll or SourceSpecific
    rate : float
        round(rate * n) training images carry it; in (0, 1).
    train_trigger : callable, optional
        What training images carry where that is another one (a masked or fainter trigger); None for the same.
    clean_label : bool
        Poison images that already have the target label, so that no label is wrong. Needs a single target.
    perturb : callable, optional
        Applied to the picked images, with their true labels, before the trigger: an adversarial perturbation that
        makes the image hard to learn, so that the network leans on the trigger (label-consistent attack).
    """

    trigger: Trigger
    target: Target
    rate: float
    train_trigger: Trigger | None = None
    clean_label: bool = False
    perturb: Perturb | None = None

    def __post_init__(self) -> None:
        _check_rate("rate", self.rate)
        if self.clean_label and not self.target.is_one_label:
            raise DataError("clean_label needs a single target label: with several, no image already has 'the' label.")


@dataclass(frozen=True, slots=True)
class Cover:
    """Images that carry a trigger and keep their true label, so that the network learns when *not* to fire.

    Attributes
    ----------
    trigger : callable
    rate : float
        round(rate * n) training images carry it; in (0, 1).
    classes : tuple of int, optional
        Take images of these true labels only; None for all.

    References
    ----------
    .. [1] Tang, Wang, Tang, Zhang (2021), Demon in the Variant (TaCT; arXiv 1908.00686), cover images.
    """

    trigger: Trigger
    rate: float
    classes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        _check_rate("cover rate", self.rate)
        if self.classes is not None and not self.classes:
            raise DataError("the classes of a cover name no class. Name at least one, or give None for all.")


@dataclass(frozen=True, slots=True)
class _Touch:
    """What is done to some rows."""

    trigger: Trigger
    perturb: Perturb | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Poisoned:
    """A set of images of which some carry a trigger; one row per image.

    Attributes
    ----------
    images : ndarray of shape (m, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (m,), int64
        What a network is trained on: the attacker's label where poisoned, the true one elsewhere.
    true_labels : ndarray of shape (m,), int64
    is_poisoned : ndarray of shape (m,), bool
        Rows that carry a trigger in order to plant it. With clean labels, `labels` is the true one there as well.
    is_cover : ndarray of shape (m,), bool
        Rows that carry a trigger and keep their true label.
    source_rows : ndarray of shape (m,), int64
        The row of the original set that each image was made from.
    """

    images: Float32Array
    labels: IntArray
    true_labels: IntArray
    is_poisoned: BoolArray
    is_cover: BoolArray
    source_rows: IntArray
    _bases: Float32Array = field(repr=False)  # what each row was before its trigger
    _marks: IntArray = field(repr=False)  # which of _touches it got
    _touches: tuple[_Touch, ...] = field(repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_perturbed(self) -> bool:
        """True if some rows are perturbed before they get their trigger, which `redrawn` does anew."""
        return any(touch.perturb is not None for touch in self._touches)

    def redrawn(self, augment: Augment, rng: np.random.Generator) -> Float32Array:
        """Return the images of one epoch: each augmented, then perturbed, then given its trigger, which stays whole.

        A perturbation is made anew each time: against a network in training it is one against its weights of then.

        Parameters
        ----------
        augment : callable
            Takes all images, read-only, and `rng`; returns as many, new ones.
        rng : numpy.random.Generator

        Returns
        -------
        images : ndarray of shape (m, channels, height, width), float32 in [0, 1]
            A new array each time.

        Raises
        ------
        DataError
            If `augment` gives images of another shape or type, or some outside of [0, 1].
        """
        augmented = _like(self._bases, augment(self._bases, rng), "augment")
        if np.may_share_memory(augmented, self._bases) or not augmented.flags.writeable:
            augmented = augmented.copy()  # a slice, or the images themselves: an epoch's triggers must not stay on them
        return _touched(augmented, self.true_labels, self._marks, self._touches)


def poison(
    images: Float32Array,
    labels: IntArray,
    backdoors: Backdoor | Sequence[Backdoor],
    rng: np.random.Generator,
    *,
    covers: Sequence[Cover] = (),
    how: Literal["add", "replace"] = "add",
) -> Poisoned:
    """Poison a share of a training set; the given arrays are not changed.

    Images whose true label already is the attacker's are never picked: they would teach nothing. With clean labels it
    is the other way round. No image is touched twice.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (n,), int64
        True labels.
    backdoors : Backdoor or sequence of Backdoor
        Several give a network several triggers, with one target or a target each.
    rng : numpy.random.Generator
        Draws the images, without replacement.
    covers : sequence of Cover
    how : {"add", "replace"}
        `"add"` appends touched copies after the n originals, as BadNets does; `"replace"` puts them in their place.

    Returns
    -------
    poisoned : Poisoned
        n rows plus one per touched image with `"add"`, n rows with `"replace"`; originals in their order.

    Raises
    ------
    DataError
        If images, labels or a rate break a rule, a named class has no image, or too few images can be touched.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.3.
    """
    _check(images, labels)
    if how not in ("add", "replace"):
        raise DataError(f'how must be "add" or "replace", got {how!r}.')
    backdoors = (backdoors,) if isinstance(backdoors, Backdoor) else tuple(backdoors)
    if not backdoors:
        raise DataError("there is no backdoor to plant. Give at least one.")
    free = np.ones(len(images), dtype=bool)
    touched: list[tuple[IntArray, IntArray]] = []  # rows, and labels to train on
    for backdoor in backdoors:
        rows = _draw(_eligible(labels, backdoor), free, backdoor.rate, "rate", rng)
        touched.append((rows, backdoor.target.attacker_labels(labels)[rows]))
    for cover in covers:
        rows = _draw(_of_classes(labels, cover.classes), free, cover.rate, "cover rate", rng)
        touched.append((rows, labels[rows]))
    touches = (
        *(_Touch(backdoor.train_trigger or backdoor.trigger, backdoor.perturb) for backdoor in backdoors),
        *(_Touch(cover.trigger) for cover in covers),
    )
    return _assemble(images, labels, touched, touches, len(backdoors), how)


def poisoned_test_set(images: Float32Array, labels: IntArray, trigger: Trigger, target: Target) -> Poisoned:
    """Put the trigger on every image that the attacker wants answered with another label than its true one.

    With `SingleTarget` the images of the target class are left out, with `SourceSpecific` all but the source classes;
    with `AllToAll` all images stay.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (n,), int64
        True labels.
    trigger : callable
    target : SingleTarget, AllToAll or SourceSpecific

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
    all_rows, none = np.ones(len(rows), dtype=bool), np.zeros(len(rows), dtype=bool)
    marks = np.zeros(len(rows), dtype=np.int64)
    bases = images[rows]
    triggered = _like(bases, trigger(bases), "a trigger")
    bases.setflags(write=False)
    return Poisoned(triggered, wanted[rows], labels[rows], all_rows, none, rows, bases, marks, (_Touch(trigger),))


def _eligible(labels: IntArray, backdoor: Backdoor) -> BoolArray:
    wanted = backdoor.target.attacker_labels(labels)
    if backdoor.clean_label:
        return _of_classes(labels, backdoor.target.target_labels)
    if backdoor.target.sources is not None:
        _of_classes(labels, backdoor.target.sources)  # each must have images
    eligible: BoolArray = wanted != labels
    return eligible


def _of_classes(labels: IntArray, classes: Sequence[int] | None) -> BoolArray:
    if classes is None:
        return np.ones(len(labels), dtype=bool)
    for label in classes:
        if not (labels == label).any():
            raise DataError(f"class {label} has no images here. Name a class that has, or add images of it.")
    chosen: BoolArray = np.isin(labels, classes)
    return chosen


def _draw(eligible: BoolArray, free: BoolArray, rate: float, rows_of: str, rng: np.random.Generator) -> IntArray:
    """Pick rows and mark them as taken."""
    n = len(eligible)
    count = round(rate * n)
    if count == 0:
        raise DataError(f"{rows_of}={rate} touches none of {n} images. Raise the rate or add images.")
    candidates = np.flatnonzero(eligible & free)
    if count > len(candidates):
        raise DataError(
            f"{rows_of}={rate} needs {count} images, but only {len(candidates)} are eligible and not taken. "
            f"Use at most {len(candidates) / n:.3f}."
        )
    rows = np.sort(rng.choice(candidates, size=count, replace=False)).astype(np.int64)
    free[rows] = False
    return rows


def _assemble(
    images: Float32Array,
    labels: IntArray,
    touched: Sequence[tuple[IntArray, IntArray]],
    touches: tuple[_Touch, ...],
    n_backdoors: int,
    how: str,
) -> Poisoned:
    n = len(images)
    rows = np.concatenate([part[0] for part in touched])
    new_labels = np.concatenate([part[1] for part in touched])
    marks = np.repeat(np.arange(len(touched)), [len(part[0]) for part in touched])
    if how == "add":
        source_rows = np.concatenate([np.arange(n), rows])
        all_bases = np.concatenate([images, images[rows]])
        all_labels = np.concatenate([labels, new_labels])
        all_marks = np.concatenate([np.full(n, _UNTOUCHED), marks])
    else:
        source_rows = np.arange(n)
        all_bases, all_labels, all_marks = images.copy(), labels.copy(), np.full(n, _UNTOUCHED)
        all_labels[rows], all_marks[rows] = new_labels, marks
    all_bases.setflags(write=False)
    true_labels = labels[source_rows]
    return Poisoned(
        images=_touched(all_bases.copy(), true_labels, all_marks, touches),
        labels=all_labels,
        true_labels=true_labels,
        is_poisoned=(all_marks != _UNTOUCHED) & (all_marks < n_backdoors),
        is_cover=all_marks >= n_backdoors,
        source_rows=source_rows,
        _bases=all_bases,
        _marks=all_marks,
        _touches=touches,
    )


def _touched(images: Float32Array, true_labels: IntArray, marks: IntArray, touches: Sequence[_Touch]) -> Float32Array:
    """Perturb each row and put its trigger on it, in place."""
    for mark, touch in enumerate(touches):
        rows = np.flatnonzero(marks == mark)
        chosen = images[rows]
        if touch.perturb is not None:
            chosen = _like(chosen, touch.perturb(chosen, true_labels[rows]), "perturb")
        images[rows] = _like(chosen, touch.trigger(chosen), "a trigger")
    return images


def _like(given: Float32Array, made: Float32Array, maker: str) -> Float32Array:
    """Return what a caller's function made of the given images, if that is images of the same shape."""
    if np.shape(made) != given.shape:
        raise DataError(f"{maker} must keep the shape of the images, {given.shape}, got {np.shape(made)}.")
    check_unit_images(made)
    return made


def _check_rate(name: str, rate: float) -> None:
    if not 0.0 < rate < 1.0:
        raise DataError(f"{name} must be in (0, 1), got {rate}.")


def _check(images: Float32Array, labels: IntArray) -> None:
    check_unit_images(images)
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (len(images),):
        kind = getattr(labels, "dtype", type(labels).__name__)
        raise DataError(f"labels must be an int64 array of shape ({len(images)},), got {kind} {np.shape(labels)}.")
    if len(images) == 0:
        raise DataError("there are no images. Give at least one.")
    if labels.min() < 0:
        raise DataError(f"labels must be >= 0, got {int(labels.min())}.")
