"""How near do the estimates of `guard assess` come to what the guard catches on networks that were backdoored for real?

    python benchmarks/assess_estimates.py

The zoo holds benign MNIST networks, and others of the same architecture that were trained from scratch with a backdoor.
For each seed `assess` plants the same trigger in a copy of the benign one; the other is guarded and tried with as many
clean images, drawn by the same split, that none of the networks was trained on. Writes `assess_estimates.csv`, one row
per trigger and seed. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.detection.pipeline import Guard
from guard.lab.assess import assess
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.statistics.evaluation import attack_success_rate, true_positive_rate
from guard.suspect.model import SuspectModel

SEEDS = (0, 1, 2)
RATE = 0.05
CLEAN_IMAGES = 3000
TRIGGERS = ("single-pixel", "pattern", "blend", "sig", "wanet")  # of the same name in the zoo
PARTS = (1200, 600)  # to fit the guard, to test: as many as `assess` has of 3,000


def measure(seed: int) -> list[dict[str, Any]]:
    """Return one row per trigger: the estimate, and the same of a network that carries the trigger."""
    data = load_dataset("mnist", "test")
    images, labels = to_tensor_images(data.images), data.labels
    (chosen,) = split_rows(len(data), (CLEAN_IMAGES,), np.random.default_rng(seed))
    images, labels = images[chosen], labels[chosen]
    config = GuardConfig(false_positive_rate=RATE, seed=seed)
    zoo = Zoo(default_zoo_dir())
    benign = SuspectModel(zoo.load(f"mnist-benign-mnist_cnn-{seed}"))
    report = assess(benign, images, labels, config, attacks=TRIGGERS, seeds=(seed,))
    fit, test = slice(0, PARTS[0]), slice(PARTS[0], sum(PARTS))
    rows = []
    for trial in report.trials:
        if trial.is_control:
            continue
        name = f"mnist-{trial.attack}-mnist_cnn-{seed}"
        suspect = SuspectModel(zoo.load(name))
        (triggered,) = zoo.card(name).restore_attack().test_sets(images[test], labels[test])
        guard = Guard.fit(suspect, images[fit], labels[fit], config)
        activations = suspect.activations(triggered.images)
        flagged = guard.scores(activations).is_poisoned
        rows.append(
            {
                "trigger": trial.attack,
                "seed": seed,
                "requested_false_positive_rate": RATE,
                "planted": trial.planted,
                "estimated_attack_success": trial.attack_success_unguarded,
                "estimated_true_positive_rate": trial.true_positive_rate,
                "flagged_without_backdoor": trial.flagged_without_backdoor,
                "real_attack_success": attack_success_rate(
                    activations.predicted_labels, triggered.labels, triggered.true_labels
                ),
                "real_true_positive_rate": true_positive_rate(flagged, triggered.is_poisoned),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    output = parser.parse_args(arguments).output_dir
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        rows += measure(seed)
        print(f"seed {seed} done", flush=True)
    rows.sort(key=lambda row: (TRIGGERS.index(row["trigger"]), row["seed"]))
    with (output / "assess_estimates.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print(f"\nshare of triggered images caught at a requested rate of {RATE}, per seed")
    print(f"{'trigger':14}{'estimate':>24}{'real':>24}")
    for trigger in TRIGGERS:
        of_trigger = [row for row in rows if row["trigger"] == trigger]
        print(
            f"{trigger:14}{_cells(of_trigger, 'estimated_true_positive_rate')}"
            f"{_cells(of_trigger, 'real_true_positive_rate')}"
        )


def _cells(rows: Sequence[dict[str, Any]], key: str) -> str:
    return "  ".join("not planted" if row[key] is None else f"{row[key]:.3f}" for row in rows).rjust(24)


if __name__ == "__main__":
    main()
