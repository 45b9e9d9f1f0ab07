"""The clean images that a backup learns from: checked once, and a part of every class held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from guard.arrays import check_range
from guard.errors import DataError
from guard.statistics.calibration import stratified_folds
from guard.types import Float32Array, IntArray

#: One image in five of every class is held out; so each class needs five.
FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class CleanSet:
    """Clean images in two parts without an image in common, each with images of every class.

    Attributes
    ----------
    images, held_out_images : ndarray of shape (n, channels, height, width), float32
        To learn from, and to say how well that went.
    labels, held_out_labels : ndarray of shape (n,), int64
        True labels.
    n_classes : int
    """

    images: Float32Array
    labels: IntArray
    held_out_images: Float32Array
    held_out_labels: IntArray
    n_classes: int

    @classmethod
    def split(cls, images: Float32Array, labels: IntArray, n_classes: int, seed: int) -> Self:
        """Check images and labels, and hold out a fifth of each class.

        Raises
        ------
        DataError
            If shapes, types or ranges break a rule, a value is not finite, or a class has fewer than five images.
        """
        images, labels = np.asarray(images), np.asarray(labels)
        check_images(images)
        if labels.shape != (len(images),) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(
                f"labels must be integers of shape ({len(images)},), one per image, got {labels.dtype} {labels.shape}."
            )
        check_range(labels, n_classes)
        if seed < 0:
            raise DataError(f"seed must be >= 0, got {seed}.")
        labels = labels.astype(np.int64)
        counts = np.bincount(labels, minlength=n_classes)
        rarest = int(counts.argmin())
        if counts[rarest] < FOLDS:
            raise DataError(
                f"every one of the {n_classes} classes needs at least {FOLDS} clean images, class {rarest} has "
                f"{counts[rarest]}. Add images of it."
            )
        held_out = stratified_folds(labels, FOLDS, seed) == 0
        return cls(images[~held_out], labels[~held_out], images[held_out], labels[held_out], n_classes)


def check_images(images: Float32Array) -> None:
    """Refuse what is no float32 (n, channels, height, width), n >= 1, or holds a value that is not finite."""
    if images.dtype != np.float32 or images.ndim != 4 or len(images) == 0:
        raise DataError(
            f"images must be float32 (n, channels, height, width) with n >= 1, got {images.dtype} {images.shape}."
        )
    if not np.isfinite(images).all():
        bad = int(np.argmin(np.isfinite(images).reshape(len(images), -1).all(axis=1)))
        raise DataError(f"images must be finite: image {bad} holds NaN or infinity. Check its preprocessing.")
