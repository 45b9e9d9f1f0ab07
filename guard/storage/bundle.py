"""The artefact on disk: a folder named by its digest, written once, verified whenever it is read, never a pickle."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from guard.errors import BundleError, StoreUnavailable
from guard.files import (
    READABLE_FILE,
    READABLE_FOLDER,
    copy_private,
    put_in_place,
    read_plain,
    replace_file,
    sync_folder,
    whole_folder,
)
from guard.storage.packing import pack, unpack
from guard.types import AnyArray

#: Of what is written. Version 2 is read as well: its arrays are not packed, and it has no notes about that.
SCHEMA_VERSION = 3
_READ_VERSIONS = (2, SCHEMA_VERSION)
_NOTES = "packing"  # in the document on disk, see `guard.storage.packing`
DOCUMENT, ARRAYS, SUMS = "guard.json", "arrays.safetensors", "SHA256SUMS"
ACTIVE, HISTORY = "ACTIVE", "HISTORY"
#: What a promotion that has begun is about to do; gone when it is done.
JOURNAL = ".promotion.json"
#: Held by the retrainer of the folder; says for which model it works, and when a round starts by itself.
RETRAINER_LOCK = ".retrainer.lock"
SHORT = 12  # digits of a digest that are shown to people
DIGEST = re.compile("[0-9a-f]{64}")
#: Largest files that are read: a few lines, ten thousands of digests, settings and lineage, clean reference and backup.
MAX_BYTES = {SUMS: 2**12, ACTIVE: 2**10, HISTORY: 2**24, DOCUMENT: 2**26, ARRAYS: 2**35, JOURNAL: 2**26}


@dataclass(frozen=True, slots=True)
class StoredBundle:
    """A verified bundle in memory.

    Attributes
    ----------
    digest : str
        SHA-256 of the bundle's SHA256SUMS, 64 hex digits; also the folder's name.
    document : dict
        What `guard.json` holds, without the notes about packing.
    arrays : dict of str to ndarray
        What `write_bundle` was given, types included. Equal arrays may share their memory.
    """

    digest: str
    document: dict[str, Any]
    arrays: dict[str, AnyArray]


@dataclass(frozen=True, slots=True)
class BundleEntry:
    """One line of `BundleStore.entries`.

    Attributes
    ----------
    digest : str
    is_active : bool
    written : float
        When it was written, in seconds since 1970.
    document : dict
        As in `StoredBundle`.
    """

    digest: str
    is_active: bool
    written: float
    document: dict[str, Any]


def write_bundle(root: str | os.PathLike[str], document: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> Path:
    """Write a bundle atomically and return its folder, `root/<digest>`.

    Files go to a temporary folder beside it, are flushed to disk, and the folder is renamed: a reader never sees half a
    bundle, and the same contents written twice are one bundle. Arrays are kept in the narrowest type that holds every
    value, and equal ones once: what is read is what was written, bit by bit.

    Raises
    ------
    BundleError
        If the folder cannot be written.
    """
    root = Path(root)
    kept, notes = pack(arrays)
    full = {**document, "schema_version": SCHEMA_VERSION} | ({_NOTES: notes} if notes else {})
    files = {
        DOCUMENT: json.dumps(full, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n",
        ARRAYS: save_safetensors(kept),
    }
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(files.items())).encode()
    digest = hashlib.sha256(sums).hexdigest()
    target = root / digest
    try:
        root.mkdir(mode=READABLE_FOLDER, parents=True, exist_ok=True)
        if os.path.lexists(target):
            with suppress(BundleError):
                read_bundle(target)
                return target
            remove(target)  # damaged: the same contents, whole, take its place
        with whole_folder(target, READABLE_FOLDER) as writing:
            for name, data in {**files, SUMS: sums}.items():
                _write_durably(writing / name, data)
    except OSError as error:
        if (
            error.errno in (errno.EEXIST, errno.ENOTEMPTY) and target.is_dir()
        ):  # another process wrote the same bundle first
            return target
        raise BundleError(
            f"bundle cannot be written to {root}: {error.strerror or error}. "
            "Is it a folder that can be written to, and is there room?"
        ) from error
    return target


def read_bundle(path: str | os.PathLike[str]) -> StoredBundle:
    """Read and verify the bundle in a folder.

    Raises
    ------
    BundleError
        If it is missing, damaged, renamed, lists files it should not, or was written by a newer version.
    """
    path = Path(path)
    if path.is_symlink():
        raise BundleError(
            f"bundle {path.name[:SHORT]} is a symbolic link, which is not followed. Copy the folder there."
        )
    try:
        sums = read_plain(path / SUMS, MAX_BYTES[SUMS])
    except OSError as error:
        raise BundleError(
            f"{path} is not a bundle: {SUMS} cannot be read ({error.strerror}). Name a folder that `guard fit` wrote."
        ) from error
    digest = hashlib.sha256(sums).hexdigest()
    if path.name != digest:
        raise BundleError(
            f"bundle {path.name[:SHORT]} is damaged: its {SUMS} has digest {digest[:SHORT]}. "
            "Restore it from a copy, or fit again."
        )
    contents: dict[str, bytes] = {}
    for name, expected in listed_sums(sums).items():
        try:
            contents[name] = read_plain(path / name, MAX_BYTES[name])
        except OSError as error:
            raise BundleError(
                f"bundle {digest[:SHORT]}: {name} cannot be read ({error.strerror}). Check the file and its rights."
            ) from error
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(
                f"bundle {digest[:SHORT]} is damaged: {name} ({len(contents[name])} bytes) does not match {SUMS}. "
                "Restore it from a copy, or fit again."
            )
    if contents.keys() != {DOCUMENT, ARRAYS}:
        raise BundleError(f"bundle {digest[:SHORT]} must hold {DOCUMENT} and {ARRAYS}, lists {sorted(contents)}.")
    document = parsed_document(digest, contents[DOCUMENT])
    try:
        arrays = unpack(load_safetensors(contents.pop(ARRAYS)), document.pop(_NOTES, {}))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise BundleError(
            f"bundle {digest[:SHORT]}: {ARRAYS} cannot be read ({error}). Restore it from a copy, or fit again."
        ) from error
    return StoredBundle(digest, document, arrays)


def listed_sums(sums: bytes) -> dict[str, str]:
    """Return the SHA-256 of each file that a SHA256SUMS lists, by name; BundleError if it lists a strange one."""
    listed = {}
    digest = hashlib.sha256(sums).hexdigest()
    for line in sums.decode("utf-8", "replace").splitlines():
        expected, _, name = line.partition("  ")
        if name not in (DOCUMENT, ARRAYS):
            raise BundleError(
                f"bundle {digest[:SHORT]} lists a file that does not belong there: {name!r}. "
                "Restore it from a copy, or fit again."
            )
        listed[name] = expected
    return listed


def parsed_document(digest: str, data: bytes) -> dict[str, Any]:
    """Return what a `guard.json` of checked bytes holds, with the notes about packing; BundleError if it is none."""
    try:
        document: dict[str, Any] = json.loads(data)
        version = document["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"bundle {digest[:SHORT]}: {DOCUMENT} has no schema_version or is no JSON. Fit again."
        ) from error
    if version not in _READ_VERSIONS:
        raise BundleError(
            f"bundle {digest[:SHORT]} has schema version {version}, this program reads 2 and {SCHEMA_VERSION}. "
            "Upgrade backdoor-guard, or fit again."
        )
    return document


class BundleStore:
    """A folder of bundles and the pointer to the one in use.

    `ACTIVE` holds one digest and is replaced atomically. `HISTORY` holds the digests that were active, oldest first,
    so that `roll_back` knows where to go. `guard.storage.remote.RemoteBundleStore` is the same in an object store;
    `guard.storage.places.open_store` opens either.

    Attributes
    ----------
    root : Path
        Folder that bundles lie in on this machine. A new one is written there, and then given to `publish`.
    address : str
        What people call the store.
    least_poll_seconds : float
        Who follows ACTIVE need not look more often.
    """

    least_poll_seconds: float = 0.0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.address = str(self.root)

    def exists(self) -> bool:
        """Return whether there is such a store; one that has to be asked for is taken to be there."""
        return self.root.is_dir()

    def is_empty(self) -> bool:
        """Return whether nothing at all lies there."""
        return not self.root.exists() or not any(self.root.iterdir())

    def copy_pointers(self, target: Path) -> None:
        """Write ACTIVE and HISTORY, those that there are, as private files into a folder."""
        for name in (ACTIVE, HISTORY):
            if (self.root / name).is_file():
                copy_private(self.root / name, target / name)

    def take_over(self, copy: Path) -> None:
        """Make an empty store hold the bundles and pointers of a folder beside `root`, which may go for that."""
        put_in_place(copy, self.root)

    def folder_of(self, digest: str) -> Path:
        """Return the folder of a bundle by its whole digest, as a file or another program gave it.

        Whether it is there is not looked at: see `fetch`.

        Raises
        ------
        BundleError
            If that is no digest: nothing else may become part of a path.
        """
        if not DIGEST.fullmatch(digest):
            raise BundleError(
                f"a bundle is named by the 64 hex digits of its digest, got {digest[:80]!a}. See `guard bundle list`."
            )
        return self.root / digest

    def fetch(self, digest: str) -> Path:
        """Return the folder of a bundle on this machine, after bringing it here if it lies elsewhere.

        Raises
        ------
        BundleError
            If that is no digest, or the bundle cannot be brought here whole.
        """
        return self.folder_of(digest)

    def publish(self, digest: str) -> None:
        """See to it that everybody who uses the store can read a bundle that was written to `root`.

        Raises
        ------
        BundleError
            If it cannot be brought there.
        """

    def starting_folder(self) -> tuple[Path | None, str]:
        """Return the folder of the bundle to start serving with, and why it is not the active one ("" if it is).

        Raises
        ------
        BundleError
            If the folder of bundles is there, and nothing in it is active.
        """
        if not self.exists():
            return None, "folder of bundles not found"
        return self.active_path(), ""

    def remember(self, digest: str) -> None:
        """Note which bundle serves here, for a start while the store is out of reach."""

    def written(self) -> dict[str, float]:
        """Return when each bundle was written, in seconds since 1970, damaged ones among them, by digest in order."""
        found = {path.name: path for path in self.root.glob("?" * 64) if DIGEST.fullmatch(path.name)}
        return {digest: found[digest].lstat().st_mtime for digest in sorted(found)}

    def digests(self) -> list[str]:
        """Return the digests of all bundles in the folder, damaged ones among them, sorted."""
        return list(self.written())

    def document(self, digest: str) -> dict[str, Any]:
        """Return what a bundle says of itself, verified; BundleError if it is missing or damaged."""
        return read_bundle(self.fetch(digest)).document

    def entries(self) -> list[BundleEntry]:
        """Return every whole bundle, newest first; damaged ones are left out."""
        active, written = self.known_active(), self.written()
        entries = []
        for digest in sorted(written, key=lambda digest: written[digest], reverse=True):
            try:
                entries.append(BundleEntry(digest, digest == active, written[digest], self.document(digest)))
            except StoreUnavailable:
                raise
            except BundleError:
                continue
        return entries

    def resolve(self, prefix: str) -> Path:
        """Return the folder of the bundle whose digest starts with `prefix` (at least 6 digits)."""
        if len(prefix) < 6 or not set(prefix) <= set("0123456789abcdef"):
            raise BundleError(
                f"a bundle is named by at least 6 hex digits of its digest, got {prefix[:80]!a}. "
                "See `guard bundle list`."
            )
        found = [digest for digest in self.digests() if digest.startswith(prefix)]
        if len(found) != 1:
            raise BundleError(f"{len(found)} bundles in {self.address} start with {prefix!r}. See `guard bundle list`.")
        return self.fetch(found[0])

    def active_digest(self) -> str | None:
        """Return the digest in ACTIVE, or None if there is no such file.

        Raises
        ------
        BundleError
            If it holds no digest, is no plain file, or cannot be read.
        """
        text = self._read(ACTIVE)
        if text is None:
            return None
        if not DIGEST.fullmatch(digest := text.strip()):
            raise BundleError(
                f"{self.root / ACTIVE} is damaged: it holds no digest. Run `guard bundle activate DIGEST`."
            )
        return digest

    def known_active(self) -> str | None:
        """Return the active digest for a list or a page; None where ACTIVE is missing or damaged, so that both work."""
        try:
            return self.active_digest()
        except BundleError:
            return None

    def active_path(self) -> Path:
        """Return the folder of the active bundle.

        Raises
        ------
        BundleError
            If none is active, or ACTIVE holds no digest.
        """
        digest = self.active_digest()
        if digest is None:
            raise BundleError(
                f"no bundle is active in {self.address}. Run `guard fit`, or `guard bundle activate DIGEST`."
            )
        return self.fetch(digest)

    def activate(self, digest: str, *, instead_of: str | None = None) -> None:
        """Verify a bundle's files and point ACTIVE at it; what the arrays say is checked by `Guard.load`.

        Parameters
        ----------
        digest : str
        instead_of : str, optional
            The bundle that must be active until now.

        Raises
        ------
        BundleError
            If the bundle is missing or damaged, or another one than `instead_of` is active; nothing was changed.
        """
        read_bundle(self.folder_of(digest))
        if instead_of is not None:
            self._check_unchanged(self.active_digest(), instead_of)
        history = self._history(self.known_active())
        if not history or history[-1] != digest:
            self._replace(HISTORY, "".join(f"{line}\n" for line in [*history, digest]))
        self._replace(ACTIVE, f"{digest}\n")

    def roll_back(self, *, instead_of: str | None = None) -> str:
        """Point ACTIVE at the bundle that was active before, and return its digest; `instead_of` as in `activate`.

        Raises
        ------
        BundleError
            If no other bundle was active before, or that one is damaged, or another one than `instead_of` is active.
        """
        if instead_of is not None:
            self._check_unchanged(self.active_digest(), instead_of)
        history = self._checked_way_back(self._before())
        digest = history[-1]
        read_bundle(self.folder_of(digest))
        self._replace(ACTIVE, f"{digest}\n")
        self._replace(HISTORY, "".join(f"{line}\n" for line in history))
        return digest

    def previous_digest(self) -> str | None:
        """Return the digest that `roll_back` would go to, or None if there is none."""
        history = self._before()
        return history[-1] if history else None

    def history(self) -> list[str]:
        """Return the digests that were active, oldest first; the last is the active one."""
        return self._history(self.known_active())

    def begin_promotion(self, text: str) -> None:
        """Write down what a promotion is about to do, for whoever has to finish it; BundleError if that fails."""
        try:
            replace_file(self.root / JOURNAL, text.encode())
        except OSError as error:
            raise BundleError(f"{self.root / JOURNAL} cannot be written: {error}. Is there room?") from error

    def begun_promotion(self) -> str | None:
        """Return what a promotion that has begun wrote down; None if none has."""
        try:
            return (self.root / JOURNAL).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def is_promoting(self) -> bool:
        """Return whether a promotion has begun and not ended."""
        return (self.root / JOURNAL).exists()

    def end_promotion(self) -> None:
        """Forget what a promotion wrote down."""
        (self.root / JOURNAL).unlink(missing_ok=True)
        sync_folder(self.root)

    def _check_unchanged(self, active: str | None, expected: str) -> None:
        if active != expected:
            raise BundleError(
                f"bundle {expected[:SHORT]} was to be replaced in {self.address}, but {str(active)[:SHORT]} is "
                "active now: nothing was changed. Look again."
            )

    def _checked_way_back(self, history: list[str]) -> list[str]:
        if not history:
            raise BundleError(
                f"nothing to roll back to: no other bundle was active in {self.address} before. "
                "See `guard bundle list`."
            )
        return history

    def _before(self) -> list[str]:
        active = self.known_active()
        history = self._history(active)
        while history and history[-1] == active:
            history.pop()
        return history

    def _history(self, active: str | None) -> list[str]:
        """Return the lines of HISTORY up to the active bundle's last; a crash between the two files may leave more."""
        history = [line for line in (self._read(HISTORY) or "").split() if DIGEST.fullmatch(line)]
        while active in history and history[-1] != active:
            history.pop()
        return history

    def _read(self, name: str) -> str | None:
        try:
            return read_plain(self.root / name, MAX_BYTES[name]).decode("ascii", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BundleError(
                f"{self.root / name} cannot be read ({error.strerror}). Remove it, and run `guard bundle activate`."
            ) from error

    def _replace(self, name: str, text: str) -> None:
        try:
            replace_file(self.root / name, text.encode(), READABLE_FILE)
        except OSError as error:
            raise BundleError(
                f"{self.root / name} cannot be written: {error.strerror or error}. Check the folder and the disk."
            ) from error


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        os.fchmod(file.fileno(), READABLE_FILE)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
