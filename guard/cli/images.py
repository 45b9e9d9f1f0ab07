"""Images that a user names on the command line: listed first, then read and judged in parts, each for itself."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np

from guard.cli.output import Report, tell, what_failed
from guard.data.image_files import MODES, in_channels, is_picture, load_images, picture_mode, read_picture
from guard.data.labelled_folders import FoundFile, composed, find_files, labels_of
from guard.errors import ConfigError, DataError, GuardError, RowError
from guard.types import Float32Array, IntArray
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
_ARCHIVES = frozenset((".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"))
_GREY_MODES = frozenset(("", "1", "L", "LA", "I", "I;16", "F"))


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
    passed_over : list of str
        Names of files that are no images, or lie beside the folders of the classes.
    files : list of Path
        Of images on disk that are decoded here; empty for others.
    modes : list of str
        Pillow's mode of each image that can be read in other channels ("" = not readable); empty where none can.
    decode : callable (int, int) -> ndarray of shape (channels, height, width), or None
        Returns such an image, by its number, in 1, 3 or 4 channels.
    """

    names: list[str]
    read: Callable[[int], Any]
    labels: IntArray | None = None
    class_names: list[str] | None = None
    passed_over: list[str] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    modes: list[str] = field(default_factory=list)
    decode: Callable[[int, int], Float32Array] | None = None

    @property
    def usual_channels(self) -> int:
        """Channels that images are read in where no network asks for others: 1 if all are grey, else 3."""
        return 1 if _GREY_MODES.issuperset(self.modes) else 3

    def in_channels(self, channels: int) -> Self:
        """Return images that can be read in 1, 3 or 4 channels so that they are."""
        decode = self.decode
        return self if decode is None else replace(self, read=lambda row: decode(row, channels))


@dataclass(frozen=True, slots=True)
class NamedLabelledImages(NamedImages):
    """Images that were found, all with labels.

    Attributes
    ----------
    empty_folders : list of str
        Those of `class_names` that are sub-folders without an image; none where a class list was given.
    """

    labels: IntArray
    empty_folders: list[str] = field(default_factory=list)


def find_images(path: Path, *, as_bytes: bool = False) -> NamedImages:
    """Find the images of a .npz, of a folder and its sub-folders, or one file, whatever they show.

    Parameters
    ----------
    path : Path
    as_bytes : bool
        Read files as they are, of any suffix, for a handler that decodes them itself.

    Raises
    ------
    DataError
        If there are none, or a .npz breaks its rules.
    """
    if (arrays := _arrays(path, as_bytes)) is not None:
        return arrays
    found = find_files(path)[0] if path.is_dir() else [FoundFile(path, composed(path.name), "")]
    return _pictures(path, found, as_bytes)


def find_labelled(
    path: Path, *, as_bytes: bool = False, class_names: Sequence[str] | None = None
) -> NamedLabelledImages:
    """Find the images of a .npz with labels, or of a folder with one sub-folder per class.

    Parameters
    ----------
    path : Path
    as_bytes : bool
        As for `find_images`.
    class_names : sequence of str, optional
        The class list: a sub-folder's label is its place there. Without it, whole numbers as names are the labels;
        other names are counted in sorted order.

    Raises
    ------
    DataError
        If there are none, or no labels, a .npz breaks its rules, or a sub-folder is not in the class list.
    """
    found, labels, names, empty = _arrays(path, as_bytes), None, class_names, []
    if found is not None:
        labels = found.labels
    elif path.is_dir():
        files, folders = find_files(path)
        if not files:
            raise DataError(f"{path} holds no images. Name a folder with one sub-folder per class.")
        inside = [file for file in files if file.folder]
        if inside:
            found = _pictures(path, inside, as_bytes)
            folder_of = {file.name: file.folder for file in inside}
            used = [folder_of[name] for name in found.names]
            labels, names = labels_of(used, folders, class_names)
            empty = sorted({*folders} - {*used}) if class_names is None and names is not None else []
            beside = [file.name for file in files if not file.folder]
            found = replace(found, passed_over=[*beside, *found.passed_over])
    if found is None or labels is None:
        raise without_labels(path)
    return NamedLabelledImages(
        names=found.names,
        read=found.read,
        labels=labels,
        class_names=None if names is None else list(names),
        passed_over=found.passed_over,
        files=found.files,
        modes=found.modes,
        decode=found.decode,
        empty_folders=empty,
    )


def as_fitted(
    images: NamedLabelledImages,
    fitted_labels: IntArray | None,
    fitted_names: Sequence[str] | None = None,
    *,
    is_its_folder: bool = False,
) -> NamedLabelledImages:
    """Return images with the labels that a guard was fitted with, where every class of theirs is one of the guard's.

    So it does not matter whether its classes were named by a list, by an archive, or by the sub-folders themselves.
    Several sub-folders may be of one class, as where a list has several names for it, if that is told by more than the
    number of their images: they are in the folder that the guard was fitted on, or one of them has the class's name.

    Parameters
    ----------
    images : NamedLabelledImages
    fitted_labels : ndarray of shape (m,), int64, or None
        True labels of the guard's clean reference, in order.
    fitted_names : sequence of str, optional
        Names of the guard's classes, by label.
    is_its_folder : bool
        Whether the images lie where those lay that the guard was fitted on.
    """
    if fitted_labels is None or len(fitted_labels) != len(images.labels):
        return images
    ours, fitted = np.unique(np.stack([images.labels, fitted_labels]), axis=1).tolist()
    if len({*ours}) < len(ours):  # images of one sub-folder, of two classes
        return images
    if fitted_names is None and len({*fitted}) < len(fitted):  # without names there is no list with several of them
        return images
    names, known = images.class_names or (), fitted_names or ()
    folders = {
        label: [names[own] for own, other in zip(ours, fitted, strict=True) if other == label and own < len(names)]
        for label, n_folders in Counter(fitted).items()
        if n_folders > 1
    }
    if not is_its_folder and any(known[label] not in named for label, named in folders.items()):
        return images
    return replace(images, labels=fitted_labels)


def without_labels(path: Path) -> DataError:
    """Return the error about images that no class is given for."""
    is_archive = path.suffix.lower() in _ARCHIVES
    unpack = " Unpack it first." if path.is_file() and is_archive else ""
    use = "use"
    if path.is_file() and path.suffix.lower() != ".npz" and not is_archive:
        use = f"it is {'one image' if is_picture(path) else 'neither a folder nor a .npz'}. Use"
    return DataError(f"{path} has no labels: {use} one sub-folder per class, or a .npz with 'labels'.{unpack}")


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


@contextmanager
def naming_rows(images: NamedImages) -> Iterator[None]:
    """While open, an error about one of these images by its number names its file."""
    try:
        yield
    except RowError as error:
        raise DataError(f"image {images.names[error.row]}: {error}") from error


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


def _arrays(path: Path, as_bytes: bool) -> NamedImages | None:
    if not path.exists() and path.parts[0] in ("http:", "https:", "s3:", "gs:"):
        raise DataError(f"{path} is an address, and images are read from this machine. Fetch them first.")
    if not path.exists():
        raise DataError(f"{path} does not exist. Give a .npz file, an image, or a folder of images.")
    if path.suffix.lower() != ".npz" or path.is_dir():
        return None
    if as_bytes:
        raise DataError(f"{path}: a handler reads image files, got a .npz. Give a folder, or use --architecture.")
    images, labels, names, are_pixels = load_images(path, finite=False)  # one that is not fails alone
    found = NamedImages(names, images.__getitem__, labels)
    if not are_pixels:
        return found
    modes = [MODES[images.shape[1]]] * len(images)
    return replace(found, modes=modes, decode=lambda row, channels: in_channels(images[row], channels))


def _pictures(path: Path, found: Sequence[FoundFile], as_bytes: bool) -> NamedImages:
    """Return those of some files that are images, to be read as they are or decoded."""
    chosen = [file for file in found if as_bytes or is_picture(file.path)]
    if not chosen and path.is_file():
        raise DataError(f"{path} is no image by its name. Name a .png, .jpg, .webp, .bmp or .tif, a folder, or a .npz.")
    if not chosen:
        raise DataError(
            f"{path} holds no images: no file of its own or of its sub-folders has a suffix such as .png, .jpg, .webp, "
            ".bmp or .tif. Name another folder."
        )
    names, files = [file.name for file in chosen], [file.path for file in chosen]
    passed_over = [file.name for file in found if not as_bytes and not is_picture(file.path)]
    if as_bytes:
        return NamedImages(names, lambda row: files[row].read_bytes(), passed_over=passed_over)
    modes = [picture_mode(file) for file in files]
    found_images = NamedImages(
        names,
        files.__getitem__,
        passed_over=passed_over,
        files=files,
        modes=modes,
        decode=lambda row, channels: read_picture(files[row], channels),
    )
    return found_images.in_channels(found_images.usual_channels)


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
