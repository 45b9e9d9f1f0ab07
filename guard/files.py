"""Files and folders on disk: private ones that nobody else may read, durable writes, and reads that follow no link."""

from __future__ import annotations

import codecs
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

#: Of what holds inputs, answers, settings or keys, whatever the umask.
PRIVATE_FILE, PRIVATE_FOLDER = 0o600, 0o700
#: Of what every process of the machine may read and only its owner may write, such as bundles.
READABLE_FILE, READABLE_FOLDER = 0o644, 0o755
_PART = 2**20
#: What a link, a device or a queue of bytes is called in an error.
_KINDS = (
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISDIR, "a folder"),
)


def make_private_folder(folder: Path) -> None:
    """Make a folder that only its owner may enter; one that is there is closed to others. Parents are made as usual."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
    folder.chmod(PRIVATE_FOLDER)


def open_private(path: Path, mode: str = "w", **options: Any) -> IO[Any]:
    """Open a file that only its owner may read, made if it is missing; `mode` as for `open`, to write or to append."""

    def opener(name: str, flags: int) -> int:
        handle = os.open(name, flags, PRIVATE_FILE)
        with suppress(PermissionError):  # somebody else's file keeps the rights that its owner gave it
            os.fchmod(handle, PRIVATE_FILE)
        return handle

    return open(path, mode, opener=opener, **options)


def write_private(path: Path, text: str) -> None:
    """Write a text in UTF-8 that only the owner of the file may read."""
    with open_private(path, encoding="utf-8", newline="") as file:
        file.write(text)


def decoded(data: bytes) -> str:
    """Return the text of a file that people made: UTF-8 or UTF-16, with a byte order mark or without, else Latin-1.

    Bytes that Windows gives a meaning beyond Latin-1 (its quotation marks, the euro) have that meaning.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16", "replace")
    if data[:64].count(0) * 3 > len(data[:64]):  # UTF-16 without a mark: every other byte of a Latin letter is zero
        return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le", "replace")
    for encoding in ("utf-8-sig", "cp1252"):
        with suppress(UnicodeDecodeError):
            return data.decode(encoding)
    return data.decode("latin-1")


def close_to_others(path: Path) -> None:
    """Take all rights from everybody but the owner, where everybody has some: nobody meant that. A group's stay."""
    with suppress(OSError):  # somebody else's file
        if path.stat().st_mode & stat.S_IRWXO:
            path.chmod(PRIVATE_FILE)


def make_private_file(path: Path) -> None:
    """Make an empty private file; one that is there stays, and is closed to others (see `close_to_others`)."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE_FILE))
    except FileExistsError:
        close_to_others(path)


def replace_file(path: Path, data: bytes, mode: int = PRIVATE_FILE) -> None:
    """Replace a file as a whole, flushed to disk: a reader sees the old one or the new one."""
    with whole_file(path, mode) as file:
        file.write(data)


@contextmanager
def whole_file(path: Path, mode: int = PRIVATE_FILE) -> Iterator[BinaryIO]:
    """Open a file for writing that appears under its name when all of it is on the disk, and not at all if it fails."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        with Path(temporary).open("w+b") as file:  # by its name, which callers may want
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(mode)
        put_in_place(Path(temporary), path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path, mode: int = PRIVATE_FOLDER) -> Iterator[Path]:
    """Give a folder to fill that appears under its name, flushed to disk, when the block ends; not at all if it fails.

    Raises
    ------
    OSError
        If there is something of that name, but for an empty folder (`EEXIST`, `ENOTEMPTY`, `ENOTDIR`), or it cannot be
        written.
    """
    temporary = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(mode)
        for folder in (*(below for below in list_plain(temporary) if below.is_dir()), temporary):
            sync_folder(folder)
        put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(source: Path, target: Path) -> None:
    """Give a file or a folder beside its place the name that it is read by, for good; a file of that name goes."""
    source.replace(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_plain(path: Path, most_bytes: int) -> bytes:
    """Return what a plain file holds; links are not followed, and nothing is waited for.

    Raises
    ------
    OSError
        If it cannot be read, is a link, a pipe, a device or a folder (`ELOOP`, `EINVAL`), or is larger than
        `most_bytes` (`EFBIG`); its `strerror` says so in words.
    """
    with _open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= most_bytes else b""
    if max(size, len(data)) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes} bytes", str(path))
    return data


def list_plain(folder: Path) -> list[Path]:
    """Return all files and folders below a folder, sorted; the folder itself is not among them.

    Raises
    ------
    OSError
        If it cannot be read, or is or holds a link, a pipe, a socket or a device (`ELOOP`, `EINVAL`).
    """
    found: list[Path] = []
    _check_kind(folder, folder.lstat().st_mode, folder=True)
    waiting = [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path, mode = Path(entry.path), entry.stat(follow_symlinks=False).st_mode
                _check_kind(path, mode, folder=stat.S_ISDIR(mode))
                found.append(path)
                if stat.S_ISDIR(mode):
                    waiting.append(path)
    return sorted(found)


def copy_private(source: Path, target: Path) -> None:
    """Copy a plain file, or a folder with all that is in it, as private files and folders, flushed to disk.

    Raises
    ------
    OSError
        As `list_plain`, or if it cannot be written.
    """
    mode = source.lstat().st_mode
    _check_kind(source, mode, folder=stat.S_ISDIR(mode))
    if not stat.S_ISDIR(mode):
        _copy_file(source, target)
        return
    make_private_folder(target)
    for path in list_plain(source):
        copy = target / path.relative_to(source)
        if stat.S_ISDIR(path.lstat().st_mode):
            make_private_folder(copy)
        else:
            _copy_file(path, copy)
    for folder in (target, *(path for path in list_plain(target) if path.is_dir())):
        sync_folder(folder)


def digest_plain(path: Path) -> str:
    """Return the SHA-256 of a plain file, 64 hexadecimal digits; raises as `read_plain`."""
    with _open_plain(path) as file:
        digest = hashlib.sha256()
        while part := file.read(_PART):
            digest.update(part)
    return digest.hexdigest()


def _copy_file(source: Path, target: Path) -> None:
    with _open_plain(source) as reader, open_private(target, "xb") as writer:
        while part := reader.read(_PART):
            writer.write(part)
        writer.flush()
        os.fsync(writer.fileno())


def _open_plain(path: Path) -> BinaryIO:
    # Whether it is a plain file is asked of what was opened. O_NONBLOCK: a pipe does not wait for its other end.
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link", str(path)) from None
        raise
    try:
        _check_kind(path, os.fstat(handle).st_mode, folder=False)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _check_kind(path: Path, mode: int, *, folder: bool) -> None:
    is_wanted: Callable[[int], bool] = stat.S_ISDIR if folder else stat.S_ISREG
    if not is_wanted(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "no folder" if folder else "no file")
        raise OSError(errno.EINVAL, f"it is {kind}", str(path))
