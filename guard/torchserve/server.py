"""Start one TorchServe on loopback, wait until its models answer, stop it, and leave nothing behind."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import psutil

from guard.errors import ServerError
from guard.files import PRIVATE_FOLDER, make_private_folder, write_private
from guard.processes.companion import end_supervised, start_supervised
from guard.processes.ports import LOOPBACK, Ports, choose_ports
from guard.resources import resource_path
from guard.torchserve.archives.archive import Archive, find_archives
from guard.torchserve.client import NO_REPLY, Client
from guard.torchserve.keys import agent_option, kept_keys
from guard.torchserve.launch import format_properties, java_command, server_environment, server_settings
from guard.torchserve.server_log import ServerLogs, failed_model

#: After SIGTERM, before SIGKILL; TorchServe was seen to end within 2.5 s.
GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
#: A Unix socket's path holds at most 107 bytes on Linux, 103 on macOS; the worker's is `<temp>/.ts.sock.9000`.
_LONGEST_TEMP_PATH = 80


class TorchServeInstance:
    """One TorchServe in the foreground, as a child of this process; use it in a `with` statement.

    The server runs under a small supervisor that ends it when this process ends in any way, SIGKILL included. POSIX
    only.

    Parameters
    ----------
    model_store : Path
        Folder of the `.mar` archives.
    models : mapping of str to str, or "all"
        File of the archive for every served name; `"all"` serves every archive under its own name.
    work_dir : Path, optional
        Folder for logs, keys, temporary files and the generated settings, for this instance alone. Default is a new
        temporary folder, removed by `stop`; a folder given here is kept, without the keys.
    inference_port, management_port, metrics_port : int, optional
        0 or None picks a free port. gRPC always gets free ports, where nobody can connect if the system allows that
        (`guard.processes.ports.grpc_address`).
    workers : int
        Worker processes per model.
    batch_size : int
        Largest batch that the server puts together.
    max_batch_delay_ms : int
        How long it waits for a batch to fill, in milliseconds; a lone client pays this on every request.
    response_timeout_seconds : int
        A worker that does not answer for so long is killed and started again.
    token_authorization : bool
        Whether calls need a key, see `token`.
    key_file : Path, optional
        Where keys are kept for the next start; made if it is missing. Default: new keys at every start.
    rotate_keys : bool
        Whether `key_file` gets new keys.
    metrics_config : Path, optional
        YAML that declares the metrics; undeclared ones are dropped. Default is the `metrics.yaml` of this package,
        else the one of TorchServe.
    environment : mapping of str to str, optional
        Further variables for the server and its workers.
    java_options : sequence of str
        Further options for Java, such as `-Xmx1g`.
    quiet : bool
        False writes TorchServe's own, long logs.
    """

    def __init__(
        self,
        model_store: Path,
        models: Mapping[str, str] | Literal["all"] = "all",
        *,
        work_dir: Path | None = None,
        inference_port: int | None = None,
        management_port: int | None = None,
        metrics_port: int | None = None,
        workers: int = 1,
        batch_size: int = 1,
        max_batch_delay_ms: int = 1,
        response_timeout_seconds: int = 60,
        token_authorization: bool = True,
        key_file: Path | None = None,
        rotate_keys: bool = False,
        metrics_config: Path | None = None,
        environment: Mapping[str, str] | None = None,
        java_options: Sequence[str] = (),
        quiet: bool = True,
    ) -> None:
        self.model_store = Path(model_store).absolute()
        self.models = models
        self.workers = workers
        self.batch_size = batch_size
        self.max_batch_delay_ms = max_batch_delay_ms
        self.response_timeout_seconds = response_timeout_seconds
        self.token_authorization = token_authorization
        self.key_file = key_file if token_authorization else None
        self.metrics_config = metrics_config
        self.environment = dict(environment or {})
        self.java_options = tuple(java_options)
        self.quiet = quiet
        self._requested_ports = (inference_port or 0, management_port or 0, metrics_port or 0)
        self._requested_work_dir = work_dir
        self._rotate_keys = rotate_keys
        self._keys: dict[str, str] | None = None
        self._work_dir: Path | None = None
        self._temp_dir: Path | None = None
        self._ports: Ports | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._java_pid = 0
        self._served: dict[str, Archive] = {}
        self._seen: dict[int, psutil.Process] = {}
        self._logs: ServerLogs | None = None  # known after start
        self._owner_pid = os.getpid()

    def start(self) -> TorchServeInstance:
        """Start the server and return at once; `wait_ready` waits for its models.

        Raises
        ------
        ServerError
            If it runs already, an archive is missing, a number is out of range, a port is taken, or there is no Java
            or TorchServe.
        """
        if self._process is not None:
            raise ServerError("this TorchServe runs already. Stop it first, or make another instance.")
        self._check_numbers()
        self._served = find_archives(self.model_store, self.models)
        self._ports = choose_ports(*self._requested_ports)
        self._owner_pid = os.getpid()
        atexit.register(self.stop)
        try:
            self._make_folders()
            if self.key_file is not None:
                self._keys = kept_keys(self.key_file, rotate=self._rotate_keys)
            self._write_settings()
            self._spawn(self._command())
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, timeout_seconds: float = 120.0) -> float:
        """Wait until every worker of every model is ready and the inference port answers.

        `/ping` alone is not asked: it says Healthy seconds before the first prediction can work.

        Returns
        -------
        seconds : float
            How long this call waited.

        Raises
        ------
        ServerError
            As soon as the server or a worker has failed, with the reason from the logs (their last lines as a note),
            or after the time-out. The server is stopped then.
        """
        start = time.monotonic()
        try:
            while not self._is_ready():
                self._raise_if_failed()
                if time.monotonic() - start > timeout_seconds:
                    raise self._failure(f"TorchServe was not ready within {timeout_seconds:g} s. Give it more time.")
                time.sleep(_POLL_SECONDS)
        except ServerError:
            self.stop()
            raise
        self._record_processes()
        return time.monotonic() - start

    def stop(self) -> None:
        """Stop the server and every process it started, and remove its temporary files. Safe to call twice."""
        if os.getpid() != self._owner_pid:  # a forked child must not stop its parent's server
            return
        atexit.unregister(self.stop)
        process, self._process = self._process, None
        if process is not None:
            self._record_processes(process)
            end_supervised(process, GRACE_SECONDS)
        for child in self._seen.values():
            with contextlib.suppress(psutil.Error):
                child.kill()  # psutil checks that the pid still means the same process
        psutil.wait_procs(list(self._seen.values()), timeout=5)
        self._seen.clear()
        self._remove_folders()

    @property
    def inference_url(self) -> str:
        """Address for predictions."""
        return f"http://{LOOPBACK}:{self.ports.inference}"

    @property
    def management_url(self) -> str:
        """Address of the management API."""
        return f"http://{LOOPBACK}:{self.ports.management}"

    @property
    def metrics_url(self) -> str:
        """Address that Prometheus scrapes; it needs no key."""
        return f"http://{LOOPBACK}:{self.ports.metrics}/metrics"

    @property
    def ports(self) -> Ports:
        """The ports, known after `start`."""
        if self._ports is None:
            raise ServerError("this TorchServe has no ports yet. Call start() first.")
        return self._ports

    @property
    def work_dir(self) -> Path:
        """The folder of logs and keys, known after `start`."""
        if self._work_dir is None:
            raise ServerError("this TorchServe has no working folder. Call start() first.")
        return self._work_dir

    @property
    def java_pid(self) -> int:
        """Process id of the Java server, 0 if it does not run."""
        return self._java_pid if self._process is not None and self._process.poll() is None else 0

    @property
    def models_served(self) -> list[str]:
        """Names under which the models are served, known after `start`."""
        return sorted(self._served)

    @property
    def archives_served(self) -> dict[str, Path]:
        """Archive by the name under which its model is served, known after `start`."""
        return {name: self.model_store / archive.file for name, archive in sorted(self._served.items())}

    def is_alive(self) -> bool:
        """Return whether the server still runs."""
        return self._process is not None and self._process.poll() is None

    def token(self, kind: Literal["inference", "management"] = "inference") -> str | None:
        """Return the key for one kind of call, read anew from `key_file.json`; None if calls need none.

        TorchServe makes new keys at every start, unless there is a `key_file`, and lets them lapse after 60 minutes;
        the shipped settings (`token_expiration_min`) make that a year, because nothing renews them by itself.

        Raises
        ------
        ServerError
            If the file is not there, or not whole.
        """
        if not self.token_authorization:
            return None
        file = self.work_dir / "key_file.json"
        try:
            return str(json.loads(file.read_text())[kind]["key"])
        except (OSError, ValueError, KeyError) as error:
            raise ServerError(f"no {kind} key in {file.name}: {error}. Call wait_ready() first.") from error

    def client(self, timeout_seconds: float = 30.0) -> Client:
        """Return a new connection for predictions, with the key set."""
        return Client(self.inference_url, token=self.token("inference"), timeout_seconds=timeout_seconds)

    def worker_pids(self, model: str) -> list[int]:
        """Return the process ids of a model's workers that are ready, as the management API tells them.

        Raises
        ------
        ServerError
            If the server does not answer, or does not know the model.
        """
        status, workers = self._describe(model)
        if status != 200:
            raise ServerError(f"the workers of model {model!r} cannot be listed: the server answered {status}.")
        return [int(worker["pid"]) for worker in workers if worker["status"] == "READY"]

    def scrape_metrics(self) -> str:
        """Return what Prometheus would see.

        Raises
        ------
        ServerError
            If the server does not answer.
        """
        with Client(f"http://{LOOPBACK}:{self.ports.metrics}", timeout_seconds=10) as client:
            reply = client.request("GET", "/metrics")
        if reply.status != 200:
            raise ServerError(f"metrics cannot be read: status {reply.status} {reply.error}. Is the server running?")
        return reply.body.decode("utf-8", "replace")

    def log_tail(self, lines: int = 20) -> str:
        """Return the last lines of every log of this run, for a person."""
        return self._logs.tail(lines) if self._logs is not None else ""

    def __enter__(self) -> TorchServeInstance:
        return self.start() if self._process is None else self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # --- starting

    def _check_numbers(self) -> None:
        for name in ("workers", "batch_size", "max_batch_delay_ms", "response_timeout_seconds"):
            if (value := getattr(self, name)) < 1:
                raise ServerError(f"{name} must be >= 1, got {value}.")

    def _make_folders(self) -> None:
        if self._requested_work_dir is None:
            self._work_dir = Path(tempfile.mkdtemp(prefix="guard-ts-")).resolve()
        else:
            self._work_dir = Path(self._requested_work_dir).resolve()
            self._work_dir.parent.mkdir(parents=True, exist_ok=True)
            self._work_dir.mkdir(mode=PRIVATE_FOLDER, exist_ok=True)  # somebody's own folder keeps its rights
        make_private_folder(self._work_dir / "logs")
        (self._work_dir / "key_file.json").unlink(missing_ok=True)  # of an earlier run: its keys are void
        parent = self._work_dir if len(os.fsencode(self._work_dir)) <= _LONGEST_TEMP_PATH - 10 else None
        self._temp_dir = Path(tempfile.mkdtemp(prefix="tmp-" if parent else "guard-ts-", dir=parent)).resolve()
        if len(os.fsencode(self._temp_dir)) > _LONGEST_TEMP_PATH:
            raise ServerError(
                f"the temporary folder's path is too long for a socket: {self._temp_dir}. Shorten TMPDIR."
            )
        self._logs = ServerLogs(self._work_dir / "logs")

    def _write_settings(self) -> None:
        settings = server_settings(
            self.ports,
            model_store=self.model_store,
            archives=self._served,
            token_authorization=self.token_authorization,
            metrics_config=self.metrics_config,
            per_model={
                "minWorkers": self.workers,
                "maxWorkers": self.workers,
                "batchSize": self.batch_size,
                "maxBatchDelay": self.max_batch_delay_ms,
                "responseTimeout": self.response_timeout_seconds,
            },
        )
        write_private(self.work_dir / "config.properties", format_properties(settings))

    def _command(self) -> list[str]:
        assert self._temp_dir is not None
        options = [f"-Djava.io.tmpdir={self._temp_dir}"]
        if self.quiet:
            options.append(f"-Dlog4j.configurationFile={resource_path('log4j2.xml').absolute().as_uri()}")
        if self._keys is not None:
            options.append(agent_option(self._keys, self._temp_dir))
        arguments = ["-f", str(self.work_dir / "config.properties"), "-s", str(self.model_store), "-ncs"]
        return java_command([*options, *self.java_options], arguments)

    def _spawn(self, command: list[str]) -> None:
        assert self._temp_dir is not None
        self._process, self._java_pid = start_supervised(
            command,
            folder=self.work_dir,
            log=self.work_dir / "logs" / "console.log",
            environment=server_environment(self._temp_dir, self.work_dir / "logs", self.environment),
            grace_seconds=GRACE_SECONDS,
            remove=[self._temp_dir, *([self.work_dir] if self._requested_work_dir is None else [])],
        )

    # --- watching

    def _is_ready(self) -> bool:
        for name in self._served:
            status, workers = self._describe(name)
            if status == 404:  # models are registered before the port opens: it will not come
                assert self._logs is not None
                warning = self._logs.last_warning()
                raise self._failure(f"model {name!r} was not loaded: {warning}. Look at its archive.")
            if status != 200 or sum(worker["status"] == "READY" for worker in workers) < self.workers:
                return False
        try:
            if self._keys is not None and self.token() != self._keys["inference"]:
                return False  # not in their place yet
            with self.client(timeout_seconds=10) as client:
                return client.request("GET", "/ping").status == 200
        except ServerError:
            return False

    def _describe(self, model: str) -> tuple[int, list[dict[str, Any]]]:
        """Return the status and the workers that the management API tells of a model; status 0 if it is silent."""
        try:
            token = self.token("management")
        except ServerError:
            return NO_REPLY, []
        with Client(self.management_url, token=token, timeout_seconds=10) as client:
            reply = client.request("GET", f"/models/{model}")
        if reply.status != 200:
            return reply.status, []
        versions = json.loads(reply.body)
        return 200, [worker for version in versions for worker in version.get("workers", [])]

    def _raise_if_failed(self) -> None:
        if self._process is None or self._logs is None:
            raise ServerError("this TorchServe does not run. Call start() first.")
        self._record_processes()
        if (status := self._process.poll()) is not None:
            warning = self._logs.last_warning()
            raise self._failure(f"TorchServe ended with status {status} while it started: {warning}.")
        if (failed := failed_model(self._logs.lines("ts_log.log"))) is not None:
            model, thread = failed
            reason = self._logs.worker_exception(thread)
            reason = reason or "its worker process ended without a word, as when it is killed or memory runs out"
            raise self._failure(f"model {model!r} did not load: {reason}. Mend its handler or files, then start again.")

    def _failure(self, message: str) -> ServerError:
        error = ServerError(message)
        if tail := self.log_tail():
            error.add_note(tail)
        return error

    def _record_processes(self, process: subprocess.Popen[bytes] | None = None) -> None:
        process = process or self._process
        if process is None:
            return
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True):
                self._seen[child.pid] = child

    # --- stopping

    def _remove_folders(self) -> None:
        if self._temp_dir is not None:
            shutil.rmtree(self._temp_dir, ignore_errors=True)
            self._temp_dir = None
        if self._work_dir is not None:
            (self._work_dir / "key_file.json").unlink(missing_ok=True)
            if self._requested_work_dir is None:
                shutil.rmtree(self._work_dir, ignore_errors=True)
                self._work_dir = None
