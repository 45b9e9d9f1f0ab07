"""How far does the Ray engine scale? What its parts take on this machine, and a simulation of many replicas.

    python benchmarks/scale.py [--replicas 1 2 4] [--seconds 4] [--postgresql postgresql://user@host/database]
    python benchmarks/scale.py --simulate results/scale.csv [--fleet 100] [--per-day 1e9]

The first form measures, and writes `results/scale.csv` (`part`, `size`, `value`, `unit`):

- `requests`: requests a second that 8 clients get answered by so many replicas of `guard serve --engine ray`, guarded;
- `batch`: milliseconds of one guarded forward pass of so many rows, in one process and one thread;
- `enqueue`: flagged inputs a second that so many processes put into a queue on PostgreSQL, one each call;
- `poll`: looks at ACTIVE a second, of one process on this disk; `load`: seconds until a bundle is loaded;
- `report`: reports a second that are added up with those of so many replicas, without the call that brings them, and
  `scrape`: milliseconds of the sum over so many replicas.

The second form simulates a fleet from that file, and prints where its limits are. It assumes:

- requests of one row, arriving at random (Poisson), at `--peak` times the day's mean rate;
- a replica has a core of its own and takes the measured time per batch, and `--overhead-ms` more per request for HTTP;
- each request goes to the shorter of two replicas chosen at random (Serve's own rule), which takes what waits, up to 8;
- a share `--flagged` is flagged, and each is one enqueue on one PostgreSQL; every replica looks at ACTIVE four times a
  second on a file system as fast as this one, and reports its counts once a second to one process;
- nodes with `--per-node` replicas and one proxy each, whose speed is what one replica gets through Serve here, at most;
- no replica fails, and none is added or removed.
"""

from __future__ import annotations

import argparse
import csv
import heapq
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import engines
import numpy as np
import queue_speed
from serving_overhead import SEED, of_demo

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.ray.counts import Standing, Tally
from guard.ray.server import RayServer
from guard.serving.guarded_model import GuardedModel
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive

TABLE = Path(__file__).resolve().parent / "results" / "scale.csv"
COLUMNS = ("part", "size", "value", "unit")
CLIENTS = 8
BATCH_SIZE = 8
REPLICAS_REPORTING = (1, 100)
_POLLS_PER_SECOND = 4
_SIMULATED_SECONDS = 10.0

Row = tuple[str, int, float, str]


def per_second(work: Callable[[], Any], seconds: float) -> float:
    """Return how often work can be done in a second."""
    work()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        work()
        count += 1
    return count / (time.perf_counter() - started)


def measure(replicas: list[int], seconds: float, postgresql: str | None) -> Iterator[Row]:
    """Yield one row per figure."""
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch)
        material = of_demo(store, Path("build/demo"))
        suspect = SuspectModel.load(material.weights, material.architecture)
        guard = Guard.fit(suspect, material.clean, material.labels, GuardConfig(seed=SEED))
        bundle = guard.save(store / "bundles")
        served = ServedModel(material.weights, None, material.architecture, tuple(material.sent.shape[1:]), {})
        settings = {"verdict_detail": "full"}
        make_guarded_archive("guarded", served, bundle, model_store=store, settings=settings)
        for number in replicas:
            yield "requests", number, requests_per_second(store, material, number, seconds), "per s"
        module = SuspectModel.load(material.weights, material.architecture).module
        with GuardedModel(module, bundle=bundle) as model:
            for rows in (1, BATCH_SIZE):
                images = np.ascontiguousarray(material.sent[:rows])
                yield "batch", rows, 1e3 / per_second(lambda images=images: model.answer(images), seconds), "ms"
        bundles = BundleStore(store / "bundles")
        bundles.activate(bundle.name)
        yield "poll", 1, per_second(bundles.active_digest, seconds / 4), "per s"
        yield "load", 1, 1 / per_second(lambda: Guard.load(bundle, suspect), seconds / 4), "s"
        samples = model.runtime.metrics.drain()
    for number in REPLICAS_REPORTING:
        tally = Tally()
        made = Standing().report(samples)
        for replica in range(number):
            tally.report(str(replica), made)
        yield "report", number, per_second(lambda tally=tally, made=made: tally.report("0", made), seconds / 4), "per s"
        yield "scrape", number, 1e3 / per_second(tally.totals, seconds / 4), "ms"
    if postgresql is not None:
        for processes in queue_speed.PROCESSES:
            with queue_speed.empty_queue(postgresql, None) as url:
                found = queue_speed.measure(url, "enqueue_1", processes)
            yield "enqueue", processes, float(found["per_second"]), "per s"


def requests_per_second(store: Path, material: Any, replicas: int, seconds: float) -> float:
    """Serve with so many replicas, and let clients ask as fast as they are answered."""
    server = RayServer(store, {"guarded": "guarded.mar"}, replicas=replicas, **engines.SETTINGS)
    with server:
        server.wait_ready(180)
        bodies = engines.v2_bodies(material)
        side = engines.Side(
            "ray", {"guarded": server.inference_url}, None, bodies, engines.V2Client, "application/octet-stream"
        )
        engines.send(side, "guarded", CLIENTS, seconds)
        started = time.perf_counter()
        replies = engines.send(side, "guarded", CLIENTS, seconds)
        return len(replies) / (time.perf_counter() - started)


class Fleet(NamedTuple):
    """What is simulated."""

    replicas: int
    per_second: float
    first_row_s: float
    each_row_s: float
    overhead_s: float


def simulate(fleet: Fleet, seconds: float, seed: int = 0) -> tuple[float, float, float]:
    """Return median and 99th percentile of a request's milliseconds, and the share of time that replicas work.

    Requests come at random; each goes to the shorter of two queues, and a replica takes what waits, up to a batch.
    """
    rng = np.random.default_rng(seed)
    n_requests = int(fleet.per_second * seconds)
    arrivals = np.sort(rng.uniform(0, seconds, n_requests))
    pairs = rng.integers(fleet.replicas, size=(n_requests, 2))
    waiting: list[deque[float]] = [deque() for _ in range(fleet.replicas)]
    working: list[int] = [0] * fleet.replicas
    ends: list[tuple[float, int]] = []
    took: list[float] = []
    busy = 0.0

    def begin(replica: int, now: float) -> None:
        nonlocal busy
        batch = [waiting[replica].popleft() for _ in range(min(BATCH_SIZE, len(waiting[replica])))]
        working[replica] = len(batch)
        if batch:
            lasts = fleet.first_row_s + len(batch) * (fleet.each_row_s + fleet.overhead_s)
            busy += lasts
            took.extend(now + lasts - sent for sent in batch)
            heapq.heappush(ends, (now + lasts, replica))

    for sent, (one, other) in zip(arrivals.tolist(), pairs.tolist(), strict=True):
        while ends and ends[0][0] <= sent:
            now, replica = heapq.heappop(ends)
            begin(replica, now)
        chosen = min(one, other, key=lambda replica: len(waiting[replica]) + working[replica])
        waiting[chosen].append(sent)
        if not working[chosen]:
            begin(chosen, sent)
    median, late = np.quantile(took, (0.5, 0.99)) if took else (0.0, 0.0)
    return 1e3 * float(median), 1e3 * float(late), busy / seconds / fleet.replicas


def print_limits(table: Path, options: argparse.Namespace) -> None:
    """Print what a fleet needs of each part, beside what the part was measured to give."""
    with table.open(newline="") as file:
        found = {(row["part"], int(row["size"])): float(row["value"]) for row in csv.DictReader(file)}
    peak = options.per_day / 86_400 * options.peak
    each = (found["batch", BATCH_SIZE] - found["batch", 1]) / (BATCH_SIZE - 1) / 1e3
    first = max(0.0, found["batch", 1] / 1e3 - each)
    fleet = Fleet(options.fleet, peak, first, each, options.overhead_ms / 1e3)
    full_batch_s = first + BATCH_SIZE * (each + fleet.overhead_s)
    print(f"{options.per_day:.3g} requests a day, {peak:,.0f} a second at the peak; {options.fleet} replicas")
    median, late, busy = simulate(fleet, _SIMULATED_SECONDS)
    print(
        f"simulated {_SIMULATED_SECONDS:g} s of the peak: p50 {median:.1f} ms, p99 {late:.1f} ms, "
        f"replicas {min(busy, 1):.0%} busy"
    )
    if busy > 0.99:
        print("  what waits grows without end: Serve answers the surplus with status 503")
    nodes = max(1, options.fleet // options.per_node)
    parts = {
        "replicas": (peak, options.fleet * BATCH_SIZE / full_batch_s, "requests a second"),
        "proxies": (peak / nodes, found["requests", 1], "requests a second and node"),
        "bundle store": (options.fleet * _POLLS_PER_SECOND, found["poll", 1], "looks at ACTIVE a second"),
        "counts": (float(options.fleet), found["report", max(REPLICAS_REPORTING)], "reports a second"),
    }
    if ("enqueue", 4) in found:
        parts["queue"] = (peak * options.flagged, found["enqueue", 4], "enqueues a second")
    for name, (needs, gives, unit) in sorted(parts.items(), key=lambda part: -part[1][0] / part[1][1]):
        word = "LIMIT" if needs > gives else "holds"
        print(f"  {word}  {name:13} needs {needs:12,.1f} of {gives:12,.1f} {unit} ({needs / gives:.0%})")
    replicas = int(np.ceil(peak / (0.7 * BATCH_SIZE / full_batch_s)))
    print(f"replicas for this peak at 70 % of what full batches give: {replicas:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--seconds", type=float, default=4.0, help="per figure")
    parser.add_argument("--postgresql", help="URL of a database where schemas may be made; else no enqueues")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--simulate", type=Path, metavar="CSV", help="simulate from what was measured")
    parser.add_argument("--fleet", type=int, default=100, help="replicas")
    parser.add_argument("--per-day", type=float, default=1e9, help="requests")
    parser.add_argument("--peak", type=float, default=2.5, help="times the mean rate")
    parser.add_argument("--flagged", type=float, default=0.01, help="share of requests")
    parser.add_argument("--overhead-ms", type=float, default=1.0, help="of a replica's HTTP, per request")
    parser.add_argument("--per-node", type=int, default=8, help="replicas")
    options = parser.parse_args()
    if options.simulate is not None:
        print_limits(options.simulate, options)
        return
    rows = []
    for part, size, value, unit in measure(options.replicas, options.seconds, options.postgresql):
        rows.append((part, size, f"{value:.4g}", unit))
        print(*rows[-1], flush=True)
    with options.output.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
