"""Images that a user names on the command line: found and listed, not yet read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from guard.data.image_files import MODES, in_channels, is_picture, load_images, picture_mode, read_picture
from guard.data.labelled_folders import FoundFile, composed, find_files, labels_of
from guard.errors import DataError, RowError
from guard.types import Float32Array, IntArray

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


@contextmanager
def naming_rows(images: NamedImages) -> Iterator[None]:
    """While open, an error about one of these images by its number names its file."""
    try:
        yield
    except RowError as error:
        raise DataError(f"image {images.names[error.row]}: {error}") from error


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
