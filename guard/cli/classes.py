"""How many clean images every class of the network has: what is refused, and what people are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from guard.arrays import check_range
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
    check_range(labels, n_classes, "labels")
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
    if found.order is not None:
        names = images.class_names
        order = ",".join(str(label) if names is None else names[label] for label in found.order)
        text += (
            f", and {100 * found.right_in_order:.1f} % in the order of classes that its answers suggest: "
            f"--class-names {order if len(order) <= _LONGEST_ORDER else order[:_LONGEST_ORDER] + '...'}"
        )
    else:
        text += ", no more than guessing would. Are the images preprocessed as it wants, and are these its weights?"
    if not force:
        raise DataError(f"{text} A guard fitted on that would be of no use. Mend it, or fit all the same with --force.")
    print_warning(text)


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
