"""Back up and restore what a guarded service has learned: the queue with its decisions, and the folder of bundles."""

from __future__ import annotations

import hashlib
import os
import shutil
import sqlite3
import tempfile
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from guard.bundle import ACTIVE, HISTORY, BundleStore, read_bundle
from guard.errors import BundleError, GuardError, SnapshotError
from guard.relabel.queue import Queue

QUEUE, BUNDLES, SUMS = "queue.db", "bundles", "SHA256SUMS"
_SQLITE = "sqlite:///"
_CHUNK_PAGES = 256  # copied at a time; between them, servers and reviewers write


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a snapshot holds.

    Attributes
    ----------
    folder : Path
    bundles : tuple of str
        Digests; empty if there is no folder of bundles in it.
    active : str or None
    decisions : int or None
        Rows of the decisions' chain; None if there is no queue in it.
    chain_head : str or None
        Hash of the newest decision, see `Queue.verify_decisions`.
    """

    folder: Path
    bundles: tuple[str, ...]
    active: str | None
    decisions: int | None
    chain_head: str | None


def save_snapshot(folder: Path, *, queue_url: str | None, bundles: Path | None) -> Snapshot:
    """Copy queue and bundles into a new folder while everything runs.

    The queue comes first, then the bundles: whatever the copied queue names is among the copied bundles. The folder
    gets its name when it is whole.

    Parameters
    ----------
    folder : Path
        Must not exist.
    queue_url : str or None
        Of a queue in SQLite. PostgreSQL has tools of its own (`pg_dump`), which do this better.
    bundles : Path or None

    Raises
    ------
    SnapshotError
        If there is nothing to copy, the folder exists or cannot be written, or the queue is in PostgreSQL or damaged.
    BundleError
        If a bundle is damaged.
    """
    if queue_url is None and bundles is None:
        raise SnapshotError("there is nothing to copy. Name a queue, a folder of bundles, or both.")
    source = _sqlite_file(queue_url) if queue_url is not None else None
    if folder.exists():
        raise SnapshotError(f"{folder} exists already. Name another folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            writing = Path(scratch) / "snapshot"
            writing.mkdir()
            if source is not None:
                _copy_database(source, writing / QUEUE)
            if bundles is not None:
                _copy_bundles(bundles, writing / BUNDLES)
            about = _look_at(writing, folder)
            (writing / SUMS).write_text(_sums(writing))
            _flush(writing)
            writing.rename(folder)
    except OSError as error:
        raise SnapshotError(f"{folder} cannot be written: {error}. Is there room?") from error
    return about


def restore_snapshot(folder: Path, *, queue_url: str | None, bundles: Path | None) -> Snapshot:
    """Put queue and bundles of a snapshot in their places; nothing that is there is replaced.

    Parameters
    ----------
    folder : Path
        That `save_snapshot` made; every file is verified first.
    queue_url : str or None
        Where the queue shall be: a SQLite file that does not exist.
    bundles : Path or None
        Where the bundles shall be: a folder that does not exist, or is empty.

    Raises
    ------
    SnapshotError
        If the snapshot is damaged or lacks what is asked for, or a place is taken.
    """
    if queue_url is None and bundles is None:
        raise SnapshotError("there is nothing to restore. Name a place for the queue, for the bundles, or both.")
    about = verify_snapshot(folder)
    target = _sqlite_file(queue_url) if queue_url is not None else None
    for wanted, name, what in ((target, QUEUE, "queue"), (bundles, BUNDLES, "folder of bundles")):
        if wanted is not None and not (folder / name).exists():
            raise SnapshotError(f"{folder} holds no {what}. Leave it out.")
    if target is not None and any(Path(f"{target}{end}").exists() for end in ("", "-wal", "-shm")):
        raise SnapshotError(f"{target} exists already. Move it away first; nothing is overwritten.")
    if bundles is not None and bundles.exists() and any(bundles.iterdir()):
        raise SnapshotError(f"{bundles} is not empty. Move it away first; nothing is overwritten.")
    try:
        for place, name in ((bundles, BUNDLES), (target, QUEUE)):
            if place is None:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
                copy = Path(scratch) / name
                (shutil.copytree if (folder / name).is_dir() else shutil.copyfile)(folder / name, copy)
                _flush(Path(scratch))
                copy.rename(place)
    except OSError as error:
        raise SnapshotError(f"{folder} cannot be restored: {error}.") from error
    return about


def verify_snapshot(folder: Path) -> Snapshot:
    """Check every file of a snapshot, its bundles and its queue; return what it holds.

    Raises
    ------
    SnapshotError
        If it is none, or anything in it was changed.
    """
    try:
        sums = (folder / SUMS).read_text()
        same = sums == _sums(folder)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{folder} is no snapshot: {SUMS} cannot be read. `guard snapshot save` makes one.") from (
            error
        )
    if not same:
        raise SnapshotError(f"{folder} is damaged: its files do not match {SUMS}. Take another snapshot.")
    return _look_at(folder, folder)


def _sqlite_file(url: str) -> Path:
    if not url.startswith(_SQLITE):
        raise SnapshotError("a queue in PostgreSQL is backed up with pg_dump and restored with pg_restore. See docs.")
    return Path(url.removeprefix(_SQLITE))


def _copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite database as it is at one moment, while others write."""
    if not source.is_file():
        raise SnapshotError(f"there is no queue {source}. Is the path right?")
    try:
        with (
            closing(sqlite3.connect(f"file:{source.absolute().as_posix()}?mode=ro", uri=True, timeout=30)) as live,
            closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy, pages=_CHUNK_PAGES, sleep=0.01)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
    except sqlite3.Error as error:
        raise SnapshotError(f"the queue {source} cannot be copied: {error}.") from error


def _copy_bundles(source: Path, target: Path) -> None:
    """Copy every bundle and what points at them. ACTIVE is read first: what it names is there when it is copied."""
    store = BundleStore(source)
    pointers = {name: (source / name).read_bytes() for name in (ACTIVE, HISTORY) if (source / name).is_file()}
    store.active_path()
    target.mkdir()
    for folder in sorted(source.glob("?" * 64)):
        read_bundle(folder)
        shutil.copytree(folder, target / folder.name)
    for name, data in pointers.items():
        (target / name).write_bytes(data)


def _look_at(folder: Path, name: Path) -> Snapshot:
    """Open what lies in a folder, and tell what it is."""
    digests: tuple[str, ...] = ()
    active = decisions = head = None
    try:
        if (folder / BUNDLES).is_dir():
            store = BundleStore(folder / BUNDLES)
            digests = tuple(sorted(path.name for path in store.root.glob("?" * 64)))
            for digest in digests:
                read_bundle(store.root / digest)
            active = read_bundle(store.active_path()).digest
        if (folder / QUEUE).is_file():
            decisions, head = _audited(folder / QUEUE)
    except BundleError as error:
        raise SnapshotError(f"the bundles are not whole: {error}") from error
    return Snapshot(name, digests, active, decisions, head)


def _audited(database: Path) -> tuple[int, str]:
    """Check a copied queue in a copy of its own: opening a queue writes to it."""
    try:
        with closing(sqlite3.connect(f"file:{database.absolute().as_posix()}?mode=ro", uri=True)) as copy:
            (found,) = copy.execute("PRAGMA integrity_check").fetchone()
        if found != "ok":
            raise SnapshotError(f"the queue's database is damaged: {found}.")
        with tempfile.TemporaryDirectory() as scratch:
            shutil.copyfile(database, Path(scratch) / QUEUE)
            with Queue.open(f"{_SQLITE}{scratch}/{QUEUE}") as queue:
                audit = queue.verify_decisions()
    except sqlite3.Error as error:
        raise SnapshotError(f"the queue's database cannot be read: {error}.") from error
    except SnapshotError:
        raise
    except GuardError as error:
        raise SnapshotError(f"the queue cannot be opened: {error}") from error
    if audit.problems:
        raise SnapshotError(f"the queue's decisions were changed: {audit.problems[0]}")
    return audit.rows, audit.head


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / SUMS)


def _sums(folder: Path) -> str:
    lines = []
    for path in _files(folder):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(folder).as_posix()}\n")
    return "".join(lines)


def _flush(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        with suppress(OSError):  # a folder cannot be flushed everywhere
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
