"""Measure what the guard catches on the trained networks, at 1 and 5 %, and print the table of docs/networks.md.

    python benchmarks/networks/detection.py

Writes `networks.csv`, one row per network, trigger and seed; a row that is there is kept unless `--again` is given. The
guard is fitted on 2,500 clean validation images and measured on 2,500 test images, clean and triggered. For comparison
the zoo's convolutional network for the same images, which was trained longer, is measured alike.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from training import ATTACKS, BENIGN, SEEDS, planted, weights_path

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.attacks.attack import Attack
from guard.lab.zoo.collection import Zoo
from guard.lab.zoo.splits import LabelledImages, load_split
from guard.statistics.evaluation import attack_success_rate, auroc, clean_accuracy
from guard.suspect.model import SuspectModel

RATES = (0.01, 0.05)
N_IMAGES = 2500
RESULTS = Path(__file__).parents[1] / "results" / "networks.csv"
KEY = ("network", "attack", "seed")
ZOO, ZOO_NETWORK = Zoo(Path(__file__).parents[1] / "zoo"), "gtsrb_cnn"
NETWORKS = (*BENIGN, ZOO_NETWORK)


def suspect_model(name: str, attack: str | None = None, seed: int = 0) -> SuspectModel:
    """Return a trained network, loaded as a user's."""
    return SuspectModel.load(weights_path(name, attack, seed), f"sign_networks:{name}")


def subjects(name: str, attack: str, seed: int) -> tuple[SuspectModel, SuspectModel, Attack] | None:
    """Return a network with its backdoor, without it, and the attack; None if it is not trained."""
    if name == ZOO_NETWORK:
        backdoored, benign = (f"gtsrb-{kind}-{name}-{seed}" for kind in (attack, "benign"))
        if not ZOO.has(backdoored):
            return None
        loaded = (SuspectModel(ZOO.load(card)) for card in (backdoored, benign))
        return (*loaded, ZOO.card(backdoored).restore_attack())
    if not weights_path(name, attack, seed).exists():
        return None
    return suspect_model(name, attack, seed), suspect_model(name), planted(attack, seed)


def drawn(part: LabelledImages, seed: int) -> LabelledImages:
    """Return as many images as are measured, drawn by the seed."""
    rows = np.sort(np.random.default_rng(seed).permutation(len(part))[:N_IMAGES])
    return LabelledImages(part.images[rows], part.labels[rows])


def measure(suspect: SuspectModel, benign: SuspectModel, attack: Attack, seed: int) -> dict[str, Any]:
    """Fit a guard for one backdoored network and return what it catches."""
    split = load_split("gtsrb")
    validation, test = drawn(split.validation, seed), drawn(split.test, seed)
    suspect.locate(validation.images, validation.labels)
    guard = Guard.fit(suspect, validation.images, validation.labels, GuardConfig(false_positive_rate=0.05, seed=seed))
    (triggered,) = attack.test_sets(test.images, test.labels)
    clean, poisoned = suspect.activations(test.images), suspect.activations(triggered.images)
    scores = guard.scores(clean), guard.scores(poisoned)
    is_poisoned = np.repeat([False, True], [len(clean), len(poisoned)])
    truth = (poisoned.predicted_labels, triggered.labels, triggered.true_labels)
    row = {
        "split": suspect.split_points.split,
        "depths": " ".join(suspect.split_points.depths),
        "numbers": " ".join(str(content.width) for content in suspect.contents),
        "benign_clean_accuracy": clean_accuracy(benign.activations(test.images).predicted_labels, test.labels),
        "clean_accuracy": clean_accuracy(clean.predicted_labels, test.labels),
        "attack_success": attack_success_rate(*truth),
        "auroc": auroc(np.concatenate([part.combined for part in scores]), is_poisoned),
        "auroc_by_detector": "; ".join(
            f"{detector} {auroc(np.concatenate([part.raw[:, column] for part in scores]), is_poisoned):.3f}"
            for column, detector in enumerate(guard.ensemble.names)
        ),
    }
    for rate in RATES:
        flagged_clean, flagged = (part.p_values <= rate for part in scores)
        row[f"false_positive_rate_at_{rate:g}"] = float(flagged_clean.mean())
        row[f"true_positive_rate_at_{rate:g}"] = float(flagged.mean())
        row[f"attack_success_guarded_at_{rate:g}"] = attack_success_rate(*truth, flagged)
    return row


def read_rows() -> list[dict[str, str]]:
    """Return the rows that have been measured."""
    if not RESULTS.exists():
        return []
    with RESULTS.open(newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Write rows in the order of networks, attacks and seeds."""
    order = sorted(rows, key=lambda r: (NETWORKS.index(r["network"]), ATTACKS.index(r["attack"]), int(r["seed"])))
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(order[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in order)


def table(rows: Sequence[dict[str, str]]) -> str:
    """Return the table of docs/networks.md, in percent: the mean, and where there are several values the worst."""
    columns: dict[str, Any] = {"benign_clean_accuracy": min, "clean_accuracy": min, "attack_success": min}
    for rate in RATES:
        columns[f"true_positive_rate_at_{rate:g}"] = min
        columns |= {f"{name}_at_{rate:g}": max for name in ("false_positive_rate", "attack_success_guarded")}

    def line(chosen: Sequence[dict[str, str]], *words: str) -> str:
        cells = list(words)
        for column, worst in columns.items():
            values = [100 * float(row[column]) for row in chosen]
            cells.append(f"{statistics.mean(values):.1f}" + f" ({worst(values):.1f})" * (len(values) > 1))
        return f"| {' | '.join(cells)} |"

    lines = [f"| network | trigger | {' | '.join(columns)} |", "|---" * (2 + len(columns)) + "|"]
    for name, attack in itertools.product(NETWORKS, ATTACKS):
        if chosen := [row for row in rows if (row["network"], row["attack"]) == (name, attack)]:
            lines.append(line(chosen, name, attack))
    if ours := [row for row in rows if row["network"] in BENIGN]:
        lines.append(line(ours, "mean (worst) without the zoo's", ""))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every network that has been trained, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="measure rows that are there already as well")
    again = parser.parse_args(arguments).again
    rows: list[Any] = [] if again else read_rows()
    known = {tuple(str(row[key]) for key in KEY) for row in rows}
    for seed, name, attack in itertools.product(SEEDS, NETWORKS, ATTACKS):
        if (name, attack, str(seed)) not in known and (found := subjects(name, attack, seed)) is not None:
            key = dict(zip(KEY, (name, attack, seed), strict=True))
            rows.append(key | measure(*found, seed))
            write_rows(rows)
            print(f"{name}, {attack}, seed {seed} done", flush=True)
    print(table(read_rows()))


if __name__ == "__main__":
    main()
