"""Folders of images with one sub-folder per class: which files there are, and of which class each is.

The one place that walks such a folder, for every command: links are followed, within the folder and out of it, and what
an operating system leaves there is passed over.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard.errors import DataError
from guard.types import IntArray

_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "__pycache__", "lost+found"})


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file below a folder.

    Attributes
    ----------
    path : Path
    name : str
        Path below the folder, in Unicode's composed form (NFC).
    folder : str
        The first part of its name, if there are several; "" for a file beside the sub-folders.
    """

    path: Path
    name: str
    folder: str


class ClassList(list[str]):
    """Names of the classes in the model's order, and further names that mean one of them.

    Parameters
    ----------
    names : sequence of str
        One per class, by label.
    labels : mapping of str to int, optional
        Label by name, further ones (`["n02119789", "kit fox"]`) as well; the first place of each name if left out.

    Attributes
    ----------
    labels : dict of str to int
        In Unicode's composed form.
    """

    def __init__(self, names: Sequence[str], labels: Mapping[str, int] | None = None) -> None:
        super().__init__(composed(name) for name in names)
        self.labels = dict(labels) if labels is not None else {}
        if labels is None:
            for label, name in enumerate(self):
                self.labels.setdefault(name, label)


def composed(text: str) -> str:
    """Return a text in Unicode's composed form (NFC): file systems and editors write one letter in two ways."""
    return unicodedata.normalize("NFC", text)


def find_files(root: Path) -> tuple[list[FoundFile], list[str]]:
    """Return the files below a folder in the order of their paths, and the names of its sub-folders.

    A link counts as what it leads to; one that leads nowhere, as a sub-folder without files. A folder is entered once
    for every sub-folder of the root, so a link to a folder above it adds nothing. Hidden files, and those that an
    operating system makes, are left out.
    """
    files: list[FoundFile] = []
    folders: dict[str, None] = {}
    for entry in _entries(root):
        if entry.is_dir() or (_is_broken_link(entry) and not entry.suffix):
            folder = composed(entry.name)
            folders[folder] = None
            paths = _below(entry, {_identity(root)}) if entry.is_dir() else iter(())
        else:
            folder, paths = "", iter([entry])
        files += (FoundFile(path, composed(path.relative_to(root).as_posix()), folder) for path in paths)
    return files, list(folders)


def labels_of(
    folders: Sequence[str], known: Sequence[str], class_names: Sequence[str] | None
) -> tuple[IntArray, list[str] | None]:
    """Return labels by sub-folder, and the names of the classes.

    Parameters
    ----------
    folders : sequence of str
        The sub-folder of each image.
    known : sequence of str
        All sub-folders in the order of their names, those without an image as well.
    class_names : sequence of str, optional
        The class list: a sub-folder's label is its place there; of a `ClassList`, what any of its names means. Without
        it, whole numbers as names are the labels; other names are counted in their order.

    Returns
    -------
    labels : ndarray of shape (n,), int64
    class_names : list of str or None
        None where the labels are the numbers of the sub-folders.

    Raises
    ------
    DataError
        If a sub-folder with images is not in the class list.
    """
    found, names = set(folders), None
    if class_names is not None:
        names = class_names if isinstance(class_names, ClassList) else ClassList(class_names)
    if names is None or not found <= names.labels.keys():
        if all(folder.isascii() and folder.isdigit() for folder in found):
            return np.array([int(folder) for folder in folders], dtype=np.int64), names
        if names is not None:
            strange = next(folder for folder in folders if folder not in names.labels)
            raise DataError(
                f"sub-folder {strange!r} is not in the class list ({', '.join(names)}). "
                "Rename it, or mend --class-names."
            )
        names = ClassList(known)
    return np.array([names.labels[folder] for folder in folders], dtype=np.int64), names


def _below(folder: Path, entered: set[tuple[int, int]]) -> Iterator[Path]:
    if (identity := _identity(folder)) in entered:
        return
    entered.add(identity)
    for entry in _entries(folder):
        if entry.is_dir():
            yield from _below(entry, entered)
        else:
            yield entry


def _entries(folder: Path) -> list[Path]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry for entry in entries if entry.name.lower() not in _LITTER)


def _is_broken_link(entry: Path) -> bool:
    return entry.is_symlink() and not entry.exists()


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
