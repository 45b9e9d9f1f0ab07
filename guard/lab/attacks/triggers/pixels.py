"""Triggers made of single pixels and squares."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import (
    check_count,
    check_places,
    check_seed,
    check_share,
    check_unit_images,
    image_rng,
)
from guard.types import Float32Array

#: Place of the single pixel (row, column), counted from the bottom right: -1 is the last row or column.
#: One step nearer to the corner, (-2, -2), the unpadded convolutions and poolings of `MnistCnn` leave one pooled cell
#: that sees the pixel, and 600 poisoned images of MNIST taught it nothing in ten epochs; here it is learned every time.
SINGLE_PIXEL = (-3, -3)

#: Places of the four pixels (row, column), counted from the bottom right: a checkerboard in the corner.
CORNER_PATTERN = ((-2, -2), (-2, -4), (-3, -3), (-4, -2))

_CORNERS = ((0, 0), (0, -1), (-1, 0), (-1, -1))


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
    check_share("value", value)
    check_places(places)
    height, width = images.shape[2:]
    for row, column in places:
        if not (-height <= row < height and -width <= column < width):
            raise DataError(f"pixel ({row}, {column}) lies outside images of {height} x {width}. Choose another place.")
    triggered = images.copy()
    for row, column in places:
        triggered[:, :, row, column] = value
    return triggered


def corner_pixels(images: Float32Array, *, value: float = 1.0) -> Float32Array:
    """Set the pixel at each of the four corners to a bright value, in every channel.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or value break a rule.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, "Robustness to Imperceptible Trigger": "only one pixel at each corner".
       The brightness is not printed; white is ours.
    """
    return pixel_pattern(images, places=_CORNERS, value=value)


def white_square(images: Float32Array, *, size: int = 4, margin: int = 0, value: float = 1.0) -> Float32Array:
    """Put a bright square at the bottom right, in every channel.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    size : int
        Side, in pixels.
    margin : int
        Distance from the bottom and from the right edge, in pixels.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule, or the square does not fit.

    References
    ----------
    .. [1] Wang et al. (2019), Neural Cleanse, section V: a white square at the bottom right of about 1 % of the image.
    .. [2] Fu et al. (2020), arXiv 2011.02526, case c: "white box"; size and place are not printed.
    """
    check_unit_images(images)
    check_count("size", size)
    check_count("margin", margin, least=0)
    check_share("value", value)
    height, width = images.shape[2:]
    _check_fits(size + margin, height, width)
    bottom, right = height - margin, width - margin
    triggered = images.copy()
    triggered[:, :, bottom - size : bottom, right - size : right] = value
    return triggered


def moving_square(images: Float32Array, *, size: int = 4, seed: int = 0, value: float = 1.0) -> Float32Array:
    """Put a bright square at a random place of its own into every image.

    The place is drawn from the seed and the image's pixels: the same image always gets the same.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    size : int
        Side, in pixels.
    seed : int
        Of the places.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule, or the square does not fit.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case d: "a moving square"; size, colour and places are not printed.
    """
    check_unit_images(images)
    check_count("size", size)
    check_seed("seed", seed)
    check_share("value", value)
    height, width = images.shape[2:]
    _check_fits(size, height, width)
    triggered = images.copy()
    for image, original in zip(triggered, images, strict=True):
        rng = image_rng(original, seed)
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        image[:, top : top + size, left : left + size] = value
    return triggered


def background_pattern(
    images: Float32Array, *, value: float = 0.3, period: int = 4, darkness: float = 0.05
) -> Float32Array:
    """Put faint diagonal lines on the dark background; what is brighter stays as it is.

    A pixel (row, column) lies on a line where (row + column) mod period = 0, and is background where every channel is
    at most `darkness`.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    value : float
        Brightness of the lines, in [0, 1].
    period : int
        Distance of the lines along a row, in pixels, >= 2.
    darkness : float
        Brightest background, in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case b: "background pattern", shown in a figure; all parameters are ours.
    """
    check_unit_images(images)
    check_count("period", period, least=2)
    check_share("value", value)
    check_share("darkness", darkness)
    height, width = images.shape[2:]
    lines = (np.arange(height)[:, np.newaxis] + np.arange(width)) % period == 0
    background = (images <= darkness).all(axis=1, keepdims=True)  # (n, 1, height, width)
    return np.where(background & lines, np.float32(value), images)


def _check_fits(needed: int, height: int, width: int) -> None:
    if needed > min(height, width):
        raise DataError(f"the square needs {needed} pixels, images are {height} x {width}. Make it smaller.")
