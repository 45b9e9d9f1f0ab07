"""The local engine from outside: one process that serves guarded archives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from guard.extras import require
from guard.local.engine import EngineServer
from guard.local.job import Job


class LocalServer(EngineServer):
    """A local engine.

    Parameters
    ----------
    *arguments, **settings
        As for `EngineServer`.
    grpc_port : int, optional
        Of the protocol's gRPC half, 0 = any free one; None = REST alone.
    """

    title = "the local engine"
    module = "guard.local"

    def __init__(self, *arguments: Any, grpc_port: int | None = None, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if grpc_port is not None:
            self._requested_ports["grpc"] = grpc_port

    def _check(self) -> None:
        require("v2")

    def _job(self, own: Path) -> str:
        return Job(
            {name: str(path) for name, path in self.archives_served.items()},
            str(own / "models"),
            self.ports.inference,
            self.ports.metrics,
            self.batch_size,
            self.max_batch_delay_ms / 1000,
            self.ports.grpc,
            self.token(),
        ).text()
