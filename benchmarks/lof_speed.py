"""Time per-class LOF: a loop over scikit-learn estimators against `guard.detection.detectors.lof.PerClassLof`.

    python benchmarks/lof_speed.py

Writes `lof_speed.csv` (tidy: one row per shape, batch and implementation) and `lof_speed.png`.

Data are synthetic: Gaussian classes behind a ReLU in 128 columns, at the shapes of MNIST (10 classes x 500 clean
images), GTSRB (43 x 116), ImageNet (1,000 x 25) and YouTube Face (1,283 x 9). Only speed and equality are measured, and
neither depends on the images. One thread everywhere: the loop gains nothing from a second. Features are float32;
scikit-learn gets them as float64, to work in that precision as we do. Times run from the features to the factors; the
suspect model is no part of them. Every repetition takes other queries, and within one the implementations take turns.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TypedDict

import matplotlib.pyplot as plt
import numpy as np
from sklearn.neighbors import LocalOutlierFactor
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from guard.detection.detectors.lof import PerClassLof
from guard.detection.detectors.norms import norm_summary
from guard.types import Activations, Float32Array, Float64Array, IntArray

SEED = 20260101
SHAPES = [(10, 500), (43, 116), (1000, 25), (1283, 9)]  # (classes, clean images of each)
BATCHES = [1, 32]
COLUMNS = 128
NEIGHBOURS = 20
NORMS = ("l0", "l1", "l2")
#: Name of what is compared, and the setting `summary` that stands for it.
VIEWS: dict[str, tuple[str, ...] | None] = {"norms": NORMS, "full128": None}
#: Rounds of every implementation in turn, by number of classes; the loop takes a second per call at a thousand.
COMMON_ROUNDS = {10: 30, 43: 10, 1000: 4, 1283: 4}
GUARD_ROUNDS = 20  # further rounds of ours alone, after each common round
#: Okabe-Ito colours, distinct to colour-blind readers.
COLOURS = {"sklearn_loop": "#000000", "guard_all": "#0072B2", "guard_predicted": "#E69F00"}
LABELS = {
    "sklearn_loop": "loop over scikit-learn, every class",
    "guard_all": "guard, every class",
    "guard_predicted": "guard, predicted class only",
}


class Row(TypedDict):
    """One line of the table."""

    classes: int
    per_class: int
    batch: int
    implementation: str
    milliseconds: float
    max_abs_difference: float


@dataclass(frozen=True)
class Case:
    """One shape: detectors of both kinds fitted on the same clean vectors, and where queries come from."""

    rng: np.random.Generator
    centres: Float64Array
    per_class: int
    estimators: dict[str, list[LocalOutlierFactor]]
    detectors: dict[str, PerClassLof]

    def queries(self, n: int) -> Activations:
        labels = self.rng.integers(0, len(self.centres), n)
        return Activations(
            np.eye(len(self.centres), dtype=np.float32)[labels], draw(self.rng, self.centres, labels, spread=0.7)
        )


def draw(rng: np.random.Generator, centres: Float64Array, labels: IntArray, spread: float) -> Float32Array:
    features = np.maximum(centres[labels] + spread * rng.normal(size=(len(labels), COLUMNS)), 0.0)
    return features.astype(np.float32)


def vectors_of(view: str, features: Float32Array) -> Float64Array:
    summary = VIEWS[view]
    return features.astype(np.float64) if summary is None else norm_summary(features, summary)


def make_case(classes: int, per_class: int) -> Case:
    rng = np.random.default_rng([SEED, classes, per_class])
    centres = rng.normal(size=(classes, COLUMNS))
    labels = np.repeat(np.arange(classes), per_class)
    features = draw(rng, centres, labels, spread=0.5)
    clean = Activations(np.eye(classes, dtype=np.float32)[labels], features)
    estimators = {}
    for view in VIEWS:
        by_class = vectors_of(view, features).reshape(classes, per_class, -1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "n_neighbors is greater than the total number of samples"
            estimators[view] = [LocalOutlierFactor(n_neighbors=NEIGHBOURS, novelty=True).fit(x) for x in by_class]
    detectors = {
        view: PerClassLof(n_neighbors=NEIGHBOURS, summary=summary).fit(clean, labels) for view, summary in VIEWS.items()
    }
    return Case(rng, centres, per_class, estimators, detectors)


def implementations(case: Case, view: str) -> dict[str, Callable[[Activations], Float64Array]]:
    """Return the three ways to score: the last one gives (n,), the others (n, classes)."""
    estimators, detector = case.estimators[view], case.detectors[view]

    def sklearn_loop(queries: Activations) -> Float64Array:
        vectors = vectors_of(view, queries.features)
        return np.column_stack([-estimator.score_samples(vectors) for estimator in estimators])

    return {
        f"sklearn_loop_{view}": sklearn_loop,
        f"guard_all_{view}": detector.score_all,
        f"guard_predicted_{view}": detector.score,
    }


def measure(case: Case, batch: int) -> list[Row]:
    """Return one row of the table per implementation: median milliseconds and largest difference to scikit-learn."""
    ways = {name: way for view in VIEWS for name, way in implementations(case, view).items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    difference = dict.fromkeys(ways, 0.0)

    def timed(name: str, queries: Activations) -> Float64Array:
        start = time.perf_counter()
        factors = ways[name](queries)
        seconds[name].append(time.perf_counter() - start)
        return factors

    for name in ways:  # warm-up
        ways[name](case.queries(batch))
    for _ in range(COMMON_ROUNDS[len(case.centres)]):
        queries = case.queries(batch)
        for name in ways:
            factors = timed(name, queries)
            if name.startswith("sklearn"):
                truth = factors
            else:
                expected = truth[np.arange(batch), queries.predicted_labels] if "predicted" in name else truth
                difference[name] = max(difference[name], float(np.abs(factors - expected).max()))
        for _ in range(GUARD_ROUNDS):
            queries = case.queries(batch)
            for name in ways:
                if name.startswith("guard"):
                    timed(name, queries)
    return [
        Row(
            classes=len(case.centres),
            per_class=case.per_class,
            batch=batch,
            implementation=name,
            milliseconds=1e3 * float(np.median(seconds[name])),
            max_abs_difference=difference[name],
        )
        for name in ways
    ]


def report(rows: list[Row]) -> None:
    loop = rows[0]
    for row in rows:
        if row["implementation"].startswith("sklearn"):
            loop = row
        ratio = loop["milliseconds"] / row["milliseconds"]
        print(
            f"{row['classes']:>7} {row['per_class']:>9} {row['batch']:>5}  {row['implementation']:<24}"
            f" {row['milliseconds']:>12.4f} {ratio:>9.0f} {row['max_abs_difference']:>10.1e}"
        )


def short(ratio: float) -> str:
    return f"{ratio:.0f}×" if ratio < 1000 else f"{ratio / 1000:.1f}k×"


def plot(rows: list[Row], path: Path) -> None:
    """Draw milliseconds per call by shape: one panel per view and batch, a log scale, ratios over our bars."""
    figure, axes = plt.subplots(
        len(BATCHES), len(VIEWS), figsize=(11, 7), sharey="row", sharex=True, layout="constrained"
    )
    places = np.arange(len(SHAPES))
    for axis, (batch, view) in zip(axes.flat, product(BATCHES, VIEWS), strict=True):
        heights = {
            kind: [
                row["milliseconds"]
                for row in rows
                if row["batch"] == batch and row["implementation"] == f"{kind}_{view}"
            ]
            for kind in COLOURS
        }
        for offset, (kind, colour) in enumerate(COLOURS.items()):
            bars = axis.bar(places + 0.28 * (offset - 1), heights[kind], 0.26, color=colour, label=LABELS[kind])
            if kind != "sklearn_loop":
                ratios = [short(a / b) for a, b in zip(heights["sklearn_loop"], heights[kind], strict=True)]
                axis.bar_label(bars, ratios, fontsize=7.5, padding=2)
        axis.set_yscale("log")
        axis.set_title(f"{'three norms' if view == 'norms' else f'{COLUMNS} features'}, batch {batch}")
        axis.set_xticks(places, [f"{classes:,} × {per_class}" for classes, per_class in SHAPES])
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("milliseconds per call")
    for axis in axes[-1]:
        axis.set_xlabel("classes × clean images of each")
    figure.suptitle("Time of one call, one thread; on our bars, how many times faster than the loop", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time per-class LOF against a loop over scikit-learn.")
    parser.add_argument("--output-dir", type=Path, help="folder for both files; default: where the project keeps them")
    arguments = parser.parse_args()
    project = Path(__file__).resolve().parent.parent
    table = (arguments.output_dir or project / "benchmarks" / "results") / "lof_speed.csv"
    picture = (arguments.output_dir or project / "docs" / "images") / "lof_speed.png"
    print(f"seed {SEED}, one thread, k = {NEIGHBOURS}, norms {', '.join(NORMS)}, {COLUMNS} columns, synthetic classes")
    print("classes per_class batch  implementation            ms per call     ratio   max diff")
    rows: list[Row] = []
    for classes, per_class in SHAPES:
        with threadpool_limits(1):
            case = make_case(classes, per_class)
            for batch in BATCHES:
                found = measure(case, batch)
                report(found)
                rows += found
    for path in (table, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(Row.__annotations__), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                row
                | {
                    "milliseconds": f"{row['milliseconds']:.4f}",
                    "max_abs_difference": f"{row['max_abs_difference']:.2e}",
                }
            )
    plot(rows, picture)


if __name__ == "__main__":
    main()
