"""Bundles in an object store: brought here whole or not at all, and one object that says which of them is active."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guard.errors import BundleError, StoreUnavailable
from guard.files import READABLE_FOLDER, make_private_folder, put_in_place, sync_folder, write_private
from guard.storage.bundle import (
    ACTIVE,
    ARRAYS,
    DIGEST,
    DOCUMENT,
    HISTORY,
    JOURNAL,
    MAX_BYTES,
    SHORT,
    SUMS,
    BundleStore,
    listed_sums,
    parsed_document,
    read_bundle,
    remove,
)
from guard.storage.objects import Found, NotThere, Objects

#: Largest file of a bundle that is brought here; a folder may hold larger ones.
_MOST_BYTES = 2**32
#: Seconds that bringing a bundle here may take: while an old one serves, and while nothing serves yet.
_LONGEST_S, _LONGEST_START_S = 600.0, 30.0
#: Bundles that are kept on this machine.
_KEPT = 16
#: How long a list or a page takes the last answer for true; longer if there was none, so that a page does not wait.
_FRESH_S, _AWAY_S = 0.5, 15.0
#: Seconds until a bundle whose bytes were wrong is asked for again: at first, and at most.
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
#: Times that a switch is tried while others switch.
_TRIES = 10
#: Switches that ACTIVE remembers, and its size at most: it is read again after every one.
_MOST_LINES, _MOST_POINTER_BYTES = 10_000, 2**20
#: Begins the name of what is being brought here; older ones than this many seconds are left from a crash.
_FETCHING, _LEFT_S = ".fetching-", 3600.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """A bundle that does not fit its digest: not asked for again before `until`, of `time.monotonic`."""

    until: float
    pause: float
    error: BundleError


class RemoteBundleStore(BundleStore):
    """A store of bundles below a URL, with copies in a folder of this machine.

    A bundle's objects are `<digest>/<file>`, written before anything points at them, `SHA256SUMS` last. `ACTIVE` holds
    the digests that were active, oldest first; the last is the one in use. It is written if nobody else has written it
    since it was read, so that one write switches both and no line is lost.

    `root` is an ordinary folder of bundles, named by their digests; each was verified before it got its name there. Its
    ACTIVE names the bundle that served here last.

    Parameters
    ----------
    objects : Objects
    cache : Path
        A folder that nobody else may write to.
    """

    least_poll_seconds = 0.5

    def __init__(self, objects: Objects, cache: Path) -> None:
        super().__init__(cache)
        self.address = objects.url
        self._objects = objects
        self._pointer: Found | None = None
        self._looked = float("-inf")
        self._away_until = float("-inf")
        self._refusals: dict[str, _Refusal] = {}
        self._whole_there: set[str] = set()  # read or written by this process
        self._remove_leftovers()

    def exists(self) -> bool:
        return True

    def is_empty(self) -> bool:
        return not self._objects.written()

    def copy_pointers(self, target: Path) -> None:
        active = self.active_digest()
        if active is not None:
            write_private(target / HISTORY, _text(_lines(self._pointer)))
            write_private(target / ACTIVE, _text([active]))

    def take_over(self, copy: Path) -> None:
        source = BundleStore(copy)
        for digest in source.digests():
            self._give(source.folder_of(digest))
        if (active := source.active_digest()) is not None and not self._write(None, source.history() or [active]):
            raise BundleError(f"a bundle is active in {self.address} already. Name another prefix.")

    # -- bundles ------------------------------------------------------------------------------------------------

    def fetch(self, digest: str, within_s: float = _LONGEST_S) -> Path:
        """Return the folder of a bundle on this machine; it is brought here if there is no whole copy yet.

        Raises
        ------
        StoreUnavailable
            If the store cannot be reached, or takes longer than `within_s` seconds.
        BundleError
            If that is no digest, the bundle is not there (yet), or its bytes do not fit its digest. Then it is not
            asked for again for some time.
        """
        folder = self.folder_of(digest)
        if _is_whole(folder):
            return folder
        refusal = self._refusals.get(digest)
        if refusal is not None and time.monotonic() < refusal.until:
            raise refusal.error
        try:
            self._bring(digest, self._sums(digest), time.monotonic() + within_s)
        except (StoreUnavailable, NotThere):
            raise
        except BundleError as error:
            pause = min(_LONGEST_PAUSE_S, 2 * refusal.pause if refusal is not None else _PAUSE_S)
            self._refusals[digest] = _Refusal(time.monotonic() + pause, pause, error)
            raise
        self._refusals.pop(digest, None)
        self._whole_there.add(digest)
        self._forget_oldest(digest)
        return folder

    def publish(self, digest: str) -> None:
        if digest in self._whole_there and self._objects.size(f"{digest}/{SUMS}") is not None:
            return
        self._give(self.folder_of(digest))
        self._whole_there.add(digest)

    def written(self) -> dict[str, float]:
        found = ((name.partition("/"), when) for name, when in self._objects.written().items())
        return dict(
            sorted((parts[0], when) for parts, when in found if parts[2] == SUMS and DIGEST.fullmatch(parts[0]))
        )

    def document(self, digest: str) -> dict[str, Any]:
        """Return what a bundle says of itself, verified; its arrays are not brought here for that."""
        folder = self.folder_of(digest)
        if folder.is_dir():
            with suppress(BundleError):
                return read_bundle(folder).document
        expected = listed_sums(self._sums(digest).data)
        found = self._objects.read(f"{digest}/{DOCUMENT}", MAX_BYTES[DOCUMENT])
        if found is None or hashlib.sha256(found.data).hexdigest() != expected.get(DOCUMENT):
            raise BundleError(
                f"bundle {digest[:SHORT]} in {self.address} is damaged: {DOCUMENT} does not match {SUMS}."
            )
        document = parsed_document(digest, found.data)
        document.pop("packing", None)
        return document

    def resolve(self, prefix: str) -> Path:
        if DIGEST.fullmatch(prefix):  # needs no list
            return self.fetch(prefix)
        try:
            return super().resolve(prefix)
        except StoreUnavailable:
            raise
        except BundleError:
            with suppress(BundleError):  # written here, and not yet brought there
                return BundleStore(self.root).resolve(prefix)
            raise

    def starting_folder(self) -> tuple[Path | None, str]:
        try:
            digest = self.active_digest()
            if digest is not None:
                return self.fetch(digest, _LONGEST_START_S), ""
            problem = f"no bundle is active in {self.address}"
        except BundleError as error:
            problem = str(error).rstrip(".")
        with suppress(BundleError):
            served = BundleStore(self.root).active_digest()
            if served is not None:
                return self.root / read_bundle(self.root / served).digest, problem
        return None, problem

    def remember(self, digest: str) -> None:
        with suppress(BundleError):  # a full disk must not keep a bundle from serving
            if BundleStore(self.root).known_active() != digest:
                self._replace(ACTIVE, f"{digest}\n")

    # -- which one is active ------------------------------------------------------------------------------------

    def active_digest(self) -> str | None:
        """Return the digest that ACTIVE names, asking the store; None if there is no such object.

        Raises
        ------
        StoreUnavailable
            If the store cannot be reached.
        BundleError
            If ACTIVE is damaged.
        """
        pointer = self._look()
        lines = _lines(pointer)
        if pointer is not None and not (lines and all(map(DIGEST.fullmatch, lines))):
            raise BundleError(
                f"{ACTIVE} in {self.address} is damaged: it holds no digest. Run `guard bundle activate DIGEST`."
            )
        return lines[-1] if lines else None

    def known_active(self) -> str | None:
        """Return the active digest for a list or a page: what was read last, if the store cannot be asked now."""
        try:
            if time.monotonic() > max(self._looked + _FRESH_S, self._away_until):
                return self.active_digest()
        except StoreUnavailable:
            pass
        except BundleError:
            return None
        lines = _lines(self._pointer)
        return lines[-1] if lines and all(map(DIGEST.fullmatch, lines)) else None

    def activate(self, digest: str, *, instead_of: str | None = None) -> None:
        self.fetch(digest)
        self.publish(digest)
        for attempt in range(_TRIES):
            lines = _valid_lines(known := self._look())
            active = lines[-1] if lines else None
            if active == digest and _lines(known) == lines:
                return
            if instead_of is not None:
                self._check_unchanged(active, instead_of)
            if self._write(known, [*lines, digest]):
                return
            time.sleep(random.uniform(0, 0.05 * (attempt + 1)))  # somebody else has switched meanwhile
        raise BundleError(f"others switch the bundle of {self.address} all the time. Stop them, and try again.")

    def roll_back(self, *, instead_of: str | None = None) -> str:
        lines = _valid_lines(known := self._look())
        active = lines[-1] if lines else None
        if instead_of is not None:
            self._check_unchanged(active, instead_of)
        before = self._checked_way_back(_without_last(lines))
        self.fetch(before[-1])
        self.publish(before[-1])
        if not self._write(known, before) and _lines(self._look()) != before:  # the same: the answer had been lost
            raise BundleError(
                f"somebody else switched the bundle of {self.address} just now: nothing was rolled back. Look again."
            )
        return before[-1]

    def begin_promotion(self, text: str) -> None:
        self._objects.write(JOURNAL, text.encode())

    def begun_promotion(self) -> str | None:
        found = self._objects.read(JOURNAL, MAX_BYTES[JOURNAL])
        return found.data.decode("utf-8", "replace") if found is not None else None

    def is_promoting(self) -> bool:
        return self._objects.size(JOURNAL) is not None

    def end_promotion(self) -> None:
        self._objects.remove(JOURNAL)

    def _history(self, active: str | None) -> list[str]:
        return _valid_lines(self._pointer)

    def _look(self) -> Found | None:
        try:
            self._pointer = self._objects.read(ACTIVE, _MOST_POINTER_BYTES, self._pointer)
        except StoreUnavailable:
            self._away_until = time.monotonic() + _AWAY_S
            raise
        self._looked = time.monotonic()
        return self._pointer

    def _write(self, known: Found | None, lines: list[str]) -> bool:
        self._looked = float("-inf")  # whatever comes of it, what was read is no news any more
        data = _text(lines[-_MOST_LINES:]).encode()
        try:
            is_written = self._objects.write_if(ACTIVE, data, known)
        except StoreUnavailable as error:
            raise StoreUnavailable(f"{error} It is not known whether it was switched: `guard bundle list`.") from error
        if is_written:
            self._pointer = Found(data, {}, time.time())  # until it is read, under a version that nobody knows yet
        return is_written

    # -- the copies here ----------------------------------------------------------------------------------------

    def _sums(self, digest: str) -> Found:
        self.folder_of(digest)  # refuses what is none
        found = self._objects.read(f"{digest}/{SUMS}", MAX_BYTES[SUMS])
        if found is None:
            raise NotThere(f"bundle {digest[:SHORT]} is not in {self.address} (yet). See `guard bundle list`.")
        if hashlib.sha256(found.data).hexdigest() != digest:
            raise BundleError(
                f"bundle {digest[:SHORT]} in {self.address} is damaged: its {SUMS} has another digest. "
                "Run `guard bundle activate` where it is whole, or fit again."
            )
        return found

    def _give(self, folder: Path) -> None:
        """Write a bundle's objects, whatever was there: the sums last, for where they are, all is."""
        read_bundle(folder)
        for name in (DOCUMENT, ARRAYS, SUMS):
            self._objects.write(f"{folder.name}/{name}", folder / name)

    def _bring(self, digest: str, sums: Found, deadline: float) -> None:
        """Bring a bundle here: into a folder beside its place, verified there, and then under its name."""
        try:
            make_private_folder(self.root)  # somebody may have emptied the folder of caches
            with tempfile.TemporaryDirectory(prefix=_FETCHING, dir=self.root, ignore_cleanup_errors=True) as scratch:
                copy = Path(scratch) / digest
                copy.mkdir()
                (copy / SUMS).write_bytes(sums.data)
                for name in (DOCUMENT, ARRAYS):
                    most = min(MAX_BYTES[name], _MOST_BYTES)
                    self._objects.download(f"{digest}/{name}", copy / name, most, deadline)
                read_bundle(copy)
                copy.chmod(READABLE_FOLDER)
                os.utime(copy, (sums.written, sums.written))  # as lists tell it
                sync_folder(copy)
                self._put_in_place(copy, self.folder_of(digest))
        except OSError as error:
            raise BundleError(
                f"bundle {digest[:SHORT]} of {self.address} cannot be kept in {self.root}: {error.strerror or error}. "
                "Is there room?"
            ) from error
        except (StoreUnavailable, NotThere):
            raise
        except BundleError as error:
            raise BundleError(f"{self.address} gave what is no bundle {digest[:SHORT]}: {error}") from error

    def _put_in_place(self, copy: Path, target: Path) -> None:
        if os.path.lexists(target):
            if _is_whole(target):  # another process was first
                return
            remove(target)
        try:
            put_in_place(copy, target)
        except OSError:
            if not _is_whole(target):
                raise

    def _forget_oldest(self, used: str) -> None:
        """Remove the oldest copies above the number that is kept, but for the active one and the one in use."""
        kept = {used, BundleStore(self.root).known_active()}
        with suppress(OSError):
            copies = sorted(
                map(self.folder_of, BundleStore(self.root).digests()), key=lambda copy: copy.lstat().st_ctime
            )
            for copy in copies[:-_KEPT]:
                if copy.name not in kept:
                    shutil.rmtree(copy, ignore_errors=True)

    def _remove_leftovers(self) -> None:
        with suppress(OSError):
            for left in self.root.glob(f"{_FETCHING}*"):
                if time.time() - left.lstat().st_mtime > _LEFT_S:
                    shutil.rmtree(left, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    try:
        read_bundle(folder)
    except BundleError:
        return False
    return True


def _text(lines: list[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def _lines(pointer: Found | None) -> list[str]:
    return pointer.data.decode("ascii", "replace").split("\n")[:-1] if pointer is not None else []


def _valid_lines(pointer: Found | None) -> list[str]:
    return [line for line in _lines(pointer) if DIGEST.fullmatch(line)]


def _without_last(lines: list[str]) -> list[str]:
    """Return the lines without the last one and its repetitions."""
    before = list(lines)
    while before and before[-1] == lines[-1]:
        before.pop()
    return before
