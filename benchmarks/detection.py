"""Measure what the guard catches on the demo's attacks, over seeds: both modes, at one requested rate.

    python benchmarks/detection.py

Writes `detection.csv`, one row per attack, seed and setting. A seed draws everything anew: the split of the 10,000
shipped MNIST images (6,000 train the backdoored network, 2,000 fit the guard, 2,000 test), the poisoned images, the
start weights and the folds. The guard sees clean images only. About 5 minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.demo.run import SPLIT
from guard.detection.pipeline import Guard
from guard.lab.attacks.poisoning import poisoned_test_set
from guard.lab.attacks.recipes import DEMO_ATTACKS, AttackRecipe, train_badnet
from guard.statistics.evaluation import attack_success_rate, auroc, clean_accuracy
from guard.suspect.model import SuspectModel

SEEDS = (0, 1, 2)
RATE = 0.05
SETTINGS: dict[str, dict[str, Any]] = {
    "calibrated": {},
    "paper": {"mode": "paper"},
    "paper, image noise 0.1": {"mode": "paper", "image_noise_std": 0.1},
}


def measure(recipe: AttackRecipe, seed: int) -> list[dict[str, Any]]:
    """Train one backdoored network and return a row for every setting."""
    data = load_dataset("mnist", "test")
    images, labels = to_tensor_images(data.images), data.labels
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(seed))
    network, _, _ = train_badnet(recipe, images[train], labels[train], seed=seed)
    suspect = SuspectModel(network)
    triggered = poisoned_test_set(images[test], labels[test], recipe.apply_trigger, recipe.target)
    clean_activations = suspect.activations(images[test])
    poisoned_activations = suspect.activations(triggered.images)
    is_poisoned = np.arange(len(test) + len(triggered)) >= len(test)
    truth = (triggered.labels, triggered.true_labels)
    rows = []
    for setting, changes in SETTINGS.items():
        config = GuardConfig(false_positive_rate=RATE, seed=seed, **changes)
        guard = Guard.fit(suspect, images[validate], labels[validate], config)
        clean, poisoned = guard.scores(clean_activations), guard.scores(poisoned_activations)
        answers = poisoned_activations.predicted_labels
        rows.append(
            {
                "attack": recipe.name,
                "seed": seed,
                "setting": setting,
                "requested_false_positive_rate": RATE,
                "clean_accuracy": clean_accuracy(clean_activations.predicted_labels, labels[test]),
                "attack_success_unguarded": attack_success_rate(answers, *truth),
                "attack_success_guarded": attack_success_rate(answers, *truth, poisoned.is_poisoned),
                "true_positive_rate": float(poisoned.is_poisoned.mean()),
                "realised_false_positive_rate": float(clean.is_poisoned.mean()),
                "auroc": auroc(np.concatenate([clean.combined, poisoned.combined]), is_poisoned),
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print mean and worst over seeds, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    output = parser.parse_args(arguments).output_dir
    rows = []
    for recipe in DEMO_ATTACKS:
        for seed in SEEDS:
            rows += measure(recipe, seed)
            print(f"{recipe.name}, seed {seed} done", flush=True)
    with (output / "detection.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    print(f"\nseeds {SEEDS}, requested rate {RATE}; mean (worst) over seeds; for false alarms: mean (lowest - highest)")
    print(f"{'attack':14}{'setting':24}{'attack success':>18}{'TPR':>16}{'false alarms':>24}{'AUROC':>18}")
    for recipe in DEMO_ATTACKS:
        for setting in SETTINGS:
            selected = [row for row in rows if row["attack"] == recipe.name and row["setting"] == setting]
            success, caught, alarms, areas = (
                [row[key] for row in selected]
                for key in ("attack_success_guarded", "true_positive_rate", "realised_false_positive_rate", "auroc")
            )
            print(
                f"{recipe.name:14}{setting:24}"
                f"{f'{statistics.mean(success):.3f} ({max(success):.3f})':>18}"
                f"{f'{statistics.mean(caught):.3f} ({min(caught):.3f})':>16}"
                f"{f'{statistics.mean(alarms):.3f} ({min(alarms):.3f} - {max(alarms):.3f})':>24}"
                f"{f'{statistics.mean(areas):.4f} ({min(areas):.4f})':>18}"
            )


if __name__ == "__main__":
    main()
