"""Compare the weights of anytime heads at parts of the cost, and measure what verdicts at each depth catch.

    python benchmarks/anytime.py

Writes two tables. `anytime.csv`: heads on the nine blocks of the zoo's residual networks, trained on clean validation
images and tested on clean test images; error at 1/4, 1/2, 3/4 and all of the blocks, and the relative increase over
OPT, heads trained for that depth alone, in percent. `anytime_depths.csv`: for some models of the zoo a guard fitted
with `anytime` at a rate of 5 %; per depth the share of clean and of triggered test images that it flags, and the median
microseconds of its verdict on one image. Networks are as they are, only heads are trained. About 20 minutes on a core.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np

from guard.config import GuardConfig
from guard.detection.heads.anytime import AnytimeHeads
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.suspect.model import SuspectModel

BLOCKS = tuple(f"stages.{stage}.{block}" for stage in range(3) for block in range(3))
PARTS = {"1/4": 2, "1/2": 5, "3/4": 7, "1": 9}  # blocks, of nine that cost the same
SEEDS = (0, 1, 2)
WEIGHTINGS = ("constant", "linear", "adaptive")
#: Table 3(a) of arXiv 1708.06832: relative increase in error over OPT, in percent, mean of 12 networks.
PAPER = {
    "constant": (15.07, 16.40, 18.76, 18.90),
    "linear": (25.67, 13.02, 12.97, 12.65),
    "adaptive": (32.99, 9.97, 3.96, 2.73),
}
RESNETS = (
    "cifar10-benign-resnet20-0",
    "cifar10-benign-resnet20-1",
    "cifar10-badnets-resnet20-0",
    "cifar100-benign-resnet20-0",
)
GUARDED = (
    "mnist-pattern-mnist_cnn-0",
    "mnist-blend-mnist_cnn-0",
    "gtsrb-c-gtsrb_cnn-0",
    "gtsrb-blend-gtsrb_cnn-0",
    "cifar10-badnets-resnet20-0",
    "cifar10-blend-resnet20-0",
)
RATE = 0.05


def compare(name: str, n_images: int, n_test: int) -> list[dict[str, Any]]:
    """Return error and relative increase over OPT of every weighting and part of the cost, for one network."""
    zoo = Zoo(default_zoo_dir())
    card, split = zoo.card(name), load_split(zoo.card(name).data_set)
    suspect = SuspectModel(zoo.load(name), depths=BLOCKS)
    learn = suspect.activations(split.validation.images[:n_images])
    test = suspect.activations(split.test.images[:n_test])
    inputs, unseen = ([entry.at(block) for block in BLOCKS] for entry in (learn, test))
    labels, truth = split.validation.labels[:n_images], split.test.labels[:n_test]
    rows = []
    for seed in SEEDS:
        alone = {}
        for part, blocks in PARTS.items():
            heads = AnytimeHeads(seed=seed, weighting="last").fit(inputs[:blocks], labels, card.n_classes)
            alone[part] = float((heads.logits(unseen[:blocks]).argmax(axis=1) != truth).mean())
        for weighting in WEIGHTINGS:
            together = AnytimeHeads(seed=seed, weighting=weighting).fit(inputs, labels, card.n_classes)
            errors = [float((logits.argmax(axis=1) != truth).mean()) for logits in together.answers(unseen)]
            for place, (part, blocks) in enumerate(PARTS.items()):
                error = errors[blocks - 1]
                rows.append(
                    {
                        "model": name,
                        "seed": seed,
                        "weights": weighting,
                        "part_of_cost": part,
                        "error": error,
                        "opt_error": alone[part],
                        "increase_percent": 100 * (error / alone[part] - 1),
                        "paper_increase_percent": PAPER[weighting][place],
                    }
                )
    return rows


def measure_depths(name: str, n_images: int, n_test: int) -> list[dict[str, Any]]:
    """Return what a guard flags at each depth, and how long its verdict takes."""
    zoo = Zoo(default_zoo_dir())
    card, split = zoo.card(name), load_split(zoo.card(name).data_set)
    suspect = SuspectModel(zoo.load(name))
    config = GuardConfig(false_positive_rate=RATE, anytime=True, seed=card.seed)
    guard = Guard.fit(suspect, split.validation.images[:n_images], split.validation.labels[:n_images], config)
    test, truth = split.test.images[:n_test], split.test.labels[:n_test]
    (triggered,) = card.restore_attack().test_sets(test, truth)
    clean, poisoned = suspect.activations(test), suspect.activations(triggered.images)
    rows = []
    for entry in [*(guard.at_depth(early.depth) for early in guard.early), guard]:
        times = []
        for row in range(200):
            first = clean[row : row + 1]
            started = time.perf_counter()
            entry.scores(first)
            times.append(time.perf_counter() - started)
        rows.append(
            {
                "model": name,
                "depth": entry.depth or "all",
                "false_positive_rate": float(entry.scores(clean).is_poisoned.mean()),
                "true_positive_rate": float(entry.scores(poisoned).is_poisoned.mean()),
                "microseconds": 1e6 * statistics.median(times),
            }
        )
    return rows


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write a table."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the tables and print their means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=5000, help="clean images to learn from, at most")
    parser.add_argument("--test", type=int, default=5000, help="test images, at most")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in RESNETS:
        rows += compare(name, chosen.images, chosen.test)
        write(chosen.output_dir / "anytime.csv", rows)
    for weighting in WEIGHTINGS:
        for part in PARTS:
            selected = [
                row["increase_percent"] for row in rows if (row["weights"], row["part_of_cost"]) == (weighting, part)
            ]
            print(f"{weighting:9} {part:4} {np.mean(selected):7.2f} %")
    depths: list[dict[str, Any]] = []
    for name in GUARDED:
        depths += measure_depths(name, chosen.images, chosen.test)
        write(chosen.output_dir / "anytime_depths.csv", depths)
        for row in depths[-5:]:
            print("  ".join(str(value) for value in row.values()))


if __name__ == "__main__":
    main()
