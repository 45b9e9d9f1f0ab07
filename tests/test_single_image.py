"""Bodies that may share a batch on trust: one image and nothing else, in any of four formats."""

from __future__ import annotations

import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from guard.serving.probe_bodies import MOST_IMAGES, distinct_images, odd_images
from guard.serving.single_image import holds_one_image

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
SEVERAL = {
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
