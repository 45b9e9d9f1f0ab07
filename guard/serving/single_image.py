"""Bodies that hold exactly one image and nothing beside it, told by their bytes: such may share a batch on trust."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Mapping
from typing import Any

_MOST_PARTS = 4096  # chunks or segments; a body with more is answered by itself
#: Names under which servers hand over a body without a name.
_FIELDS = frozenset(("body", "data"))
#: Chunks of a PNG with one picture. Those of an animation (acTL, fcTL, fdAT) and private ones are left out.
_PNG_CHUNKS = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP cICP sBIT bKGD hIST pHYs tIME tEXt zTXt iTXt eXIf".split()
)
#: Chunks of a WebP with one picture; ANIM and ANMF belong to animations.
_WEBP_CHUNKS = frozenset((b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ICCP", b"EXIF", b"XMP "))


def holds_one_image(item: Any) -> bool:
    """Return whether a request is a single field with the bytes of one PNG, JPEG, BMP or WebP, complete and alone.

    Whatever may hold several inputs is not: JSON, text, several fields, animations and multi-picture files, TIFF, GIF,
    images behind one another, bytes of an unknown kind, and an image that is an archive (zip, tar, RAR) or a PDF, too:
    its metadata have room for one. Nothing is decoded; a damaged image may pass.

    Parameters
    ----------
    item : object
        What a server hands over for one request: a mapping of field names to values, or the one value.
    """
    if isinstance(item, Mapping):
        if len(item) != 1 or next(iter(item)) not in _FIELDS:
            return False
        item = next(iter(item.values()))
    if not isinstance(item, bytes | bytearray):
        return False
    return any(item.startswith(magic) and is_single(item) for magic, is_single in _FORMATS.items()) and not (
        _is_container(item)
    )


def _is_container(body: bytes | bytearray) -> bool:
    """Return whether a reader of archives may find one in these bytes; a photo is taken for one in a million."""
    if body.find(b"PK\x05\x06") >= 0 or body.find(b"Rar!\x1a\x07") >= 0 or body.find(b"%PDF-", 0, 1024) >= 0:
        return True
    try:
        tarfile.TarInfo.frombuf(bytes(body[:512]), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _is_one_png(body: bytes | bytearray) -> bool:
    at, kind = 8, b""
    for _ in range(_MOST_PARTS):
        size, kind, is_first = int.from_bytes(body[at : at + 4]), bytes(body[at + 4 : at + 8]), at == 8
        at += 12 + size
        if kind not in _PNG_CHUNKS or is_first != (kind == b"IHDR") or at > len(body):
            return False
        if kind == b"IEND":
            return at == len(body)
    return False


def _is_one_jpeg(body: bytes | bytearray) -> bool:
    at = 2
    for _ in range(_MOST_PARTS):
        marker, size = body[at : at + 2], int.from_bytes(body[at + 2 : at + 4])
        if len(marker) < 2 or marker[0] != 0xFF or not 0xC0 <= marker[1] <= 0xFE or 0xD0 <= marker[1] <= 0xD9:
            return False
        if marker[1] == 0xE2 and body[at + 4 : at + 8] == b"MPF\0":  # a list of further pictures
            return False
        at += 2 + size
        if marker[1] == 0xDA:  # the picture: its data hold neither an end nor another begin
            return body.find(b"\xff\xd9", at) == len(body) - 2 >= at and body.find(b"\xff\xd8", at) < 0
    return False


def _is_one_bmp(body: bytes | bytearray) -> bool:
    return len(body) > 26 and int.from_bytes(body[2:6], "little") == len(body)


def _is_one_webp(body: bytes | bytearray) -> bool:
    if body[8:12] != b"WEBP" or int.from_bytes(body[4:8], "little") + 8 != len(body):
        return False
    at, pictures = 12, 0
    for _ in range(_MOST_PARTS):
        if at == len(body):
            return pictures == 1
        kind, size = bytes(body[at : at + 4]), int.from_bytes(body[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
        if kind not in _WEBP_CHUNKS or at > len(body):
            return False
        pictures += kind in (b"VP8 ", b"VP8L")
    return False


_FORMATS: dict[bytes, Callable[[bytes | bytearray], bool]] = {
    b"\x89PNG\r\n\x1a\n": _is_one_png,
    b"\xff\xd8\xff": _is_one_jpeg,
    b"BM": _is_one_bmp,
    b"RIFF": _is_one_webp,
}
