"""Measure what an attack on the calibration does to a guard, and whether the guard notices it when it is fitted.

    python benchmarks/calibration_attack.py

Needs MNIST as the zoo splits it (`GUARD_DATA_DIR`). Per seed, networks are trained on 20,000 images with WaNet as
backdoor: an honest twin without decoys, and two with a share of the clean images, the brightest, answered wrong
(`guard/lab/attacks/decoys.py`). Guards are fitted on 2,000 clean validation images, and asked about 5,000 clean test
images and the triggered ones of another class than the target. Networks are kept in `build/calibration_attack`. About
10 minutes on one core.

Writes `calibration_attack.csv`, a row per network and requested rate.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from safetensors.torch import load_file, save_file
from torch import nn

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.catalogue import make_attack
from guard.lab.attacks.decoys import Decoys
from guard.lab.attacks.network_training import TrainingSettings, train_classifier
from guard.lab.zoo.collection import build_network
from guard.lab.zoo.splits import ZooSplit, load_split
from guard.statistics.evaluation import attack_success_rate, auroc, clean_accuracy
from guard.suspect.model import SuspectModel

SEEDS = (0, 1, 2)
SHARES = (0.0, 0.06, 0.12)
RATES = (0.01, 0.05)
TARGET = 7
_TRAINED_ON, _FITTED_ON = 20_000, 2_000


def attack_with(share: float, seed: int) -> Attack:
    """Return WaNet, with a share of decoys unless that is 0."""
    attack = make_attack("wanet", TARGET, seed)
    return replace(attack, decoys=Decoys(share, n_classes=10)) if share else attack


def trained(share: float, seed: int, split: ZooSplit, work_dir: Path) -> nn.Module:
    """Return a backdoored network, from its file where there is one."""
    network = build_network("mnist_cnn", 10, 1, seed=seed)
    kept = work_dir / f"wanet-{share:g}-{seed}.safetensors"
    if kept.is_file():
        network.load_state_dict(load_file(kept))
        return network
    images, labels = split.train.images[:_TRAINED_ON], split.train.labels[:_TRAINED_ON]
    poisoned = attack_with(share, seed).poison(images, labels, np.random.default_rng(seed))
    settings = TrainingSettings(epochs=5, batch_size=128, learning_rate=3e-3)
    train_classifier(network, poisoned.images, poisoned.labels, settings, seed=seed, n_threads=1)
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, kept)
    return network


def measure(share: float, seed: int, split: ZooSplit, work_dir: Path) -> list[dict[str, Any]]:
    """Return a row per requested rate."""
    suspect = SuspectModel(trained(share, seed, split, work_dir))
    images, labels = split.validation.images[:_FITTED_ON], split.validation.labels[:_FITTED_ON]
    guard = Guard.fit(suspect, images, labels, GuardConfig(false_positive_rate=max(RATES), seed=seed))
    (triggered,) = attack_with(share, seed).test_sets(split.test.images, split.test.labels)
    clean_activations, poisoned_activations = (suspect.activations(part.images) for part in (split.test, triggered))
    answers, truth = poisoned_activations.predicted_labels, (triggered.labels, triggered.true_labels)
    clean, poisoned = guard.scores(clean_activations), guard.scores(poisoned_activations)
    found = guard.contradictions
    assert found is not None  # every fit counts them
    is_poisoned = np.arange(len(clean.combined) + len(poisoned.combined)) >= len(clean.combined)
    return [
        {
            "decoys": share,
            "seed": seed,
            "requested": rate,
            "clean_accuracy": clean_accuracy(clean_activations.predicted_labels, split.test.labels),
            "attack_success": attack_success_rate(answers, *truth),
            "true_positive_rate": float((poisoned.p_values <= rate).mean()),
            "realised": float((clean.p_values <= rate).mean()),
            "auroc": auroc(np.concatenate([clean.combined, poisoned.combined]), is_poisoned),
            "contradictions": found.share,
            "noticed": found.is_noticed,
        }
        for rate in RATES
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work-dir", type=Path, default=Path("build/calibration_attack"))
    chosen = parser.parse_args(arguments)
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    split = load_split("mnist")
    rows = []
    for seed in SEEDS:
        for share in SHARES:
            rows += measure(share, seed, split, chosen.work_dir)
            for row in rows[-len(RATES) :]:
                print(", ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    with (chosen.output_dir / "calibration_attack.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
