"""How many clean images every class of the network has: what is refused, and what people are told."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from guard.cli.images import NamedLabelledImages
from guard.cli.output import print_warning
from guard.detection.membership import membership
from guard.detection.pipeline import Guard
from guard.detection.unseen_classes import flagged_of_unseen_classes
from guard.errors import DataError
from guard.statistics.class_order import class_order
from guard.suspect.model import SuspectModel
from guard.suspect.outputs import share_of_several_labels
from guard.types import Float32Array, IntArray

#: Clean images of a class with which its own false-alarm rate begins to be near the one asked for.
FEW_IMAGES = 10
_NAMED = 8  # classes that a line names
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
            f"{_listed(missing, names)}. Nearly all of their clean traffic would be flagged. "
            "Add images of them (a sub-folder may be empty or a broken link, or hold other files), or give "
            "--allow-missing-classes."
        )
    few = np.flatnonzero((counts > 0) & (counts < FEW_IMAGES))
    if len(few):
        print_warning(
            f"{len(few)} classes have fewer than {FEW_IMAGES} clean images: {_listed(few, names, counts)}. "
            "More of their clean traffic will be flagged than asked for. Add images of them."
        )
    return images


def _check_labels(labels: IntArray, n_classes: int, names: Sequence[str] | None) -> None:
    low, high = int(labels.min()), int(labels.max())
    if low >= 0 and high < n_classes:
        return
    text = f"labels must be in [0, {n_classes}), got {low} to {high}"
    if names is not None:
        raise DataError(
            f"{text}: there are {len(names)} names of classes ({_listed(np.arange(len(names)), names)}), and the "
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
    else:
        text += ", no more than guessing would"
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
    rows = np.unique(np.linspace(0, len(inputs) - 1, min(len(inputs), _SCALED)).astype(int))
    given, wanted = inputs[rows], labels[rows]
    mean, deviation = (of(given, axis=(0, 2, 3), keepdims=True) for of in (np.mean, np.std))
    low, high = given.min(), given.max()
    scaled = {
        "every channel has mean 0 and standard deviation 1": (given - mean) / np.maximum(deviation, 1e-6),
        "all values lie in [0, 1]": (given - low) / max(high - low, 1e-6),
    }

    def right(images: Float32Array) -> float:
        answers = suspect.activations(images.astype(np.float32, copy=False)).logits.argmax(axis=1)
        return float((answers == wanted).mean())

    as_given = right(given)
    if as_given + _NOTICED > 1:
        return
    kind, best = max(((kind, right(images)) for kind, images in scaled.items()), key=lambda found: found[1])
    if best > as_given + _NOTICED:
        print_warning(
            f"the network gets {100 * as_given:.1f} % of these labels right, and {100 * best:.1f} % when the images "
            f"are scaled so that {kind}; their values are {low:.3g} to {high:.3g}. It seems to have learned from "
            "images of another scale. Name what normalises them as in its training with --preprocess, and fit again."
        )


def images_per_class(labels: IntArray, n_classes: int, names: Sequence[str] | None) -> str:
    """Return in one line how many images the classes have."""
    counts = np.bincount(labels, minlength=n_classes)
    if counts.min() == counts.max():
        return f"{counts[0]} of each of {n_classes} classes"
    fewest = np.argsort(counts, kind="stable")[:3]
    return f"{counts.min()} to {counts.max()} of each of {n_classes} classes; fewest: {_listed(fewest, names, counts)}"


def copies_among(guard: Guard, names: Sequence[str]) -> str:
    """Return in one line how many of the clean images are copies of others; warn of copies in several classes.

    Parameters
    ----------
    guard : Guard
    names : sequence of str
        Of the clean images.
    """
    groups, labels = guard.reference_groups, guard.reference_labels
    if groups is None:
        return "none found"
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    contradicting = np.flatnonzero(labels != labels[first][group])
    if len(contradicting):
        row = int(contradicting[0])
        print_warning(
            f"{len(contradicting)} clean images are copies of images of another class, the first {names[row]} of "
            f"{names[first[group[row]]]}; the class of the earlier one counts. Which is right?"
        )
    return (
        f"{len(labels) - len(first)} of {len(labels)} images; what is promised is promised of the {len(first)} others"
    )


def tell_missing(guard: Guard) -> None:
    """Warn of classes of the network that have no clean image, with the rate of false alarms to be expected."""
    counts = np.bincount(guard.reference_labels, minlength=guard.reference.logits.shape[1])
    missing = np.flatnonzero(counts == 0)
    if len(missing) == 0:
        return
    unseen, realised = flagged_of_unseen_classes(guard), guard.realised_false_positive_rate
    share = len(missing) / len(counts)
    overall = share * unseen + (1 - share) * realised
    print_warning(
        f"{len(missing)} of the network's {len(counts)} classes have no clean image: "
        f"{_listed(missing, guard.class_names)}. About {100 * unseen:.0f} % of their clean traffic will be flagged "
        f"(measured on classes that were left out): {100 * overall:.1f} % of all traffic if every class is as frequent "
        f"as any other, where {100 * guard.config.false_positive_rate:g} % were asked for."
    )


def tell_membership(suspect: SuspectModel, inputs: Float32Array, guard: Guard) -> None:
    """Warn of clean images that the network seems to have been trained on."""
    found = membership(suspect, inputs, guard.reference_labels)
    if found.is_noticed:
        print_warning(
            f"the network seems to have been trained on these images: it gets {100 * found.errors:.1f} % of them wrong "
            f"(loss {found.loss:.2g}), and {100 * found.moved_errors:.1f} % when they are moved a little (loss "
            f"{found.moved_loss:.2g}). More of the clean traffic will be flagged than asked for. Give images that it "
            "was not trained on. See docs/detection.md, Clean images."
        )


def tell_contradictions(guard: Guard) -> None:
    """Warn of as many sure mistakes of the network as an attack on the calibration needs."""
    found = guard.contradictions
    if found is not None and found.is_noticed:
        print_warning(
            f"{found.told}. A network may be trained so, to raise the guard's threshold above its triggered inputs: "
            "the false-positive rate is then as asked for, and few of them are flagged. Are the labels right? If they "
            f"are, do not trust the network; at least ask for a rate well above {100 * found.share:.1f} %. See "
            "docs/detection.md, Attack on calibration."
        )


def tell_multi_label(guard: Guard) -> None:
    """Warn of a network that seems to answer several labels of one image."""
    logits = guard.reference.logits
    if share := share_of_several_labels(logits):
        print_warning(
            f"on {100 * share:.0f} % of the images two or more of the network's {logits.shape[1]} logits are positive, "
            "and nearly all are far from 0, as of a multi-label classifier. The guard takes the largest for the only "
            "answer. If several labels may be right, guard each by itself: a module that returns one logit is guarded "
            "as two classes. If the network was trained for one class per image, all is well."
        )


def _listed(labels: IntArray, names: Sequence[str] | None, counts: IntArray | None = None) -> str:
    words = [
        (repr(names[label]) if names is not None else str(label))
        + (f" ({counts[label]})" if counts is not None else "")
        for label in labels[:_NAMED].tolist()
    ]
    return ", ".join(words) + (f" and {len(labels) - _NAMED} more" if len(labels) > _NAMED else "")
