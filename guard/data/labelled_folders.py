"""Folders of images with one sub-folder per class: which files there are, and of which class each is.

The one place that walks such a folder, for every command: links are followed, within the folder and out of it, and what
an operating system leaves there is passed over.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from guard.errors import DataError
from guard.types import IntArray

_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx", "__pycache__", "lost+found"})
_NAMED = 20  # classes that a message names


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
    names : sequence of str, or of sequences of str
        One entry per class, by label: its name, or its names (`["n02119789", "kit fox"]`), of which the last is shown.

    Attributes
    ----------
    labels : dict of str to int
        By name, in Unicode's composed form; without those that several classes have.
    shared : dict of str to list of int
        Labels of the names that several classes have, which mean none of them.
    """

    def __init__(self, names: Sequence[str | Sequence[str]]) -> None:
        several = [[composed(name) for name in ([entry] if isinstance(entry, str) else entry)] for entry in names]
        super().__init__(entry[-1] for entry in several)
        found: dict[str, list[int]] = {}
        for label, entry in enumerate(several):
            for name in dict.fromkeys(entry):
                found.setdefault(name, []).append(label)
        self.labels = {name: labels[0] for name, labels in found.items() if len(labels) == 1}
        self.shared = {name: labels for name, labels in found.items() if len(labels) > 1}


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
        If a sub-folder with images is not in the class list, or several classes have its name.
    """
    found, names = set(folders), None
    if class_names is not None:
        names = class_names if isinstance(class_names, ClassList) else ClassList(class_names)
    if names is None or not found <= names.labels.keys():
        if all(folder.isascii() and folder.isdigit() for folder in found):
            return np.array([int(folder) for folder in folders], dtype=np.int64), names
        if names is not None:
            raise _not_one_class(next(folder for folder in folders if folder not in names.labels), names)
        names = ClassList(known)
    return np.array([names.labels[folder] for folder in folders], dtype=np.int64), names


def _not_one_class(folder: str, names: ClassList) -> DataError:
    if folder in names.shared:
        labels = ", ".join(str(label) for label in names.shared[folder])
        return DataError(
            f"sub-folder {folder!r} has a name that several classes of the class list have: {labels}. "
            "Give it a name that one class alone has, or mend the class list."
        )
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return DataError(
        f"sub-folder {folder!r} is not in the class list ({', '.join(names[:_NAMED])}{more}). "
        "Rename it, or mend the class list."
    )


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
