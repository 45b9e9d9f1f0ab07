"""Measure what the guard costs while serving: guarded against unguarded archive in one TorchServe, in turns.

    python benchmarks/serving_overhead.py [--zoo-model cifar10-badnets-resnet20-0]

Writes `serving_overhead.csv` (one row per setting, variant and round) and `serving_overhead.png`; with `--zoo-model`
the same of a model of the zoo, its name added to both.

A small backdoored CNN on real MNIST images, or a model of the zoo on its own, sent as PNG over loopback. Both archives
hold the same weights and the same handler; one adds the guard. Batch size belongs to a server, so each takes one
server. After a warm-up the two variants take turns in short blocks, each alone on the machine, first one and then the
other leading. Ratios are taken within a round. CPU is the worker process's own, user and system. One thread per worker.
Run it on a quiet machine.

The small network is that of `guard demo` if build/demo holds it, else it is trained here (6 s).
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: threads that wait take the server's cores
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import numpy as np
import psutil
from safetensors.torch import save_file
from socket_client import SocketClient

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.data.image_files import encode_png
from guard.demo.run import ARCHITECTURE, SPLIT
from guard.detection.pipeline import Guard
from guard.lab.attacks.recipes import DEMO_ATTACKS, train_badnet
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.torchserve.client import Reply, run_load
from guard.torchserve.server import TorchServeInstance
from guard.types import Float32Array, IntArray

SEED = 0
RECIPE = next(recipe for recipe in DEMO_ATTACKS if recipe.name == "pattern")
VARIANTS = ("unguarded", "guarded")
BATCH_SIZES = (1, 8, 16)
CLIENTS = (1, 8, 32)
MAX_BATCH_DELAY_MS = 1
WARM_UP_SECONDS = 18.0  # per server: Java compiles what is called often
IMAGES = 1000  # sent again and again, in order
LARGEST_RATE = 4000  # requests per second that no setting reaches
#: Okabe-Ito colours, distinct to colour-blind readers, and a marker each.
STYLES = {1: ("#0072B2", "o"), 8: ("#E69F00", "s"), 16: ("#009E73", "^")}


class Row(TypedDict):
    """One line of the table: one block."""

    clients: int
    batch_size: int
    variant: str
    p50_ms: float
    p99_ms: float
    requests_per_second: float
    cpu_ms_per_request: float
    round: int


#: Figure of design.md, section 7: (clients, batch size), column, whether the ratio must be at most or at least, limit.
FIGURES = [
    ((1, 1), "p50_ms", "<=", 1.08),
    ((8, 16), "requests_per_second", ">=", 0.96),
    ((32, 16), "requests_per_second", ">=", 0.96),
    ((8, 16), "cpu_ms_per_request", "<=", 1.10),
    ((32, 16), "cpu_ms_per_request", "<=", 1.10),
]
#: What is compared: column -> words for it.
MEASURES = {
    "p50_ms": "median latency",
    "requests_per_second": "throughput",
    "cpu_ms_per_request": "worker CPU per request",
}


class Material(NamedTuple):
    """A model on disk, clean images to fit a guard with, and images to send."""

    weights: Path
    architecture: str
    clean: Float32Array
    labels: IntArray
    sent: Float32Array
    class_names: tuple[str, ...]


def of_demo(store: Path, demo: Path) -> Material:
    """Return the network of `guard demo`, trained into `store` if the demo has not left it."""
    data = load_dataset("mnist", "test")
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(SEED))
    images = to_tensor_images(data.images)
    weights = demo / RECIPE.name / "weights.safetensors"
    if not weights.is_file():
        network, _, _ = train_badnet(RECIPE, images[train], data.labels[train], seed=SEED)
        weights = store / "weights.safetensors"
        save_file(network.state_dict(), weights)
    return Material(
        weights, ARCHITECTURE, images[validate], data.labels[validate], images[test[:IMAGES]], tuple(data.class_names)
    )


def of_zoo(store: Path, name: str) -> Material:
    """Return a model of the zoo as float32, guarded with at most 5,000 of its validation images."""
    zoo = Zoo(default_zoo_dir())
    card, split = zoo.card(name), load_split(zoo.card(name).data_set)
    weights = store / "weights.safetensors"
    save_file(zoo.load(name).float().state_dict(), weights)
    chosen = np.random.default_rng(SEED).permutation(len(split.validation))[:5000]
    return Material(
        weights,
        f"guard.lab.attacks.networks:{card.architecture}",
        split.validation.images[chosen],
        split.validation.labels[chosen],
        split.test.images[:IMAGES],
        tuple(str(label) for label in range(card.n_classes)),
    )


def make_archives(store: Path, material: Material) -> list[bytes]:
    """Write both archives into `store`, and return the images to send."""
    suspect = SuspectModel.load(material.weights, material.architecture)
    guard = Guard.fit(suspect, material.clean, material.labels, GuardConfig(seed=SEED))
    bundle = guard.save(store / "bundles")
    shape = tuple(material.sent.shape[1:])
    model = ServedModel(
        material.weights, None, material.architecture, shape, {"class_names": list(material.class_names)}
    )
    make_plain_archive("unguarded", model, model_store=store)
    make_guarded_archive("guarded", model, bundle, model_store=store)
    return [encode_png(image) for image in material.sent]


def send(
    server: TorchServeInstance, variant: str, bodies: Sequence[bytes], clients: int, seconds: float
) -> list[Reply]:
    """Keep `clients` connections busy for some seconds and return the replies."""
    replies = run_load(
        server.inference_url,
        variant,
        list(itertools.islice(itertools.cycle(bodies), int(LARGEST_RATE * seconds))),
        token=server.token(),
        clients=clients,
        content_type="image/png",
        limit_seconds=seconds,
        client_class=SocketClient,
    )
    sent = [reply for reply in replies if not reply.error.startswith("not sent")]
    if failed := [reply for reply in sent if reply.status != 200]:
        raise SystemExit(f"{len(failed)} of {len(sent)} requests to the {variant} archive failed: {failed[0]}.")
    return sent


def measure_block(
    server: TorchServeInstance, variant: str, bodies: Sequence[bytes], clients: int, seconds: float
) -> dict[str, float]:
    """Return the figures of one block."""
    workers = [psutil.Process(pid) for pid in server.worker_pids(variant)]
    before = sum(sum(worker.cpu_times()[:2]) for worker in workers)
    start = time.perf_counter()
    replies = send(server, variant, bodies, clients, seconds)
    wall = time.perf_counter() - start
    cpu = sum(sum(worker.cpu_times()[:2]) for worker in workers) - before
    latencies = [1e3 * reply.seconds for reply in replies]
    return {
        "p50_ms": float(np.quantile(latencies, 0.5)),
        "p99_ms": float(np.quantile(latencies, 0.99)),
        "requests_per_second": len(replies) / wall,
        "cpu_ms_per_request": 1e3 * cpu / len(replies),
    }


def measure(store: Path, bodies: Sequence[bytes], batch_size: int, rounds: int, seconds: float) -> Iterator[Row]:
    """Start a server for one batch size and yield the rows of all rounds."""
    archives = {variant: f"{variant}.mar" for variant in VARIANTS}
    with TorchServeInstance(store, archives, batch_size=batch_size, max_batch_delay_ms=MAX_BATCH_DELAY_MS) as server:
        server.wait_ready(180)
        until = time.monotonic() + WARM_UP_SECONDS
        for clients, variant in itertools.cycle(itertools.product(CLIENTS, VARIANTS)):
            if time.monotonic() > until:
                break
            send(server, variant, bodies, clients, 0.5)
        for number in range(1, rounds + 1):
            for clients in CLIENTS:
                for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
                    figures = measure_block(server, variant, bodies, clients, seconds)
                    yield Row(clients=clients, batch_size=batch_size, variant=variant, round=number, **figures)  # type: ignore[typeddict-item]


def ratios(rows: Sequence[Row], column: str) -> dict[tuple[int, int], list[float]]:
    """Return guarded / unguarded of every round, by (clients, batch size)."""
    values = {(row["clients"], row["batch_size"], row["variant"], row["round"]): row[column] for row in rows}  # type: ignore[literal-required]
    found: dict[tuple[int, int], list[float]] = {}
    for (clients, batch_size, variant, number), value in values.items():
        if variant == "guarded":
            found.setdefault((clients, batch_size), []).append(value / values[clients, batch_size, "unguarded", number])
    return found


def report(rows: Sequence[Row]) -> None:
    """Print medians, ratios (median and worst round), and which figures of the design hold."""
    print("\nunguarded / guarded, medians of rounds; then guarded / unguarded, median (worst) of rounds")
    print("clients batch       p50 ms          requests/s      worker CPU ms       p50           req/s         CPU")
    by_column = {column: ratios(rows, column) for column in MEASURES}
    for clients, batch_size in sorted(by_column["p50_ms"], key=lambda setting: setting[::-1]):
        line = f"{clients:>7} {batch_size:>5}  "
        for column, digits in zip(MEASURES, (2, 0, 3), strict=True):
            pair = [
                statistics.median(
                    row[column]  # type: ignore[literal-required]
                    for row in rows
                    if (row["clients"], row["batch_size"], row["variant"]) == (clients, batch_size, variant)
                )
                for variant in VARIANTS
            ]
            line += f"{pair[0]:>8.{digits}f} / {pair[1]:<7.{digits}f}"
        for column in MEASURES:
            values = by_column[column][clients, batch_size]
            worst = min(values) if column == "requests_per_second" else max(values)
            line += f"   {statistics.median(values):.2f} ({worst:.2f})"
        print(line)
    print("\nfigures of design.md, section 7, by the median of rounds:")
    for (clients, batch_size), column, sign, limit in FIGURES:
        value = statistics.median(by_column[column][clients, batch_size])
        holds = value <= limit if sign == "<=" else value >= limit
        print(
            f"  {clients:>2} clients, batch {batch_size:>2}: {MEASURES[column]:<24} {value:.2f}, {sign} {limit:.2f}: "
            f"{'holds' if holds else 'MISSED'}"
        )


def plot(rows: Sequence[Row], path: Path, subject: str) -> None:
    """Draw the ratios: a panel per measure, small marks for rounds, a large one for their median."""
    figure, axes = plt.subplots(1, len(MEASURES), figsize=(11, 4.2), layout="constrained")
    for axis, (column, words) in zip(axes, MEASURES.items(), strict=True):
        for offset, batch_size in enumerate(BATCH_SIZES):
            colour, marker = STYLES[batch_size]
            for place, clients in enumerate(CLIENTS):
                values = ratios(rows, column)[clients, batch_size]
                x = place + 0.24 * (offset - 1)
                axis.plot([x] * len(values), values, marker, color=colour, markersize=4, alpha=0.35, zorder=2)
                median = statistics.median(values)
                label = f"batch size {batch_size}" if place == 0 else None
                axis.plot(x, median, marker, color=colour, markersize=9, markeredgecolor="black", label=label, zorder=3)
                axis.annotate(f"{median:.2f}", (x, median), (0, 8), textcoords="offset points", ha="center", fontsize=8)
        axis.axhline(1.0, color="black", linewidth=0.8)
        limit = next(limit for _, of, _, limit in FIGURES if of == column)
        axis.axhline(limit, color="#D55E00", linestyle="--", linewidth=1.2)
        axis.annotate(
            f"aim {limit:.2f}",
            (1.0, limit),
            (-3, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            color="#D55E00",
            fontsize=8,
            ha="right",
        )
        axis.set_title(f"{words}, guarded / unguarded", fontsize=10)
        axis.set_xticks(range(len(CLIENTS)), [f"{clients} client{'s' * (clients > 1)}" for clients in CLIENTS])
        axis.set_xlim(-0.5, len(CLIENTS) - 0.5)
        axis.margins(y=0.12)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Cost of the guard behind TorchServe: {subject}; small marks are rounds", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure guarded against unguarded serving in one TorchServe.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds per setting (5)")
    parser.add_argument("--seconds", type=float, default=1.2, help="seconds per block (1.2)")
    parser.add_argument("--zoo-model", help="measure beside a model of the zoo")
    parser.add_argument("--output-dir", type=Path, help="folder for both files; default: where the project keeps them")
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    name = "serving_overhead" + (f"_{arguments.zoo_model}" if arguments.zoo_model else "")
    table = (arguments.output_dir or project / "benchmarks" / "results") / f"{name}.csv"
    picture = (arguments.output_dir or project / "docs" / "images") / f"{name}.png"
    started = time.perf_counter()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="guard-overhead-") as folder:
        store = Path(folder)
        zoo_model = arguments.zoo_model
        material = of_zoo(store, zoo_model) if zoo_model else of_demo(store, project / "build" / "demo")
        bodies = make_archives(store, material)
        print(f"seed {SEED}; archives ready after {time.perf_counter() - started:.0f} s")
        for batch_size in BATCH_SIZES:
            rows += measure(store, bodies, batch_size, arguments.rounds, arguments.seconds)
            print(f"batch size {batch_size} done after {time.perf_counter() - started:.0f} s", flush=True)
    report(rows)
    for path in (table, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.4f}" if isinstance(value, float) else value for key, value in row.items()})
    plot(rows, picture, arguments.zoo_model or "small CNN, MNIST PNGs")
    print(f"\n{table.name} and {picture.name} written; {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
