"""What every trigger does first: look at its images, draw per image, mix colours for any number of channels."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
        if not 0.0 <= value <= 1.0:
            raise DataError(f"{name} must be in [0, 1], got {value}.")
    elif not above < value <= 1.0:
        raise DataError(f"{name} must be in ({above:g}, 1], got {value}.")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise DataError unless a parameter is a whole number of at least `least`."""
    if value != int(value) or value < least:
        raise DataError(f"{name} must be a whole number >= {least}, got {value}.")


def image_rng(image: Float32Array, seed: int) -> np.random.Generator:
    """Return a generator that depends on the seed and on the image's own pixels.

    So an image gets the same draw in any batch and any order.
    """
    digest = hashlib.blake2b(np.ascontiguousarray(image).tobytes(), digest_size=16, key=str(seed).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def in_channels(colour: Sequence[float], channels: int) -> Float32Array:
    """Return an RGB colour for images of so many channels, shape (channels, 1): its brightness unless there are 3."""
    if channels == 3:
        return np.array(colour, dtype=np.float32)[:, np.newaxis]
    return np.full((channels, 1), float(np.dot(LUMINANCE, colour)), dtype=np.float32)


def paint(images: Float32Array, mask: AnyArray, colour: Sequence[float]) -> None:
    """Set the pixels of a mask, (height, width) bool, to a colour in every image, in place."""
    images[:, :, mask] = in_channels(colour, images.shape[1])
