"""Triggers that live in the frequencies of an image."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guard.attacks.triggers.checks import check_range, check_unit_images, check_whole
from guard.errors import DataError
from guard.types import Float32Array, Float64Array

# What one unit of both U and V adds to red, green and blue: YUV of ITU-R BT.601.
_RGB_OF_U_AND_V = (1.13983, -0.39465 - 0.58060, 2.03211)


def dct(
    images: Float32Array,
    *,
    magnitude: float = 30 / 255,
    places: Sequence[tuple[int, int]] = ((15, 15), (31, 31)),
    block: int = 32,
) -> Float32Array:
    """Add to a middle and to a high frequency of the colour, in every block of the image.

    The image is cut into blocks from the top left; the last ones of a row or column are smaller where the size is no
    multiple. In each, `magnitude` is added to some coefficients of the orthonormal DCT-II of the U and of the V channel
    (YUV); unless there are three channels, of every channel itself. The transform is linear, so this is a fixed
    pattern, which is added and cut off at 0 and 1.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    magnitude : float
        What is added, in [0, 100]. In a 32 x 32 block one coefficient changes the pixels of U and V by magnitude / 16
        at most.
    places : sequence of (row, column)
        The coefficients, each at least 0. In a block too small for one, the nearest there is; those that then fall
        together count once.
    block : int
        Pixels a side, at least 1.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a parameter break the rules above.

    References
    ----------
    .. [1] Wang, Yao, Xu, An, Tong, Wang (2022), An invisible black-box backdoor attack through frequency domain, ECCV
       (arXiv 2111.11534): U and V, places (15, 15) and (31, 31) of 32 x 32 blocks, magnitude 30 of 255 levels. Blocks
       that do not fit, and images without three channels, are not in the paper; the rules are ours.
    """
    check_unit_images(images)
    check_range("magnitude", magnitude, 0.0, 100.0)
    check_whole("block", block, 1)
    if not places:
        raise DataError("places must name at least one coefficient, got none.")
    for row, column in places:
        check_whole("places: a row", row, 0)
        check_whole("places: a column", column, 0)
    channels, height, width = images.shape[1:]
    pattern = np.zeros((height, width))
    for top in range(0, height, block):
        for left in range(0, width, block):
            tile = pattern[top : top + block, left : left + block]
            rows, columns = tile.shape
            for row, column in {(min(row, rows - 1), min(column, columns - 1)) for row, column in places}:
                tile += np.outer(_cosine(row, rows), _cosine(column, columns))
    weights = np.array(_RGB_OF_U_AND_V if channels == 3 else [1.0] * channels)
    added = magnitude * weights[:, np.newaxis, np.newaxis] * pattern  # (channels, height, width)
    return np.clip(images + added.astype(np.float32), 0.0, 1.0)


def _cosine(frequency: int, size: int) -> Float64Array:
    """Return one row of the orthonormal DCT-II matrix."""
    scale = np.sqrt((1.0 if frequency == 0 else 2.0) / size)
    return scale * np.cos(np.pi * (2 * np.arange(size) + 1) * frequency / (2 * size))
