"""What the process of a local engine is to do, handed over in a private file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Job:
    """Archives to serve, and how.

    Attributes
    ----------
    archives : mapping of str to str
        Path of the archive by the name of its model.
    folder : str
        Where archives are unpacked to; whoever started the process removes it.
    port, metrics_port : int
        On loopback.
    batch_size : int
    max_delay_s : float
        Seconds that the first request of a batch waits for others.
    grpc_port : int or None
        None: no gRPC.
    key : str or None
        What callers must send; None asks for nothing.
    """

    archives: Mapping[str, str]
    folder: str
    port: int
    metrics_port: int
    batch_size: int
    max_delay_s: float
    grpc_port: int | None
    key: str | None

    def text(self) -> str:
        """Return it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, file: Path) -> Self:
        """Return what `text` was written to a file."""
        return cls(**json.loads(file.read_text()))
