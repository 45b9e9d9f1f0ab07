"""What a trigger checks before it draws: the images, and the ranges of its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray


def check_unit_images(images: AnyArray) -> None:
    """Raise DataError unless the images are float32, (n, channels, height, width), finite and in [0, 1]."""
    shape: Any = np.shape(images)
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4:
        kind = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images must be a float32 array (n, channels, height, width), got {kind} {shape}.")
    # Written so that NaN, which compares as false, is refused too.
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):
        raise DataError("images must lie in [0, 1] and be finite. Put the trigger on before normalising.")


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise DataError unless a number lies in [low, high]; NaN never does."""
    if not low <= value <= high:
        raise DataError(f"{name} must be in [{low:g}, {high:g}], got {value}.")


def check_whole(name: str, value: int, least: int) -> None:
    """Raise DataError unless a number is whole and large enough."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number >= {least}, got {value!r}.")


def check_colour(name: str, colour: Any) -> None:
    """Raise DataError unless a colour is (red, green, blue), each in [0, 1]."""
    if np.shape(colour) != (3,) or not all(0.0 <= part <= 1.0 for part in colour):
        raise DataError(f"{name} must be (red, green, blue), each in [0, 1], got {colour}.")


def check_fits(what: str, needed: int, height: int, width: int) -> None:
    """Raise DataError if a square of `needed` pixels a side does not fit into the image."""
    if needed > min(height, width):
        raise DataError(f"{what} needs {needed} pixels, more than images of {height} x {width} have. Make it smaller.")
