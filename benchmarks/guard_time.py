"""Time the guard itself, from the activations of one forward pass to the verdicts: `Guard.decide` and its parts.

    python benchmarks/guard_time.py

Writes `guard_time.csv`: one row per shape, batch and part, milliseconds per call (of a whole batch): the tenth
percentile of the calls, which other work on the machine hardly changes.

`decide` is the whole, and `one_by_one` the same with every detector scored by itself, as before detectors were fused.
Data are synthetic: Gaussian classes behind a ReLU at four depths, at the shapes of MNIST (10 classes x 500 clean
images, 512 columns), GTSRB (43 x 116, 2,048 columns at the split layer, 512 at the others, which are pooled to that),
a large network (1,000 x 25, the same) and YouTube Face (1,283 x 9, 160 columns as in the Fusion paper's network). Only
speed is measured, and it does not depend on the images, nor on how long the heads are trained: one epoch. One thread.
Every call takes other queries, and the parts take turns.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypedDict
from unittest import mock

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from guard.config import GuardConfig
from guard.detection.detectors import DETECTORS, disagreement
from guard.detection.detectors.stacked import StackedMeans, StackedReferences
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import CalibratedFusion
from guard.detection.heads.decision_head import DecisionHead
from guard.detection.pipeline import Guard
from guard.detection.stacked_spaces import StackedSpaces
from guard.detection.whitening import RANK
from guard.suspect.split_points import POOL_LIMIT
from guard.types import Activations, Float32Array, Float64Array, IntArray

SEED = 20260101
SHAPES = [(10, 500, 512), (43, 116, 2048), (1000, 25, 2048), (1283, 9, 160)]  # classes, clean images of each, columns
BATCHES = [1, 16]
DEPTHS = ("early", "middle", "late")  # and the features: four in all
ROUNDS = {1: 4, 16: 40}  # by batch
QUERIES = 256
#: Aims for `decide` at batch 1, in milliseconds, by number of classes; at batch 16 a third of it per input.
AIMS = {10: 0.12, 43: 0.12, 1000: 0.25, 1283: 0.25}
PARTS = ("decide", "one_by_one", "whitening", "lof", "relative_distance", "disagreement", "fusion")


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


def synthetic(classes: int, per_class: int, n_features: int) -> Callable[[IntArray], Activations]:
    """Return what makes synthetic activations of images of given true labels, by a network that is always right."""
    rng = np.random.default_rng([SEED, classes, per_class])
    widths = {"features": n_features, **dict.fromkeys(DEPTHS, min(n_features, POOL_LIMIT))}
    centres = {name: rng.normal(size=(classes, width)) for name, width in widths.items()}

    def activations_of(labels: IntArray) -> Activations:
        logits = rng.normal(size=(len(labels), classes)).astype(np.float32)
        logits[np.arange(len(labels)), labels] += 10.0
        features, *depths = (draw(rng, centre, labels) for centre in centres.values())
        return Activations(logits, features, dict(zip(DEPTHS, depths, strict=True)))

    return activations_of


def make_guard(classes: int, per_class: int, n_features: int) -> tuple[Guard, Activations]:
    """Return a guard fitted on synthetic activations, without cross-fitting, and new activations to judge."""
    activations_of = synthetic(classes, per_class, n_features)
    labels = np.repeat(np.arange(classes), per_class)
    clean, held_out = activations_of(labels), activations_of(labels[:: max(1, len(labels) // 1000)])
    config = GuardConfig(seed=SEED)
    with mock.patch.object(disagreement, "DecisionHead", partial(DecisionHead, max_epochs=1)):
        ensemble = Ensemble.for_mode(config, DEPTHS).fit(clean, labels)
    raw = ensemble.score(held_out)
    fusion = CalibratedFusion().fit(raw, held_out.logits, labels[:: max(1, len(labels) // 1000)], ensemble.kinds)
    guard = Guard(
        config=config,
        ensemble=ensemble,
        fusion=fusion,
        clean_scores=np.sort(fusion.combine(fusion.surprise(raw), held_out.logits)),
        reference=clean,
        reference_labels=labels,
        realised_false_positive_rate=config.false_positive_rate,
    )
    return guard, activations_of(np.random.default_rng(SEED).integers(0, classes, QUERIES))


class Given(NamedTuple):
    """One batch, with what the parts before have made of it."""

    batch: Activations
    features: list[Float32Array]
    leading: Float32Array
    raw: Float64Array


class OneByOne(Ensemble):
    """Scores detectors one after the other, as before they were fused."""

    score_fused = Ensemble.score


def parts_of(guard: Guard) -> dict[str, Callable[[Given], object]]:
    """Return what is timed: the whole in both ways, and the parts of the fused one."""
    ensemble, fusion = guard.ensemble, guard.fusion
    of_kind = {kind: [member.detector for member in ensemble.members if member.kind == kind] for kind in DETECTORS}
    references = StackedReferences([lof.references_ for lof in of_kind["lof"]], RANK)
    means = StackedMeans(of_kind["relative_distance"], RANK)
    (head,) = of_kind["disagreement"]
    apart = dataclasses.replace(guard, ensemble=OneByOne(ensemble.members, ensemble.spaces))
    spaces = spaces_of(ensemble)
    return {
        "decide": lambda given: guard.decide(given.batch),
        "one_by_one": lambda given: apart.decide(given.batch),
        "whitening": lambda given: spaces(given.features),
        "lof": lambda given: references.factors(given.leading, given.batch.predicted_labels),
        "relative_distance": lambda given: means.scores(given.leading, given.batch.predicted_labels),
        "disagreement": lambda given: head.score(given.batch),
        "fusion": lambda given: fusion.combine(fusion.surprise(given.raw), given.batch.logits),
    }


def spaces_of(ensemble: Ensemble) -> StackedSpaces:
    return StackedSpaces([space for space in ensemble.spaces.values() if space is not None])


def measure(guard: Guard, queries: Activations, batch: int) -> dict[str, float]:
    """Return milliseconds per call of every part."""
    parts, spaces, given = parts_of(guard), spaces_of(guard.ensemble), []
    for start in range(0, QUERIES, batch):
        rows = queries[start : start + batch]
        features = [rows.at(depth) for depth in guard.ensemble.spaces]
        whitened = spaces(features)
        assert whitened is not None
        given.append(Given(rows, features, whitened[0], guard.ensemble.score(rows)))  # warms up, too
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS[batch]):
        for name, part in parts.items():
            for one in given:
                start_time = time.perf_counter()
                part(one)
                seconds[name].append(time.perf_counter() - start_time)
    return {name: 1e3 * float(np.quantile(values, 0.1)) for name, values in seconds.items()}


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
                aim = AIMS[classes] if batch == 1 else AIMS[classes] / 3 * batch
                line += f"   at most {aim:.2f} ms: {'holds' if found['decide'] <= aim else 'MISSED'}"
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
