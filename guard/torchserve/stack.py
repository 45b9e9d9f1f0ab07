"""A server and what runs beside it: review page, retrainers, and the file that tells Prometheus of them all."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from guard.errors import ServerError
from guard.observing.targets import Target, write_targets
from guard.processes.companion import Companion
from guard.processes.ports import LOOPBACK, free_port
from guard.storage.places import BundlePlace
from guard.torchserve.archives.contents import followed_bundles, is_guarded


class Server(Protocol):
    """A server that others run beside."""

    @property
    def ports(self) -> Any:
        """Its ports, a dataclass; one is called `metrics`."""

    @property
    def work_dir(self) -> Path:
        """Folder of logs and keys."""

    @property
    def inference_url(self) -> str:
        """Address for predictions."""

    @property
    def metrics_url(self) -> str:
        """Address that Prometheus scrapes."""

    @property
    def archives_served(self) -> dict[str, Path]:
        """Archive by the name under which its model is served."""

    def wait_ready(self, timeout_seconds: float) -> float:
        """Wait until its models answer, and return how many seconds that took."""

    def is_alive(self) -> bool:
        """Return whether it runs."""

    def __enter__(self) -> object:
        """Start it, and return at once."""

    def __exit__(self, *_: object) -> None:
        """Stop it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What is to run beside the server.

    Attributes
    ----------
    queue_url : str or None
        Of the queue that page and retrainers work on; goes into their environment.
    review_port : int or None
        Port of the review page; None = there is none.
    retrains : bool
        Whether every model whose archive follows a folder of bundles gets a retrainer.
    exports_metrics : bool
        Whether page and retrainers export metrics.
    first_metrics_port : int
        The first port that is tried for them; 0 = any free one.
    review_options, retrainer_options : sequence of str
        Passed on to `guard review` and `guard retrainer`.
    command : sequence of str
        What runs `guard`.
    """

    queue_url: str | None = None
    review_port: int | None = None
    retrains: bool = False
    exports_metrics: bool = True
    first_metrics_port: int = 0
    review_options: Sequence[str] = ()
    retrainer_options: Sequence[str] = ()
    command: Sequence[str] = (sys.executable, "-m", "guard.cli")


class ServingStack:
    """A server and its companions: started in order, started again when they die, stopped in reverse order.

    Use it as a context manager: entering starts the server, `start_companions` adds what runs beside once the server is
    ready, and whatever fails in between, leaving stops all that was started.

    Parameters
    ----------
    server : Server
        Not yet started.
    beside : Beside
    tell : callable
        Called with a line for a person who watches.
    """

    def __init__(self, server: Server, beside: Beside, tell: Callable[[str], None]) -> None:
        self.server = server
        self.beside = beside
        self._tell = tell
        self._running = ExitStack()
        self._companions: list[Companion] = []

    def __enter__(self) -> ServingStack:
        self._running.enter_context(self.server)
        return self

    def __exit__(self, *error: Any) -> None:
        self._running.__exit__(*error)

    @property
    def targets(self) -> Path:
        """The file of metrics endpoints, there while companions run."""
        return self.server.work_dir / "targets.json"

    def start_companions(self) -> None:
        """Start review page and retrainers, and write the file of targets; the server must be ready.

        Raises
        ------
        ServerError
            If one cannot be started.
        """
        watched = [Target("guard-server", f"{LOOPBACK}:{self.server.ports.metrics}")]
        for name, command in self._commands(watched).items():
            companion = Companion(
                name,
                [*self.beside.command, *command],
                folder=Path.cwd(),
                log=self.server.work_dir / "logs" / f"{name.replace(' ', '_')}.log",
                environment={"GUARD_QUEUE_URL": str(self.beside.queue_url)},  # everybody can see command lines
            )
            self._running.callback(companion.stop)
            companion.start()
            self._companions.append(companion)
        self._running.callback(self.targets.unlink, missing_ok=True)  # what was stopped on purpose is not down
        write_targets(self.targets, watched)

    def keep_alive(self) -> None:
        """Start again what has died beside the server, and tell of it; call it every half second or so.

        Raises
        ------
        ServerError
            If the server itself has ended.
        """
        if not self.server.is_alive():
            raise ServerError("TorchServe has ended by itself. Start it with --work-dir, and look at its logs.")
        for companion in self._companions:
            if happened := companion.keep_alive():
                self._tell(happened)

    def _commands(self, watched: list[Target]) -> dict[str, list[str]]:
        """Return the commands by the name of what they start; metrics endpoints are added to what is watched."""
        beside, bundles = self.beside, self._followed_bundles()
        taken = {*dataclasses.astuple(self.server.ports), beside.review_port or 0}

        def metrics_option(job: str) -> list[str]:
            """Give a companion a port that is its own for as long as the server runs, however often it is restarted."""
            if not beside.exports_metrics:
                return []
            taken.add(chosen := free_port(taken, beside.first_metrics_port))
            watched.append(Target(job, f"{LOOPBACK}:{chosen}"))
            return ["--metrics-port", str(chosen)]

        commands = {}
        if beside.review_port is not None:
            guarded = {name: path for name, path in self.server.archives_served.items() if is_guarded(path)}
            folders = [f"{name}={folder}" if len(guarded) > 1 else str(folder) for name, folder in bundles.items()]
            if any(word.partition("=")[0] == "--bundles" for word in beside.review_options):
                folders = []  # whoever names some names all
            archives = [f"{name}={path}" for name, path in guarded.items()]
            commands["review page"] = [
                *("review", "--port", str(beside.review_port)),
                *(word for folder in folders for word in ("--bundles", folder)),
                *(word for archive in archives for word in ("--archive", archive)),
                *("--metrics-url", self.server.metrics_url, *metrics_option("guard-review"), *beside.review_options),
            ]
        for name, folder in bundles.items() if beside.retrains else ():
            commands[f"retrainer of {name}"] = [
                *("retrainer", "--model", name, "--bundles", str(folder)),
                *(*metrics_option("guard-retrainer"), *beside.retrainer_options),
            ]
        return commands

    def _followed_bundles(self) -> dict[str, BundlePlace]:
        """Return the folder or URL of bundles that a model follows, by model."""
        found = {name: followed_bundles(path) for name, path in self.server.archives_served.items()}
        return {name: folder for name, folder in found.items() if folder is not None}
