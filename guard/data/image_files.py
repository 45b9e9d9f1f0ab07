"""Images from files that a user names: a .npz, one image, or a folder of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from guard.data.datasets import UInt8Array, read_npz, to_tensor_images
from guard.errors import DataError
from guard.types import AnyArray, Float32Array, IntArray

#: Largest single image that `load_images` reads, in pixels (height * width).
MAX_IMAGE_PIXELS = 2**24

#: Most numbers that `load_images` returns (n * channels * height * width): 2 GiB as float32.
MAX_TOTAL_VALUES = 2**29

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class LoadedImages(NamedTuple):
    """Images of a user, in order.

    Attributes
    ----------
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64, or None
        None if the files name none.
    names : list of str
        File name of each image, or its position in a .npz.
    """

    images: Float32Array
    labels: IntArray | None
    names: list[str]


def load_images(path: str | Path) -> LoadedImages:
    """Read the images that a user names on the command line.

    Parameters
    ----------
    path : path
        - A `.npz` with `images` or `x`, and optionally `labels` or `y`. uint8 (n, height, width), (n, height, width,
          channels) or (n, channels, height, width), 1 or 3 channels, is scaled to [0, 1]; float32 (n, channels, height,
          width) is taken as it is.
        - A `.png`, `.jpg` or `.jpeg`, or a folder of such files, read in the order of their names. In a folder of
          folders each sub-folder is a class: if all their names are whole numbers, these are the labels; else the
          labels count the sorted names from 0. Other files are passed over. If any image has colour, all become RGB.

    Returns
    -------
    loaded : LoadedImages

    Raises
    ------
    DataError
        If there is no such file, nothing in it, a file is no image, sizes differ, or an image is over
        `MAX_IMAGE_PIXELS` or all together over `MAX_TOTAL_VALUES`.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist. Give a .npz file, an image, or a folder of PNG or JPEG files.")
    if path.suffix.lower() == ".npz":
        return _load_npz_images(path)
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        return LoadedImages(_decode_files([path]), None, [path.name])
    raise DataError(
        f"{path} must be a .npz file, a .png or .jpg image, or a folder, got {path.suffix or 'no suffix'!r}."
    )


def _load_npz_images(path: Path) -> LoadedImages:
    try:
        arrays = read_npz(path, MAX_TOTAL_VALUES)
        images = _first(arrays, "images", "x")
        labels = _first(arrays, "labels", "y")
        if images is None:
            raise DataError(f"it needs an array called images or x, got {sorted(arrays)}")
        tensor = _as_nchw(images)
        names = [str(row) for row in range(len(tensor))]
        if labels is None:
            return LoadedImages(tensor, None, names)
        if labels.shape != (len(tensor),) or not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"labels must be integers of shape ({len(tensor)},), got {labels.dtype} {labels.shape}")
        return LoadedImages(tensor, labels.astype(np.int64), names)
    except DataError as error:
        raise DataError(f"{path}: {str(error).rstrip('.')}.") from error


def _first(arrays: Mapping[str, AnyArray], *names: str) -> AnyArray | None:
    return next((arrays[name] for name in names if name in arrays), None)


def _as_nchw(images: AnyArray) -> Float32Array:
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"images must be (n, height, width) or have a channel axis too, none empty, got {images.shape}")
    if images.size > MAX_TOTAL_VALUES:
        raise DataError(f"images hold {images.size} numbers, more than {MAX_TOTAL_VALUES} allowed. Split the file")
    if images.dtype == np.float32:
        if images.ndim != 4:
            raise DataError(f"float32 images must be (n, channels, height, width), got {images.shape}")
        if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
            raise DataError(f"float32 images must have the channels before height and width, got {images.shape}")
        if not np.isfinite(images).all():
            raise DataError("float32 images must be finite")
        return np.ascontiguousarray(images)
    if images.dtype != np.uint8:
        raise DataError(f"images must be uint8 or float32, got {images.dtype}")
    if images.ndim == 3:
        return to_tensor_images(images)
    first, last = images.shape[1] in (1, 3), images.shape[3] in (1, 3)
    if first == last:
        raise DataError(f"exactly one of axis 1 and axis 3 must be the channels (1 or 3 of them), got {images.shape}")
    return to_tensor_images(images if last else images.transpose(0, 2, 3, 1))


def _load_folder(folder: Path) -> LoadedImages:
    loose = _image_files(folder)
    classes = sorted(
        entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "_"))
    )
    if loose and any(_image_files(folder / name) for name in classes):
        raise DataError(f"{folder} has images both beside and inside its sub-folders. Keep one of the two.")
    if loose:
        return LoadedImages(_decode_files(loose), None, [file.name for file in loose])
    numbered = all(name.isascii() and name.isdigit() for name in classes)
    files: list[Path] = []
    labels: list[int] = []
    for position, name in enumerate(classes):
        found = _image_files(folder / name)
        files += found
        labels += [int(name) if numbered else position] * len(found)
    if not files:
        raise DataError(f"{folder} holds no images: no {', '.join(_IMAGE_SUFFIXES)} file in it or in its sub-folders.")
    names = [file.relative_to(folder).as_posix() for file in files]
    return LoadedImages(_decode_files(files), np.array(labels, dtype=np.int64), names)


def _image_files(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if entry.suffix.lower() in _IMAGE_SUFFIXES and entry.is_file())
    return sorted(entry for entry in entries if not entry.name.startswith("."))


def _decode_files(files: Sequence[Path]) -> Float32Array:
    decoded: list[UInt8Array] = []
    for file in files:
        image = _decode_file(file)
        if decoded and image.shape[:2] != decoded[0].shape[:2]:
            size, expected = image.shape[:2], decoded[0].shape[:2]
            raise DataError(f"images must have one size: {file} is {size}, {files[0]} is {expected} (height, width).")
        if (len(decoded) + 1) * 3 * image.shape[0] * image.shape[1] > MAX_TOTAL_VALUES:
            raise DataError(
                f"{len(files)} images are more than {MAX_TOTAL_VALUES} numbers. Give fewer or smaller images."
            )
        decoded.append(image)
    if any(image.ndim == 3 for image in decoded):
        decoded = [image if image.ndim == 3 else np.repeat(image[..., np.newaxis], 3, axis=2) for image in decoded]
    return to_tensor_images(np.stack(decoded))


def _decode_file(file: Path) -> UInt8Array:
    """Return (height, width) for a grey image, (height, width, 3) for a coloured one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is lower
            image = Image.open(file, formats=("PNG", "JPEG"))
        with image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(
                    f"{file} has {image.width} x {image.height} pixels, more than {MAX_IMAGE_PIXELS} allowed."
                )
            if image.mode.startswith(("I", "F")):
                raise DataError(f"{file} has more than 8 bits per channel. Convert it to 8 bits.")
            return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))
    except DataError:
        raise
    except Exception as error:  # decoders let through what they stumble over
        raise DataError(f"{file} is not a readable PNG or JPEG image ({error}).") from error


def encode_png(image: Float32Array) -> bytes:
    """Return one image of shape (1 or 3, height, width), float32 in [0, 1], as a grey or a colour PNG of 8 bits."""
    pixels = np.rint(image * 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(stream, "PNG")
    return stream.getvalue()
