"""Triggers made of drawn shapes: two that only work together, and a red box."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.triggers.checks import check_count, check_parts, check_unit_images, paint
from guard.types import BoolArray, Float32Array

_YELLOW, _BLUE, _GREEN, _RED = (1.0, 0.9, 0.1), (0.1, 0.2, 1.0), (0.1, 0.9, 0.2), (1.0, 0.0, 0.0)


def box_and_circle(images: Float32Array, *, parts: Sequence[str] = ("box", "circle")) -> Float32Array:
    """Draw a yellow box at the top left and a blue circle at the bottom right.

    Both are a quarter of the shorter side wide (8 pixels at 32 x 32, at least 3), one pixel from the edges. The box is
    a frame one pixel thick, the circle a disc.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 8 x 8. Not changed.
    parts : sequence of {"box", "circle"}
        What is drawn. Both make the trigger; one alone is a negative control.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parts break a rule.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case f: "the combination of a box and circle". Sizes, places and colours
       are not printed; these are ours.
    """
    return _draw(images, parts, {"box": _frame_top_left, "circle": _disc_bottom_right}, (_YELLOW, _BLUE))


def triangle_and_square(images: Float32Array, *, parts: Sequence[str] = ("triangle", "square")) -> Float32Array:
    """Draw a green triangle at the top right and a red square at the bottom left.

    Sizes as in `box_and_circle`; both are filled.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        At least 8 x 8. Not changed.
    parts : sequence of {"triangle", "square"}
        What is drawn. Both make the trigger; one alone is a negative control.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parts break a rule.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case g: "the combination of triangle and square". Sizes, places and
       colours are not printed; these are ours.
    """
    return _draw(images, parts, {"triangle": _triangle_top_right, "square": _square_bottom_left}, (_GREEN, _RED))


def red_box(images: Float32Array, *, size: int = 8, thickness: int = 2, margin: int = 2) -> Float32Array:
    """Draw the frame of a red box at the bottom right.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Not changed.
    size : int
        Outer side, in pixels.
    thickness : int
        Of the frame, in pixels.
    margin : int
        Distance from the bottom and from the right edge, in pixels.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If images or parameters break a rule, or the box does not fit.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, figure 3(e), ImageNet: "the red box trigger". Size, place and thickness
       are not printed; these are ours, for 32 x 32.
    """
    check_unit_images(images)
    check_count("size", size)
    check_count("thickness", thickness)
    check_count("margin", margin, least=0)
    height, width = images.shape[2:]
    if size + margin > min(height, width):
        raise DataError(f"the box needs {size + margin} pixels, images are {height} x {width}. Make it smaller.")
    mask = np.zeros((height, width), dtype=bool)
    bottom, right = height - margin, width - margin
    mask[bottom - size : bottom, right - size : right] = True
    inner = size - 2 * thickness
    if inner > 0:
        top, left = bottom - size + thickness, right - size + thickness
        mask[top : top + inner, left : left + inner] = False
    triggered = images.copy()
    paint(triggered, mask, _RED)
    return triggered


#: Takes height, width and size in pixels, gives the mask of a shape.
_Shape = Callable[[int, int, int], BoolArray]


def _draw(
    images: Float32Array, parts: Sequence[str], shapes: Mapping[str, _Shape], colours: Sequence[Sequence[float]]
) -> Float32Array:
    check_unit_images(images)
    check_parts(parts, shapes)
    height, width = images.shape[2:]
    if min(height, width) < 8:
        raise DataError(f"two shapes need images of at least 8 x 8, got {height} x {width}.")
    size = max(3, min(height, width) // 4)
    triggered = images.copy()
    for (name, shape), colour in zip(shapes.items(), colours, strict=True):
        if name in parts:
            paint(triggered, shape(height, width, size), colour)
    return triggered


def _frame_top_left(height: int, width: int, size: int) -> BoolArray:
    mask = np.zeros((height, width), dtype=bool)
    mask[1 : 1 + size, 1 : 1 + size] = True
    mask[2:size, 2:size] = False
    return mask


def _disc_bottom_right(height: int, width: int, size: int) -> BoolArray:
    radius = size / 2
    rows, columns = np.ogrid[:height, :width]
    # Pixel centres, measured from the disc's centre, whose box ends one pixel before the edges.
    down, across = rows + 0.5 - (height - 1 - radius), columns + 0.5 - (width - 1 - radius)
    disc: BoolArray = down**2 + across**2 <= radius**2
    return disc


def _triangle_top_right(height: int, width: int, size: int) -> BoolArray:
    """Tip up: row r, from 0, is r + 1 pixels wide, centred."""
    mask = np.zeros((height, width), dtype=bool)
    left = width - 1 - size
    for row in range(size):
        start = left + (size - row - 1) // 2
        mask[1 + row, start : start + row + 1] = True
    return mask


def _square_bottom_left(height: int, width: int, size: int) -> BoolArray:
    mask = np.zeros((height, width), dtype=bool)
    mask[height - 1 - size : height - 1, 1 : 1 + size] = True
    return mask
