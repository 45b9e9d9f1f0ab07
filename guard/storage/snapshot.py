"""Back up and restore what a guarded service has learned: the queue with its decisions, and the folder of bundles."""

from __future__ import annotations

import errno
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from guard.errors import BundleError, GuardError, SnapshotError
from guard.files import (
    copy_private,
    digest_plain,
    list_plain,
    make_private_file,
    make_private_folder,
    put_in_place,
    read_plain,
    whole_folder,
    write_private,
)
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore, read_bundle
from guard.storage.places import BundlePlace
from guard.storage.stores import open_store

QUEUE, BUNDLES, SUMS = "queue.db", "bundles", "SHA256SUMS"
_SQLITE = "sqlite:///"
_MOST_SUMS_BYTES = 2**26
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


def save_snapshot(folder: Path, *, queue_url: str | None, bundles: BundlePlace | None) -> Snapshot:
    """Copy queue and bundles into a new folder while everything runs.

    The queue comes first, then the bundles: whatever the copied queue names is among the copied bundles. The folder
    gets its name when it is whole. Only its owner may read it.

    Parameters
    ----------
    folder : Path
        Must not exist.
    queue_url : str or None
        Of a queue in SQLite. PostgreSQL has tools of its own (`pg_dump`), which do this better.
    bundles : path-like or None
        A folder, or its URL in an object store.

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
    store = open_store(bundles) if bundles is not None else None
    if folder.exists():
        raise SnapshotError(f"{folder} exists already. Name another folder.")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with whole_folder(folder) as writing:
            if source is not None:
                _copy_database(source, writing / QUEUE)
            if store is not None:
                _copy_bundles(store, writing / BUNDLES)
            about = _look_at(writing, folder)
            write_private(writing / SUMS, _sums(writing))
    except OSError as error:
        raise SnapshotError(f"{folder} cannot be written: {error.strerror or error}. Is there room?") from error
    return about


def restore_snapshot(folder: Path, *, queue_url: str | None, bundles: BundlePlace | None) -> Snapshot:
    """Put queue and bundles of a snapshot in their places; nothing that is there is replaced.

    Only the owner of what is written may read it. Copies are compared with the snapshot's sums before they get their
    names.

    Parameters
    ----------
    folder : Path
        That `save_snapshot` made; every file is verified first.
    queue_url : str or None
        Where the queue shall be: a SQLite file that does not exist.
    bundles : path-like or None
        Where the bundles shall be: a folder that does not exist, or is empty, or a URL below which nothing lies.

    Raises
    ------
    SnapshotError
        If the snapshot is damaged or lacks what is asked for, or a place is taken.
    """
    if queue_url is None and bundles is None:
        raise SnapshotError("there is nothing to restore. Name a place for the queue, for the bundles, or both.")
    about = verify_snapshot(folder)
    sums = _read_sums(folder)
    target = _sqlite_file(queue_url) if queue_url is not None else None
    store = open_store(bundles) if bundles is not None else None
    for wanted, name, part in ((target, QUEUE, "queue"), (store, BUNDLES, "folder of bundles")):
        if wanted is not None and not (folder / name).exists():
            raise SnapshotError(f"{folder} holds no {part}. Leave it out.")
    if target is not None and any(Path(f"{target}{end}").exists() for end in ("", "-wal", "-shm")):
        raise SnapshotError(f"{target} exists already. Move it away first; nothing is overwritten.")
    if store is not None and not store.is_empty():
        raise SnapshotError(f"{store.address} is not empty. Move it away first; nothing is overwritten.")
    try:
        for place, name in ((store.root if store is not None else None, BUNDLES), (target, QUEUE)):
            if place is None:
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as scratch:
                copy = Path(scratch) / name
                copy_private(folder / name, copy)
                if _sums(Path(scratch)) != "".join(line for line in sums if _below(line, name)):
                    raise SnapshotError(f"{folder} was changed while it was restored. Look who writes to it.")
                if store is not None and name == BUNDLES:
                    store.take_over(copy)
                else:
                    put_in_place(copy, place)
    except OSError as error:
        raise SnapshotError(
            f"{folder} cannot be restored: {error.strerror or error}. Check the places and the disk."
        ) from error
    return about


def verify_snapshot(folder: Path) -> Snapshot:
    """Check every file of a snapshot, its bundles and its queue; return what it holds.

    Raises
    ------
    SnapshotError
        If it is none, or anything in it was changed.
    """
    sums = _read_sums(folder)
    try:
        same = "".join(sums) == _sums(folder)
    except OSError as error:
        raise SnapshotError(f"{folder} is damaged: {_reason(error)}. Take another snapshot.") from error
    if not same:
        raise SnapshotError(f"{folder} is damaged: its files do not match {SUMS}. Take another snapshot.")
    return _look_at(folder, folder)


def _read_sums(folder: Path) -> list[str]:
    try:
        return read_plain(folder / SUMS, _MOST_SUMS_BYTES).decode().splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise SnapshotError(f"{folder} is no snapshot: {SUMS} cannot be read. `guard snapshot save` makes one.") from (
            error
        )


def _below(line: str, name: str) -> bool:
    path = line.rstrip("\n").partition("  ")[2]
    return path == name or path.startswith(f"{name}/")


def _reason(error: OSError) -> str:
    """Say what is wrong with a file; links of all kinds are refused, for they lead out of the snapshot."""
    strange = error.errno in (errno.ELOOP, errno.EINVAL)
    return f"{error.filename} is no plain file or folder: {error.strerror}" if strange else str(error)


def _sqlite_file(url: str) -> Path:
    if not url.startswith(_SQLITE):
        raise SnapshotError(
            "a queue in PostgreSQL is backed up with pg_dump and restored with pg_restore: see docs/operations.md."
        )
    return Path(url.removeprefix(_SQLITE))


def _copy_database(source: Path, target: Path) -> None:
    """Copy a SQLite database as it is at one moment, while others write."""
    if not source.is_file():
        raise SnapshotError(f"there is no queue {source}. Is the path right?")
    make_private_file(target)
    try:
        with (
            closing(sqlite3.connect(f"file:{source.absolute().as_posix()}?mode=ro", uri=True, timeout=30)) as live,
            closing(sqlite3.connect(target)) as copy,
        ):
            live.backup(copy, pages=_CHUNK_PAGES, sleep=0.01)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, nothing beside it
    except sqlite3.Error as error:
        raise SnapshotError(
            f"the queue {source} cannot be copied: {error}. Is it a queue, and does nobody lock it?"
        ) from error


def _copy_bundles(store: BundleStore, target: Path) -> None:
    """Copy every bundle and what points at them. ACTIVE is read first: what it names is there when it is copied."""
    make_private_folder(target)
    store.copy_pointers(target)
    store.active_path()
    for digest in store.digests():
        folder = store.fetch(digest)
        read_bundle(folder)
        copy_private(folder, target / digest)


def _look_at(folder: Path, name: Path) -> Snapshot:
    """Open what lies in a folder, and tell what it is."""
    digests: tuple[str, ...] = ()
    active = decisions = head = None
    try:
        if (folder / BUNDLES).is_dir():
            store = BundleStore(folder / BUNDLES)
            digests = tuple(store.digests())
            for digest in digests:
                read_bundle(store.folder_of(digest))
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
            raise SnapshotError(f"the queue's database is damaged: {found}. Restore an earlier snapshot.")
        with tempfile.TemporaryDirectory() as scratch:
            copy_private(database, Path(scratch) / QUEUE)
            with Queue.open(f"{_SQLITE}{scratch}/{QUEUE}") as queue:
                audit = queue.verify_decisions()
    except sqlite3.Error as error:
        raise SnapshotError(f"the queue's database cannot be read: {error}. Is it a queue?") from error
    except SnapshotError:
        raise
    except GuardError as error:
        raise SnapshotError(f"the queue cannot be opened: {error}") from error
    if audit.problems:
        raise SnapshotError(f"the queue's decisions were changed: {audit.problems[0]}")
    return audit.rows, audit.head


def _sums(folder: Path) -> str:
    """Return a line with digest and path of every file below a folder; OSError if there is anything but plain files."""
    files = [path for path in list_plain(folder) if not path.is_dir() and path != folder / SUMS]
    return "".join(f"{digest_plain(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
