"""Start one installed Prometheus on loopback with the package's rules, wait until it answers, and stop it."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from guard.errors import ObservingError
from guard.processes.companion import end_supervised, start_supervised
from guard.processes.ports import LOOPBACK, free_port, port_is_free
from guard.resources import resource_path

#: The shipped rules; `prometheus.yml` names them as they are called in deploy/prometheus.
RULES = {"rules.yml": "prometheus_rules.yml", "alerts.yml": "prometheus_alerts.yml"}
_HOW_TO_GET = "Install it (Debian: apt install prometheus; others: https://prometheus.io/download)"
_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1


def find_prometheus(named: Path | None = None) -> Path:
    """Return the Prometheus to run: the named one, or the one on PATH.

    Raises
    ------
    ObservingError
        If there is none.
    """
    if named is not None:
        if not named.is_file() or not os.access(named, os.X_OK):
            raise ObservingError(f"{named} is no program that can be run. {_HOW_TO_GET}, and name it.")
        return named.absolute()
    found = shutil.which("prometheus")
    if found is None:
        raise ObservingError(f"there is no prometheus on PATH. {_HOW_TO_GET}, or name it with --prometheus.")
    return Path(found)


def prometheus_settings(targets: Path, scrape_seconds: float, rules: Sequence[Path] = ()) -> dict[str, Any]:
    """Return the shipped `prometheus.yml` for one machine: with full paths, and this file of targets.

    Parameters
    ----------
    targets : Path
        JSON as Prometheus' file_sd has it; followed while it runs.
    scrape_seconds : float
        Between two scrapes, and between two evaluations of the rules.
    rules : sequence of Path
        Files of rules; empty = the shipped ones.
    """
    settings: dict[str, Any] = yaml.safe_load(resource_path("prometheus.yml").read_text(encoding="utf-8"))
    interval = f"{max(1, round(1000 * scrape_seconds))}ms"
    settings["global"] |= {"scrape_interval": interval, "evaluation_interval": interval, "scrape_timeout": interval}
    chosen = rules or [resource_path(RULES[name]) for name in settings["rule_files"]]
    settings["rule_files"] = [str(file.absolute()) for file in chosen]
    (job,) = settings["scrape_configs"]
    pattern = re.sub(r"([*?\[\\])", r"\\\1", str(targets.absolute()))  # it is a name, not a pattern
    job["file_sd_configs"] = [{"files": [pattern], "refresh_interval": "5s"}]
    return settings


class PrometheusInstance:
    """One Prometheus as a child of this process, which it never outlives; use it in a `with` statement.

    Parameters
    ----------
    targets : Path
        File of targets, see `guard.observing.targets`; may change, and vanish, meanwhile.
    program : Path, optional
        Default is the one on PATH.
    port : int
        0 = any free one.
    data_dir : Path, optional
        Folder of its data, kept; default is a temporary one, removed by `stop`.
    scrape_seconds : float
        Between two scrapes.
    rules : sequence of Path
        Files of rules instead of the shipped ones.
    """

    def __init__(
        self,
        targets: Path,
        *,
        program: Path | None = None,
        port: int = 0,
        data_dir: Path | None = None,
        scrape_seconds: float = 5.0,
        rules: Sequence[Path] = (),
    ) -> None:
        self.targets = targets
        self.program = program
        self.scrape_seconds = scrape_seconds
        self.rules = tuple(rules)
        self._requested_port = port
        self._requested_dir = data_dir
        self._process: subprocess.Popen[bytes] | None = None
        self.port = self.pid = 0
        self.data_dir: Path | None = None  # known after start

    def start(self) -> PrometheusInstance:
        """Start it, and wait until it answers.

        Raises
        ------
        ObservingError
            If there is no Prometheus, its port is taken, or it ends at once, with what it said last.
        """
        program = find_prometheus(self.program)
        if self._requested_port and not port_is_free(self._requested_port):
            raise ObservingError(
                f"port {self._requested_port} is taken by another program. Give another --port, or 0 for a free one."
            )
        self.port = self._requested_port or free_port()
        folder = self.data_dir = (self._requested_dir or Path(tempfile.mkdtemp(prefix="guard-prom-"))).absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = prometheus_settings(self.targets, self.scrape_seconds, self.rules)
            (folder / "prometheus.yml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
            self._process, self.pid = start_supervised(
                [
                    str(program),
                    f"--config.file={folder / 'prometheus.yml'}",
                    f"--storage.tsdb.path={folder / 'data'}",
                    f"--web.listen-address={LOOPBACK}:{self.port}",
                    "--log.level=warn",
                ],
                folder=folder,
                log=folder / "prometheus.log",
                environment=os.environ,
                grace_seconds=_GRACE_SECONDS,
                remove=[] if self._requested_dir is not None else [folder / "data"],  # not the log, which is read below
            )
            self._wait_ready()
        except OSError as error:
            self.stop()
            raise ObservingError(f"{folder} cannot be used: {error.strerror}. Name another --data-dir.") from error
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop it, and remove its data unless a folder was named for it. Safe to call twice."""
        process, self._process = self._process, None
        if process is not None:
            end_supervised(process, _GRACE_SECONDS)
        if self.data_dir is not None and self._requested_dir is None:
            shutil.rmtree(self.data_dir, ignore_errors=True)

    def is_alive(self) -> bool:
        """Return whether it still runs."""
        return self._process is not None and self._process.poll() is None

    @property
    def url(self) -> str:
        """Where its page and its API are."""
        return f"http://{LOOPBACK}:{self.port}"

    def __enter__(self) -> PrometheusInstance:
        return self.start() if self._process is None else self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_ready(self, timeout_seconds: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not self._is_ready():
            if not self.is_alive():
                raise ObservingError(f"Prometheus has ended by itself: {self._last_words()}.")
            if time.monotonic() > deadline:
                raise ObservingError(f"Prometheus was not ready within {timeout_seconds:g} s: {self._last_words()}.")
            time.sleep(_POLL_SECONDS)

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as reply:
                return bool(reply.status == 200)
        except (OSError, http.client.HTTPException):
            return False

    def _last_words(self) -> str:
        assert self.data_dir is not None
        lines = (self.data_dir / "prometheus.log").read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "level=error" in line or "level=" not in line] or ["its log is empty"]
        message = re.search(r'(?:err|msg)="?((?:[^"\\]|\\.)*)"?$', errors[-1])
        return (message[1] if message else errors[-1]).strip().rstrip(".")
