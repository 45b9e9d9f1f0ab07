"""Measure what watching costs: guarded requests with Prometheus, review page, retrainer and status page, and without.

    python benchmarks/observing_cost.py

Writes `observing_cost.csv` (one row per variant and round). Needs an installed Prometheus.

One TorchServe with one guarded archive (the network of `guard demo`) and a queue; flagged requests go there in both
variants. Beside it run what `guard serve --review --retrain` and `guard observe` start, and a client that asks for the
status page's numbers every five seconds, as an open browser does. `off`: all of these are suspended (SIGSTOP). `on`:
they run, and Prometheus scrapes every five seconds. One client sends without a pause; the variants take turns in blocks
of a few scrapes, first one and then the other leading. The aim: p50 with everything on at most 1.02 times that without.
Run it on a quiet machine with at least two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: threads that wait take the server's cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from serving_overhead import make_archives, send

from guard.observing.targets import Target, write_targets
from guard.processes.companion import Companion
from guard.processes.ports import LOOPBACK, free_port
from guard.processes.prometheus import PrometheusInstance
from guard.relabel.address import queue_url
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.torchserve.server import TorchServeInstance

VARIANTS = ("off", "on")
AIM = 1.02
WARM_UP_SECONDS = 20.0
SCRAPE_SECONDS = 5.0
#: What an open status page does; its token comes in the environment.
BROWSER = """
import os, sys, time, urllib.error, urllib.parse, urllib.request
opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
page, form = sys.argv[1], {"name": "ada", "token": os.environ["TOKEN"]}
while True:
    try:
        opener.open(page + "/login", urllib.parse.urlencode(form).encode(), timeout=10).read()
        break
    except OSError:
        time.sleep(0.2)
while True:
    started = time.monotonic()
    with opener.open(page + "/status/now?span=hour&model=", timeout=10) as reply:
        print(reply.status, len(reply.read()), flush=True)
    time.sleep(max(0.0, 5.0 - (time.monotonic() - started)))
"""


class Row(TypedDict):
    """One line of the table: one block."""

    variant: str
    round: int
    requests: int
    p50_ms: float
    p99_ms: float


@contextlib.contextmanager
def watchers(server: TorchServeInstance, store: Path, queue: str, token: str) -> Iterator[list[int]]:
    """Start everything that watches, and yield the process ids."""
    page, page_metrics, retrainer_metrics = (free_port() for _ in range(3))
    targets = store / "targets.json"
    addresses = {
        "guard-server": server.ports.metrics,
        "guard-review": page_metrics,
        "guard-retrainer": retrainer_metrics,
    }
    write_targets(targets, [Target(job, f"{LOOPBACK}:{port}") for job, port in addresses.items()])
    bundles = str(store / "bundles")
    guard = [sys.executable, "-m", "guard.cli"]
    url = f"http://{LOOPBACK}:{page}"
    commands = {
        "page": [
            *(*guard, "review", "--port", str(page), "--metrics-port", str(page_metrics), "--bundles", bundles),
            *("--metrics-url", server.metrics_url),
        ],
        "retrainer": [
            *(*guard, "retrainer", "--model", "guarded", "--bundles", bundles),
            *("--metrics-port", str(retrainer_metrics)),
        ],
        "browser": [sys.executable, "-c", BROWSER, url],
    }
    environment = {"GUARD_QUEUE_URL": queue, "TOKEN": token}
    with contextlib.ExitStack() as running:
        pids = []
        for name, command in commands.items():
            companion = Companion(name, command, folder=store, log=store / f"{name}.log", environment=environment)
            companion.start()
            running.callback(companion.stop)
            pids.append(companion.pid)
        prometheus = running.enter_context(PrometheusInstance(targets, scrape_seconds=SCRAPE_SECONDS))
        pids.append(prometheus.pid)
        running.callback(switch, pids, "on")  # what is suspended cannot stop in order
        deadline = time.monotonic() + 60
        while "200 " not in (store / "browser.log").read_text():
            if time.monotonic() > deadline:
                raise SystemExit(f"the status page does not answer: {(store / 'browser.log').read_text()[-500:]}")
            time.sleep(0.2)
        yield pids


def switch(pids: Sequence[int], variant: str) -> None:
    """Let the watchers run, or suspend them."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT if variant == "on" else signal.SIGSTOP)


def measure(rounds: int, seconds: float, demo: Path) -> Iterator[Row]:
    """Yield one row per block."""
    with tempfile.TemporaryDirectory(prefix="guard-observing-") as folder:
        store = Path(folder)
        bodies = make_archives(store, demo)
        (store / "plain").mkdir()
        (store / "unguarded.mar").rename(store / "plain" / "unguarded.mar")
        queue = queue_url(str(store / "queue.db"))
        with Queue.open(queue) as opened:
            token = Reviewers(opened).add("ada", "admin")
        archives = {"guarded": "guarded.mar"}
        with TorchServeInstance(store, archives, batch_size=1, environment={"GUARD_QUEUE_URL": queue}) as server:
            server.wait_ready(180)
            with watchers(server, store, queue, token) as pids:
                send(server, "guarded", bodies, 1, WARM_UP_SECONDS)
                for number in range(1, rounds + 1):
                    for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
                        switch(pids, variant)
                        time.sleep(1.0)  # what was missed meanwhile is made up for
                        replies = send(server, "guarded", bodies, 1, seconds)
                        latencies = [1e3 * reply.seconds for reply in replies]
                        p50, p99 = (float(value) for value in np.quantile(latencies, (0.5, 0.99)))
                        yield Row(variant=variant, round=number, requests=len(replies), p50_ms=p50, p99_ms=p99)


def report(rows: Sequence[Row]) -> None:
    """Print the medians of rounds, and whether the aim holds."""
    for column in ("p50_ms", "p99_ms"):
        values = {(row["variant"], row["round"]): row[column] for row in rows}  # type: ignore[literal-required]
        numbers = sorted({row["round"] for row in rows})
        found = [values["on", number] / values["off", number] for number in numbers]
        off, on = (statistics.median(values[variant, number] for number in numbers) for variant in VARIANTS)
        ratio = statistics.median(found)
        line = f"{column}: {off:.3f} -> {on:.3f}, ratio {ratio:.3f} (rounds {min(found):.3f} to {max(found):.3f})"
        print(line + (f", <= {AIM}: {'holds' if ratio <= AIM else 'MISSED'}" if column == "p50_ms" else ""))


def main() -> None:
    """Measure, write the table, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=12.0, help="of each block")
    parser.add_argument("--demo", type=Path, default=Path("build/demo"), help="output of `guard demo`")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    rows: list[Row] = []
    for row in measure(arguments.rounds, arguments.seconds, arguments.demo):
        rows.append(row)
        print(row, flush=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "observing_cost.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__))
        writer.writeheader()
        writer.writerows({**row, "p50_ms": round(row["p50_ms"], 4), "p99_ms": round(row["p99_ms"], 4)} for row in rows)
    report(rows)


if __name__ == "__main__":
    main()
