"""Where the time of one guarded request goes: the adapter of TorchServe with a context and no server, part by part.

    python benchmarks/profile_request.py

Writes `results/profile_request.csv` (one row per batch size and part, microseconds per request) and
`docs/images/profile_request.png`.

The small CNN of `guard demo` behind the plain image handler, guarded with 2,000 images of MNIST. Batches of 1 and of 16
clean PNGs go through `GuardHandler.handle`, as a worker calls it. A part's time is its own: what it calls and is a part
itself is taken off. Each call of a part costs the profile about 0.5 microseconds, which the part before it seems to
take. Tenth percentile of all calls, which other work on the machine hardly changes; one thread. There is no queue here:
evidence is taken of flagged inputs only, and only for a queue.
"""

from __future__ import annotations

import argparse
import csv
import functools
import itertools
import json
import os
import sys
import tempfile
import time
import warnings
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib.pyplot as plt
import numpy as np
import torch
from serving_overhead import make_archives, of_demo

import guard.detection.pipeline
import guard.serving.active_guard
import guard.serving.runtime
import guard.suspect.recording
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.stacked import StackedMeans, StackedReferences
from guard.detection.fused import FusedScores
from guard.detection.fusion import CalibratedFusion
from guard.detection.pipeline import Guard
from guard.detection.stacked_spaces import StackedSpaces
from guard.resources import resource_path
from guard.serving.bookkeeping import Bookkeeping
from guard.serving.runtime import GuardRuntime
from guard.torchserve.batches import Batches

BATCHES = (1, 16)
REQUESTS = 4096  # of each batch size
WARM_UP = 200  # calls
#: Part -> whose time it is. The network and the user's handler are there without a guard, too.
PARTS = {
    "handler": "user's handler: decode, answer",
    "network": "network",
    "hooks": "hooks, pooling, copies",
    "runtime": "runtime: checks, outcomes",
    "spaces": "whitened spaces, all depths",
    "lof": "local outlier factors, all depths",
    "means": "relative distances, all depths",
    "head": "decision head",
    "scores": "residuals, views",
    "surprise": "scores to surprise",
    "combination": "combination",
    "p-values": "p-values",
    "verdicts": "verdict objects",
    "evidence": "evidence",
    "batches": "batch: which requests share a call",
    "headers": "headers, statuses of the context",
    "metrics": "metrics, log",
    "adapter": "adapter",
}
_BARE = ("handler", "network")
#: Okabe-Ito colours: what is there anyway, the decision, what is around it.
_COLOURS = {"bare": "#999999", "decision": "#0072B2", "around": "#E69F00"}
_DECISION = ("spaces", "lof", "means", "head", "scores", "surprise", "combination", "p-values", "verdicts")


class Row(TypedDict):
    """One line of the table."""

    batch: int
    part: str
    microseconds_per_request: float


class Clock:
    """Adds up the time of parts that call each other."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._parts: list[str] = []
        self._since = 0.0

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Count the time of one function or method for a part from now on."""
        original = getattr(owner, name)

        @functools.wraps(original)
        def timed(*given: Any, **named: Any) -> Any:
            self._turn()
            self._parts.append(part)
            try:
                return original(*given, **named)
            finally:
                self._turn()
                self._parts.pop()

        setattr(owner, name, timed)

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._parts:
            self.spent[self._parts[-1]] += now - self._since
        self._since = now


class Watched(NamedTuple):
    """Stands in the user's handler for its network: what a call takes beyond the forward pass is the hooks'."""

    call: Callable[..., Any]

    def __call__(self, *given: Any, **named: Any) -> Any:
        return self.call(*given, **named)


def watch_classes(clock: Clock) -> None:
    """Watch everything that is found by name when it is called, before a handler is made."""
    recording = guard.suspect.recording
    for name in ("_copy", "_activations", "logits_of"):
        clock.watch(recording, name, "hooks")
    for name in ("judge", "_judge_rows"):
        clock.watch(GuardRuntime, name, "runtime")
    clock.watch(guard.serving.runtime, "relabelled", "runtime")
    clock.watch(guard.serving.active_guard, "judged", "runtime")
    clock.watch(guard.serving.active_guard, "collect_evidence", "evidence")
    clock.watch(Guard, "decide", "verdicts")
    clock.watch(Guard, "scores", "scores")
    clock.watch(FusedScores, "score_into", "scores")
    clock.watch(StackedSpaces, "__call__", "spaces")
    clock.watch(StackedReferences, "factors", "lof")
    clock.watch(StackedMeans, "scores", "means")
    clock.watch(HeadDisagreement, "score", "head")
    clock.watch(CalibratedFusion, "surprise", "surprise")
    clock.watch(CalibratedFusion, "combine", "combination")
    clock.watch(guard.detection.pipeline, "conformal_p_values", "p-values")
    clock.watch(Batches, "answer", "batches")
    for name in ("request", "stages"):
        clock.watch(Bookkeeping, name, "metrics")


def start(archive: Path, folder: Path, clock: Clock) -> tuple[Any, Any]:
    """Return the handler of an unpacked archive, initialised and watched, and its context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # ts leaves files open
        from ts.context import Context
        from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

        metrics = MetricsCacheYamlImpl(str(resource_path("metrics.yaml")))
        metrics.initialize_cache()
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    manifest = json.loads((folder / "MAR-INF" / "MANIFEST.json").read_text())
    metrics.set_request_ids("loading")
    context = Context("guarded", str(folder), manifest, 16, None, "0.12.0", metrics=metrics, model_yaml_config={})
    sys.path.insert(0, str(folder))
    module = ModuleType("guard_handler")
    file = folder / manifest["model"]["handler"]
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)  # as a worker imports it
    for name in ("make_response", "set_answer"):
        clock.watch(module, name, "headers")
    clock.watch(module.GuardHandler, "handle", "adapter")
    handler = module.GuardHandler()
    handler.initialize(context)
    network = handler._inner.model
    clock.watch(network, "forward", "network")
    clock.watch(type(handler._inner), "handle", "handler")
    handler._inner.model = Watched(network.__call__)
    clock.watch(Watched, "__call__", "hooks")
    return handler, context


def ask(handler: Any, context: Any, bodies: list[bytes]) -> None:
    """Send one batch, as a worker does."""
    from ts.context import RequestProcessor

    context.request_ids = {index: f"id-{index}" for index in range(len(bodies))}
    context.request_processor = [RequestProcessor({}) for _ in bodies]
    context.metrics.request_ids = context.request_ids
    handler.handle([{"body": bytearray(body)} for body in bodies], context)


def measure(handler: Any, context: Any, clock: Clock, bodies: list[bytes], batch: int) -> dict[str, float]:
    """Return microseconds per request of every part."""
    images = itertools.cycle(bodies)
    found: dict[str, list[float]] = {part: [] for part in PARTS}
    for call in range(WARM_UP + REQUESTS // batch):
        clock.spent.clear()
        ask(handler, context, list(itertools.islice(images, batch)))
        if call >= WARM_UP:
            for part, values in found.items():
                values.append(1e6 * clock.spent[part] / batch)
    return {part: float(np.quantile(values, 0.1)) for part, values in found.items()}


def plot(rows: list[Row], path: Path) -> None:
    """Draw a bar per part, a panel per batch size."""
    figure, axes = plt.subplots(1, len(BATCHES), figsize=(11, 5), sharey=True, layout="constrained")
    for axis, batch in zip(axes, BATCHES, strict=True):
        values = {row["part"]: row["microseconds_per_request"] for row in rows if row["batch"] == batch}
        kinds = ["bare" if part in _BARE else "decision" if part in _DECISION else "around" for part in PARTS]
        bars = axis.barh([*PARTS.values()], [values[part] for part in PARTS], color=[_COLOURS[kind] for kind in kinds])
        axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
        own = sum(value for part, value in values.items() if part not in _BARE)
        axis.set_title(f"batch {batch}: guard {own:.0f} of {sum(values.values()):.0f} µs per request", fontsize=10)
        axis.set_xlabel("microseconds per request")
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Profile one guarded request.")
    parser.add_argument("--output-dir", type=Path, help="folder for both files; default: where the project keeps them")
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    table = (arguments.output_dir or project / "benchmarks" / "results") / "profile_request.csv"
    picture = (arguments.output_dir or project / "docs" / "images") / "profile_request.png"
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="guard-profile-") as folder:
        store = Path(folder)
        bodies = make_archives(store, of_demo(store, project / "build" / "demo"))
        clock = Clock()
        watch_classes(clock)
        handler, context = start(store / "guarded.mar", store / "guarded", clock)
        for batch in BATCHES:
            found = measure(handler, context, clock, bodies, batch)
            rows += [Row(batch=batch, part=part, microseconds_per_request=value) for part, value in found.items()]
        handler._runtime.close()
    print("microseconds per request  " + " ".join(f"{f'batch {batch}':>9}" for batch in BATCHES))
    for part, words in PARTS.items():
        values = [row["microseconds_per_request"] for row in rows if row["part"] == part]
        print(f"{words:<36}" + " ".join(f"{value:>9.1f}" for value in values))
    for path in (table, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"microseconds_per_request": f"{row['microseconds_per_request']:.2f}"})
    plot(rows, picture)
    print(f"{table.name} and {picture.name} written")


if __name__ == "__main__":
    main()
