"""Measure what it costs to know whose row is whose, against the former rule, which counted rows.

    python benchmarks/row_fidelity.py

Writes `results/row_fidelity.csv`: one line per case, clients and batch size, ratios now / former, medians of rounds.

The package's image handler with a small CNN on real MNIST images, as in `serving_overhead.py`. Cases:

- `png, declared`: the image handler as it is. Held to 1 %.
- `png, probed`: the same handler as if it declared nothing and had passed the probe: bodies are looked into.
- `png, one by one` and `json, one by one`: a handler that is not trusted, or bodies that may hold several inputs.

`clients` 0 is the handler driven in this process with TorchServe's own Context: every batch by both rules, which comes
first drawn by lot; p50 is that of a batch, throughput is 1 / total time, CPU the process's. The others are one
TorchServe per batch size with an archive per case, which take turns in short blocks after a warm-up; there CPU is the
worker's. The former rule is an archive whose adapter runs every batch together, and accepts it by the count of rows.
Only rounds in one run are compared. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from serving_overhead import SEED, Material, measure_block, of_demo, send
from ts.context import Context, RequestProcessor
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from guard.config import GuardConfig
from guard.data.image_files import encode_png
from guard.detection.pipeline import Guard
from guard.resources import resource_path
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.torchserve.batches import Batches
from guard.torchserve.server import TorchServeInstance

CASES = ("png, declared", "png, probed", "png, one by one", "json, one by one")
SETTINGS = ((1, 1), (8, 8), (32, 16))  # clients, batch size of a server
IN_PROCESS = (1, 8, 16)
BLOCK_SECONDS = 1.0
WARM_UP_SECONDS = 18.0
LIMIT = 0.01
#: What the former rule did, as lines at the end of an adapter.
FORMER = """
from guard.torchserve.batches import Batches

Batches._sharing = lambda self, data, guard: list(range(len(data)))
Batches.drawn = lambda self, n_requests: None
"""
PROBED = """
from guard.serving import batches

batches.declares_one_row = lambda handler: False
"""


class Row(NamedTuple):
    """One line of the table."""

    case: str
    clients: int
    batch_size: int
    p50_ratio: float
    throughput_ratio: float
    cpu_ratio: float
    rounds: int


class Ratios(NamedTuple):
    """Of one round: now / former."""

    p50: float
    throughput: float
    cpu: float


class FormerRule(Batches):
    """Accepts a batch by its count of rows, whatever is in it."""

    def _sharing(self, data: Sequence[Any], guard: Guard) -> list[int]:
        return list(range(len(data)))

    def drawn(self, n_requests: int) -> int | None:
        return None


def make_archives(store: Path, material: Material) -> None:
    """Write an archive per rule: `former`, `declared`, `probed` and `never`."""
    suspect = SuspectModel.load(material.weights, material.architecture)
    bundle = Guard.fit(suspect, material.clean, material.labels, GuardConfig(seed=SEED)).save(store / "bundles")
    model = ServedModel(material.weights, None, material.architecture, tuple(material.sent.shape[1:]))
    for name, settings in (("declared", {}), ("never", {"batching": "never"})):
        make_guarded_archive(name, model, bundle, model_store=store, settings=settings)
    for name, more in (("former", FORMER), ("probed", PROBED)):
        with zipfile.ZipFile(store / "declared.mar") as whole, zipfile.ZipFile(store / f"{name}.mar", "w") as changed:
            for member in whole.namelist():
                data = whole.read(member)
                changed.writestr(member, data + more.encode() * (member == "guard_handler.py"))


def bodies_of(case: str, material: Material) -> list[bytes]:
    """Return the bodies that are sent."""
    if case.startswith("png"):
        return [encode_png(image) for image in material.sent]
    return [json.dumps(np.rint(255 * image).astype(int).tolist()).encode() for image in material.sent]


# --- in this process


def started(store: Path, folder: Path) -> tuple[Any, Context]:
    """Return the handler of the archive `declared` as a worker has it, and its context."""
    with zipfile.ZipFile(store / "declared.mar") as packed:
        packed.extractall(folder)
    metrics = MetricsCacheYamlImpl(str(resource_path("metrics.yaml")))
    metrics.initialize_cache()
    metrics.set_request_ids("loading")
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    context = Context("m", str(folder), manifest, 16, None, "0.12.0", metrics=metrics, model_yaml_config={})
    spec = importlib.util.spec_from_file_location("adapter_in_process", folder / "guard_handler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(folder))
    spec.loader.exec_module(module)
    module._flush_forever = lambda *_: None  # type: ignore[attr-defined]
    handler = module.GuardHandler()
    handler.initialize(context)
    return handler, context


def in_process(handler: Any, context: Context, case: str, bodies: Sequence[bytes], size: int, batches: int) -> Ratios:
    """Drive the handler with every batch twice, by both rules."""
    now, former = Batches(handler._inner, handler._runtime), FormerRule(handler._inner, handler._runtime)
    if case.endswith("probed"):
        now._is_declared, now._why_one_by_one, now._answers_compare = False, "", True
    elif case.endswith("one by one"):
        now._is_declared, now._why_one_by_one = False, "it is not trusted"
    parsed = [json.loads(body) if case.startswith("json") else bytearray(body) for body in bodies]
    around = itertools.cycle(parsed)
    walls: dict[bool, list[float]] = {True: [], False: []}
    cpus: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(batches):
        items = [{"body": next(around)} for _ in range(size)]
        for is_now in random.sample((True, False), 2):
            handler._batches = now if is_now else former
            context.request_ids = {index: str(index) for index in range(size)}
            context.request_processor = [RequestProcessor({}) for _ in range(size)]
            wall, cpu = time.perf_counter(), time.process_time()
            handler.handle(list(items), context)
            walls[is_now].append(time.perf_counter() - wall)
            cpus[is_now].append(time.process_time() - cpu)
    return Ratios(
        statistics.median(walls[True]) / statistics.median(walls[False]),
        sum(walls[False]) / sum(walls[True]),
        sum(cpus[True]) / sum(cpus[False]),
    )


# --- in a server


def in_server(
    store: Path, bodies: dict[str, list[bytes]], clients: int, size: int, rounds: int
) -> Iterator[tuple[str, Ratios]]:
    """Serve all archives at once, and yield the ratios of every case and round."""
    archive_of = {case: case.split(", ")[1].replace("one by one", "never") for case in CASES}
    names = ["former", *dict.fromkeys(archive_of.values())]
    with TorchServeInstance(
        store, {name: f"{name}.mar" for name in names}, batch_size=size, max_batch_delay_ms=1
    ) as server:
        server.wait_ready(240)
        until = time.monotonic() + WARM_UP_SECONDS
        for name in itertools.cycle(names):
            send(server, name, bodies[CASES[0]], clients, 0.5)
            if time.monotonic() > until:
                break
        for number, case in itertools.product(range(rounds), CASES):
            pair = ("former", archive_of[case])
            got = {
                name: measure_block(server, name, bodies[case], clients, BLOCK_SECONDS)
                for name in (pair if number % 2 else pair[::-1])
            }
            former, now = (got[name] for name in pair)
            yield (
                case,
                Ratios(
                    now["p50_ms"] / former["p50_ms"],
                    now["requests_per_second"] / former["requests_per_second"],
                    now["cpu_ms_per_request"] / former["cpu_ms_per_request"],
                ),
            )


def summed_up(case: str, clients: int, size: int, ratios: Sequence[Ratios]) -> Row:
    """Return the medians of the rounds."""
    middle: Callable[[Sequence[float]], float] = statistics.median
    row = Row(case, clients, size, *(round(middle(column), 4) for column in zip(*ratios, strict=True)), len(ratios))
    print(
        f"{case:<18} clients {clients:>2} batch {size:>2}: p50 {row.p50_ratio:.3f}  throughput "
        f"{row.throughput_ratio:.3f}  CPU {row.cpu_ratio:.3f}",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what it costs to know whose row is whose.")
    parser.add_argument("--rounds", type=int, default=15, help="rounds per setting (15)")
    parser.add_argument(
        "--requests", type=int, default=200, help="requests of a round in this process, at least 20 batches (200)"
    )
    parser.add_argument("--no-server", action="store_true", help="measure in this process only")
    parser.add_argument("--output-dir", type=Path, help="folder of the table; default: where the project keeps it")
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="guard-rows-") as scratch:
        store = Path(scratch) / "store"
        store.mkdir()
        material = of_demo(store, project / "build" / "demo")
        make_archives(store, material)
        bodies = {case: bodies_of(case, material) for case in CASES}
        handler, context = started(store, Path(scratch) / "worker")
        in_process(handler, context, CASES[0], bodies[CASES[0]], 8, 200)  # warm-up
        for size, case in itertools.product(IN_PROCESS, CASES):
            count = max(20, arguments.requests // size)
            ratios = [in_process(handler, context, case, bodies[case], size, count) for _ in range(arguments.rounds)]
            rows.append(summed_up(case, 0, size, ratios))
        handler._runtime.close()
        for clients, size in () if arguments.no_server else SETTINGS:
            found: dict[str, list[Ratios]] = {case: [] for case in CASES}
            for case, ratio in in_server(store, bodies, clients, size, arguments.rounds):
                found[case].append(ratio)
            rows += [summed_up(case, clients, size, ratios) for case, ratios in found.items()]
    table = (arguments.output_dir or project / "benchmarks" / "results") / "row_fidelity.csv"
    with table.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(rows)
    held = [row for row in rows if row.case == CASES[0]]
    missed = [row for row in held if row.p50_ratio > 1 + LIMIT or row.throughput_ratio < 1 - LIMIT]
    print(f"{table}\nwithin 1 % for the image handler: {len(held) - len(missed)} of {len(held)} settings")


if __name__ == "__main__":
    main()
