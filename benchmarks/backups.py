"""Measure the backups on models of the zoo: who still knows the true label of a triggered image?

    python benchmarks/backups.py [MODEL ...]

Writes `backups.csv`, one row per model and backup, replacing the rows of the models that were measured. `head` is the
guard's replacement head, which needs no training of its own. Every backup learns from the clean validation images of
the zoo's split (at most `--images` of them) and is measured on test images: the share of triggered images that it gives
their true label (recovery), clean accuracy, and attack success of the backup alone, and of the whole guard in
`relabel`: a flagged image gets the backup's label, any other the suspect model's. Milliseconds are for one image, the
median of 30, on one thread.
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

from guard.backups.anp import AnpSettings
from guard.backups.backup import BACKUP_KINDS, Backup
from guard.config import GuardConfig
from guard.evaluation import attack_success_rate, clean_accuracy, recovery_accuracy
from guard.pipeline import Guard
from guard.suspect import SuspectModel
from guard.zoo.collection import Zoo, default_zoo_dir
from guard.zoo.splits import load_split

RATE = 0.05
HEAD = "head"
COLUMNS = (
    "model",
    "backup",
    "recovery_accuracy",
    "clean_accuracy",
    "attack_success",
    "guarded_attack_success",
    "training_seconds",
    "megabytes",
    "milliseconds",
)


def measure(name: str, kinds: Sequence[str], n_images: int, n_test: int, anp_iterations: int) -> list[dict[str, Any]]:
    """Return one row per backup of one model; rates over all triggers of its attack together."""
    zoo = Zoo(default_zoo_dir())
    card, network = zoo.card(name), zoo.load(name)
    split = load_split(card.data_set)
    order = np.random.default_rng(card.seed).permutation(len(split.validation))[:n_images]
    images, labels = split.validation.images[order], split.validation.labels[order]
    test, truth = split.test.images[:n_test], split.test.labels[:n_test]
    triggered = card.restore_attack().test_sets(test, truth)
    poisoned = np.concatenate([one.images for one in triggered])
    wanted, true = (np.concatenate([getattr(one, key) for one in triggered]) for key in ("labels", "true_labels"))
    suspect = SuspectModel(network)
    guard = Guard.fit(suspect, images, labels, GuardConfig(false_positive_rate=RATE, seed=card.seed))
    activations, clean_activations = suspect.activations(poisoned), suspect.activations(test)
    flagged = guard.scores(activations).is_poisoned
    rows = []
    for kind in kinds:
        if kind == HEAD:
            seconds, megabytes = 0.0, 0.0
            answers = guard.ensemble.replacement_logits(activations).argmax(axis=1)
            clean_answers = guard.ensemble.replacement_logits(clean_activations).argmax(axis=1)
            first = activations[:1]
            milliseconds = median_milliseconds(lambda: guard.ensemble.replacement_logits(first))  # noqa: B023
        else:
            settings = AnpSettings(iterations=anp_iterations) if kind == "anp" else None
            backup = Backup.train(kind, network, images, labels, settings=settings, seed=card.seed)
            seconds = backup.seconds
            megabytes = sum(array.nbytes for array in backup.arrays().values()) / 1e6
            answers = backup.logits(poisoned).argmax(axis=1)
            clean_answers = backup.logits(test).argmax(axis=1)
            milliseconds = median_milliseconds(lambda: backup.logits(test[:1]))  # noqa: B023
        final = np.where(flagged, answers, activations.predicted_labels)
        values = (
            name,
            kind,
            recovery_accuracy(answers, true),
            clean_accuracy(clean_answers, truth),
            attack_success_rate(answers, wanted, true),
            attack_success_rate(final, wanted, true),
            seconds,
            megabytes,
            milliseconds,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        shown = "  ".join(f"{value:.4f}" for value in values[2:6])
        print(f"{name:34} {kind:14} {shown}  {seconds:7.1f} s  {megabytes:6.2f} MB  {milliseconds:.2f} ms", flush=True)
    return rows


def median_milliseconds(call: Any, repeats: int = 30) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def write(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Put rows into the table in place of older ones of the same model and backup; the file is replaced at once."""
    old: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="") as stream:
            old = list(csv.DictReader(stream))
    new = {(row["model"], row["backup"]) for row in rows}
    kept = [row for row in old if (row["model"], row["backup"]) not in new]
    rounded = [{key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    unfinished = file.with_name(f".{file.name}.writing")
    with unfinished.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rounded], key=lambda row: str(row["model"])))
    unfinished.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are named, or all that carry a backdoor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--backups", nargs="+", default=[HEAD, *BACKUP_KINDS], choices=[HEAD, *BACKUP_KINDS])
    parser.add_argument("--images", type=int, default=5000, help="clean images at most")
    parser.add_argument("--test", type=int, default=5000, help="test images at most")
    parser.add_argument("--anp-iterations", type=int, default=2000)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args(arguments)
    models = chosen.models or [card.name for card in Zoo(default_zoo_dir()).cards() if not card.is_benign]
    for name in models:
        rows = measure(name, chosen.backups, chosen.images, chosen.test, chosen.anp_iterations)
        write(chosen.output_dir / "backups.csv", rows)


if __name__ == "__main__":
    main()
