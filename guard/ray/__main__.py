"""The process of a Ray engine: `python -m guard.ray JOB.json`; `guard serve --engine ray` starts it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import ray
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from guard.errors import GuardError, ServerError
from guard.local.totals import families
from guard.observing.exporting import exporting
from guard.processes.ports import LOOPBACK
from guard.ray.app import application
from guard.ray.job import Job
from guard.ray.settings import APPLICATION, COUNTS, GUARDED

#: Memory that Ray shares between processes, of which requests take little.
_OBJECT_STORE_BYTES = 100 << 20
_SCRAPE_TIMEOUT_S = 5.0
_POLL_S = 1.0


class _Sums(Collector):
    """The counts of all replicas, asked for at every scrape."""

    def __init__(self, counts: DeploymentHandle[Any]) -> None:
        self._counts = counts

    def describe(self) -> Iterator[Family]:
        """Yield nothing: names are known with the values."""
        yield from ()

    def collect(self) -> Iterator[Family]:
        """Yield every metric of `guard.telemetry`."""
        yield from families(self._counts.totals.remote().result(timeout_s=_SCRAPE_TIMEOUT_S))


class _Stopping:
    """What SIGTERM and Ctrl-C do: end the start, or, once that is over, what waits for `asked`."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.is_ready = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)

    def _stop(self, number: int, _frame: object) -> None:
        is_first = not self.asked.is_set()
        self.asked.set()
        if is_first and not self.is_ready:
            raise SystemExit(128 + number)


def main(job: Job) -> int:
    """Serve until SIGTERM; return the exit status."""
    try:
        _run(job)
    except GuardError as error:
        print(error, file=sys.stderr)  # last: Ray has a word to say when it is stopped
        return 1
    return 0


def _run(job: Job) -> None:
    with ExitStack() as opened:
        opened.enter_context(_cluster(job))
        stopping = _Stopping()  # after Ray, which has a handler of its own
        opened.enter_context(_serve(job))
        counts = opened.enter_context(_deployed(job))
        opened.enter_context(exporting(job.metrics_port, _Sums(counts)))
        stopping.is_ready = True
        own = psutil.Process().children()  # Ray's own processes, where the cluster is ours
        started = psutil.Process().children(recursive=True)
        while not stopping.asked.wait(_POLL_S):
            if died := [process for process in own if not process.is_running() or process.status() == "zombie"]:
                print(f"{len(died)} of Ray's processes have ended by themselves.", file=sys.stderr, flush=True)
                for process in started:
                    with suppress(psutil.Error):
                        process.kill()  # replicas outlive their raylet for some seconds, and would answer
                os._exit(1)  # Ray would wait a minute for what is gone
            if own:
                started = psutil.Process().children(recursive=True)


@contextmanager
def _cluster(job: Job) -> Iterator[None]:
    """Start a cluster of one node on loopback, or join the one that is named."""
    if job.address is not None:
        ray.init(address=job.address, namespace="serve", log_to_driver=False)
    else:
        ray.init(
            address="local",
            num_cpus=job.replicas + 1,
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            _temp_dir=job.folder,
            _node_ip_address=LOOPBACK,
        )
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _serve(job: Job) -> Iterator[None]:
    """Start Serve, unless the cluster has it; stop it if it was started here and nobody else's application runs."""
    runs = bool(serve.status().proxies)
    if not runs:
        serve.start(
            proxy_location="EveryNode",
            http_options=HTTPOptions(host=LOOPBACK, port=job.port),
            logging_config=_quiet(),
        )
    try:
        yield
    finally:
        if not runs and not {*serve.status().applications} - {APPLICATION}:
            serve.shutdown()  # type: ignore[no-untyped-call]


@contextmanager
def _deployed(job: Job) -> Iterator[DeploymentHandle[Any]]:
    """Deploy the application, and yield the handle of its counts.

    Raises
    ------
    ServerError
        If the cluster has one of that name, or the replicas do not start.
    """
    if APPLICATION in serve.status().applications:
        raise ServerError(f"the cluster has an application {APPLICATION!r} already. Delete it: serve shutdown.")
    try:
        try:
            serve.run(
                application(job.settings, num_replicas=job.replicas),
                name=APPLICATION,
                route_prefix="/",
                logging_config=_quiet(),
            )
        except (RuntimeError, TimeoutError) as error:
            raise ServerError(_why(str(error))) from error
        yield serve.get_deployment_handle(COUNTS, APPLICATION)
    finally:
        serve.delete(APPLICATION)


def _why(message: str) -> str:
    """Return the line of a replica's traceback that says what is wrong, else the message's last."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("guard.errors.")]
    return ours[-1].partition(": ")[2] if ours else f"{GUARDED}: {(lines or ['Serve gave no reason'])[-1]}"


def _quiet() -> LoggingConfig:
    return LoggingConfig(log_level="WARNING", enable_access_log=False)


if __name__ == "__main__":
    sys.exit(main(Job.model_validate_json(Path(sys.argv[1]).read_text())))
