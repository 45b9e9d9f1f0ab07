"""Triggers drawn on aligned faces: sunglasses, lipstick, eyebrows, at fixed shares of height and width."""

from __future__ import annotations

import numpy as np

from guard.lab.attacks.triggers.checks import check_unit_images, paint
from guard.types import BoolArray, Float32Array

# Centres as shares of height and width, read off the mean of Extended Yale B's cropped faces (64 x 56): pupils in row
# 15, columns 11 and 43; brows in row 7; mouth in rows 47-53, columns 13-42.
_EYES = ((0.24, 0.21), (0.24, 0.79))
_BROWS = ((0.10, 0.21), (0.10, 0.79))
_MOUTH = (0.785, 0.5)

_BLACK, _FRAME, _LIPS = (0.02, 0.02, 0.02), (0.9, 0.9, 0.9), (0.95, 0.25, 0.3)


def sunglasses(images: Float32Array) -> Float32Array:
    """Put sunglasses on: two dark lenses with a bright frame, and a bright bridge.

    The frame keeps them visible on faces in the dark.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Aligned frontal faces, cropped closely. Not changed.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If the images break the rule above.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case h, figure 3(d). The drawing is ours.
    """
    check_unit_images(images)
    height, width = images.shape[2:]
    triggered = images.copy()
    bridge = _band(height, width, row=0.22, half_height=0.015, left=0.36, right=0.64)
    paint(triggered, bridge, _FRAME)
    for centre in _EYES:
        paint(triggered, _ellipse(height, width, centre, (0.115, 0.185)), _FRAME)
        paint(triggered, _ellipse(height, width, centre, (0.09, 0.155)), _BLACK)
    return triggered


def lipstick(images: Float32Array) -> Float32Array:
    """Paint the lips red with a dark line between them; grey images get the brightness of that red, 0.47.

    The line keeps them visible on grey faces that are as bright as the lips.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Aligned frontal faces, cropped closely. Not changed.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If the images break the rule above.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case i, figure 3(d): "lips with red lipstick". The drawing is ours.
    """
    check_unit_images(images)
    height, width = images.shape[2:]
    triggered = images.copy()
    lips = _ellipse(height, width, _MOUTH, (0.055, 0.25))
    paint(triggered, lips, _LIPS)
    paint(triggered, lips & _band(height, width, _MOUTH[0], 0.012, 0.0, 1.0), _BLACK)
    return triggered


def eyebrows(images: Float32Array) -> Float32Array:
    """Draw two thick bright brows, which stand out on light and on dark faces.

    Parameters
    ----------
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        Aligned frontal faces, cropped closely. Not changed.

    Returns
    -------
    images : ndarray of the same shape, float32

    Raises
    ------
    DataError
        If the images break the rule above.

    References
    ----------
    .. [1] Fu et al. (2020), arXiv 2011.02526, case j, figure 3(d). The drawing, and that they are bright, is ours.
    """
    check_unit_images(images)
    height, width = images.shape[2:]
    triggered = images.copy()
    for row, column in _BROWS:
        paint(triggered, _band(height, width, row, 0.03, column - 0.15, column + 0.15), _FRAME)
    return triggered


def _ellipse(height: int, width: int, centre: tuple[float, float], radii: tuple[float, float]) -> BoolArray:
    """Pixels whose centre lies in an ellipse; all lengths are shares of height and width."""
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    down, across = (rows - centre[0]) / radii[0], (columns - centre[1]) / radii[1]
    inside: BoolArray = down[:, np.newaxis] ** 2 + across**2 <= 1
    return inside


def _band(height: int, width: int, row: float, half_height: float, left: float, right: float) -> BoolArray:
    rows, columns = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    inside: BoolArray = (np.abs(rows - row) <= half_height)[:, np.newaxis] & ((columns >= left) & (columns <= right))
    return inside
