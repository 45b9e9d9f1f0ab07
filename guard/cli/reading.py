"""Images that were found, read and turned into what the network takes, in parts; each fails for itself."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from guard.cli.images import NamedImages
from guard.cli.output import Report, tell, what_failed
from guard.data.image_files import MODES
from guard.errors import ConfigError, DataError, GuardError
from guard.types import Float32Array
from guard.users_code import why_it_failed

T = TypeVar("T")
Found = TypeVar("Found", bound="NamedImages")

#: Turns what was read (pixels, or a file's bytes) into what the model takes: float32 (n, channels, height, width).
Convert = Callable[[list[Any]], Float32Array]

_PART = 64  # images that are read, converted and judged together
_MANY = 20  # images that cannot be read, after which no more are tried
_NAMED = 5  # of these that a message names
_TRIED = 4  # images of which one should be readable, to see what the network takes
_TRIED_AGAIN = 8  # images that are read again, alone
_REPEATED = 1e-3  # of the range of all inputs: so near is the same input
_KINDS = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with alpha",
    "P": "palette",
    "RGB": "colour",
    "RGBA": "alpha",
}


def in_channels_taken(images: Found, run: Callable[[list[Any]], object], at_once: int = 1) -> Found:
    """Return images so that they are read in the channels that the network takes, and say what is converted.

    Without another need they are grey if all are, else RGB. Where the network does not take that, it is tried with RGB,
    grey and RGBA. Files that a handler decodes itself, and float32 arrays of a .npz, stay as they are.

    Parameters
    ----------
    images : NamedImages
    run : callable (list of ndarray of shape (channels, height, width)) -> object
        Does with a few images what will be done with all, and raises where they do not fit.
    at_once : int
        How many it is given.

    Raises
    ------
    DataError
        If float32 arrays have other channels than the network takes.
    """
    n = len(images.modes)
    if n == 0:
        _check_channels(images, run, at_once)
        return images
    candidates = {channels: images.in_channels(channels) for channels in (images.usual_channels, 3, 1, 4)}
    tried = [range(start, min(start + at_once, n)) for start in range(0, min(n, _TRIED * at_once), at_once)]
    fitting = (channels for rows in tried for channels, read_so in candidates.items() if _fit(read_so, rows, run))
    channels = next(fitting, images.usual_channels)
    deep = ("I", "F")  # more than 8 bits: refused when they are read
    others = Counter(mode for mode in images.modes if mode not in ("", MODES[channels]) and not mode.startswith(deep))
    if others:
        kinds = ", ".join(f"{number} {_KINDS.get(mode, mode)}" for mode, number in others.most_common())
        tell(f"read as {MODES[channels]}, as the image handler converts them: {kinds} of {n} images")
    return candidates[channels]


def _check_channels(images: NamedImages, run: Callable[[list[Any]], object], at_once: int) -> None:
    """Refuse arrays that the network would take with other channels, by their number."""
    rows = range(min(at_once, len(images.names)))
    if _fit(images, rows, run):
        return
    some = [images.read(row) for row in rows]

    def guessed(channels: int) -> NamedImages:
        return replace(images, read=lambda row: np.repeat(some[row][:1], channels, axis=0))

    for channels in MODES if all(isinstance(image, np.ndarray) for image in some) else ():
        if len(some[0]) != channels and _fit(guessed(channels), rows, run):
            raise DataError(
                f"the images have {len(some[0])} channels, and the network takes {channels}. They are float32, and may "
                "be normalised, so they are not converted: give uint8 pixels, which are, or images of "
                f"{channels} channels."
            )


def _fit(images: NamedImages, rows: Sequence[int], run: Callable[[list[Any]], object]) -> bool:
    """Whether some images that are read so can be run."""
    try:
        run([images.read(row) for row in rows])
    except Exception:  # the reason is given when all are read
        return False
    return True


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
        If images cannot be read, are of several shapes, become NaN or infinite, or something else each time; names the
        first, and of those that cannot be read the others.
    """
    rows: list[Float32Array] = []
    failed: list[tuple[str, Exception]] = []
    for part in parts(len(images.names)):
        for index, row in zip(part, each(lambda some: list(converted(images, convert, some)), part), strict=True):
            if isinstance(row, Exception):
                failed.append((images.names[index], row))
                continue
            if not np.isfinite(row).all():
                raise DataError(
                    f"image {images.names[index]}: what the network takes of it must be finite, and holds NaN or "
                    "infinity. Look at its pixels, and at what the preprocessing divides by."
                )
            if rows and row.shape != rows[0].shape:
                raise DataError(
                    f"all images must have the same shape, got {rows[0].shape} and {row.shape} "
                    f"({images.names[index]}). {remedy}"
                )
            rows.append(row)
        if len(failed) >= _MANY:
            break
        report(f"reading: {part.stop} of {len(images.names)} images", part.stop / len(images.names))
    if failed:
        raise _unreadable(failed)
    inputs = np.stack(rows)
    _check_repeats(images, convert, inputs)
    return inputs


def _check_repeats(images: NamedImages, convert: Convert, inputs: Float32Array) -> None:
    """Refuse images of which the network takes something else each time, or something else alone than among others."""
    most = _REPEATED * float(inputs.max() - inputs.min())
    tried = range(0, len(inputs), max(1, len(inputs) // _TRIED_AGAIN))
    once, again = ([converted(images, convert, [row])[0] for row in tried] for _ in range(2))
    for others, when, mend in (
        (again, "each time", "Leave out what is random, such as augmentation"),
        (inputs[tried], "alone than among others", "Scale each image by itself, or by numbers that stay the same"),
    ):
        for row, first, other in zip(tried, once, others, strict=True):
            if first.shape != other.shape or np.abs(first - other).max() > most:
                raise DataError(
                    f"image {images.names[row]}: what the network takes of it is another {when}, and a guard needs "
                    f"what it takes in service. {mend}."
                )


def _unreadable(failed: list[tuple[str, Exception]]) -> DataError:
    (name, error), *others = failed
    listed = ", ".join(other for other, _ in others[:_NAMED]) + (", ..." if len(others) > _NAMED else "")
    at_least = "at least " if len(failed) >= _MANY else ""
    more = f" So it is with {at_least}{len(others)} more: {listed}." if others else ""
    if isinstance(error, GuardError):
        return DataError(f"image {name}: {error}{more}")
    return DataError(
        f"image {name} cannot be prepared for the network: {what_failed(error)} "
        f"Is it of the size, channels and format that the preprocessing takes?{more}"
    )


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
    if not module or not function:
        raise ConfigError(f"--preprocess must be module:function, got {name!r}.")
    try:
        loaded = importlib.import_module(module)
    except Exception as error:  # importing runs the user's code
        alone = f'Importing it must work by itself: try `python -c "import {module}"`.'
        raise ConfigError(
            f"--preprocess {name!r} cannot be imported: {why_it_failed(error, alone, module=module)}"
        ) from error
    call = getattr(loaded, function, None)
    if not callable(call):
        there = f"{function!r}, which is no function" if hasattr(loaded, function) else f"no {function!r}"
        place = getattr(loaded, "__file__", None) or "part of Python"
        raise ConfigError(
            f"--preprocess {name!r} must be module:function: module {module!r} ({place}) has {there}. Check the name."
        )

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
