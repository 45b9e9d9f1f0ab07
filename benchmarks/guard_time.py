"""Time the guard itself, from the activations of one forward pass to the verdicts: `Guard.decide` and its parts.

    python benchmarks/guard_time.py

Writes `guard_time.csv`: one row per shape, batch and part, median milliseconds per call (of a whole batch).

Data are synthetic: Gaussian classes behind a ReLU at four depths, at the shapes of MNIST (10 classes x 500 clean
images, 512 columns), GTSRB (43 x 116) and YouTube Face (1,283 x 9, 160 columns as in the Fusion paper's network). Only
speed is measured, and it does not depend on the images. One thread. Every call takes other queries, and the parts take
turns.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from guard.config import GuardConfig
from guard.detection.detectors.base import Reads
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import CalibratedFusion
from guard.detection.pipeline import Guard
from guard.types import Activations, Float32Array, Float64Array, IntArray

SEED = 20260101
SHAPES = [(10, 500, 512), (43, 116, 512), (1283, 9, 160)]  # classes, clean images of each, columns
BATCHES = [1, 16]
DEPTHS = ("early", "middle", "late")  # and the features: four in all
ROUNDS = {1: 4, 16: 40}  # by batch
QUERIES = 256
#: Figures of the design for `decide` at batch 1, in milliseconds, by number of classes.
LARGEST = {10: 0.5, 43: 0.5, 1283: 1.5}
KINDS = ("lof", "disagreement", "residual", "relative_distance")
PARTS = ("decide", "whitening", *KINDS, "fusion")


class Row(TypedDict):
    """One line of the table."""

    classes: int
    per_class: int
    n_features: int
    depths: int
    batch: int
    part: str
    milliseconds: float


def draw(rng: np.random.Generator, centres: Float64Array, labels: IntArray) -> Float32Array:
    features = np.maximum(centres[labels] + 0.5 * rng.normal(size=(len(labels), centres.shape[1])), 0.0)
    return features.astype(np.float32)


def make_guard(classes: int, per_class: int, n_features: int) -> tuple[Guard, Activations]:
    """Return a guard fitted on synthetic activations, without cross-fitting, and new activations to judge."""
    rng = np.random.default_rng([SEED, classes, per_class])
    centres = {name: rng.normal(size=(classes, n_features)) for name in ("features", *DEPTHS)}

    def activations_of(labels: IntArray) -> Activations:
        logits = rng.normal(size=(len(labels), classes)).astype(np.float32)
        logits[np.arange(len(labels)), labels] += 10.0
        features, *depths = (draw(rng, centre, labels) for centre in centres.values())
        return Activations(logits, features, dict(zip(DEPTHS, depths, strict=True)))

    labels = np.repeat(np.arange(classes), per_class)
    clean, held_out = activations_of(labels), activations_of(labels[:: max(1, len(labels) // 1000)])
    config = GuardConfig(seed=SEED)
    ensemble = Ensemble.for_mode(config, DEPTHS).fit(clean, labels)
    raw = ensemble.score(held_out)
    fusion = CalibratedFusion().fit(raw, held_out.logits, labels[:: max(1, len(labels) // 1000)])
    guard = Guard(
        config=config,
        ensemble=ensemble,
        fusion=fusion,
        clean_scores=np.sort(fusion.combine(fusion.surprise(raw), held_out.logits)),
        reference=clean,
        reference_labels=labels,
        realised_false_positive_rate=config.false_positive_rate,
    )
    return guard, activations_of(rng.integers(0, classes, QUERIES))


class Given(NamedTuple):
    """One batch, with what the parts before have made of it."""

    batch: Activations
    views: Mapping[Reads, Activations]
    raw: Float64Array


def parts_of(guard: Guard) -> dict[str, Callable[[Given], object]]:
    """Return what is timed: the whole, whitening, every kind of detector at all its depths, and what follows them."""
    ensemble, fusion = guard.ensemble, guard.fusion
    by_kind = {kind: [m.detector for m in ensemble.members if m.kind == kind] for kind in KINDS}

    def score(kind: str) -> Callable[[Given], object]:
        return lambda given: [detector.score(given.views[detector.reads]) for detector in by_kind[kind]]

    return {
        "decide": lambda given: guard.decide(given.batch),
        "whitening": lambda given: ensemble.views(given.batch),
        **{kind: score(kind) for kind in KINDS},
        "fusion": lambda given: fusion.combine(fusion.surprise(given.raw), given.batch.logits),
    }


def measure(guard: Guard, queries: Activations, batch: int) -> dict[str, float]:
    """Return median milliseconds per call of every part."""
    ensemble = guard.ensemble
    batches = [queries[start : start + batch] for start in range(0, QUERIES, batch)]
    given = [Given(rows, ensemble.views(rows), ensemble.score(rows)) for rows in batches]  # warms up, too
    parts = parts_of(guard)
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS[batch]):
        for name, part in parts.items():
            for one in given:
                start = time.perf_counter()
                part(one)
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time Guard.decide and its parts.")
    parser.add_argument("--output-dir", type=Path, help="folder for the table; default: where the project keeps it")
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    table = (arguments.output_dir or project / "benchmarks" / "results") / "guard_time.csv"
    torch.set_num_threads(1)
    print(f"seed {SEED}, one thread, {1 + len(DEPTHS)} depths, synthetic classes; milliseconds per call")
    print("classes per_class columns batch  " + " ".join(f"{part:>17}" for part in PARTS))
    rows: list[Row] = []
    for classes, per_class, n_features in SHAPES:
        with threadpool_limits(1):
            guard, queries = make_guard(classes, per_class, n_features)
            for batch in BATCHES:
                found = measure(guard, queries, batch)
                line = f"{classes:>7} {per_class:>9} {n_features:>7} {batch:>5}  "
                line += " ".join(f"{found[part]:>17.3f}" for part in PARTS)
                if batch == 1:
                    holds = "holds" if found["decide"] <= LARGEST[classes] else "MISSED"
                    line += f"   at most {LARGEST[classes]} ms: {holds}"
                print(line)
                rows += [
                    Row(
                        classes=classes,
                        per_class=per_class,
                        n_features=n_features,
                        depths=1 + len(DEPTHS),
                        batch=batch,
                        part=part,
                        milliseconds=milliseconds,
                    )
                    for part, milliseconds in found.items()
                ]
    table.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"milliseconds": f"{row['milliseconds']:.4f}"})


if __name__ == "__main__":
    main()
