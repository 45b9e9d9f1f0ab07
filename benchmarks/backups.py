"""Measure the backups on models of the zoo: who still knows the true label of a triggered image?

    python benchmarks/backups.py [MODEL ...] [--backups KIND ...]

Writes `backups.csv`, one row per model and backup, as soon as it is measured; rows that are there are not measured
again unless `--again` is given, so an interrupted run goes on where it was. `head` is the guard's replacement head,
which needs no training of its own. Every backup learns from clean validation images of the zoo's split (at most
`--images` of them, drawn by the model's seed; for anp 50 per class on average, as in its paper), and is measured on
test images: the share of triggered images that it gives their true label (recovery), clean accuracy, and attack success
of the backup alone, and of the whole guard in `relabel`: a flagged image gets the backup's label, any other the suspect
model's.

Twins also write their curve, before any fine-tuning, to `backups_curves.csv`. No figure of a triggered image measured
here has any influence on a backup; docs/backups.md says how the defaults were chosen. Settings are the defaults, but
for the iterations of anp (`--anp-iterations`). Training of residual networks runs in bfloat16 where the processor can,
which halves the time. Seconds are processor time of training on one thread; milliseconds are for one image, the median
of 30.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch

from guard.backups.anp import AnpSettings
from guard.backups.backup import BACKUP_KINDS, DEFECTIVE, Backup
from guard.backups.purified_twin import Probe, purify
from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.zoo.card import ZooCard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.statistics.evaluation import attack_success_rate, clean_accuracy, recovery_accuracy
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, IntArray

RATE = 0.05
HEAD = "head"
#: 1 % of the training images of CIFAR-10.
ANP_IMAGES_PER_CLASS = 50
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
CURVE_COLUMNS = ("model", "backup", "at", "pruned", "held_out_accuracy", "test_accuracy", "attack_success")
#: Images that a curve is measured on; a row is measured on all.
_PROBED = 1000

Rows = list[dict[str, Any]]


class Bench:
    """One model of the zoo, its images, and a guard that was fitted on the clean ones."""

    def __init__(self, name: str, n_images: int, n_test: int) -> None:
        zoo = Zoo(default_zoo_dir())
        self.name, self.card, self.network = name, zoo.card(name), zoo.load(name)
        split = load_split(self.card.data_set)
        order = np.random.default_rng(self.card.seed).permutation(len(split.validation))[:n_images]
        self.images, self.labels = split.validation.images[order], split.validation.labels[order]
        self.test, self.truth = split.test.images[:n_test], split.test.labels[:n_test]
        sets = [] if self.card.is_benign else self.card.restore_attack().test_sets(self.test, self.truth)
        self.poisoned = np.concatenate([self.test[:0], *(test_set.images for test_set in sets)])
        self.wanted: IntArray = np.concatenate([self.truth[:0], *(test_set.labels for test_set in sets)])
        self.true: IntArray = np.concatenate([self.truth[:0], *(test_set.true_labels for test_set in sets)])
        suspect = SuspectModel(self.network)
        config = GuardConfig(false_positive_rate=RATE, seed=self.card.seed)
        self.guard = Guard.fit(suspect, self.images, self.labels, config)
        self.clean_activations = suspect.activations(self.test)
        if len(self.poisoned):
            self.activations = suspect.activations(self.poisoned)
            self.flagged = self.guard.scores(self.activations).is_poisoned

    def row(self, kind: str, anp: AnpSettings) -> tuple[dict[str, Any], Rows]:
        """Return the row of one backup, rates over all triggers of the attack together, and its curve."""
        if kind == HEAD:
            head = self.guard.ensemble.replacement_logits
            answers = head(self.activations).argmax(axis=1) if len(self.poisoned) else self.wanted
            first = self.clean_activations[:1]
            values = self._values(answers, head(self.clean_activations).argmax(axis=1), 0.0, 0.0, lambda: head(first))
            return {"model": self.name, "backup": kind, **values}, []
        started = time.process_time()
        backup, curve = self._train(kind, anp)
        seconds = time.process_time() - started
        megabytes = sum(array.nbytes for array in backup.arrays().values()) / 1e6
        values = self._values(
            backup.logits(self.poisoned).argmax(axis=1) if len(self.poisoned) else self.wanted,
            backup.logits(self.test).argmax(axis=1),
            seconds,
            megabytes,
            lambda: backup.logits(self.test[:1]),
        )
        return {"model": self.name, "backup": kind, **values}, curve

    def _train(self, kind: str, anp: AnpSettings) -> tuple[Backup, Rows]:
        images, labels = self.images, self.labels
        if kind == "anp":
            few = ANP_IMAGES_PER_CLASS * self.card.n_classes
            images, labels = images[:few], labels[:few]
        if kind == DEFECTIVE:
            return Backup.train(kind, self.network, images, labels, seed=self.card.seed), []
        with half_precision(self.card):
            done = purify(
                self.network,
                images,
                labels,
                kind,
                settings=anp if kind == "anp" else None,
                seed=self.card.seed,
                probes=probes_of(self.test, self.truth, self.poisoned, self.wanted),
            )
        curve = [
            {
                "model": self.name,
                "backup": kind,
                "at": point.at,
                "pruned": point.pruned,
                "held_out_accuracy": point.measured["clean_accuracy"],
                "test_accuracy": point.measured["test_accuracy"],
                "attack_success": point.measured.get("attack_success", ""),
            }
            for point in done.report.curve
        ]
        return Backup(kind, done.twin, {}), curve

    def _values(
        self, answers: IntArray, clean_answers: IntArray, seconds: float, megabytes: float, call: Callable[[], Any]
    ) -> dict[str, Any]:
        attacked: dict[str, Any] = dict.fromkeys(("recovery", "alone", "guarded"), "")
        if len(self.poisoned):
            final = np.where(self.flagged, answers, self.activations.predicted_labels)
            attacked = {
                "recovery": recovery_accuracy(answers, self.true),
                "alone": attack_success_rate(answers, self.wanted, self.true),
                "guarded": attack_success_rate(final, self.wanted, self.true),
            }
        values = (
            attacked["recovery"],
            clean_accuracy(clean_answers, self.truth),
            attacked["alone"],
            attacked["guarded"],
            seconds,
            megabytes,
            median_milliseconds(call),
        )
        return dict(zip(COLUMNS[2:], values, strict=True))


def half_precision(card: ZooCard) -> AbstractContextManager[object]:
    """Return what training of a residual network runs in."""
    if not card.architecture.startswith("resnet"):
        return nullcontext()
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)  # cached weights would be those of the first step


def probes_of(test: Float32Array, truth: IntArray, poisoned: Float32Array, wanted: IntArray) -> dict[str, Probe]:
    """Return what a curve is measured on: some test images, and some triggered ones if there are any."""
    probes = {"test_accuracy": Probe(test[:_PROBED], truth[:_PROBED])}
    if len(poisoned):
        some = np.random.default_rng(0).permutation(len(poisoned))[:_PROBED]
        probes["attack_success"] = Probe(poisoned[some], wanted[some])
    return probes


def median_milliseconds(call: Callable[[], Any], repeats: int = 30) -> float:
    """Return the median time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def read(file: Path) -> Rows:
    """Return the rows of a table; none if it is not there."""
    if not file.exists():
        return []
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def write(file: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into a table in place of those of the same model and backup; the file is replaced at once."""
    new = {(row["model"], row["backup"]) for row in rows}
    kept = [row for row in read(file) if (row["model"], row["backup"]) not in new]
    rounded = [{key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows]
    unfinished = file.with_name(f".{file.name}.writing")
    with unfinished.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted([*kept, *rounded], key=lambda row: (str(row["model"]), str(row["backup"]))))
    unfinished.replace(file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the models that are named, or all of the zoo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*")
    parser.add_argument("--backups", nargs="+", default=[HEAD, *BACKUP_KINDS], choices=[HEAD, *BACKUP_KINDS])
    parser.add_argument("--images", type=int, default=5000, help="clean images at most")
    parser.add_argument("--test", type=int, default=5000, help="test images at most")
    parser.add_argument("--anp-iterations", type=int, default=2000)
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args(arguments)
    table, curves = chosen.output_dir / "backups.csv", chosen.output_dir / "backups_curves.csv"
    anp = AnpSettings(iterations=chosen.anp_iterations)
    for name in chosen.models or [card.name for card in Zoo(default_zoo_dir()).cards()]:
        present = set() if chosen.again else {row["backup"] for row in read(table) if row["model"] == name}
        missing = [kind for kind in chosen.backups if kind not in present]
        bench = Bench(name, chosen.images, chosen.test) if missing else None
        for kind in missing:
            assert bench is not None
            row, curve = bench.row(kind, anp)
            write(table, COLUMNS, [row])
            if curve:
                write(curves, CURVE_COLUMNS, curve)
            print("  ".join(str(round(v, 4) if isinstance(v, float) else v) for v in row.values()), flush=True)


if __name__ == "__main__":
    main()
