"""Time the queue of flagged inputs: enqueues, and claims with decisions, by one process and by four at once.

    python benchmarks/queue_speed.py [--postgresql postgresql://user@host/database]

Writes `results/queue.csv`: backend, operation, processes, items per second (of all processes together), and the median
and 99th percentile of one call in milliseconds. `enqueue_16` is one call with 16 inputs; `claim_decide_25` is one claim
of 25 items and one `decide_many` of their answers, as a group label makes it; `flood_16` is `enqueue_16` into a full
queue.

Nothing is switched off: enqueues are durable as the queue promises, and every decision is flushed to disk, so that its
speed is mostly the disk's. `flush` is that disk: one appended page, flushed.

An input is as large as one of MNIST: a body of 400 bytes, 28 x 28 numbers, and 618 numbers of activations.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import sqlalchemy as sa

from guard.relabel.items import Answer, FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings, QueueWaits
from guard.types import Activations

#: Operation -> items in all, per backend and number of processes.
ITEMS = {
    "enqueue_1": 2000,
    "enqueue_16": 8000,
    "enqueue_64": 16000,
    "flood_16": 8000,
    "claim_decide_1": 1000,
    "claim_decide_25": 5000,
}
PROCESSES = (1, 4)
#: Nothing is to fail because it waits; the waiting shows in the 99th percentile.
WAITS = QueueWaits(enqueue_timeout_s=30, wait_s=60)
SETTINGS, FULL = QueueSettings(), QueueSettings(max_items=2000)


def make_inputs(n: int) -> list[FlaggedInput]:
    rng = np.random.default_rng(0)
    return [
        FlaggedInput(
            request_id=f"request-{number}",
            model="digits",
            bundle_digest="ab" * 32,
            suspect_label=int(rng.integers(10)),
            backup_label=5,
            backup_confidence=0.5,
            raw={"lof": 1.0, "disagreement": 2.0},
            surprise={"lof": 3.0, "disagreement": 4.0},
            combined=float(rng.random()),
            p_value=float(rng.uniform(0.001, 0.01)),
            reason="lof: far from every clean input of its class",
            content_type="image/png",
            body=rng.bytes(400),
            inputs=rng.random((1, 28, 28), dtype=np.float32),
            activations=Activations(
                rng.random((1, 10), dtype=np.float32),
                rng.random((1, 512), dtype=np.float32),
                {"early": rng.random((1, 32), dtype=np.float32), "late": rng.random((1, 64), dtype=np.float32)},
            ),
            received_at=datetime.now(UTC),
        )
        for number in range(n)
    ]


def work(url: str, operation: str, n_items: int, name: str, start: Any, results: Any) -> None:
    """Do one process's share, and send when it began and ended and how long every call took, in seconds."""
    kind, _, size = operation.rpartition("_")
    n = int(size)
    with Queue.open(url, FULL if kind == "flood" else SETTINGS, waits=WAITS) as queue:
        inputs = make_inputs(256)

        def enqueue(call: int) -> None:
            first = call * n % (len(inputs) - n + 1)
            queue.enqueue(inputs[first : first + n])

        def claim_decide(call: int) -> None:
            items = queue.claim(name, n)
            queue.decide_many(name, [Answer(item_id=item.id, is_poisoned=True, true_label=5) for item in items])

        entry: Callable[[int], None] = claim_decide if kind == "claim_decide" else enqueue
        entry(0)  # compiles the statements
        start.wait()
        began = time.time()
        took = []
        for call in range(n_items // n):
            before = time.perf_counter()
            entry(call)
            took.append(time.perf_counter() - before)
        results.put((began, time.time(), took))


def measure(url: str, operation: str, processes: int) -> dict[str, Any]:
    with Queue.open(url, SETTINGS, waits=WAITS) as queue:
        stock = 0
        if operation.startswith("claim"):
            stock = ITEMS[operation] + 100 * processes
        elif operation.startswith("flood"):
            stock = FULL.max_items
        inputs = make_inputs(100)
        for _ in range(0, stock, len(inputs)):
            queue.enqueue(inputs)
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    share = ITEMS[operation] // processes
    workers = [
        context.Process(target=work, args=(url, operation, share, f"reviewer {number}", start, results))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    done = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    seconds = max(end for _, end, _ in done) - min(began for began, _, _ in done)
    calls = np.concatenate([took for _, _, took in done])
    per_second = len(calls) * int(operation.rpartition("_")[2]) / seconds
    return row_of(operation, processes, per_second, calls)


def row_of(operation: str, processes: int, per_second: float, calls: np.ndarray) -> dict[str, Any]:
    return {
        "operation": operation,
        "processes": processes,
        "per_second": f"{per_second:.0f}",
        "p50_ms": f"{1000 * np.quantile(calls, 0.5):.2f}",
        "p99_ms": f"{1000 * np.quantile(calls, 0.99):.2f}",
    }


def measure_flush(folder: str, n: int = 300) -> dict[str, Any]:
    """How fast is the disk? Append 4 KiB and flush, n times."""
    calls = np.empty(n)
    with tempfile.TemporaryFile(dir=folder) as file:
        for call in range(n):
            file.write(bytes(4096))
            file.flush()
            before = time.perf_counter()
            os.fdatasync(file.fileno())
            calls[call] = time.perf_counter() - before
    return row_of("flush", 1, n / calls.sum(), calls)


@contextmanager
def empty_queue(postgresql: str | None, folder: str | None) -> Iterator[str]:
    """Make room for a new queue, in a file or in a schema of its own, and remove it afterwards."""
    if postgresql is None:
        with tempfile.TemporaryDirectory(dir=folder) as selected:
            yield f"sqlite:///{selected}/queue.db"
        return
    engine = sa.create_engine(sa.make_url(postgresql).set(drivername="postgresql+psycopg"))
    name = f"queue_speed_{os.getpid()}"
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema(name))
    yield f"{postgresql}?options=-csearch_path%3D{name}"
    with engine.begin() as connection:
        connection.execute(sa.schema.DropSchema(name, cascade=True))
    engine.dispose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--postgresql", help="URL of a database where schemas may be made; else only SQLite")
    parser.add_argument("--folder", help="where SQLite's files go; default is the system's temporary folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "queue.csv")
    arguments = parser.parse_args()
    rows = []

    def report(backend: str, row: dict[str, Any]) -> None:
        rows.append({"backend": backend, **row})
        print(*(f"{value:>16}" for value in rows[-1].values()), flush=True)

    report("disk", measure_flush(arguments.folder or tempfile.gettempdir()))
    for backend in ("sqlite", *(["postgresql"] if arguments.postgresql else [])):
        for operation in ITEMS:
            for processes in PROCESSES:
                with empty_queue(arguments.postgresql if backend == "postgresql" else None, arguments.folder) as url:
                    report(backend, measure(url, operation, processes))
    with arguments.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
