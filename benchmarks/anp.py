"""Adversarial neuron pruning, more gently than its paper has it, on networks with fewer neurons than its paper's.

    python benchmarks/anp.py [MODEL ...] [--epsilons 0.4 0.2 0.1] [--iterations 200]

Writes `anp.csv` (model, epsilon, iterations, at, pruned, held_out_accuracy, test_accuracy, attack_success): for every
threshold `at` the twin before any choice of threshold, as `backups_curves.csv` has it for the paper's settings. Clean
images, half precision and probes are those of `backups.py`. What is there already is passed over.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from backups import ANP_IMAGES_PER_CLASS, Rows, half_precision, probes_of, read

from guard.backups.anp import AnpSettings
from guard.backups.purified_twin import purify
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split

MODELS = ("cifar10-badnets-resnet20-0", "cifar10-blend-resnet20-0")
COLUMNS = ("model", "epsilon", "iterations", "at", "pruned", "held_out_accuracy", "test_accuracy", "attack_success")


def measure(name: str, settings: AnpSettings, n_test: int) -> Rows:
    """Return one row per threshold."""
    zoo = Zoo(default_zoo_dir())
    card, network = zoo.card(name), zoo.load(name)
    split = load_split(card.data_set)
    few = np.random.default_rng(card.seed).permutation(len(split.validation))[: ANP_IMAGES_PER_CLASS * card.n_classes]
    test, truth = split.test.images[:n_test], split.test.labels[:n_test]
    sets = card.restore_attack().test_sets(test, truth)
    probes = probes_of(
        test,
        truth,
        np.concatenate([test_set.images for test_set in sets]),
        np.concatenate([test_set.labels for test_set in sets]),
    )
    with half_precision(card):
        done = purify(
            network,
            split.validation.images[few],
            split.validation.labels[few],
            "anp",
            settings=settings,
            seed=card.seed,
            probes=probes,
        )
    return [
        {
            "model": name,
            "epsilon": settings.epsilon,
            "iterations": settings.iterations,
            "at": point.at,
            "pruned": point.pruned,
            "held_out_accuracy": point.measured["clean_accuracy"],
            "test_accuracy": point.measured["test_accuracy"],
            "attack_success": round(point.measured["attack_success"], 6),
        }
        for point in done.report.curve
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are named at every epsilon that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--epsilons", nargs="+", type=float, default=[0.4, 0.2, 0.1])
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--test", type=int, default=2000, help="test images at most")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args(arguments)
    file = chosen.output_dir / "anp.csv"
    for epsilon in chosen.epsilons:
        for name in chosen.models:
            rows = read(file)
            requested = (name, epsilon, chosen.iterations)
            if any((row["model"], float(row["epsilon"]), int(row["iterations"])) == requested for row in rows):
                continue
            rows += measure(name, AnpSettings(epsilon=epsilon, iterations=chosen.iterations), chosen.test)
            rows.sort(key=lambda row: (row["model"], int(row["iterations"]), float(row["epsilon"]), float(row["at"])))
            with file.open("w", newline="") as stream:
                writer = csv.DictWriter(stream, fieldnames=COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
            print(name, epsilon, "done", flush=True)


if __name__ == "__main__":
    main()
