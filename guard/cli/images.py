"""Images that a user names on the command line: listed first, then read and judged in parts, each for itself."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image

from guard.cli.output import Report, what_failed
from guard.data.datasets import read_npz
from guard.data.image_files import MAX_TOTAL_VALUES, load_images
from guard.errors import ConfigError, DataError
from guard.types import Float32Array, IntArray

if TYPE_CHECKING:
    pass

T = TypeVar("T")

#: Turns what was read (pixels, or a file's bytes) into what the model takes: float32 (n, channels, height, width).
Convert = Callable[[list[Any]], Float32Array]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_PART = 64  # images that are read, converted and judged together


@dataclass(frozen=True, slots=True)
class NamedImages:
    """Images that were found, not yet read.

    Attributes
    ----------
    names : list of str
        Path below the folder that was named, or position in a .npz.
    read : callable (int) -> ndarray of shape (channels, height, width), or bytes
    labels : ndarray of shape (n,), int64, or None
    class_names : list of str or None
        Names of the classes, by label, where sub-folders or the user told them.
    passed_over : int
        Files that are no images by their suffix.
    """

    names: list[str]
    read: Callable[[int], Any]
    labels: IntArray | None = None
    class_names: list[str] | None = None
    passed_over: int = 0


def find_images(
    path: Path, *, as_bytes: bool = False, channels: int | None = None, class_names: list[str] | None = None
) -> NamedImages:
    """Find the images of a .npz, of a folder and its sub-folders, or one file.

    Parameters
    ----------
    path : Path
    as_bytes : bool
        Read files as they are, of any suffix, for a handler that decodes them itself.
    channels : int, optional
        What the model takes; grey images become RGB for 3. None: RGB as soon as one image of the folder has colour.
    class_names : list of str, optional
        The class list: a sub-folder's label is its place there. Without it, whole numbers as names are the labels;
        other names are counted in sorted order.

    Raises
    ------
    DataError
        If there are none, a .npz breaks its rules, or a sub-folder is not in the class list.
    """
    if path.suffix.lower() == ".npz" and path.is_file():
        if as_bytes:
            raise DataError(f"{path}: a handler reads image files, got a .npz. Give a folder, or use --architecture.")
        images, labels = _read_npz(path)
        return NamedImages([str(row) for row in range(len(images))], images.__getitem__, labels, class_names)
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a .npz file, an image, or a folder of PNG or JPEG files.")
    root = path if path.is_dir() else path.parent
    candidates = [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file())
        candidates = sorted(f for f in below if not any(part.startswith(".") for part in f.relative_to(path).parts))
    files = [file for file in candidates if as_bytes or file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError(f"{path} holds no images: no {', '.join(IMAGE_SUFFIXES)} file in it or in its sub-folders.")
    names = [file.relative_to(root).as_posix() for file in files]
    labels, class_names = _labels(names, class_names)
    passed_over = len(candidates) - len(files)
    if as_bytes:
        return NamedImages(names, lambda index: files[index].read_bytes(), labels, class_names, passed_over)
    in_colour = channels == 3 if channels is not None else any(_has_colour(file) for file in files)
    return NamedImages(names, lambda index: _read_image(files[index], in_colour), labels, class_names, passed_over)


def read_all(
    images: NamedImages,
    convert: Convert,
    report: Report,
    *,
    remedy: str = "Resize them, or name a --preprocess that does.",
) -> Float32Array:
    """Return every image as the model takes it; `remedy` says what to do about images of several sizes.

    Raises
    ------
    DataError
        At the first one that cannot be read, or whose shape differs; names it.
    """
    rows: list[Float32Array] = []
    for part in parts(len(images.names)):
        for index, row in zip(part, each(lambda some: list(converted(images, convert, some)), part), strict=True):
            if isinstance(row, Exception):
                raise DataError(f"image {images.names[index]}: {what_failed(row)}") from row
            if rows and row.shape != rows[0].shape:
                raise DataError(
                    f"all images must have the same shape, got {rows[0].shape} and {row.shape} "
                    f"({images.names[index]}). {remedy}"
                )
            rows.append(row)
        report(f"reading: {len(rows)} of {len(images.names)} images", len(rows) / len(images.names))
    return np.stack(rows)


def preprocessing(name: str | None) -> Convert:
    """Return what stacks images and runs the user's `module:function` over them.

    Raises
    ------
    ConfigError
        If that function cannot be imported.
    """
    if name is None:
        return _stacked
    module, _, function = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except Exception as error:  # importing runs the user's code
        raise ConfigError(
            f"--preprocess {name!r} must be module:function, and be importable: {type(error).__name__}: {error}."
        ) from error

    def convert(images: list[Any]) -> Float32Array:
        result = call(_stacked(images))
        result = np.asarray(result.detach().cpu() if hasattr(result, "detach") else result, dtype=np.float32)
        if result.ndim != 4 or len(result) != len(images):
            raise DataError(
                f"--preprocess {name!r} must return (n, channels, h, w) for {len(images)} images, got {result.shape}."
            )
        return result

    return convert


def _stacked(images: list[Any]) -> Float32Array:
    if len({image.shape for image in images}) > 1:
        raise DataError("the images of one batch must have the same shape. Resize them.")  # each parts them
    return np.stack(images)


def converted(images: NamedImages, convert: Convert, rows: Sequence[int]) -> Float32Array:
    """Return some images as the network takes them."""
    return convert([images.read(row) for row in rows])


def parts(n: int) -> list[range]:
    """Return the numbers of n images in parts that are read and judged together."""
    return [range(start, min(start + _PART, n)) for start in range(0, n, _PART)]


def each(work: Callable[[Sequence[int]], Sequence[T]], rows: Sequence[int]) -> list[T | Exception]:
    """Return one result per row; where a batch fails it is halved, until what fails stands alone."""
    try:
        return list(work(rows))
    except Exception as error:
        if len(rows) == 1:
            return [error]
    middle = len(rows) // 2
    return each(work, rows[:middle]) + each(work, rows[middle:])


def _read_npz(path: Path) -> tuple[Float32Array, IntArray | None]:
    try:
        loaded = load_images(path)
    except DataError:  # if only some images are not finite, the others are still to be judged
        arrays = read_npz(path, MAX_TOTAL_VALUES)
        images = arrays.get("images", arrays.get("x"))
        if images is None or images.dtype != np.float32 or images.ndim != 4 or np.isfinite(images).all():
            raise
        return images, arrays.get("labels", arrays.get("y"))
    return loaded.images, loaded.labels


def _read_image(file: Path, in_colour: bool) -> Float32Array:
    image = load_images(file).images[0]
    return np.repeat(image, 3, axis=0) if in_colour and len(image) == 1 else image


def _has_colour(file: Path) -> bool:
    try:
        with Image.open(file, formats=("PNG", "JPEG")) as image:  # reads the header only
            return image.mode not in ("1", "L", "LA", "I", "I;16", "F")
    except Exception:  # it is told when it is read
        return False


def _labels(names: list[str], class_names: list[str] | None) -> tuple[IntArray | None, list[str] | None]:
    folders = [name.rpartition("/")[0].partition("/")[0] for name in names]
    if "" in folders:
        return None, class_names
    found = sorted(set(folders))
    if class_names is not None and set(found) <= set(class_names):
        return np.array([class_names.index(folder) for folder in folders]), class_names
    if all(folder.isascii() and folder.isdigit() for folder in found):
        return np.array([int(folder) for folder in folders]), class_names
    if class_names is not None:
        strange = next(folder for folder in found if folder not in class_names)
        raise DataError(f"sub-folder {strange!r} is not in --class-names ({', '.join(class_names)}). Rename one.")
    return np.array([found.index(folder) for folder in folders]), found
