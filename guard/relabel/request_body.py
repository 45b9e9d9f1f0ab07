"""The body of a flagged request as the queue keeps it: as it came, or all fields of a request that had several.

One field is kept as it came. Several (parts of a form, keys of an instance in a service envelope) go into one JSON
document, whose content type is `FIELDS_TYPE`: a handler may have looked at any of them.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

#: Content type of a document `{"fields": [{"name": ..., "kind": "bytes" | "text" | "json", "value": ...}, ...]}`.
#: Values are text: base64, the text itself, or JSON as text, so that no depth of nesting can hide a field.
FIELDS_TYPE = "application/vnd.backdoor-guard.fields+json"
#: Pictures that are looked for in one request at most.
MAX_PICTURES = 16
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")  # how files in PNG and JPEG begin,
_ENCODED = ("iVBORw0KGgo", "/9j/")  # and how they do in base64
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a request.

    Attributes
    ----------
    name : str
        Printable, cut at 60 characters; "" for a body that is no field.
    kind : {"bytes", "text", "json"}
    data : bytes
        Text and JSON in UTF-8.
    """

    name: str
    kind: str
    data: bytes


@dataclass(frozen=True, slots=True)
class SentPicture:
    """A file in PNG or JPEG, by its first bytes, and the field that it was found in."""

    name: str
    data: bytes


def pack_body(item: object, content_type: str) -> tuple[bytes, str]:
    """Return the bytes of a request and their content type, as they are kept.

    Parameters
    ----------
    item : object
        What the server handed to the handler: a mapping of fields, or a body by itself. A server may have parsed JSON;
        it is written anew.
    content_type : str
        As the client stated it.
    """
    if content_type.split(";")[0].strip().lower() == FIELDS_TYPE:
        content_type = "application/octet-stream"  # a client must not decide what a reviewer is shown
    if not isinstance(item, Mapping):
        return _packed(item)[1], content_type
    if len(item) <= 1:
        return _packed(next(iter(item.values()), b""))[1], content_type
    fields = []
    for name, value in item.items():
        kind, data = _packed(value)
        text = base64.b64encode(data).decode() if kind == "bytes" else data.decode("utf-8", "surrogatepass")
        fields.append({"name": str(name), "kind": kind, "value": text})
    return json.dumps({"fields": fields}).encode(), FIELDS_TYPE


def fields_of(body: bytes, content_type: str) -> list[Field]:
    """Return the fields of a request that had several, in order; else its body as the only one, without a name."""
    if content_type == FIELDS_TYPE:
        try:
            return [_field(entry) for entry in json.loads(body)["fields"]]
        except (ValueError, TypeError, KeyError, RecursionError):
            pass  # no document of ours: shown as what it is
    return [Field("", "bytes", body)]


def pictures_of(body: bytes, content_type: str) -> list[SentPicture]:
    """Return the pictures of a request, `MAX_PICTURES` at most: fields that are files, and base64 text in any depth."""
    found: list[SentPicture] = []
    for field in fields_of(body, content_type):
        for data in _pictures_in(field):
            found.append(SentPicture(field.name, data))
            if len(found) == MAX_PICTURES:
                return found
    return found


def _packed(value: object) -> tuple[str, bytes]:
    if isinstance(value, bytes | bytearray | memoryview):
        return "bytes", bytes(value)
    if isinstance(value, str):
        return "text", value.encode("utf-8", "surrogatepass")  # JSON may hold half a surrogate pair
    try:
        return "json", json.dumps(value, default=_plain).encode()
    except RecursionError:
        return "json", "".join(_flat_json(value)).encode()
    except (TypeError, ValueError):  # keys that JSON does not know, or a list that holds itself
        return "json", json.dumps(repr(value)).encode()


def _plain(value: object) -> Any:
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(bytes(value)).decode()}
    as_list = getattr(value, "tolist", None)  # arrays
    return as_list() if callable(as_list) else repr(value)


def _flat_json(value: object) -> Iterator[str]:
    """Yield the JSON of a value that is nested too deeply for the `json` module, without recursion."""
    waiting: list[tuple[bool, Any]] = [(False, value)]  # True: text, ready to be written
    while waiting:
        is_text, part = waiting.pop()
        if is_text:
            yield part
        elif isinstance(part, dict):
            parts: list[tuple[bool, Any]] = [(True, "{")]
            for place, (key, inner) in enumerate(part.items()):
                parts += [(True, f"{', ' if place else ''}{json.dumps(str(key))}: "), (False, inner)]
            waiting += reversed([*parts, (True, "}")])
        elif isinstance(part, list | tuple):
            parts = [(True, "[")]
            for place, inner in enumerate(part):
                parts += [(True, ", " if place else ""), (False, inner)]
            waiting += reversed([*parts, (True, "]")])
        else:
            yield json.dumps(part, default=_plain)


def _field(entry: Mapping[str, str]) -> Field:
    name, kind, text = str(entry["name"]), str(entry["kind"]), entry["value"]
    data = base64.b64decode(text) if kind == "bytes" else text.encode("utf-8", "surrogatepass")
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in name)
    return Field(shown if len(shown) <= _LONGEST_NAME else f"{shown[: _LONGEST_NAME - 1]}…", kind, data)


def _pictures_in(field: Field) -> Iterator[bytes]:
    if field.data.startswith(_PICTURES):
        yield field.data
        return
    if b"iVBOR" not in field.data and b"9j" not in field.data:  # a slash may be written as `\/`
        return
    text = field.data.decode("utf-8", "replace")
    try:
        waiting = [text if field.kind == "text" else json.loads(text)]
        if field.kind == "text" and text.lstrip()[:1] in ("{", "[", '"'):
            waiting = [json.loads(text)]
    except (ValueError, RecursionError):
        waiting = [text]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += reversed(part.values())
        elif isinstance(part, list):
            waiting += reversed(part)
        elif isinstance(part, str):
            encoded = (part.partition("base64,")[2] if part.startswith("data:") else part).strip()
            if encoded.startswith(_ENCODED):
                try:
                    yield base64.b64decode(encoded)
                except (binascii.Error, ValueError):
                    continue
