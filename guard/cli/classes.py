"""Clean images against the classes of the network: what is refused, and what people are warned of."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from guard.cli.images import NamedLabelledImages
from guard.cli.output import print_warning
from guard.errors import DataError
from guard.statistics.class_order import class_order
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, IntArray

#: Clean images of a class with which its own false-alarm rate begins to be near the one asked for.
FEW_IMAGES = 10
_NAMED = 8  # classes that a line names
_FILES = 3  # files that a line names
_ASKED = 2000  # images that the order of the classes is looked up with
_LONGEST_ORDER = 2000  # letters
_SCALED = 500  # images that other scales are tried on
_NOTICED = 0.1  # of the labels that another scale must get right beyond those that are right as given


def check_classes(images: NamedLabelledImages, n_classes: int, *, allow_missing: bool = False) -> NamedLabelledImages:
    """Compare the labels with the classes of the network; name classes with few images, refuse those without.

    A sub-folder without an image counts as a class unless the network has just as many classes as there are others.

    Parameters
    ----------
    images : NamedLabelledImages
    n_classes : int
        Of the network.
    allow_missing : bool
        Do not refuse.

    Returns
    -------
    images : NamedLabelledImages
        With the labels that hold for this network.

    Raises
    ------
    DataError
        If a label is none of the network's classes, or a class has no image.
    """
    labels, names = images.labels, images.class_names
    if names is not None and images.empty_folders and len(names) - len(images.empty_folders) == n_classes:
        used, labels = np.unique(labels, return_inverse=True)
        names = [names[label] for label in used]
        images = replace(images, labels=labels, class_names=names, empty_folders=[])
    _check_labels(labels, n_classes, names)
    names = names if names is not None and len(names) == n_classes else None  # else `Guard.fit` refuses them
    counts = np.bincount(labels, minlength=n_classes)
    missing = np.flatnonzero(counts == 0)
    if len(missing) and not allow_missing:
        raise DataError(
            f"{len(missing)} of the network's {n_classes} classes have no clean image: "
            f"{listed(missing, names)}. Nearly all of their clean traffic would be flagged. "
            f"Add images of them ({_why_missing(images, n_classes)}), or give --allow-missing-classes."
        )
    few = np.flatnonzero((counts > 0) & (counts < FEW_IMAGES))
    if len(few):
        print_warning(
            f"{len(few)} classes have fewer than {FEW_IMAGES} clean images: {listed(few, names, counts)}. "
            "More of their clean traffic will be flagged than asked for. Add images of them."
        )
    return images


def _why_missing(images: NamedLabelledImages, n_classes: int) -> str:
    """Return what may be the matter with the folder of a data set in which classes have no image."""
    inside = [name for name in images.passed_over if "/" in name]
    if inside:
        shown = ", ".join(inside[:_FILES]) + (", ..." if len(inside) > _FILES else "")
        return f"{len(inside)} files in sub-folders are no images by their names: {shown}"
    folders = [name.split("/")[:-1] for name in images.names]
    if len({folder[1] for folder in folders if len(folder) > 1}) == n_classes:
        parents = listed(np.arange(len(tops)), tops) if (tops := sorted({folder[0] for folder in folders})) else ""
        return f"there are as many sub-folders below {parents} as classes: name one of these folders"
    return "a sub-folder may be empty or a broken link"


def _check_labels(labels: IntArray, n_classes: int, names: Sequence[str] | None) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and high < n_classes:
        return
    text = f"labels must be in [0, {n_classes}), got {low} to {high}"
    if names is not None:
        raise DataError(
            f"{text}: there are {len(names)} names of classes ({listed(np.arange(len(names)), names)}), and the "
            f"network has {n_classes}. Take out the sub-folders or names that are none of its classes."
        )
    if (low, high) == (1, n_classes):
        raise DataError(
            f"{text}: they are counted from 1. Subtract 1, or name the sub-folders in the network's order: "
            f"--class-names {_as_class_list([str(label) for label in range(1, n_classes + 1)])}"
        )
    raise DataError(f"{text}. Number the classes from 0, in the network's order. Are these its weights?")


def check_order(suspect: SuspectModel, inputs: Float32Array, images: NamedLabelledImages, *, force: bool) -> None:
    """Refuse a network whose answers only chance or another order of the classes explains; with `force`, warn.

    Raises
    ------
    DataError
        With the order that its own answers suggest, where they suggest one.
    """
    rows = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), _ASKED)).astype(int))
    logits = suspect.activations(inputs[rows]).logits
    found = class_order(logits.argmax(axis=1), images.labels[rows], logits.shape[1])
    if found.is_sound:
        return
    text = f"the network gets only {100 * found.right:.1f} % of these labels right"
    mend = "Are the images preprocessed as it wants, and are these its weights?"
    if found.order is not None:
        names = images.class_names
        text += f", and {100 * found.right_in_order:.1f} % in another order of the classes"
        order = _as_class_list([str(label) if names is None else names[label] for label in found.order])
        mend = f"The order that its answers suggest is --class-names {order}"
        if "/" not in images.names[0]:  # labels of a .npz are numbers whatever the classes are called
            mend = (
                "Number the labels in the order that its answers suggest: in NumPy, labels = "
                f"numpy.argsort([{order if names is None else ','.join(map(str, found.order))}])[labels]"
            )
    else:
        text += ", no more than guessing would"
        if better := _another_scale(suspect, inputs, images.labels)[1]:
            text += f", and {better}"
            mend = "Scale the images as in its training, with --preprocess or in the handler"
    if not force:
        raise DataError(
            f"{text}. A guard fitted on that would be of no use. Mend it, or fit all the same with --fit-anyway. {mend}"
        )
    print_warning(f"{text}. {mend}")


def _as_class_list(names: Sequence[str]) -> str:
    """Return names as --class-names takes them in a shell; as what to write into a .json file if a comma parts one."""
    if any("," in name or "\n" in name for name in names):
        order = f"FILE.json that holds {json.dumps(list(names), ensure_ascii=False)}"
    else:
        order = shlex.quote(",".join(names))
    return order if len(order) <= _LONGEST_ORDER else order[:_LONGEST_ORDER] + "..."


def tell_scale(suspect: SuspectModel, inputs: Float32Array, labels: IntArray) -> None:
    """Warn of images that are scaled otherwise than those that the network learned from, as its answers tell."""
    as_given, better = _another_scale(suspect, inputs, labels)
    if better:
        print_warning(
            f"the network gets {100 * as_given:.1f} % of these labels right, and {better}. It seems to have learned "
            "from images of another scale. Name what normalises them as in its training with --preprocess, and fit "
            "again."
        )


def _another_scale(suspect: SuspectModel, inputs: Float32Array, labels: IntArray) -> tuple[float, str]:
    """Return the share of labels that are right, and what share is in another scale; "" if that is not much larger."""
    rows = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), _SCALED)).astype(int))
    given, wanted = inputs[rows], labels[rows]
    mean, deviation = (of(given, axis=(0, 2, 3), keepdims=True) for of in (np.mean, np.std))
    low, high = given.min(), given.max()
    unit = (given - low) / max(high - low, 1e-6)
    scaled = {
        "every channel has mean 0 and standard deviation 1": (given - mean) / np.maximum(deviation, 1e-6),
        "all values lie in [0, 1]": unit,
        "all values lie in [0, 255]": 255 * unit,
    }

    def right(images: Float32Array) -> float:
        answers = suspect.activations(images.astype(np.float32, copy=False)).logits.argmax(axis=1)
        return float((answers == wanted).mean())

    as_given = right(given)
    if as_given + _NOTICED > 1:
        return as_given, ""
    kind, best = max(((kind, right(images)) for kind, images in scaled.items()), key=lambda found: found[1])
    told = f"{100 * best:.1f} % when the images are scaled so that {kind}; their values are {low:.3g} to {high:.3g}"
    return as_given, told if best > as_given + _NOTICED else ""


def listed(labels: IntArray, names: Sequence[str] | None, counts: IntArray | None = None) -> str:
    """Name classes in one line, with their counts if there are any."""
    words = [
        (repr(names[label]) if names is not None else str(label))
        + (f" ({counts[label]})" if counts is not None else "")
        for label in labels[:_NAMED].tolist()
    ]
    return ", ".join(words) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")
