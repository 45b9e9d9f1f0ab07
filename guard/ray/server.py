"""The Ray engine from outside: a process that starts or joins a Ray cluster, and deploys guarded archives there."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from guard.errors import ServerError
from guard.extras import require
from guard.files import make_private_folder, write_private
from guard.local.engine import EngineServer
from guard.processes.ports import LOOPBACK, is_reachable
from guard.ray.config import serve_config
from guard.ray.job import Job
from guard.ray.settings import Settings
from guard.torchserve.archives.archive import Archive, find_archives
from guard.torchserve.archives.contents import is_guarded
from guard.torchserve.keys import kept_keys

_USUAL_PORT = 8080
#: Of a cluster that is started here: nothing is sent to Ray's makers, only who has the token may use it, and everything
#: listens on loopback (the name of that switch is Ray's). Lines of replicas are passed on as they are.
OWN_CLUSTER = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_COLOR_PREFIX": "0",
}


class RayServer(EngineServer):
    """A Ray engine.

    Parameters
    ----------
    *arguments, **settings
        As for `EngineServer`.
    replicas : int
        Processes that answer.
    max_open_models : int
        How many models a replica holds in memory.
    address : str, optional
        Of a cluster that runs, as `ray.init` takes it; None = one of its own, on loopback, stopped at the end.
    """

    title = "the Ray engine"
    module = "guard.ray"
    grace_seconds = 30.0

    def __init__(
        self,
        *arguments: Any,
        replicas: int = 1,
        address: str | None = None,
        max_open_models: int = 8,
        **settings: Any,
    ) -> None:
        super().__init__(*arguments, **settings)
        self.replicas, self.address, self.max_open_models = replicas, address, max_open_models
        self._ray_folder: Path | None = None

    def config_text(self) -> str:
        """Return a Serve config file that deploys the same; nothing is started.

        Raises
        ------
        ServerError
            If an archive is missing, or a number is out of range.
        """
        self._check()
        found = find_archives(self.model_store, self.models)
        if self.key_file is not None:
            kept_keys(self.key_file, rotate=self._rotate_keys)  # made if it is missing
        settings = self._settings(found, self.key_file and self.key_file.absolute())
        return serve_config(
            settings, replicas=self.replicas, host=LOOPBACK, port=self._requested_ports["inference"] or _USUAL_PORT
        )

    def stop(self) -> None:
        """Stop the process and its cluster, and remove its temporary files. Safe to call twice."""
        super().stop()
        if self._ray_folder is not None:
            shutil.rmtree(self._ray_folder, ignore_errors=True)

    def _check(self) -> None:
        require("ray")
        for name in ("replicas", "max_open_models"):
            if (value := getattr(self, name)) < 1:
                raise ServerError(f"{name} must be >= 1, got {value}.")

    def _job(self, own: Path) -> str:
        self._ray_folder = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))  # a socket's path has 107 bytes at most
        write_private(own / "ray_token", secrets.token_hex(32))
        for name, path in self.archives_served.items():
            if not is_guarded(path):
                raise ServerError(f"model {name}: {path.name} has no guard. Make a guarded one with `guard archive`.")
        scratch, key_file = own / "models", None
        make_private_folder(scratch)
        if self.token_authorization:
            key_file = own / "key_file.json"
            write_private(key_file, json.dumps({"inference": {"key": self.token()}}))
        return Job(
            settings=self._settings(self._served, key_file, scratch),
            replicas=self.replicas,
            port=self.ports.inference,
            metrics_port=self.ports.metrics,
            address=self.address,
            folder=str(self._ray_folder),
        ).model_dump_json()

    def _answers(self) -> bool:
        # One replica answers before all are there; metrics come last.
        return super()._answers() and is_reachable(LOOPBACK, self.ports.metrics)

    def _settings(
        self, archives: Mapping[str, Archive], key_file: Path | None, scratch: Path | None = None
    ) -> Settings:
        return Settings(
            archives={name: str(self.model_store / archive.file) for name, archive in sorted(archives.items())},
            batch_size=self.batch_size,
            max_batch_delay_ms=self.max_batch_delay_ms,
            max_open_models=self.max_open_models,
            ask_key=self.token_authorization,
            key_file=None if key_file is None else str(key_file),
            scratch=None if scratch is None else str(scratch),
        )

    def _variables(self, own: Path) -> Mapping[str, str]:
        if self.address is not None:
            return self.environment
        return {**self.environment, **OWN_CLUSTER, "RAY_AUTH_TOKEN_PATH": str(own / "ray_token")}
