"""Bodies that may share a batch on trust: one image and nothing else, in any of four formats."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guard.serving.single_image import holds_one_image
from guard.torchserve.probe_bodies import MOST_IMAGES, distinct_images, odd_images

RNG = np.random.default_rng(0)
PICTURES = [Image.fromarray(RNG.integers(0, 256, (24, 32, 3), np.uint8)) for _ in range(3)]


def saved(kind: str, *, several: bool = False, **options: Any) -> bytes:
    stream = io.BytesIO()
    if several:  # copies: saving leaves its settings on a picture
        options |= {"save_all": True, "append_images": [picture.copy() for picture in PICTURES[1:]]}
    PICTURES[0].copy().save(stream, kind, **options)
    return stream.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


PNG, JPEG, BMP, WEBP = saved("PNG"), saved("JPEG"), saved("BMP"), saved("WEBP")
EXIF = Image.Exif()
EXIF[0x010E] = "a picture"
SINGLE = {
    "png": PNG,
    "png of many chunks": PNG[:33] + chunk(b"tEXt", b"a\0b") * 40 + PNG[33:],
    "jpeg": JPEG,
    "progressive jpeg": saved("JPEG", progressive=True, quality=95),
    "jpeg with exif": saved("JPEG", exif=EXIF),
    "grey jpeg": saved("JPEG", quality=5),
    "bmp": BMP,
    "webp": WEBP,
    "lossless webp": saved("WEBP", lossless=True),
    "webp with exif": saved("WEBP", exif=EXIF),
}


def zip_before(rest: int) -> bytes:
    """Return a zip of two pictures whose comment is what follows it in a file, so many bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name in ("0.png", "1.png"):
            packed.writestr(name, PNG)
    return stream.getvalue()[:-2] + struct.pack("<H", rest)


def jpeg_that_is_a_zip() -> bytes:
    data = zip_before(len(JPEG) - 2)
    return JPEG[:2] + b"\xff\xfe" + struct.pack(">H", len(data) + 2) + data + JPEG[2:]


def png_that_is_a_tar() -> bytes:
    text = bytes(512 - 41) + PNG
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    head[:41] = PNG[:33] + struct.pack(">I", len(text)) + b"tEXt"
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return PNG[:33] + chunk(b"tEXt", bytes(head[41:]) + text[471:]) + PNG[33:]


PNG_THAT_IS_A_ZIP = PNG[:33] + chunk(b"tEXt", zip_before(4 + len(PNG) - 33)) + PNG[33:]
SEVERAL = {
    "png that is a zip": PNG_THAT_IS_A_ZIP,
    "jpeg that is a zip": jpeg_that_is_a_zip(),
    "png that is a tar": png_that_is_a_tar(),
    "png that is a pdf": PNG[:33] + chunk(b"tEXt", b"%PDF-1.7") + PNG[33:],
    "png that is a rar": PNG[:33] + chunk(b"tEXt", b"Rar!\x1a\x07\x01\0") + PNG[33:],
    "animated png": saved("PNG", several=True),
    "hidden animation": PNG[:33] + chunk(b"acTL", struct.pack(">II", 2, 0)) + PNG[33:],
    "two png": PNG + PNG,
    "png and rest": PNG + b"\0",
    "png with a private chunk": PNG[:33] + chunk(b"prVt", PNG) + PNG[33:],
    "png without an end": PNG[:-12],
    "png that begins twice": PNG[:33] + PNG[8:],
    "png whose chunk is longer than the rest": PNG[:33] + b"\x7f\xff\xff\xff" + PNG[37:],
    "two jpeg": JPEG + JPEG,
    "jpeg within a cut one": JPEG[:-2] + JPEG,
    "multi-picture jpeg": saved("MPO", several=True),
    "jpeg and rest": JPEG + b"\0\0",
    "jpeg head": JPEG[:20],
    "two bmp": BMP + BMP,
    "animated webp": saved("WEBP", several=True),
    "two webp": WEBP + WEBP,
    "gif": saved("GIF"),
    "tiff": saved("TIFF"),
    "pages": saved("TIFF", several=True),
    "icons": saved("ICO"),
    "zip": b"PK\3\4" + bytes(60),
    "json": json.dumps([1, 2]).encode(),
    "text": "iVBORw0KGgo=",
    "parsed json": [[0.0]],
    "number": 7,
    "nothing": b"",
    "magic alone": b"\x89PNG\r\n\x1a\n",
}


@pytest.mark.parametrize("name", SINGLE)
def test_one_whole_image_in_one_field_is_told(name: str) -> None:
    body = SINGLE[name]
    for item in (body, bytearray(body), {"body": body}, {"data": bytearray(body)}):
        assert holds_one_image(item)
    for item in ({"data": body, "body": body}, {"body": body, "note": ""}, {}, [body], {"body": [body]}):
        assert not holds_one_image(item)
    assert Image.open(io.BytesIO(body)).convert("RGB").size == (32, 24)


@pytest.mark.parametrize("name", SEVERAL)
def test_body_that_may_hold_several_inputs_is_not_trusted(name: str) -> None:
    assert not holds_one_image({"body": SEVERAL[name]})


@pytest.mark.parametrize("name", SINGLE)
def test_cut_body_at_any_length_raises_nothing_and_is_not_trusted(name: str) -> None:
    body = SINGLE[name]
    assert not any(holds_one_image(body[:length]) for length in range(len(body)))


def test_images_for_a_probe_are_single_distinct_and_of_the_format_that_was_given() -> None:
    for examples in ([PNG], [JPEG, JPEG], [BMP, b"[1]"], [], [SEVERAL["gif"]]):
        images = distinct_images(examples, (3, 24, 32))
        assert len(set(images)) == MOST_IMAGES
        assert all(map(holds_one_image, images))
        single = [example for example in examples if holds_one_image(example)]
        if single:
            assert {image[:2] for image in images} == {single[0][:2]}
    assert distinct_images([], (2, 24, 32)) == distinct_images([], None) == []


def test_odd_images_hold_what_a_handler_may_cut_into_several() -> None:
    odd = odd_images(JPEG)
    assert Image.open(io.BytesIO(odd["that is twice as wide"])).size == (64, 24)
    assert Image.open(io.BytesIO(odd["that is twice as high"])).size == (32, 48)
    assert Image.open(io.BytesIO(odd["in other colours"])).mode == "L"
    assert all(holds_one_image(odd[f"as {kind}"]) for kind in ("PNG", "BMP", "WEBP"))
    assert len(odd["that is cut off"]) == len(JPEG) // 2
    assert odd["with damaged pixels"] != JPEG


def test_files_that_are_an_image_and_an_archive_are_both() -> None:
    for body in (PNG_THAT_IS_A_ZIP, jpeg_that_is_a_zip()):
        assert zipfile.ZipFile(io.BytesIO(body)).read("1.png") == PNG
        assert Image.open(io.BytesIO(body)).size == (32, 24)
    assert tarfile.is_tarfile(io.BytesIO(png_that_is_a_tar()))
    assert Image.open(io.BytesIO(png_that_is_a_tar())).size == (32, 24)


@pytest.mark.parametrize("field", ["body", "data", "image", "decoy"])
def test_image_in_a_field_that_was_not_tried_is_answered_by_itself(field: str) -> None:
    assert holds_one_image({field: PNG}) == (field in ("body", "data"))
