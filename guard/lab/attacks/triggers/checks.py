"""What every trigger does first: look at its images, draw per image, mix colours for any number of channels."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray, Float32Array

#: Weights of red, green and blue in brightness (ITU-R BT.601).
LUMINANCE = (0.299, 0.587, 0.114)


def check_unit_images(images: AnyArray) -> None:
    """Raise DataError unless the images are float32, (n, channels, height, width), finite and in [0, 1]."""
    shape: Any = np.shape(images)
    if not isinstance(images, np.ndarray) or images.dtype != np.float32 or images.ndim != 4:
        kind = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images must be a float32 array (n, channels, height, width), got {kind} {shape}.")
    # Written so that NaN, which compares as false, is refused too.
    if images.size and not (images.min() >= 0.0 and images.max() <= 1.0):
        raise DataError("images must lie in [0, 1] and be finite. Put the trigger on before normalising.")


def check_share(name: str, value: float, *, above: float | None = None) -> None:
    """Raise DataError unless a parameter is in [0, 1], or in (above, 1]."""
    if above is None:
        if not (_is_number(value) and 0.0 <= value <= 1.0):
            raise DataError(f"{name} must be in [0, 1], got {value!r}.")
    elif not (_is_number(value) and above < value <= 1.0):
        raise DataError(f"{name} must be in ({above:g}, 1], got {value!r}.")


def check_positive(name: str, value: float) -> None:
    """Raise DataError unless a parameter is a finite number above 0."""
    if not (_is_number(value) and 0.0 < value < np.inf):
        raise DataError(f"{name} must be > 0 and finite, got {value!r}.")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise DataError unless a parameter is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise DataError(f"{name} must be a whole number >= {least}, got {value!r}.")


def check_seed(name: str, value: int) -> None:
    """Raise DataError unless a seed is a whole number, 0 to 2^64 - 1."""
    check_count(name, value, least=0)
    if value >= 2**64:
        raise DataError(f"{name} must be below 2^64, got {value}.")


def check_places(places: Any) -> None:
    """Raise DataError unless places are one or more pairs (row, column) of whole numbers."""
    try:
        array = np.array([(row, column) for row, column in places])
    except (TypeError, ValueError):
        array = np.empty(0)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"places must be one or more (row, column) of whole numbers, got {places!r}.")


def check_parts(parts: Any, known: Collection[str]) -> None:
    """Raise DataError unless parts are a list of one or more of the known names."""
    if not isinstance(parts, list | tuple) or not parts or any(part not in list(known) for part in parts):
        raise DataError(f"parts must be a list of one or more of {', '.join(known)}, got {parts!r}.")


def image_rng(image: Float32Array, seed: int) -> np.random.Generator:
    """Return a generator that depends on the seed and on the image's own pixels.

    So an image gets the same draw in any batch and any order.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16, key=str(seed).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating)


def in_channels(colour: Sequence[float], channels: int) -> Float32Array:
    """Return an RGB colour for images of so many channels, shape (channels, 1): its brightness unless there are 3."""
    if channels == 3:
        return np.array(colour, dtype=np.float32)[:, np.newaxis]
    return np.full((channels, 1), float(np.dot(LUMINANCE, colour)), dtype=np.float32)


def paint(images: Float32Array, mask: AnyArray, colour: Sequence[float]) -> None:
    """Set the pixels of a mask, (height, width) bool, to a colour in every image, in place."""
    images[:, :, mask] = in_channels(colour, images.shape[1])
