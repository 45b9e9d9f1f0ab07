"""Folders of replicas for what they unpack: removed when they end, or by the next one if they were killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guard.errors import ServerError
from guard.files import make_private_folder

_MARK = "in_use"


@contextmanager
def own_folder(parent: Path) -> Iterator[Path]:
    """Make a private folder for this process, and remove it at the end; remove those that killed processes left.

    Parameters
    ----------
    parent : Path
        Made if it is missing. Every process holds a lock in its own folder as long as it lives.

    Raises
    ------
    ServerError
        If `parent` is a link, or another user's.
    """
    if parent.is_symlink() or (parent.exists() and parent.stat().st_uid != os.getuid()):
        raise ServerError(f"{parent} is a link, or somebody else's folder. Name another as scratch.")
    make_private_folder(parent)
    for folder in parent.iterdir():
        _remove_unless_in_use(folder)
    folder = Path(tempfile.mkdtemp(dir=parent))
    mark = os.open(folder / f"{_MARK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(mark, fcntl.LOCK_EX)
        (folder / f"{_MARK}.new").rename(folder / _MARK)  # nobody finds it without its lock
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(mark)


def _remove_unless_in_use(folder: Path) -> None:
    with suppress(OSError):  # without a mark it is being made, or removed
        mark = os.open(folder / _MARK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(mark)
