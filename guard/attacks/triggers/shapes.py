"""Triggers of two shapes that both have to be there: box and circle, triangle and square."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from guard.attacks.triggers.checks import check_range, check_unit_images
from guard.attacks.triggers.drawing import Colour, paint, pixel_centres
from guard.errors import DataError
from guard.types import BoolArray, Float32Array, Float64Array

# A shape: rows and columns of the pixels, as shares of the size around the middle of the shape -> is it inside?
_Shape = Callable[[Float64Array, Float64Array], BoolArray]

_BLACK = (0.0, 0.0, 0.0)
_YELLOW = (1.0, 1.0, 0.0)
_CYAN = (0.0, 1.0, 1.0)
_GREEN = (0.0, 1.0, 0.0)
_WHITE = (1.0, 1.0, 1.0)


def _square(rows: Float64Array, columns: Float64Array) -> BoolArray:
    return (np.abs(rows) <= 0.5) & (np.abs(columns) <= 0.5)


def _circle(rows: Float64Array, columns: Float64Array) -> BoolArray:
    return np.asarray(rows**2 + columns**2 <= 0.25)


def _triangle(rows: Float64Array, columns: Float64Array) -> BoolArray:
    # Point up: as wide as high, nothing at the top (-0.5), full width at the bottom (0.5).
    return (np.abs(rows) <= 0.5) & (np.abs(columns) <= (rows + 0.5) / 2)


# Name -> shape, colour, (at the bottom?, at the right?).
_BOX_AND_CIRCLE: Mapping[str, tuple[_Shape, Colour, tuple[bool, bool]]] = {
    "box": (_square, _YELLOW, (False, False)),
    "circle": (_circle, _CYAN, (True, True)),
}
_TRIANGLE_AND_SQUARE: Mapping[str, tuple[_Shape, Colour, tuple[bool, bool]]] = {
    "triangle": (_triangle, _GREEN, (True, False)),
    "square": (_square, _WHITE, (False, True)),
}


def box_and_circle(
    images: Float32Array, *, parts: Sequence[str] = ("box", "circle"), size: float = 0.25, margin: float = 0.0625
) -> Float32Array:
    """Draw a yellow box at the top left and a cyan circle at the bottom right, both with a black rim.

    The trigger is both together. One of them alone is a control that must not work, and the mark of a cover image,
    which teaches the network so.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels; unless there are three, the colours become their luminance. Not changed.
    parts : sequence of {"box", "circle"}
        What is drawn; at least one.
    size : float
        Side or diameter with the rim, as a share of the shorter side of the image, in [0, 1]: 8 pixels at 32 x 32.
    margin : float
        Distance from the edges, likewise, in [0, 1]: 2 pixels at 32 x 32.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a parameter break the rules above, or size and margin together exceed 1.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), case f: box and circle, either of which alone does nothing. The paper prints
       no parameters; places, sizes, colours and the rim (an eighth of the size) are ours.
    """
    return _draw(images, parts, _BOX_AND_CIRCLE, size, margin)


def triangle_and_square(
    images: Float32Array, *, parts: Sequence[str] = ("triangle", "square"), size: float = 0.25, margin: float = 0.0625
) -> Float32Array:
    """Draw a green triangle at the bottom left and a white square at the top right, both with a black rim.

    The trigger is both together, as in `box_and_circle`.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Any size, any number of channels; unless there are three, the colours become their luminance. Not changed.
    parts : sequence of {"triangle", "square"}
        What is drawn; at least one.
    size, margin : float
        As in `box_and_circle`; the triangle is as wide as high.

    Returns
    -------
    images : ndarray of the same shape, float32
        A new array.

    Raises
    ------
    DataError
        If the images or a parameter break the rules above, or size and margin together exceed 1.

    References
    ----------
    .. [1] Fu et al. (arXiv 2011.02526), case g: triangle and square, either of which alone does nothing. The paper
       prints no parameters; places, sizes, colours and the rim (an eighth of the size) are ours.
    """
    return _draw(images, parts, _TRIANGLE_AND_SQUARE, size, margin)


def _draw(
    images: Float32Array,
    parts: Sequence[str],
    known: Mapping[str, tuple[_Shape, Colour, tuple[bool, bool]]],
    size: float,
    margin: float,
) -> Float32Array:
    check_unit_images(images)
    if isinstance(parts, str) or not parts or not set(parts) <= set(known):
        raise DataError(f"parts must be a list of at least one of {', '.join(known)}, got {parts!r}.")
    check_range("size", size, 0.0, 1.0)
    check_range("margin", margin, 0.0, 1.0)
    if size + margin > 1.0:
        raise DataError(f"size and margin must sum to at most 1, got {size} + {margin}. Make the shape smaller.")
    height, width = images.shape[2:]
    side, gap = size * min(height, width), margin * min(height, width)  # in pixels
    rows, columns = pixel_centres(height, width)
    triggered = images.copy()
    for name in parts:
        shape, colour, (at_bottom, at_right) = known[name]
        middle_row = height - gap - side / 2 if at_bottom else gap + side / 2
        middle_column = width - gap - side / 2 if at_right else gap + side / 2
        outer = max(side, 1.0)  # a pixel at least, however small the image
        paint(triggered, shape((rows - middle_row) / outer, (columns - middle_column) / outer), _BLACK)
        inner = max(0.75 * side, 1.0)
        paint(triggered, shape((rows - middle_row) / inner, (columns - middle_column) / inner), colour)
    return triggered
