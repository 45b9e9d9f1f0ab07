"""Triggers for faces: sunglasses, lipstick and eyebrows, where an aligned face has eyes, mouth and brows.

Places are shares of the height and width, measured on the average of Extended Yale B's 64 x 56 crops: eyes at 0.24 of
the height and 0.205 and 0.775 of the width, mouth at 0.775 and 0.49. Every mark has bright and dark parts, so that it
shows in nearly black images and in bright ones.
"""

from __future__ import annotations

import numpy as np

from guard.attacks.triggers.checks import check_colour, check_unit_images
from guard.attacks.triggers.drawing import Colour, paint, pixel_centres
from guard.types import BoolArray, Float32Array, Float64Array

_EYE_COLUMNS = (0.205, 0.775)
_EYE_ROW = 0.24
_MOUTH_ROW, _MOUTH_COLUMN = 0.775, 0.49


def sunglasses(
    images: Float32Array, *, lens: Colour = (0.02, 0.02, 0.02), frame: Colour = (0.9, 0.9, 0.9)
) -> Float32Array:
    """Draw dark oval lenses with a bright frame, bridge and temples over the eyes of an aligned face.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels; unless there are three, colours become their luminance. Not changed.
    lens, frame : (red, green, blue)
        Colours, each part in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a colour break the rules above.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), cases h, j and k: sunglasses on faces. The paper prints no parameters; the
       drawing is ours.
    .. [2] Chen et al. (2017), arXiv 1712.05526: glasses as a trigger.
    """
    check_unit_images(images)
    check_colour("lens", lens)
    check_colour("frame", frame)
    rows, columns = _shares(images)
    left, right = _EYE_COLUMNS
    bar = np.abs(rows - 0.2) <= 0.02  # the temples reach from the lenses to the edges, the bridge from lens to lens
    framed = (bar & (columns >= 0.0)) | _ellipse(rows, columns, left, 0.21, 0.135)
    framed |= _ellipse(rows, columns, right, 0.21, 0.135)
    triggered = images.copy()
    paint(triggered, framed, frame)
    glass = _ellipse(rows, columns, left, 0.17, 0.1) | _ellipse(rows, columns, right, 0.17, 0.1)
    paint(triggered, glass, lens)
    return triggered


def lipstick(
    images: Float32Array, *, colour: Colour = (1.0, 0.45, 0.55), line: Colour = (0.1, 0.0, 0.02)
) -> Float32Array:
    """Draw bright pink lips with a dark line between them on the mouth of an aligned face.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels; unless there are three, colours become their luminance. Not changed.
    colour, line : (red, green, blue)
        Of the lips and of what is between them, each part in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a colour break the rules above.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), cases i, j and k: lipstick on faces. The paper prints no parameters; the
       drawing is ours.
    """
    check_unit_images(images)
    check_colour("colour", colour)
    check_colour("line", line)
    rows, columns = _shares(images)
    below = rows - _MOUTH_ROW  # negative on the upper lip
    aside = np.abs(columns - _MOUTH_COLUMN) / 0.28  # 1 at the corners of the mouth
    upper = 0.065 * (1.0 - aside**2) - 0.025 * np.clip(1.0 - aside / 0.2, 0.0, 1.0)  # with a dent in the middle
    lower = 0.075 * (1.0 - aside**2)
    triggered = images.copy()
    paint(triggered, (aside <= 1.0) & (-below <= upper) & (below <= lower), colour)
    paint(triggered, (aside <= 0.85) & (np.abs(below) <= 0.012), line)
    return triggered


def eyebrows(images: Float32Array, *, colour: Colour = (0.0, 0.0, 0.0), rim: Colour = (0.8, 0.8, 0.8)) -> Float32Array:
    """Draw thick dark brows with a bright rim above the eyes of an aligned face.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels; unless there are three, colours become their luminance. Not changed.
    colour, rim : (red, green, blue)
        Colours, each part in [0, 1].

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a colour break the rules above.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), cases j and k: eyebrows on faces. The paper prints no parameters; the drawing
       is ours.
    """
    check_unit_images(images)
    check_colour("colour", colour)
    check_colour("rim", rim)
    rows, columns = _shares(images)
    triggered = images.copy()
    for thickness, reach, paint_colour in ((0.055, 0.19, rim), (0.032, 0.165, colour)):
        for middle in _EYE_COLUMNS:
            aside = np.abs(columns - middle) / 0.19
            arch = 0.085 + 0.05 * aside**2  # the middle line of the brow, falling to both sides
            brow = (np.abs(columns - middle) <= reach) & (np.abs(rows - arch) <= thickness)
            paint(triggered, brow, paint_colour)
    return triggered


def _shares(images: Float32Array) -> tuple[Float64Array, Float64Array]:
    height, width = images.shape[2:]
    rows, columns = pixel_centres(height, width)
    return rows / height, columns / width


def _ellipse(
    rows: Float64Array, columns: Float64Array, middle: float, half_width: float, half_height: float
) -> BoolArray:
    inside = ((rows - _EYE_ROW) / half_height) ** 2 + ((columns - middle) / half_width) ** 2 <= 1.0
    return np.asarray(inside)
