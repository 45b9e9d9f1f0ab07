"""Heads of requests, bounded: uvicorn's quick parser would keep headers of any length in memory, from anybody."""

from __future__ import annotations

import asyncio
from typing import Any

_MOST_HEAD = 256 << 10  # bytes of request line and headers


def bounded_protocol() -> type[asyncio.Protocol] | str:
    """Return what `uvicorn.Config` takes as `http`; without httptools its other parser, which has a bound already."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"

    class BoundedProtocol(HttpToolsProtocol):
        """Ends a connection whose head does not end."""

        def __init__(self, *arguments: Any, **settings: Any) -> None:
            super().__init__(*arguments, **settings)
            self._head_bytes = 0

        def data_received(self, data: bytes) -> None:
            if self._head_bytes > _MOST_HEAD:
                self.send_400_response("The head of the request is too long.")
                return
            self._head_bytes += len(data)
            super().data_received(data)

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._head_bytes >= 0:  # else a trailer, after the body: uvicorn would take it for a header
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._head_bytes = -(1 << 62)  # a body may come, of any length
            super().on_headers_complete()

        def on_message_begin(self) -> None:
            self._head_bytes = 0
            super().on_message_begin()

    return BoundedProtocol
