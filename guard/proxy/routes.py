"""Which requests are inference by the guarded model, which are about it, and which go through untouched."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal
from urllib.parse import unquote_to_bytes

#: `infer` and `metadata` are answered by the proxy; `about` is read only; `plain` goes through, unless it is `closed`;
#: `unguarded` would reach the model, and nobody would judge its answer.
Kind = Literal["infer", "metadata", "about", "plain", "closed", "unguarded"]
_KINDS: dict[bytes | None, Kind] = {None: "metadata", b"infer": "infer"}
_MOST_UNQUOTED = 8
#: Parts of paths by which clients of Triton load other models (an ensemble of the guarded one, say), let the server
#: write files, or share memory with it; a list of its models is harmless.
_MANAGING = (b"repository", b"trace", b"logging", b"systemsharedmemory", b"cudasharedmemory")
_INDEX = b"/v2/repository/index"
_BETWEEN = re.compile(rb"[/\\:;,?#&=@+*|!()\s\x00-\x1f]+")


@dataclass(frozen=True, slots=True)
class Route:
    """What a path asks for.

    Attributes
    ----------
    kind : {"infer", "metadata", "about", "plain", "closed", "unguarded"}
    version : str or None
        Of the guarded model, where the path names one.
    is_health : bool
    """

    kind: Kind
    version: str | None = None
    is_health: bool = False


class Routes:
    """Tells the routes of one model from others.

    A path that names the guarded model must be written exactly as the protocol has it. Everything else that holds its
    name, however it is quoted, is refused: servers read one path in several ways, and know further routes to a model
    (KServe's `v1/models/NAME:predict`, Triton's `generate`), whose answers nobody would judge. So is what manages the
    server.

    Parameters
    ----------
    model : str
        Letters, digits, dots, - and _.
    only : bool
        Let nothing through but health, the server's metadata, and this model.
    """

    def __init__(self, model: str, *, only: bool = False) -> None:
        self._name = model.encode().lower()
        self._only = only
        self._exact = re.compile(
            rb"/v2/models/%s(?:/versions/(?P<version>[A-Za-z0-9_.-]{1,100}))?(?:/(?P<what>infer|ready|config|stats))?"
            % re.escape(model.encode())
        )

    def of(self, path: bytes) -> Route:
        """Return what a path asks for, as it stands in the request: quoted, without the query."""
        if found := self._exact.fullmatch(path):
            version = found["version"]
            return Route(_KINDS.get(found["what"], "about"), version.decode() if version is not None else None)
        if path != _INDEX and self._may_name_it(path):
            return Route("unguarded")
        is_health = path in (b"/v2/health/live", b"/v2/health/ready")
        return Route("closed" if self._only and not is_health and path != b"/v2" else "plain", is_health=is_health)

    def _may_name_it(self, path: bytes) -> bool:
        for _ in range(_MOST_UNQUOTED):
            unquoted = unquote_to_bytes(path)
            if unquoted == path:
                return any(part.lower() in (self._name, *_MANAGING) for part in _BETWEEN.split(path))
            path = unquoted
        return True  # nobody quotes so often who means well
