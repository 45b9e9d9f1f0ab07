"""The user's own modules that an archive needs: what its files import, and the server would not find by itself."""

from __future__ import annotations

import ast
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from guard.errors import ArchiveError


def architecture_files(architecture: str) -> list[Path]:
    """Return the file or folder that defines an architecture, and all others that it imports.

    Parameters
    ----------
    architecture : str
        `"module:factory"`.

    Returns
    -------
    files : list of Path
        Empty if it is installed with the serving Python.

    Raises
    ------
    ArchiveError
        If the module is not found.
    """
    top = architecture.partition(":")[0].partition(".")[0]
    source = _source_of(top)
    if source is None:
        if _is_known(top):
            return []
        raise ArchiveError(
            f"module {top!r} of architecture {architecture!r} is not found. Start the command in the folder that has "
            "it, or put that folder on PYTHONPATH."
        )
    return [source, *imported_files([source])]


def imported_files(files: Sequence[Path]) -> list[Path]:
    """Return what Python files import, directly or by way of others, that is neither installed nor among them.

    Parameters
    ----------
    files : sequence of Path
        Python files and folders of modules; others are passed over.

    Returns
    -------
    found : list of Path
        Files and folders, each at the top of an archive importable under the name that is used.
    """
    packed = {path.stem if path.suffix == ".py" else path.name for path in files}
    found: list[Path] = []
    waiting = list(files)
    while waiting:
        for name in _imported_names(waiting.pop()):
            if name in packed:
                continue
            packed.add(name)
            source = _source_of(name)
            if source is not None:
                found.append(source)
                waiting.append(source)
    return found


def _imported_names(path: Path) -> Iterator[str]:
    """Yield the first part of the name of everything that a file, or the files below a folder, import."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        if file.suffix != ".py":
            continue
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError):  # said by whoever imports it
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield node.module.partition(".")[0]


def _source_of(name: str) -> Path | None:
    """Return the file or folder of a module of the user's own; None if it is installed, ours, or not found."""
    if name == "guard" or name in sys.stdlib_module_names:
        return None
    for place in _places(name):
        source = place.parent if place.name == "__init__.py" else place
        if not _is_installed(source):
            return source
    return None


def _is_installed(source: Path) -> bool:
    """Say whether a file or folder of modules belongs to this Python, or lies where pip has put packages."""
    folders = (*site.getsitepackages(), site.getusersitepackages(), sysconfig.get_path("stdlib"), sys.prefix)
    is_below = any(source.is_relative_to(os.path.realpath(folder)) for folder in folders)
    return is_below or any(source.parent.glob("*.dist-info"))


def _is_known(name: str) -> bool:
    return name == "guard" or name in sys.stdlib_module_names or any(_places(name))


def _places(name: str) -> Iterable[Path]:
    """Yield where a module lies: its file, or its folders if it is a package without `__init__.py`."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):
        return
    if spec is not None and spec.origin not in (None, "built-in", "frozen"):
        yield Path(os.path.realpath(str(spec.origin)))
    elif spec is not None and spec.submodule_search_locations is not None:
        yield from (Path(os.path.realpath(folder)) for folder in spec.submodule_search_locations)
