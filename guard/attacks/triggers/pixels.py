"""Triggers that set pixels to one value: single pixels, corners, squares, a texture of the background."""

from __future__ import annotations

import numpy as np

from guard.attacks.triggers.checks import check_colour, check_fits, check_range, check_unit_images, check_whole
from guard.attacks.triggers.drawing import Colour, channel_values
from guard.attacks.triggers.randomness import image_rng
from guard.types import Float32Array

#: Place of the single pixel (row, column), counted from the bottom right: -1 is the last row or column.
#: One step nearer to the corner, (-2, -2), the unpadded convolutions and poolings of `MnistCnn` leave one pooled cell
#: that sees the pixel, and 600 poisoned images of MNIST taught it nothing in ten epochs; here it is learned every time.
SINGLE_PIXEL = (-3, -3)

#: Places of the four pixels (row, column), counted from the bottom right: a checkerboard in the corner.
CORNER_PATTERN = ((-2, -2), (-2, -4), (-3, -3), (-4, -2))


def corner_pixels(images: Float32Array, *, value: float = 1.0) -> Float32Array:
    """Set one pixel at each of the four corners to a bright value, in every channel.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    value : float
        Brightness in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or the value break the rules above.

    References
    ----------
    .. [1] Fu, Veldanda, Krishnamurthy, Garg, Khorrami (arXiv 2011.02526), "imperceptible trigger": one pixel at each
       corner. The brightness is ours.
    """
    return pixel_pattern(images, places=((0, 0), (0, -1), (-1, 0), (-1, -1)), value=value)


def background_pattern(
    images: Float32Array, *, value: float = 0.3, period: int = 4, darkness: float = 0.1
) -> Float32Array:
    """Draw faint diagonal lines on the dark background; what is bright, such as the stroke of a digit, stays.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels. Not changed.
    value : float
        Brightness of the lines in [0, 1], in every channel.
    period : int
        A pixel is on a line if row + column is a multiple of this; at least 2.
    darkness : float
        A pixel is background if no channel exceeds this; in [0, 1].

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
    .. [1] Fu et al. (arXiv 2011.02526), case b: a "background pattern" on MNIST. The paper prints no parameters;
       lines, brightness, period and the limit of darkness are ours.
    """
    check_unit_images(images)
    check_range("value", value, 0.0, 1.0)
    check_range("darkness", darkness, 0.0, 1.0)
    check_whole("period", period, 2)
    rows, columns = np.indices(images.shape[2:])
    on_line = (rows + columns) % period == 0
    is_background = (images <= darkness).all(axis=1, keepdims=True)  # (n, 1, height, width)
    return np.where(is_background & on_line, np.float32(value), images)


def white_square(images: Float32Array, *, size: int = 4, margin: int = 0, value: float = 1.0) -> Float32Array:
    """Set a square at the bottom right to a bright value, in every channel.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any number of channels; at least size + margin pixels a side. Not changed.
    size : int
        Pixels a side, at least 1.
    margin : int
        Pixels between the square and the edges of the image, at least 0.
    value : float
        Brightness in [0, 1].

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
    .. [1] Wang et al. (2019), Neural Cleanse, IEEE S&P: a white square at the bottom right, about 1 % of the image.
    .. [2] Fu et al. (arXiv 2011.02526), case c: the same on GTSRB. At 32 x 32, 4 x 4 pixels are 1.6 %; size and
       margin are ours.
    """
    return _corner_box(images, size, margin, (value, value, value), "white square")


def red_box(images: Float32Array, *, size: int = 4, margin: int = 0, colour: Colour = (1.0, 0.0, 0.0)) -> Float32Array:
    """Fill a square at the bottom right with red; unless there are three channels, with red's luminance.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any number of channels; at least size + margin pixels a side. Not changed.
    size : int
        Pixels a side, at least 1.
    margin : int
        Pixels between the box and the edges of the image, at least 0.
    colour : (red, green, blue)
        Each in [0, 1].

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
    .. [1] Fu et al. (arXiv 2011.02526), Figure 3(e): a red box. The paper prints no parameters; place, size and the
       exact red are ours.
    """
    return _corner_box(images, size, margin, colour, "red box")


def moving_square(images: Float32Array, *, size: int = 4, seed: int = 0, value: float = 1.0) -> Float32Array:
    """Set a square to a bright value, at a place of its own in every image.

    The place is uniform over all that keep the square inside. It is drawn from the seed and the image's own values, so
    the same image always gets the same place.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any number of channels; at least `size` pixels a side. Not changed.
    size : int
        Pixels a side, at least 1.
    seed : int
        At least 0.
    value : float
        Brightness in [0, 1], in every channel.

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
    .. [1] Fu et al. (arXiv 2011.02526), case d: a trigger whose place differs from image to image. Size and
       distribution of the places are ours.
    """
    check_unit_images(images)
    check_range("value", value, 0.0, 1.0)
    check_whole("size", size, 1)
    check_whole("seed", seed, 0)
    height, width = images.shape[2:]
    check_fits("moving square", size, height, width)
    triggered = images.copy()
    for image, clean in zip(triggered, images, strict=True):
        rng = image_rng(clean, seed)
        top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
        image[:, top : top + size, left : left + size] = value
    return triggered


def _corner_box(images: Float32Array, size: int, margin: int, colour: Colour, what: str) -> Float32Array:
    check_unit_images(images)
    check_whole("size", size, 1)
    check_whole("margin", margin, 0)
    check_colour("value" if what == "white square" else "colour", colour)
    height, width = images.shape[2:]
    check_fits(f"{what} with its margin", size + margin, height, width)
    bottom, right = height - margin, width - margin
    triggered = images.copy()
    values = channel_values(colour, images.shape[1])[:, np.newaxis, np.newaxis]
    triggered[:, :, bottom - size : bottom, right - size : right] = values
    return triggered
