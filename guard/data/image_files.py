"""Images from files that a user names: a .npz, or one image in any format that Pillow decodes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from guard.data.datasets import read_npz, to_tensor_images
from guard.errors import DataError
from guard.types import AnyArray, Float32Array, IntArray

#: Largest single image that is read, in pixels (height * width).
MAX_IMAGE_PIXELS = 2**24

#: Most numbers that `load_images` returns (n * channels * height * width): 2 GiB as float32.
MAX_TOTAL_VALUES = 2**29

#: Formats that the image handler reads as well, from anybody: their header says how large a picture becomes. Not TIFF,
#: of which 97 kB that say 5 x 6 pixels take 2 GB, and none that few clients send.
SERVED_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM")
#: What Pillow itself decodes and knows by its first bytes; not those for which it starts another program.
_FORMATS = (*SERVED_FORMATS, "TIFF", "JPEG2000", "AVIF", "PCX", "SGI", "DDS", "ICO")
_PREFIX = 16  # bytes by which Pillow knows a format
#: Number of channels -> Pillow's mode, as in the image handler.
MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class LoadedImages(NamedTuple):
    """Images of a .npz, in order.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64, or None
        None if the file names none.
    names : list of str
        Position of each image.
    are_pixels : bool
        Whether they were 8-bit pixels, so that Pillow can convert their channels.
    """

    images: Float32Array
    labels: IntArray | None
    names: list[str]
    are_pixels: bool


def load_images(path: str | Path, *, finite: bool = True) -> LoadedImages:
    """Read a `.npz` with `images` or `x`, and optionally `labels` or `y`.

    Parameters
    ----------
    path : path
        Its images: (n, height, width), (n, height, width, channels) or (n, channels, height, width), 1 or 3 channels.
        Integers of any type in [0, 255] are scaled to [0, 1]; numbers of any floating type are taken as they are.
        Its labels: whole numbers of any type, shape (n,) or (n, 1), or one-hot rows.
    finite : bool
        Refuse images that hold NaN or infinity.

    Returns
    -------
    loaded : LoadedImages

    Raises
    ------
    DataError
        If the arrays are no such images and labels, or are more than `MAX_TOTAL_VALUES` numbers.
    """
    try:
        arrays = read_npz(Path(path), MAX_TOTAL_VALUES)
        images = _first(arrays, "images", "x")
        labels = _first(arrays, "labels", "y")
        if images is None:
            raise DataError(f"it needs an array called images or x, got {sorted(arrays)}. Save it under that name")
        tensor = _as_nchw(images)
        names, are_pixels = [str(row) for row in range(len(tensor))], images.dtype.kind != "f"
        if finite and not np.isfinite(tensor).all():
            raise DataError("images must be finite")
        known = None if labels is None else _as_labels(labels, len(tensor))
        return LoadedImages(tensor, known, names, are_pixels)
    except DataError as error:
        raise DataError(f"{path}: {str(error).rstrip('.')}.") from error


def _first(arrays: Mapping[str, AnyArray], *names: str) -> AnyArray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _as_nchw(images: AnyArray) -> Float32Array:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"images must be (n, height, width) or have a channel axis too, none empty, got {images.shape}")
    if images.size > MAX_TOTAL_VALUES:
        raise DataError(f"images hold {images.size} numbers, more than {MAX_TOTAL_VALUES} allowed. Split the file")
    first, last = images.shape[1] in (1, 3), images.shape[-1] in (1, 3)
    if images.dtype.kind == "f":
        maps = images[:, np.newaxis] if images.ndim == 3 else images
        maps = maps.transpose(0, 3, 1, 2) if images.ndim == 4 and last and not first else maps
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is seen
            return np.ascontiguousarray(maps, dtype=np.float32)
    if images.dtype.kind not in "iu":
        raise DataError(
            f"images must be whole or floating numbers, got {images.dtype}. Save pixels from 0 to 255 as uint8"
        )
    if images.min() < 0 or images.max() > 255:
        raise DataError(
            f"images of {images.dtype} must be in [0, 255], got {images.min()} to {images.max()}. Scale them to 8 bits"
        )
    pixels = images.astype(np.uint8, copy=False)
    if images.ndim == 3:
        return to_tensor_images(pixels)
    if first == last:
        raise DataError(f"exactly one of axis 1 and axis 3 must be the channels (1 or 3 of them), got {images.shape}")
    return to_tensor_images(pixels if last else pixels.transpose(0, 2, 3, 1))


def _as_labels(labels: AnyArray, n: int) -> IntArray:
    found = labels
    if found.ndim == 2 and found.dtype.kind in "biuf":
        if found.shape[1] == 1:
            found = found[:, 0]
        elif np.isin(found, (0, 1)).all():
            several = found.sum(axis=1) != 1
            if several.any():
                raise DataError(
                    f"labels are multi-label, {labels.shape} of 0 and 1, with none or several classes on "
                    f"{100 * several.mean():.0f} % of the images: a guard needs one class per image. Guard each label "
                    "by itself, with labels of 0 and 1 of shape (n,)"
                )
            found = found.argmax(axis=1)
    if found.ndim == 1 and len(found) != n:
        raise DataError(f"there are {n} images and {len(found)} labels. Give one label for every image, in their order")
    is_whole = found.dtype.kind in "iu" or (found.dtype.kind == "f" and bool((found == np.rint(found)).all()))
    if found.shape != (n,) or not is_whole:
        raise DataError(
            f"labels must be whole numbers of shape ({n},), or one-hot rows, got {labels.dtype} {labels.shape}. "
            "Number the classes from 0, in the network's order"
        )
    return found.astype(np.int64)


def is_picture(path: Path) -> bool:
    """Whether a file is an image by its name's suffix."""
    return path.suffix.lower() in picture_suffixes()


def is_served(path: Path) -> bool:
    """Whether the image handler reads files with this suffix from clients."""
    return Image.registered_extensions().get(path.suffix.lower()) in SERVED_FORMATS


def begins_as_picture(body: bytes) -> bool:
    """Whether bytes begin as a file in one of `SERVED_FORMATS` does; they may be damaged all the same."""
    Image.init()
    tests = [Image.OPEN[name][1] for name in SERVED_FORMATS if name in Image.OPEN]
    return len(body) >= _PREFIX and any(test is not None and test(body[:_PREFIX]) is True for test in tests)


@cache
def picture_suffixes() -> frozenset[str]:
    """Return the suffixes of the files that are read as images, in small letters, with the dot."""
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _formats())


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def read_picture(file: Path, channels: int) -> Float32Array:
    """Read one image file, in the channels that a network takes.

    Parameters
    ----------
    file : Path
        Grey, RGB, with a palette or with alpha, 8 bits per channel. Of several pictures in one file the first counts.
    channels : int
        1, 3 or 4: grey, RGB or RGBA. Pillow converts, as in the image handler.

    Returns
    -------
    image : ndarray of shape (channels, height, width), float32 in [0, 1]

    Raises
    ------
    DataError
        If it cannot be read, has more than 8 bits per channel, or is over `MAX_IMAGE_PIXELS`.
    """
    try:
        with _opened(file) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{file} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS} allowed. "
                    "Make it smaller."
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has more than 8 bits per channel. Convert it to 8 bits.")
            return _tensor_of(image, channels)
    except DataError:
        raise
    except Image.DecompressionBombError as error:  # Pillow refuses the largest before it says their size
        raise DataError(f"{file} has more than {MAX_IMAGE_PIXELS} pixels. Make it smaller.") from error
    except Exception as error:  # decoders let through what they stumble over
        raise DataError(
            f"{file} is not a readable image ({' '.join(str(error).split())}). Fetch it again, or leave it out."
        ) from error


def in_channels(image: Float32Array, channels: int) -> Float32Array:
    """Return 8-bit pixels in [0, 1] of shape (1 or 3, height, width) in 1, 3 or 4 channels, as Pillow converts them."""
    return image if len(image) == channels else _tensor_of(_as_picture(image), channels)


def _tensor_of(image: Image.Image, channels: int) -> Float32Array:
    pixels = np.asarray(image.convert(MODES[channels]))
    tensor: Float32Array = to_tensor_images(pixels.reshape(1, *pixels.shape[:2], channels))[0]
    return tensor


def _as_picture(image: Float32Array) -> Image.Image:
    pixels = np.rint(image * 255).astype(np.uint8)
    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def picture_mode(file: Path) -> str:
    """Return Pillow's mode of an image file from its header alone, such as "L" or "RGB"; "" if it cannot be read."""
    try:
        with _opened(file) as image:
            return str(image.mode)
    except Exception:  # the reason is given when it is read
        return ""


def _opened(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
        return Image.open(file, formats=_formats())


def encode_png(image: Float32Array) -> bytes:
    """Return one image of shape (1 or 3, height, width), float32 in [0, 1], as a grey or a colour PNG of 8 bits."""
    stream = io.BytesIO()
    _as_picture(image).save(stream, "PNG")
    return stream.getvalue()
