"""The one split of every image set that all models of the zoo share.

`train` teaches the suspect model, `monitor` says when its training has settled, `validation` is for the guard (clean
images that no suspect model was trained on), `test` is for measuring. No image is in two of them.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from guard.data.datasets import ImageSet, load_dataset, split_rows, to_tensor_images
from guard.errors import DatasetError
from guard.types import BoolArray, Float32Array, IntArray

#: Seed of every split; a new one makes a new zoo.
SPLIT_SEED = 2011
#: Test images that equal training images of GTSRB (all "Stop").
_GTSRB_REPEATED = (666, 2291, 3546, 3594, 4548, 9384, 9575, 11906)
#: Classes of CIFAR-100 that networks trained on all of them take least often for each other.
_CIFAR100_30 = (
    *(0, 8, 17, 20, 21, 23, 24, 28, 31, 35, 36, 41, 52, 54, 56),
    *(58, 60, 61, 62, 63, 68, 75, 76, 79, 81, 82, 88, 91, 94, 95),
)


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImages:
    """Images as a network takes them, and their true labels.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    labels : ndarray of shape (n,), int64
    """

    images: Float32Array
    labels: IntArray

    def __len__(self) -> int:
        return len(self.labels)


class ZooSplit:
    """One image set in four parts, each read when it is first asked for; made by `load_split`.

    The files of the training side are not touched by somebody who only measures, except where validation images come
    from there (Yale B).

    Attributes
    ----------
    data_set : str
    description : str
        Where the parts come from, for people.
    """

    def __init__(self, data_set: str, data_dir: Path | None) -> None:
        self._rules = _RULES[data_set]
        self._data_dir = data_dir
        self.data_set = data_set
        self.description = self._rules.description

    @property
    def train(self) -> LabelledImages:
        """What teaches the suspect model."""
        return self._training_side[0]

    @property
    def monitor(self) -> LabelledImages:
        """What says when its training has settled."""
        return self._training_side[1]

    @property
    def validation(self) -> LabelledImages:
        """Clean images for the guard, which no suspect model was trained on."""
        return self._guard_side[0]

    @property
    def test(self) -> LabelledImages:
        """What is measured on."""
        return self._guard_side[1]

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their labels."""
        return self._load("test").class_names

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 over labels and pixels of the validation and the test part, in order."""
        digest = hashlib.sha256()
        for part in self._guard_side:
            digest.update(part.labels.tobytes())
            digest.update(part.images.tobytes())
        return digest.hexdigest()

    @functools.cached_property
    def _training_side(self) -> tuple[LabelledImages, LabelledImages]:
        train, monitor, _ = self._divided_train
        return _ready(train), _ready(monitor)

    @functools.cached_property
    def _guard_side(self) -> tuple[LabelledImages, LabelledImages]:
        test = self._load("test")
        if self._rules.validation_from_train:
            return _ready(self._divided_train[2]), _ready(test)
        validation, rest = self._rules.divide_test(test, np.random.default_rng([SPLIT_SEED, 1]))
        return _ready(validation), _ready(rest)

    @functools.cached_property
    def _divided_train(self) -> tuple[ImageSet, ImageSet, ImageSet]:
        return self._rules.divide_train(self._load("train"), np.random.default_rng(SPLIT_SEED))

    def _load(self, split: str) -> ImageSet:
        images = load_dataset(self._rules.part_of or self.data_set, split, self._data_dir)
        return _only(images, self._rules.classes) if self._rules.classes else images


@functools.lru_cache(maxsize=2)
def load_split(data_set: str, data_dir: Path | None = None) -> ZooSplit:
    """Return an image set as the zoo splits it; arrays are read-only.

    Parameters
    ----------
    data_set : {"mnist", "gtsrb", "cifar10", "yaleb", "cifar100", "cifar100_30"}
        The last is 30 classes of CIFAR-100.
    data_dir : path, optional
        As in `guard.data.datasets.load_dataset`.

    Raises
    ------
    DatasetError
        If the set is unknown; later, when a part is asked for, if its file is missing.
    """
    if data_set not in _RULES:
        raise DatasetError(f"the zoo has no split of {data_set!r}: known are {', '.join(_RULES)}.")
    return ZooSplit(data_set, data_dir)


def _ready(part: ImageSet) -> LabelledImages:
    images, labels = to_tensor_images(part.images), part.labels.copy()
    images.setflags(write=False)
    labels.setflags(write=False)
    return LabelledImages(images, labels)


#: Of the training file: train, monitor, and what is left for validation (empty for most).
TrainParts = tuple[ImageSet, ImageSet, ImageSet]


@dataclass(frozen=True, slots=True)
class _Rules:
    divide_train: Callable[[ImageSet, np.random.Generator], TrainParts]
    divide_test: Callable[[ImageSet, np.random.Generator], tuple[ImageSet, ImageSet]]
    description: str
    validation_from_train: bool = False
    part_of: str | None = None  # the image set whose files hold it, where that has another name
    classes: tuple[int, ...] = ()  # labels there of the classes that it has; () for all


def _only(images: ImageSet, classes: tuple[int, ...]) -> ImageSet:
    """Return the images of some classes, labelled 0, 1, ... in the order given."""
    new_labels = np.full(len(images.class_names), -1, dtype=np.int64)
    new_labels[list(classes)] = np.arange(len(classes))
    kept = images[new_labels[images.labels] >= 0]
    names = tuple(images.class_names[label] for label in classes)
    return replace(kept, labels=new_labels[kept.labels], class_names=names)


def _hold_back_2000(train: ImageSet, rng: np.random.Generator) -> TrainParts:
    kept, monitor = split_rows(len(train), (len(train) - 2000, 2000), rng)
    return train[np.sort(kept)], train[np.sort(monitor)], train[:0]


def _hold_back_tracks(train: ImageSet, rng: np.random.Generator) -> TrainParts:
    """Hold back one whole track, up to 30 frames of one sign, of each class."""
    tracks = train.extra["track"]
    monitor = np.zeros(len(train), dtype=bool)
    for label in range(len(train.class_names)):
        of_class = train.labels == label
        monitor |= of_class & (tracks == rng.choice(np.unique(tracks[of_class])))
    return train[~monitor], train[monitor], train[:0]


def _hold_back_per_class(monitored: int, validating: int) -> Callable[[ImageSet, np.random.Generator], TrainParts]:
    def divide(train: ImageSet, rng: np.random.Generator) -> TrainParts:
        monitor = _per_class(train, monitored, rng)
        rest = train[~monitor]
        validation = _per_class(rest, validating, rng)
        return rest[~validation], train[monitor], rest[validation]

    return divide


def _first_5000(test: ImageSet, rng: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    validation, rest = split_rows(len(test), (5000, len(test) - 5000), rng)
    return test[np.sort(validation)], test[np.sort(rest)]


def _gtsrb_test(test: ImageSet, rng: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    return _first_5000(test[np.setdiff1d(np.arange(len(test)), _GTSRB_REPEATED)], rng)


def _half_per_class(test: ImageSet, rng: np.random.Generator) -> tuple[ImageSet, ImageSet]:
    validation = _per_class(test, 15, rng)
    return test[validation], test[~validation]


def _per_class(images: ImageSet, count: int, rng: np.random.Generator) -> BoolArray:
    chosen = np.zeros(len(images), dtype=bool)
    for label in range(len(images.class_names)):
        chosen[rng.choice(np.flatnonzero(images.labels == label), size=count, replace=False)] = True
    return chosen


_RULES: dict[str, _Rules] = {
    "mnist": _Rules(
        _hold_back_2000,
        _first_5000,
        "train: 58,000 of the official training images; monitor: the other 2,000; "
        "validation: 5,000 of the official test images; test: the other 5,000",
    ),
    "cifar10": _Rules(
        _hold_back_2000,
        _first_5000,
        "train: 48,000 of the official training images; monitor: the other 2,000; "
        "validation: 5,000 of the official test images; test: the other 5,000",
    ),
    "gtsrb": _Rules(
        _hold_back_tracks,
        _gtsrb_test,
        "train: the official training tracks but one per class; monitor: these 43 tracks; "
        "validation: 5,000 of the official test images; test: the other 7,622 (8 that repeat training images left out)",
    ),
    "yaleb": _Rules(
        _hold_back_per_class(2, 12),
        _half_per_class,
        "per person, of the training file: monitor 2, validation 12, train the rest (32-37); test: the test file (13)",
        validation_from_train=True,
    ),
    "cifar100": _Rules(
        _hold_back_per_class(5, 0),
        _half_per_class,
        "per class: train 115 and monitor 5 of the training file; validation 15 and test 15 of the test file",
    ),
    "cifar100_30": _Rules(
        _hold_back_per_class(5, 0),
        _half_per_class,
        "30 classes of CIFAR-100, per class: train 115 and monitor 5 of the training file; "
        "validation 15 and test 15 of the test file",
        part_of="cifar100",
        classes=_CIFAR100_30,
    ),
}
