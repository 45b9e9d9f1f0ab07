"""The classes that an archive's `index_to_name.json` names, in the model's order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from guard.data.labelled_folders import ClassList, composed
from guard.errors import ArchiveError
from guard.files import decoded

#: Where TorchServe's own handlers look for it.
CLASS_FILE = "index_to_name.json"


def read_class_list(folder: Path) -> ClassList | None:
    """Read the class list of an unpacked archive, in any of the forms that TorchServe takes.

    Returns
    -------
    classes : ClassList or None
        None if there is no file, or its keys are not the labels 0, 1, 2, ... without a gap.

    Raises
    ------
    ArchiveError
        If the file is no such list.
    """
    file = folder / CLASS_FILE
    return parse_class_list(file.read_bytes(), CLASS_FILE) if file.is_file() else None


def parse_class_list(data: bytes, file: str) -> ClassList | None:
    """Read a class list in JSON: names by label, as TorchServe takes them, labels by name, or names in order.

    Parameters
    ----------
    data : bytes
    file : str
        What an error calls it.

    Returns
    -------
    classes : ClassList or None
        With the further names of each class; a name of several classes means none. None if the labels are not 0, 1,
        2, ... without a gap.

    Raises
    ------
    ArchiveError
        If it is no such list.
    """
    try:
        mapping: Any = json.loads(composed(decoded(data)))
        names = mapping if isinstance(mapping, list) else mapping.get("object_type_names")
        if isinstance(names, list):
            mapping = {str(label): name for label, name in enumerate(names)}
        elif all(type(label) is int for label in mapping.values()):  # torchvision's class_to_idx
            mapping = {str(label): name for name, label in mapping.items()}
        entries = {key: value if isinstance(value, list) else [value] for key, value in mapping.items()}
        if not all(names and all(isinstance(name, str) for name in names) for names in entries.values()):
            raise TypeError("a class has no name")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{file} must give a name for every label ({error}). Mend it.") from error
    if set(entries) != {str(label) for label in range(len(entries))}:
        return None
    return ClassList([entries[str(label)] for label in range(len(entries))])
