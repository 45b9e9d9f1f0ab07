"""Zip archives from strangers: every member is checked before one byte is unpacked, and all readers must agree on them.

TorchServe reads an archive from front to back, by the headers before each member; Python reads the list at its end. An
archive that says one thing here and another there is refused, as is one with bytes that belong to no member.
"""

from __future__ import annotations

import hashlib
import re
import stat
import struct
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from guard.errors import ArchiveError

#: Members of one archive.
MAX_MEMBERS = 10_000
#: All members together, unpacked: 32 GiB.
MAX_UNPACKED_BYTES = 2**35
#: An archive may unpack to so many times its own size; trained weights hardly shrink at all.
MAX_RATIO = 100
#: Whatever the ratio, so much is allowed: 64 MiB.
ALWAYS_ALLOWED_BYTES = 2**26
#: What zipfile and zlib raise over a damaged or hostile archive.
ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # an encrypted member; NotImplementedError is one, too
    OverflowError,
    MemoryError,
)
#: All headers together, the list at the end included: 32 MiB.
MAX_HEADER_BYTES = 2**25
_MAX_NAME_BYTES = 1024

_PART = 2**20
_REMEDY = "Make the archive again with torch-model-archiver, from files that you trust."
_LOCAL = struct.Struct("<4s5H3L2H")  # signature, version, flags, method, time, date, crc, packed, size, name, extra
_UTF8, _DESCRIPTOR, _LEVEL = 0x800, 0x8, 0x6  # the only flags that a plain archive has
_ZIP64 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class Member:
    """One file or folder of an archive.

    Attributes
    ----------
    name : str
        Plain and relative; a folder's ends with a slash.
    method : int
        0 = stored, 8 = deflated.
    crc : int
        CRC-32 of the unpacked bytes.
    size, packed_size : int
        Bytes, unpacked and in the archive.
    start : int
        Where its packed bytes begin in the archive.
    """

    name: str
    method: int
    crc: int
    size: int
    packed_size: int
    start: int

    @property
    def is_folder(self) -> bool:
        return self.name.endswith("/")


class StrictZip:
    """An archive whose members were all checked; made by `open_strict_zip`.

    Attributes
    ----------
    path : Path
    size : int
        Bytes of the whole file.
    members : dict of str to Member
        In the order of the file.
    list_start : int
        Where the members end and the list of them begins.
    """

    def __init__(self, path: Path, file: BinaryIO, members: Sequence[Member], list_start: int, size: int) -> None:
        self.path = path
        self.size = size
        self.members = {member.name: member for member in members}
        self.list_start = list_start
        self._file = file

    def bytes_between(self, start: int, end: int) -> Iterator[bytes]:
        """Yield the file's own bytes from `start` up to `end`, in parts."""
        while start < end:
            self._file.seek(start)  # each time: a caller may read something else between two parts
            part = self._file.read(min(_PART, end - start))
            if not part:
                raise ArchiveError(f"{self.path.name} became shorter while it was read. Try again.")
            start += len(part)
            yield part

    def packed(self, name: str) -> Iterator[bytes]:
        """Yield one member's packed bytes as they are in the file."""
        member = self.members[name]
        yield from self.bytes_between(member.start, member.start + member.packed_size)

    def digest(self) -> str:
        """Return the SHA-256 of the whole file, 64 hexadecimal digits."""
        digest = hashlib.sha256()
        for part in self.bytes_between(0, self.size):
            digest.update(part)
        return digest.hexdigest()

    def read(self, name: str, limit: int = 2**24) -> bytes:
        """Return one small member unpacked.

        Raises
        ------
        ArchiveError
            If it is damaged, or larger than `limit` bytes.
        """
        if self.members[name].size > limit:
            raise ArchiveError(f"{self.path.name}: {name} must have at most {limit} bytes. {_REMEDY}")
        return b"".join(self._unpacked(self.members[name]))

    def unpack(self, folder: Path) -> None:
        """Write all members below a folder, made by this call; files get mode 0600, whatever the archive says.

        Raises
        ------
        ArchiveError
            If a member is damaged, or holds more or less than it says.
        """
        folder.mkdir(mode=0o700)
        for member in self.members.values():
            target = folder / member.name
            if member.is_folder:
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                target.chmod(0o600)
                for part in self._unpacked(member):
                    file.write(part)

    def _unpacked(self, member: Member) -> Iterator[bytes]:
        inflater = zlib.decompressobj(-15) if member.method == zipfile.ZIP_DEFLATED else None
        size, crc = 0, 0
        for packed in self.packed(member.name):
            for part in _inflated(inflater, packed, member, self.path.name) if inflater else [packed]:
                size, crc = size + len(part), zlib.crc32(part, crc)
                if size > member.size:
                    raise ArchiveError(
                        f"{self.path.name}: member {member.name!r} holds more than the {member.size} bytes "
                        f"that it says. {_REMEDY}"
                    )
                yield part
        whole = inflater is None or (inflater.eof and not inflater.unused_data)
        if size != member.size or crc != member.crc or not whole:
            raise ArchiveError(f"{self.path.name}: member {member.name!r} is damaged. Fetch or make the archive again.")


def _inflated(inflater: zlib._Decompress, packed: bytes, member: Member, archive: str) -> Iterator[bytes]:
    """Yield what some packed bytes unpack to, never more than a part at once."""
    try:
        while True:
            part = inflater.decompress(packed, _PART)
            packed = inflater.unconsumed_tail
            yield part
            if not packed and len(part) < _PART:  # after a full part there may be more of it inside
                return
    except zlib.error as error:
        raise ArchiveError(
            f"{archive}: member {member.name!r} is damaged ({error}). Fetch or make the archive again."
        ) from error


@contextmanager
def open_strict_zip(path: Path) -> Iterator[StrictZip]:
    """Open a zip archive that a stranger may have made, and check all its members.

    Refused are names that lead elsewhere (absolute, `..`, backslashes, control characters), links and devices, names
    that are twice there or differ only in case, encrypted members, what unpacks to more than `MAX_UNPACKED_BYTES` or to
    more than `MAX_RATIO` times its size, and headers that do not agree with the list at the end.

    Parameters
    ----------
    path : Path
        The file; nothing is unpacked yet.

    Raises
    ------
    ArchiveError
        With what is wrong, in one line.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise ArchiveError(f"archive {path} cannot be read: {error.strerror}. Check the path.") from error
    with file:
        size = path.stat().st_size
        try:
            with zipfile.ZipFile(file) as listed:
                entries, list_start = listed.infolist(), listed.start_dir
        except ZIP_ERRORS as error:
            raise ArchiveError(
                f"{path} is not a TorchServe archive (.mar), or is damaged: {error}. Name one that is a zip file."
            ) from error
        try:
            members = _checked(file, entries, list_start, size)
        except ArchiveError as error:
            raise ArchiveError(f"{path.name}: {error} {_REMEDY}") from None
        yield StrictZip(path, file, members, list_start, size)


def read_member(path: Path, name: str, most_bytes: int) -> bytes | None:
    """Return one small member of an archive whose others are not looked at; None if there is none of that name.

    Raises
    ------
    ArchiveError
        If the archive cannot be read, or the member is larger than `most_bytes`.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            if name not in packed.NameToInfo:
                return None
            with packed.open(name) as member:
                data = member.read(most_bytes + 1)
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror or error}. Check the path.") from error
    except ZIP_ERRORS as error:
        raise ArchiveError(f"{path.name} is no archive, or damaged ({error}). Make it again.") from error
    if len(data) > most_bytes:
        raise ArchiveError(f"{path.name}: {name} must have at most {most_bytes} bytes. {_REMEDY}")
    return data


def _checked(file: BinaryIO, entries: list[zipfile.ZipInfo], list_start: int, size: int) -> list[Member]:
    if len(entries) > MAX_MEMBERS:
        raise ArchiveError(f"it has {len(entries)} members, more than {MAX_MEMBERS} allowed.")
    seen: dict[str, str] = {}
    for entry in entries:
        _check_entry(entry)
        _check_spelling(entry.filename, seen)
    _check_nesting(entries)
    unpacked = sum(entry.file_size for entry in entries)
    allowed = min(MAX_UNPACKED_BYTES, max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * size))
    if unpacked > allowed:
        raise ArchiveError(f"it unpacks to {unpacked} bytes, more than {allowed} allowed for its size: a zip bomb?")
    if size - sum(entry.compress_size for entry in entries) > MAX_HEADER_BYTES:
        raise ArchiveError(f"its headers have more than {MAX_HEADER_BYTES} bytes.")
    if not entries:
        raise ArchiveError("it lists no member.")
    ordered = sorted(entries, key=lambda entry: entry.header_offset)
    ends = [*(entry.header_offset for entry in ordered[1:]), list_start]
    members, position = [], 0
    for entry, end in zip(ordered, ends, strict=True):
        if entry.header_offset != position:
            raise ArchiveError(f"there are {entry.header_offset - position} bytes before {entry.filename!r} unlisted.")
        members.append(_located(file, entry, end))
        position = end
    return members


def _check_entry(entry: zipfile.ZipInfo) -> None:
    """Refuse one entry of the list by its name, its kind, or its flags."""
    name, shown = entry.filename, ascii(entry.orig_filename[:120])
    kind = stat.S_IFMT(entry.external_attr >> 16)
    inner = name.removesuffix("/").split("/")
    if name != entry.orig_filename or any(ord(sign) < 32 or ord(sign) == 127 or sign == "\\" for sign in name):
        raise ArchiveError(f"member {shown} has a backslash or a control character in its name.")
    if name.startswith("/") or re.match("[A-Za-z]:", name):
        raise ArchiveError(f"member {shown} has an absolute path.")
    if any(part in ("", ".", "..") for part in inner):
        raise ArchiveError(f"member {shown} leads out of the archive's folder, or is no plain path.")
    try:
        long = len(name.encode()) > _MAX_NAME_BYTES or any(len(part.encode()) > 255 for part in inner)
    except UnicodeEncodeError:
        long = True
    if long or not (name.isascii() or entry.flag_bits & _UTF8):
        raise ArchiveError(f"member {shown} has a name that is too long, or is not in UTF-8.")
    if kind == stat.S_IFLNK:
        raise ArchiveError(f"member {shown} is a symbolic link.")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > name.endswith("/"):
        raise ArchiveError(f"member {shown} is neither a file nor a folder.")
    if entry.flag_bits & ~(_UTF8 | _DESCRIPTOR | _LEVEL):
        raise ArchiveError(f"member {shown} is encrypted, or packed in an unusual way.")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ArchiveError(f"member {shown} is packed by method {entry.compress_type}, which TorchServe cannot read.")
    stored = entry.compress_type == zipfile.ZIP_STORED
    if (stored and entry.compress_size != entry.file_size) or (name.endswith("/") and entry.file_size):
        raise ArchiveError(f"member {shown} has sizes that contradict each other.")


def _check_spelling(name: str, seen: dict[str, str]) -> None:
    """Refuse a name, or a folder in it, that is there already, or there in another spelling."""
    parts = name.removesuffix("/").split("/")
    for depth in range(1, len(parts) + 1):
        path = "/".join(parts[:depth])
        known = seen.setdefault(unicodedata.normalize("NFC", path.casefold()), path)
        if known != path:
            raise ArchiveError(f"members {known!a} and {path!a} differ only in case or spelling.")


def _check_nesting(entries: list[zipfile.ZipInfo]) -> None:
    """Refuse a name that is twice there, and a file that is also a folder."""
    names: set[str] = set()
    for entry in entries:
        path = entry.filename.removesuffix("/")
        if path in names:
            raise ArchiveError(f"member {path!a} is there twice.")
        names.add(path)
    files = {entry.filename for entry in entries if not entry.is_dir()}
    for path in names:
        for depth in range(1, path.count("/") + 1):
            if (folder := path.rsplit("/", depth)[0]) in files:
                raise ArchiveError(f"member {folder!a} is both a file and a folder.")


def _located(file: BinaryIO, entry: zipfile.ZipInfo, end: int) -> Member:
    """Return where a member's bytes are; its own header must say what the list says."""
    contradiction = ArchiveError(
        f"member {entry.filename!r} has a header that contradicts the archive's list, or unlisted bytes behind it."
    )
    file.seek(entry.header_offset)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise contradiction
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra_length = _LOCAL.unpack(header)
    raw, extra = file.read(name_length), file.read(extra_length)
    start = entry.header_offset + _LOCAL.size + name_length + extra_length
    local = (signature, flags, method, raw)
    name = entry.filename.encode()
    if local != (b"PK\x03\x04", entry.flag_bits, entry.compress_type, name) or len(extra) != extra_length:
        raise contradiction
    true_sizes = (entry.CRC, entry.compress_size, entry.file_size)
    behind = start + entry.compress_size
    if behind > end:
        raise contradiction
    file.seek(behind)
    descriptor = file.read(min(end - behind, 25))
    if flags & _DESCRIPTOR:
        forms = {
            sign + struct.pack(form, *true_sizes)
            for sign in (b"", b"PK\x07\x08")
            for form in ("<LLL", "<LQQ")
            if form == "<LQQ" or max(true_sizes) < 2**32
        }
        if descriptor not in forms:
            raise contradiction
    else:
        if _ZIP64 in (packed, size):
            packed, size = _large_sizes(extra, packed, size)
        if (crc, packed, size) != true_sizes or descriptor:
            raise contradiction
    return Member(entry.filename, entry.compress_type, entry.CRC, entry.file_size, entry.compress_size, start)


def _large_sizes(extra: bytes, packed: int, size: int) -> tuple[int, int]:
    """Return packed and unpacked size from the extra field of an archive with members over 4 GiB."""
    while len(extra) >= 4:
        kind, length = struct.unpack("<HH", extra[:4])
        if kind == 1 and length >= 16:
            size, packed = struct.unpack("<QQ", extra[4:20])
            return packed, size
        extra = extra[4 + length :]
    return packed, size
