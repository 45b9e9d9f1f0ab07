"""A process that serves until it is told to stop, and answers what it has begun."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from guard.v2.heads import bounded_protocol

_GRACE_S = 3


class _Server(uvicorn.Server):
    """Leaves signals alone: uvicorn ends the process by the signal that stopped it, and nothing after it is closed."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Stopping:
    """What SIGTERM and Ctrl-C do: end the start, or let the server answer what it has begun, and end."""

    def __init__(self) -> None:
        self._server: uvicorn.Server | None = None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def serve(self, app: ASGIApp, listening: socket.socket, **settings: Any) -> None:
        """Serve an application on a socket that listens, until a signal.

        Parameters
        ----------
        app : ASGI application
        listening : socket
        **settings
            Of `uvicorn.Config`, beside those that all servers here have.
        """
        usual: dict[str, Any] = {"log_level": "warning", "access_log": False, "server_header": False, "lifespan": "off"}
        usual |= {"timeout_graceful_shutdown": _GRACE_S, "http": bounded_protocol()}
        config = uvicorn.Config(app, **{**usual, **settings})
        self._server = _Server(config)
        self._server.run(sockets=[listening])

    def _stop(self, number: int, _frame: object) -> None:
        if self._server is None:
            raise SystemExit(128 + number)
        self._server.should_exit = True
