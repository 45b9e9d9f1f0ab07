"""What tests of the queue share: flagged inputs, a clock that is set by hand, and a real PostgreSQL of their own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import psycopg

from guard import Activations
from guard.relabel.items import FlaggedInput, QueueItem, State
from guard.relabel.queue import Queue
from guard.relabel.schema import metadata

START = datetime(2026, 3, 1, 12, tzinfo=UTC)
N_CLASSES = 10


class Clock:
    """A time that moves only when told to."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **amount: float) -> None:
        self.now += timedelta(**amount)


def flagged(number: int = 0, **changes: Any) -> FlaggedInput:
    """Return a flagged input; its number shows in the request id, the body and the tensors."""
    rng = np.random.default_rng(number)
    values: dict[str, Any] = {
        "request_id": f"request-{number}",
        "model": "digits",
        "bundle_digest": "ab" * 32,
        "suspect_label": 3,
        "backup_label": 5,
        "backup_confidence": 0.75,
        "raw": {"lof": 1.5, "head": -2.0},
        "surprise": {"lof": 4.0, "head": 0.5},
        "combined": float(number),
        "p_value": 0.004,
        "reason": "lof: far from every clean 3",
        "content_type": "image/png",
        "body": f"body {number}".encode(),
        "inputs": rng.random((1, 4, 4), dtype=np.float32),
        "activations": Activations(
            rng.normal(size=(1, N_CLASSES)).astype(np.float32),
            rng.normal(size=(1, 6)).astype(np.float32),
            {name: rng.normal(size=(1, 3)).astype(np.float32) for name in ("late", "early")},
        ),
        "received_at": START,
    }
    return FlaggedInput(**{**values, **changes})


def postgresql_folder() -> Path | None:
    """Return the folder of PostgreSQL's programs, None if there is none."""
    on_path = shutil.which("postgres")
    if on_path:
        return Path(on_path).resolve().parent
    found = Path("/usr/lib/postgresql").glob("*/bin/postgres")
    newest = max(found, key=lambda program: int(program.parts[-3]), default=None)
    return newest.parent if newest else None


class PostgresServer:
    """A PostgreSQL cluster in a temporary folder, on a free loopback port; not run as root."""

    def __init__(self, programs: Path, *settings: str) -> None:
        self._programs = programs
        self._settings = settings
        self._account: dict[str, Any] = {}
        self.folder = Path(tempfile.mkdtemp(prefix="guard-postgresql-"))
        if os.geteuid() == 0:  # PostgreSQL refuses root
            self._account = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(self.folder, "postgres", "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self._names = count()
        self._run("initdb", "-D", str(self.folder / "data"), "-U", "guard", "-A", "trust", "--no-sync", "-E", "UTF8")

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://guard@127.0.0.1:{self.port}/{database}"

    def start(self) -> None:
        arguments = ["-D", str(self.folder / "data"), "-p", str(self.port), "-c", "listen_addresses=127.0.0.1"]
        for setting in ("unix_socket_directories=", *self._settings):
            arguments += ["-c", setting]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", *arguments], stdout=log, stderr=log, cwd=self.folder, **self._account
            )
        deadline = time.monotonic() + 20
        while True:
            try:
                psycopg.connect(self.url()).close()
                return
            except psycopg.OperationalError:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError((self.folder / "log").read_text()) from None
                time.sleep(0.05)

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """Stop it: "fast", so that connections are cut and what was acknowledged is kept."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def freeze(self, how: signal.Signals = signal.SIGSTOP) -> None:
        """Let none of its processes run any more, until SIGCONT; connections stay open."""
        assert self._process is not None
        for process in (family := psutil.Process(self._process.pid), *family.children(recursive=True)):
            process.send_signal(how)

    def remove(self) -> None:
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def create_database(self) -> str:
        """Make an empty database and return its URL."""
        name = f"queue_{next(self._names)}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [self._programs / program, *arguments], capture_output=True, text=True, cwd=self.folder, **self._account
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stderr}")


def settled_items(queue: Queue, model: str, *, untrained_only: bool = False) -> list[QueueItem]:
    """Return the items of a model whose answer counts, as the retrainer reads them."""
    ids = [entry.id for entry in queue.settled(model) if not untrained_only or entry.state is State.DECIDED]
    return [item for part in queue.portions(ids, size=2) for item in part]


def empty_postgresql_queue(url: str) -> None:
    """Remove every row, as only the owner of the database can: with the triggers and references switched off."""
    with psycopg.connect(url) as connection:
        connection.execute("SET LOCAL session_replication_role = replica")
        for table in metadata.tables:
            if table != "ledger":
                connection.execute(f"DELETE FROM {table}")
        connection.execute(
            "UPDATE ledger SET last_item_id = 0, held_items = 0, held_bytes = 0, key_check = NULL, settings = NULL"
        )
