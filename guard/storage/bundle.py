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

from guard.errors import BundleError
from guard.files import READABLE_FILE, READABLE_FOLDER, read_plain, replace_file, whole_folder
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
_SHORT = 12  # digits of a digest that are shown to people
_DIGEST = re.compile("[0-9a-f]{64}")
#: Largest files that are read: a few lines, ten thousands of digests, settings and lineage, clean reference and backup.
_MAX_BYTES = {SUMS: 2**12, ACTIVE: 2**10, HISTORY: 2**24, DOCUMENT: 2**26, ARRAYS: 2**35}


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
    """One line of `BundleStore.entries`."""

    digest: str
    is_active: bool
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
            _remove(target)  # damaged: the same contents, whole, take its place
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
            f"bundle {path.name[:_SHORT]} is a symbolic link, which is not followed. Copy the folder there."
        )
    try:
        sums = read_plain(path / SUMS, _MAX_BYTES[SUMS])
    except OSError as error:
        raise BundleError(
            f"{path} is not a bundle: {SUMS} cannot be read ({error.strerror}). Name a folder that `guard fit` wrote."
        ) from error
    digest = hashlib.sha256(sums).hexdigest()
    if path.name != digest:
        raise BundleError(
            f"bundle {path.name[:_SHORT]} is damaged: its {SUMS} has digest {digest[:_SHORT]}. "
            "Restore it from a copy, or fit again."
        )
    contents: dict[str, bytes] = {}
    for line in sums.decode("utf-8", "replace").splitlines():
        expected, _, name = line.partition("  ")
        if name not in (DOCUMENT, ARRAYS):
            raise BundleError(
                f"bundle {digest[:_SHORT]} lists a file that does not belong there: {name!r}. "
                "Restore it from a copy, or fit again."
            )
        try:
            contents[name] = read_plain(path / name, _MAX_BYTES[name])
        except OSError as error:
            raise BundleError(
                f"bundle {digest[:_SHORT]}: {name} cannot be read ({error.strerror}). Check the file and its rights."
            ) from error
        if hashlib.sha256(contents[name]).hexdigest() != expected:
            raise BundleError(
                f"bundle {digest[:_SHORT]} is damaged: {name} ({len(contents[name])} bytes) does not match {SUMS}. "
                "Restore it from a copy, or fit again."
            )
    if contents.keys() != {DOCUMENT, ARRAYS}:
        raise BundleError(f"bundle {digest[:_SHORT]} must hold {DOCUMENT} and {ARRAYS}, lists {sorted(contents)}.")
    try:
        document = json.loads(contents[DOCUMENT])
        version = document["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(
            f"bundle {digest[:_SHORT]}: {DOCUMENT} has no schema_version or is no JSON. Fit again."
        ) from error
    if version not in _READ_VERSIONS:
        raise BundleError(
            f"bundle {digest[:_SHORT]} has schema version {version}, this program reads 2 and {SCHEMA_VERSION}. "
            "Upgrade backdoor-guard, or fit again."
        )
    try:
        arrays = unpack(load_safetensors(contents.pop(ARRAYS)), document.pop(_NOTES, {}))
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise BundleError(
            f"bundle {digest[:_SHORT]}: {ARRAYS} cannot be read ({error}). Restore it from a copy, or fit again."
        ) from error
    return StoredBundle(digest, document, arrays)


class BundleStore:
    """A folder of bundles and the pointer to the one in use.

    `ACTIVE` holds one digest and is replaced atomically. `HISTORY` holds the digests that were active, oldest first,
    so that `roll_back` knows where to go.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def folder_of(self, digest: str) -> Path:
        """Return the folder of a bundle by its whole digest, as a file or another program gave it.

        Raises
        ------
        BundleError
            If that is no digest: nothing else may become part of a path.
        """
        if not _DIGEST.fullmatch(digest):
            raise BundleError(
                f"a bundle is named by the 64 hex digits of its digest, got {digest[:80]!a}. See `guard bundle list`."
            )
        return self.root / digest

    def digests(self) -> list[str]:
        """Return the digests of all bundles in the folder, damaged ones among them, sorted."""
        return sorted(path.name for path in self.root.glob("?" * 64) if _DIGEST.fullmatch(path.name))

    def entries(self) -> list[BundleEntry]:
        """Return every whole bundle, newest first; damaged folders are left out."""
        active = self.known_active()
        folders = [folder for folder in map(self.folder_of, self.digests()) if folder.is_dir()]
        entries = []
        for folder in sorted(folders, key=lambda folder: folder.stat().st_mtime, reverse=True):
            with suppress(BundleError):
                entries.append(BundleEntry(folder.name, folder.name == active, read_bundle(folder).document))
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
            raise BundleError(f"{len(found)} bundles in {self.root} start with {prefix!r}. See `guard bundle list`.")
        return self.folder_of(found[0])

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
        if not _DIGEST.fullmatch(digest := text.strip()):
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
                f"no bundle is active in {self.root}. Run `guard fit`, or `guard bundle activate DIGEST`."
            )
        return self.folder_of(digest)

    def activate(self, digest: str) -> None:
        """Verify a bundle's files and point ACTIVE at it; what the arrays say is checked by `Guard.load`."""
        read_bundle(self.folder_of(digest))
        history = self._history(self.known_active())
        if not history or history[-1] != digest:
            self._replace(HISTORY, "".join(f"{line}\n" for line in [*history, digest]))
        self._replace(ACTIVE, f"{digest}\n")

    def roll_back(self) -> str:
        """Point ACTIVE at the bundle that was active before, and return its digest.

        Raises
        ------
        BundleError
            If no other bundle was active before, or that one is damaged.
        """
        history = self._before()
        if not history:
            raise BundleError(
                f"nothing to roll back to: no other bundle was active in {self.root} before. See `guard bundle list`."
            )
        digest = history[-1]
        read_bundle(self.folder_of(digest))
        self._replace(ACTIVE, f"{digest}\n")
        self._replace(HISTORY, "".join(f"{line}\n" for line in history))
        return digest

    def previous_digest(self) -> str | None:
        """Return the digest that `roll_back` would go to, or None if there is none."""
        history = self._before()
        return history[-1] if history else None

    def _before(self) -> list[str]:
        active = self.known_active()
        history = self._history(active)
        while history and history[-1] == active:
            history.pop()
        return history

    def _history(self, active: str | None) -> list[str]:
        """Return the lines of HISTORY up to the active bundle's last; a crash between the two files may leave more."""
        history = [line for line in (self._read(HISTORY) or "").split() if _DIGEST.fullmatch(line)]
        while active in history and history[-1] != active:
            history.pop()
        return history

    def _read(self, name: str) -> str | None:
        try:
            return read_plain(self.root / name, _MAX_BYTES[name]).decode("ascii", "replace")
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


def _remove(path: Path) -> None:
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
