"""What is kept of a flagged request: every field that a handler may have looked at, and every picture among them."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import pytest
from serving_helpers import png

from guard.relabel.request_body import FIELDS_TYPE, MAX_PICTURES, fields_of, pack_body, pictures_of

PICTURES = [png(np.full((1, 4, 4), shade, dtype=np.float32)) for shade in (0.0, 0.25, 0.5, 0.75)]
TEXTS = [base64.b64encode(picture).decode() for picture in PICTURES]


def deep(value: Any, depth: int = 100_000) -> Any:
    for turn in range(depth):
        value = [value] if turn % 2 else {"a": value, "b": [1, None, "x", True]}
    return value


@pytest.mark.parametrize(
    ("item", "body"),
    [
        (b"raw", b"raw"),
        ("text", b"text"),
        ({"body": b"raw"}, b"raw"),
        ({"data": bytearray(b"raw")}, b"raw"),
        ({"other": "text"}, b"text"),
        ({"body": {"data": [1, 2]}}, b'{"data": [1, 2]}'),
        ([[0.5, 1]], b"[[0.5, 1]]"),
        ({}, b""),
    ],
)
def test_one_body_is_kept_as_it_came(item: Any, body: bytes) -> None:
    assert pack_body(item, "image/png") == (body, "image/png")
    (field,) = fields_of(body, "image/png")
    assert (field.name, field.data) == ("", body)


def test_several_fields_are_all_kept_in_order_with_their_kinds() -> None:
    item = {"data": PICTURES[0], "body": bytearray(PICTURES[1]), "note": "ä\n--b", "more": {"k": [1.5, None]}, "e": b""}
    body, content_type = pack_body(item, "multipart/form-data; boundary=b")
    assert content_type == FIELDS_TYPE
    kept = [(field.name, field.kind, field.data) for field in fields_of(body, content_type)]
    assert kept == [
        ("data", "bytes", PICTURES[0]),
        ("body", "bytes", PICTURES[1]),
        ("note", "text", "ä\n--b".encode()),
        ("more", "json", b'{"k": [1.5, null]}'),
        ("e", "bytes", b""),
    ]
    assert [(field.name, field.data) for field in pictures_of(body, content_type)] == [
        ("data", PICTURES[0]),
        ("body", PICTURES[1]),
    ]


@pytest.mark.parametrize(
    "value",
    ["\ud800", deep, float("nan"), {1: {2: 3}}, {(1, 2): 3}, [b"\xff", bytearray(b"x")], np.ones(3), object()],
    ids=["half a pair", "deep", "NaN", "number keys", "tuple keys", "bytes in a list", "array", "object"],
)
def test_no_field_can_hide_its_neighbour(value: Any) -> None:
    value = deep("end") if value is deep else value  # made here, or every process of a run keeps it
    body, content_type = pack_body({"data": value, "body": PICTURES[2]}, "")
    hostile, picture = fields_of(body, content_type)
    assert picture.data == PICTURES[2]
    assert hostile.data
    assert [entry.data for entry in pictures_of(body, content_type)] == [PICTURES[2]]
    alone, _ = pack_body({"data": value}, "")
    assert alone


def test_deep_nesting_is_written_out_whole() -> None:
    text = pack_body(deep(TEXTS[0], 3000), "")[0].decode()
    assert TEXTS[0] in text
    assert text.count("[") == text.count("]")
    assert pack_body({"a": deep(1, 40)}, "")[0] == json.dumps(deep(1, 40)).encode()


def test_bytes_inside_of_json_can_be_read_back() -> None:
    body, _ = pack_body([{"image": PICTURES[3]}], "")
    assert [picture.data for picture in pictures_of(body, "application/json")] == [PICTURES[3]]


def test_pictures_are_found_in_json_at_any_depth_in_order() -> None:
    nested = {"instances": [{"b64": TEXTS[0]}, {"image": {"b64": f"data:image/png;base64,{TEXTS[1]}"}}], "x": "/9j/4!"}
    for body in (json.dumps(nested).encode(), json.dumps(nested).replace("/", "\\/").encode()):
        assert [picture.data for picture in pictures_of(body, "application/json")][:2] == PICTURES[:2]
    two, content_type = pack_body({"data": nested, "b": TEXTS[2], "c": json.dumps([TEXTS[3]])}, "")
    found = [
        (picture.name, picture.data)
        for picture in pictures_of(two, content_type)
        if picture.data.startswith(b"\x89PNG")
    ]
    assert found == list(zip(("data", "data", "b", "c"), PICTURES, strict=True))
    many = json.dumps([TEXTS[0]] * 50).encode()
    assert len(pictures_of(many, "")) == MAX_PICTURES


def test_client_cannot_pass_its_body_off_as_fields_of_ours() -> None:
    forged, _ = pack_body({"a": PICTURES[0], "b": PICTURES[1]}, "")
    for claimed in (FIELDS_TYPE, FIELDS_TYPE.upper(), f" {FIELDS_TYPE} ; charset=utf-8"):
        body, content_type = pack_body({"body": forged}, claimed)
        assert (body, content_type) == (forged, "application/octet-stream")
        assert len(fields_of(body, content_type)) == 1


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"fields": 3}', b'{"fields": [{}]}', b'{"fields": ["x"]}', b"\xff"], ids=range(7)
)
def test_damaged_fields_are_shown_as_what_they_are(body: bytes) -> None:
    assert [field.data for field in fields_of(body, FIELDS_TYPE)] == [body]


def test_names_of_fields_are_printable_and_short() -> None:
    body, content_type = pack_body({"a\u202eb\x00\n": b"1", "n" * 500: b"2"}, "")
    names = [field.name for field in fields_of(body, content_type)]
    assert names == ["a\ufffdb\ufffd\ufffd", "n" * 59 + "…"]
