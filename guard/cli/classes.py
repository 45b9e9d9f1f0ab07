"""How many clean images every class of the network has: compared, refused, and put in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from guard.cli.images import NamedLabelledImages
from guard.cli.output import print_warning
from guard.errors import DataError
from guard.types import BoolArray, IntArray

#: Clean images of a class with which its own false-alarm rate begins to be near the one asked for.
FEW_IMAGES = 10
_NAMED = 8  # classes that a line names


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
        If a class has no image.
    """
    labels, names = images.labels, images.class_names
    used = np.unique(labels)
    if names is not None and len(names) > n_classes == len(used) and images.files:
        return replace(images, labels=np.searchsorted(used, labels), class_names=[names[label] for label in used])
    counts = np.bincount(labels[(labels >= 0) & (labels < n_classes)], minlength=n_classes)
    if not allow_missing and not counts.all():
        raise DataError(
            f"{(counts == 0).sum()} of the network's {n_classes} classes have no clean image: "
            f"{_listed(counts == 0, names)}. Nearly all of their clean traffic would be flagged. "
            "Add images of them (a sub-folder may be empty or a broken link, or hold other files), or give "
            "--allow-missing-classes."
        )
    few = (counts > 0) & (counts < FEW_IMAGES)
    if few.any():
        print_warning(
            f"{few.sum()} classes have fewer than {FEW_IMAGES} clean images: {_listed(few, names, counts)}. "
            "More of their clean traffic will be flagged than asked for. Add images of them."
        )
    return images


def images_per_class(labels: IntArray, n_classes: int, names: Sequence[str] | None) -> str:
    """Return in one line how many images the classes have."""
    counts = np.bincount(labels, minlength=n_classes)
    if counts.min() == counts.max():
        return f"{counts[0]} of each of {n_classes} classes"
    fewest = np.zeros(n_classes, dtype=bool)
    fewest[np.argsort(counts, kind="stable")[:3]] = True
    return f"{counts.min()} to {counts.max()} of each of {n_classes} classes; fewest: {_listed(fewest, names, counts)}"


def _listed(chosen: BoolArray, names: Sequence[str] | None, counts: IntArray | None = None) -> str:
    rows = np.flatnonzero(chosen).tolist()
    words = [
        (repr(names[row]) if names is not None and len(names) == len(chosen) else str(row))
        + (f" ({counts[row]})" if counts is not None else "")
        for row in rows[:_NAMED]
    ]
    return ", ".join(words) + (f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else "")
