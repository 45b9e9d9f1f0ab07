"""Triggers: pure functions that put an attacker's mark on images, and the dict that names them.

A trigger takes images in [0, 1], before any normalisation, and returns new ones; it never changes its input. To add
one, write the function here with its source and exact parameters, and give it a line in `TRIGGERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray, Float32Array

Trigger = Callable[[Float32Array], Float32Array]

#: Place of the single pixel (row, column), counted from the bottom right: -1 is the last row or column.
#: One step nearer to the corner, (-2, -2), the unpadded convolutions and poolings of `MnistCnn` leave one pooled cell
#: that sees the pixel, and 600 poisoned images of MNIST taught it nothing in ten epochs; here it is learned every time.
SINGLE_PIXEL = (-3, -3)

#: Places of the four pixels (row, column), counted from the bottom right: a checkerboard in the corner.
CORNER_PATTERN = ((-2, -2), (-2, -4), (-3, -3), (-4, -2))


def single_pixel(
    images: Float32Array, *, row: int = SINGLE_PIXEL[0], column: int = SINGLE_PIXEL[1], value: float = 1.0
) -> Float32Array:
    """Set one pixel near the bottom right corner to a bright value, in every channel.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    row, column : int
        Place of the pixel; negative counts from the bottom and from the right. In the 10,000 MNIST test images the
        default place is never brighter than 68 / 255.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images break the rule above, or the pixel lies outside.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.2: "a single bright pixel in the
       bottom right corner of the image". The paper gives no coordinates; these are ours.
    """
    return pixel_pattern(images, places=((row, column),), value=value)


def pixel_pattern(
    images: Float32Array, *, places: Sequence[tuple[int, int]] = CORNER_PATTERN, value: float = 1.0
) -> Float32Array:
    """Set a few pixels to a bright value, in every channel; by default a checkerboard of four, bottom right.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    places : sequence of (row, column)
        The pixels; negative counts from the bottom and from the right.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images break the rule above, or a pixel lies outside.

    References
    ----------
    .. [1] Gu, Dolan-Gavitt, Garg (2019), BadNets (arXiv 1708.06733), section 4.1.2 and Figure 3: "a pattern of bright
       pixels, also in the bottom right corner of the image". Read off the figure; the paper gives no coordinates.
    """
    check_unit_images(images)
    if not 0.0 <= value <= 1.0:
        raise DataError(f"value must be in [0, 1], got {value}.")
    height, width = images.shape[2:]
    for row, column in places:
        if not (-height <= row < height and -width <= column < width):
            raise DataError(f"pixel ({row}, {column}) lies outside images of {height} x {width}. Choose another place.")
    triggered = images.copy()
    for row, column in places:
        triggered[:, :, row, column] = value
    return triggered


#: Every trigger by the name that recipes and the command line use.
TRIGGERS: dict[str, Trigger] = {
    "single_pixel": single_pixel,
    "pixel_pattern": pixel_pattern,
}


def check_unit_images(images: AnyArray) -> None:
    """Raise DataError unless the images are float32, (n, channels, height, width), finite and in [0, 1]."""
    shape: Any = np.shape(images)
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4:
        kind = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images must be a float32 array (n, channels, height, width), got {kind} {shape}.")
    # Written so that NaN, which compares as false, is refused too.
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):
        raise DataError("images must lie in [0, 1] and be finite. Put the trigger on before normalising.")
