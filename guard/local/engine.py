"""An engine from outside: a process that serves guarded archives, watched by the one that started it."""

from __future__ import annotations

import http.client
import json
import shutil
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Self

from guard.errors import ServerError
from guard.files import PRIVATE_FOLDER, make_private_folder, write_private
from guard.processes.companion import Companion
from guard.processes.ports import LOOPBACK, chosen_ports
from guard.torchserve.archives.archive import Archive, find_archives
from guard.torchserve.keys import kept_keys

_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class EnginePorts:
    """The ports of one engine."""

    inference: int
    metrics: int
    #: None: no gRPC.
    grpc: int | None = None


class EngineServer(ABC):
    """A process of `python -m MODULE JOB`: started, waited for, started again if it dies, stopped.

    Use it as a context manager. It serves the open inference protocol on loopback; metrics are on a port of their own,
    which asks for no key.

    Parameters
    ----------
    model_store : Path
        Folder of the archives.
    models : mapping of str to str, or "all"
        File for every name; `"all"` takes every archive of the folder.
    work_dir : Path, optional
        Folder of logs and keys; None = a temporary one, removed at the end.
    inference_port, metrics_port : int
        0 = any free one.
    batch_size : int
        The most rows of one forward pass.
    max_batch_delay_ms : int
        How long the first request waits for others.
    token_authorization : bool
        Whether calls need a key, see `token`.
    key_file : Path, optional
        Where the key is kept for the next start. Default: a new one at every start.
    rotate_keys : bool
        Whether `key_file` gets a new one.
    environment : mapping of str to str, optional
        Further variables, such as `GUARD_QUEUE_URL`.
    tell : callable, optional
        Called with a line when the process has died, and was started again.
    """

    #: What people call it, and what is run.
    title: ClassVar[str]
    module: ClassVar[str]
    #: Until requests that have begun are answered.
    grace_seconds: ClassVar[float] = 10.0

    def __init__(
        self,
        model_store: Path,
        models: Mapping[str, str] | Literal["all"] = "all",
        *,
        work_dir: Path | None = None,
        inference_port: int = 0,
        metrics_port: int = 0,
        batch_size: int = 8,
        max_batch_delay_ms: int = 1,
        token_authorization: bool = True,
        key_file: Path | None = None,
        rotate_keys: bool = False,
        environment: Mapping[str, str] | None = None,
        tell: Callable[[str], None] = lambda _line: None,
    ) -> None:
        self.model_store = Path(model_store).absolute()
        self.models = models
        self.batch_size, self.max_batch_delay_ms = batch_size, max_batch_delay_ms
        self.token_authorization = token_authorization
        self.key_file = key_file if token_authorization else None
        self.environment = dict(environment or {})
        self._requested_ports: dict[str, int] = {"inference": inference_port, "metrics": metrics_port}
        self._requested_work_dir = work_dir
        self._rotate_keys = rotate_keys
        self._tell = tell
        self._served: dict[str, Archive] = {}
        self._work_dir: Path | None = None
        self._own: Path | None = None
        self._ports: EnginePorts | None = None
        self._process: Companion | None = None
        self._key: str | None = None

    @abstractmethod
    def _check(self) -> None:
        """Refuse what cannot be started, with ServerError."""

    @abstractmethod
    def _job(self, own: Path) -> str:
        """Return the text of the job; `own` is a private folder that is removed at the end."""

    def _variables(self, own: Path) -> Mapping[str, str]:
        """Return the environment variables of the process beside those of this one."""
        return self.environment

    def start(self) -> Self:
        """Start the process and return at once; `wait_ready` waits for its models.

        Raises
        ------
        ServerError
            If an archive is missing, a number is out of range, a port is taken, or a package is missing.
        """
        for name in ("batch_size", "max_batch_delay_ms"):
            if (value := getattr(self, name)) < 1:
                raise ServerError(f"{name} must be >= 1, got {value}.")
        self._check()
        self._served = find_archives(self.model_store, self.models)
        self._ports = EnginePorts(**chosen_ports(self._requested_ports))
        try:
            self._work_dir = self._made_folder()
            if self.token_authorization:
                kept = kept_keys(self.key_file or self._work_dir / "key_file.json", rotate=self._rotates)
                self._key = kept["inference"]
                write_private(self._work_dir / "key_file.json", json.dumps({"inference": {"key": self._key}}))
            self._own = Path(tempfile.mkdtemp(prefix="engine-", dir=self._work_dir))  # others may share the folder
            write_private(self._own / "job.json", self._job(self._own))
            self._process = Companion(
                self.title,
                [sys.executable, "-m", self.module, str(self._own / "job.json")],
                folder=Path.cwd(),
                log=self._work_dir / "logs" / "engine.log",
                environment=self._variables(self._own),
            )
            self._process.grace_seconds = self.grace_seconds
            self._process.start()
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, timeout_seconds: float = 120.0) -> float:
        """Wait until every model is ready, and return how many seconds that took.

        Raises
        ------
        ServerError
            As soon as the process has ended, with the last line of its log, or after the time-out. It is stopped then.
        """
        start = time.monotonic()
        try:
            while not self._answers():
                if self._process is None or self._process.has_ended():
                    raise ServerError(f"{self.title} did not start: {self._last_line()}")
                if time.monotonic() - start > timeout_seconds:
                    raise ServerError(f"{self.title} was not ready within {timeout_seconds:g} s.")
                time.sleep(_POLL_SECONDS)
        except ServerError:
            self.stop()
            raise
        return time.monotonic() - start

    def stop(self) -> None:
        """Stop the process, and remove its temporary files. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            process.stop()
        if self._work_dir is not None:
            if self._own is not None:
                shutil.rmtree(self._own, ignore_errors=True)
            if self._requested_work_dir is None:
                shutil.rmtree(self._work_dir, ignore_errors=True)

    def is_alive(self) -> bool:
        """Return whether the engine runs; a process that has died is started again."""
        if self._process is None:
            return False
        if happened := self._process.keep_alive():
            self._tell(happened)
        return True

    @property
    def ports(self) -> EnginePorts:
        """The ports, known after `start`."""
        if self._ports is None:
            raise ServerError("this engine has no ports yet. Call start() first.")
        return self._ports

    @property
    def work_dir(self) -> Path:
        """The folder of logs and keys, known after `start`."""
        if self._work_dir is None:
            raise ServerError("this engine has no working folder. Call start() first.")
        return self._work_dir

    @property
    def pid(self) -> int:
        """Process id of the engine, known after `start`."""
        return self._process.pid if self._process is not None else 0

    @property
    def inference_url(self) -> str:
        """Address of the open inference protocol."""
        return f"http://{LOOPBACK}:{self.ports.inference}"

    @property
    def metrics_url(self) -> str:
        """Address that Prometheus scrapes; it needs no key."""
        return f"http://{LOOPBACK}:{self.ports.metrics}/metrics"

    @property
    def models_served(self) -> list[str]:
        """Names under which the models are served, known after `start`."""
        return sorted(self._served)

    @property
    def archives_served(self) -> dict[str, Path]:
        """Archive by the name under which its model is served, known after `start`."""
        return {name: self.model_store / archive.file for name, archive in sorted(self._served.items())}

    def token(self) -> str | None:
        """Return what callers send as `Authorization: Bearer ...`; None if calls need no key."""
        return self._key

    def __enter__(self) -> Self:
        return self.start() if self._process is None else self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def _rotates(self) -> bool:
        return self._rotate_keys or self.key_file is None

    def _made_folder(self) -> Path:
        if self._requested_work_dir is None:
            folder = Path(tempfile.mkdtemp(prefix="guard-local-")).resolve()
        else:
            folder = Path(self._requested_work_dir).resolve()
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)
        make_private_folder(folder / "logs")
        return folder

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(LOOPBACK, self.ports.inference, timeout=5)
        try:
            connection.request("GET", "/v2/health/ready")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _last_line(self) -> str:
        try:
            lines = (self.work_dir / "logs" / "engine.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return next((line for line in reversed(lines) if line.strip()), "it left no word.")
