"""What reviewers who lie can do to a guard, with the retrainer's default settings and the real queue.

    python benchmarks/loop/lying_reviewers.py

The attacker knows everything: the guard, its clean reference, which inputs are triggered, the caps. Attackers:

- `none`: no lie, 50 true answers about triggered inputs and false alarms;
- `spread`: calls triggered inputs clean, one per group of look-alikes: pairwise farther apart than a clean image of the
  class usually is from its k-th neighbour;
- `slow`: the same in five rounds;
- `accounts`: the same in two rounds, by two accounts that confirm each other's answers;
- `mixed`: the same, beside 50 true answers about triggered inputs and false alarms, by the same account;
- `greedy`: the triggered inputs nearest to the centre of all, in three rounds;
- `poisoned`: calls the most suspicious clean inputs poisoned, with the attacker's label as the true one, in two rounds;
  of 2,000, so most were not flagged: an attacker who sends many more inputs would have as many that were.

Rates are of triggered and clean inputs that are in no queue; `tpr_after` and `fpr_after` are of the worst guard that
was active after any of the rounds. Guards are fitted on the first clean validation images of models of the zoo, 1,000
of MNIST and all 5,000 of GTSRB, at a requested rate of 1 %. Rows that an earlier run wrote are kept. About 15 CPU
minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch

from guard.config import GuardConfig
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.heads.decision_head import DecisionHead
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer, Decision, FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.relabel.settings import QueueSettings
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.types import Activations, IntArray

PROJECT = Path(__file__).resolve().parent.parent.parent
#: Models and how many clean images their guards are fitted on.
NETWORKS = {
    "mnist-pattern-mnist_cnn-0": 1000,
    "mnist-pattern-mnist_cnn-1": 1000,
    "mnist-pattern-mnist_cnn-2": 1000,
    "gtsrb-blend-gtsrb_cnn-0": 5000,
}
ATTACKERS = ("none", "spread", "slow", "accounts", "mixed", "greedy", "poisoned")
LIES = (15, 60, 175)  # of `none`: 0
ROUNDS = {"slow": 5, "accounts": 2, "greedy": 3, "poisoned": 2}
HONEST = 50
RATE = 0.01
#: Triggered inputs that the attacker may choose from, and that are measured on; the same of clean ones.
POOL, MEASURED = 2000, 2000
COLUMNS = (
    *("attacker", "network", "seed", "lies", "honest_answers", "promoted"),
    *("tpr_before", "tpr_after", "fpr_before", "fpr_after", "reason"),
)


@dataclass(frozen=True, eq=False)
class Scene:
    """One network, its guard, and inputs for the attacker and for the measurement."""

    name: str
    seed: int
    guard: Guard
    triggered: Activations
    true_labels: IntArray
    clean: Activations
    clean_labels: IntArray
    unseen_triggered: Activations
    unseen_clean: Activations

    def rates(self, guard: Guard) -> tuple[float, float]:
        """Return true- and false-positive rate on what nobody has seen."""
        return tuple(
            float(guard.scores(entry).is_poisoned.mean()) for entry in (self.unseen_triggered, self.unseen_clean)
        )


def remember_heads() -> None:
    """Train a head once per training set and seed: the same give the same head, whoever asks."""
    known: dict[tuple[object, ...], DecisionHead] = {}
    fit = HeadDisagreement.fit

    def remembered(self: HeadDisagreement, activations: Activations, labels: IntArray) -> HeadDisagreement:
        rows = np.ascontiguousarray(activations.at(self.depth)).tobytes()
        key = (self.depth, self.seed, self.feature_noise_std, hash(rows), labels.astype(np.int64).tobytes())
        if key not in known:
            known[key] = fit(self, activations, labels).head_
        self.head_ = known[key]
        return self

    HeadDisagreement.fit = remembered  # type: ignore[method-assign]


def scene(name: str, n_clean: int) -> Scene:
    """Fit a guard to a model of the zoo, and draw its inputs by the model's seed."""
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(name)
    suspect, split = SuspectModel(zoo.load(name)), load_split(card.data_set)
    validation, test = split.validation, split.test
    config = GuardConfig(false_positive_rate=RATE, seed=card.seed)
    guard = Guard.fit(suspect, validation.images[:n_clean], validation.labels[:n_clean], config)
    (attacked,) = card.restore_attack().test_sets(test.images, test.labels)
    rng = np.random.default_rng(card.seed)
    bad = rng.permutation(len(attacked.images))[: POOL + MEASURED]
    good = rng.permutation(len(test.images))[: POOL + MEASURED]
    triggered, clean = suspect.activations(attacked.images[bad]), suspect.activations(test.images[good])
    half_bad, half_good = len(bad) // 2, len(good) // 2
    flagged = np.flatnonzero(guard.scores(triggered[:half_bad]).is_poisoned)
    return Scene(
        name,
        card.seed,
        guard,
        triggered[flagged],
        attacked.true_labels[bad[flagged]],
        clean[:half_good],
        test.labels[good[:half_good]],
        triggered[half_bad:],
        clean[half_good:],
    )


def spread_out(guard: Guard, activations: Activations, most: int) -> IntArray:
    """Return rows pairwise beyond the usual distance of a clean image to its k-th neighbour in the class."""
    kept: list[int] = []
    features, labels = activations.features.astype(np.float64), activations.predicted_labels
    radii: dict[int, float] = {}
    for row, label in enumerate(labels.tolist()):
        if label not in radii:
            clean = guard.reference.features[guard.reference_labels == label].astype(np.float64)
            squares = (clean**2).sum(axis=1)
            squared = np.sort(squares[:, None] - 2 * clean @ clean.T + squares, axis=1)
            k = min(guard.config.n_neighbors, len(clean) - 1)
            radii[label] = float(np.sqrt(max(0.0, float(np.median(squared[:, k])))))
        others = [other for other in kept if labels[other] == label]
        if all(np.linalg.norm(features[others] - features[row], axis=1) > radii[label]):
            kept.append(row)
        if len(kept) == most:
            break
    return np.array(kept[:most], dtype=np.int64)


class Office:
    """A queue, a folder of bundles, and reviewers who answer."""

    def __init__(self, root: Path, scene_of: Scene, accounts: Sequence[str]) -> None:
        self.scene = scene_of
        (root / "bundles").mkdir()
        self.store = BundleStore(root / "bundles")
        self.digest = scene_of.guard.save(self.store.root).name
        self.store.activate(self.digest)
        self.queue = Queue.open(f"sqlite:///{root / 'queue.db'}", QueueSettings(max_held=max(LIES)))
        for name in accounts:
            Reviewers(self.queue).add(name)

    def answer(
        self, activations: Activations, labels: IntArray, *, is_poisoned: bool, reviewer: str = "mallory"
    ) -> list[Decision]:
        """Queue inputs as the server does, and answer them."""
        ids = [item_id for item_id in self.queue.enqueue(list(self._flagged(activations))).ids if item_id is not None]
        self.queue.claim_items(reviewer, ids)
        answers = [
            Answer(item_id=item, is_poisoned=is_poisoned, true_label=int(label))
            for item, label in zip(ids, labels, strict=True)
        ]
        return self.queue.decide_many(reviewer, answers)

    def _flagged(self, activations: Activations) -> Iterator[FlaggedInput]:
        guard = self.scene.guard
        scores = guard.scores(activations)
        for row in range(len(activations)):
            yield FlaggedInput(
                request_id=os.urandom(8).hex(),
                model=self.scene.name,
                bundle_digest=self.digest,
                suspect_label=int(activations.predicted_labels[row]),
                backup_label=None,
                backup_confidence=None,
                raw=dict(zip(guard.ensemble.names, scores.raw[row].tolist(), strict=True)),
                surprise={},
                combined=float(scores.combined[row]),
                p_value=float(scores.p_values[row]),
                reason="",
                content_type="",
                body=b"",
                inputs=np.zeros((1, 1, 1), dtype=np.float32),
                activations=activations[row : row + 1],
                received_at=datetime.now(UTC),
            )

    def retrain(self) -> tuple[bool, str, tuple[float, float]]:
        """Run a round; return whether its candidate was promoted, why not, and the rates of what is active."""
        refresh_groups(self.queue, self.scene.name)
        Rounds(self.queue).request(self.scene.name, "benchmark")
        with Retrainer(self.queue, self.store.root, self.scene.name, RetrainerSettings()) as worker:
            done = worker.step()
        if done is None:
            raise RuntimeError("no round was held.")
        return done.outcome == "promoted", " ".join(done.report["reasons"]), self.scene.rates(self._active())

    def _active(self) -> Guard:
        return Guard.load(self.store.active_path())


def attack(office: Office, attacker: str, lies: int) -> Iterator[None]:
    """Give the answers of one round after the other; a round of retraining follows each."""
    entry, n_rounds = office.scene, ROUNDS.get(attacker, 1)
    if attacker == "poisoned":
        target = int(np.bincount(entry.triggered.predicted_labels).argmax())
        others = entry.clean[entry.clean.predicted_labels != target]
        chosen = others[np.argsort(entry.guard.scores(others).p_values, kind="stable")[:lies]]
        labels = np.full(len(chosen), target)
    else:
        rows = spread_out(entry.guard, entry.triggered, lies)
        if attacker == "greedy" or len(rows) < lies:  # no more groups: the nearest to the centre besides
            features = entry.triggered.features.astype(np.float64)
            nearest = np.argsort(((features - features.mean(axis=0)) ** 2).sum(axis=1))
            first = rows if attacker != "greedy" else rows[:0]
            rows = np.concatenate([first, nearest[~np.isin(nearest, first)]])[:lies]
        chosen, labels = entry.triggered[rows], entry.triggered.predicted_labels[rows]
    if attacker in ("none", "mixed"):
        free = np.setdiff1d(np.arange(len(entry.triggered)), rows)[: HONEST // 2]
        office.answer(entry.triggered[free], entry.true_labels[free], is_poisoned=True)
        alarms = np.flatnonzero(entry.guard.scores(entry.clean).is_poisoned)[: HONEST // 2]
        office.answer(entry.clean[alarms], entry.clean_labels[alarms], is_poisoned=False)
    for number, part in enumerate(np.array_split(np.arange(len(chosen)), n_rounds)):
        names = ("mallory", "trudy") if number % 2 == 0 else ("trudy", "mallory")
        reviewer = names[0] if attacker == "accounts" else "mallory"
        if not len(part):  # no lie
            yield
            continue
        given = office.answer(chosen[part], labels[part], is_poisoned=attacker == "poisoned", reviewer=reviewer)
        if attacker == "accounts":
            for decision in given:
                office.queue.supersede(names[1], decision.id, is_poisoned=False, true_label=decision.true_label)
        yield


def run(played: Scene, attacker: str, lies: int) -> dict[str, object]:
    """Let one attack run in a queue of its own, and return its row."""
    accounts = ("mallory", "trudy") if attacker == "accounts" else ("mallory",)
    with tempfile.TemporaryDirectory() as scratch:
        office = Office(Path(scratch), played, accounts)
        before = played.rates(played.guard)
        done = [office.retrain() for _ in attack(office, attacker, lies)]
        office.queue.close()
    return {
        "attacker": attacker,
        "network": played.name,
        "seed": played.seed,
        "lies": lies,
        "honest_answers": HONEST if attacker in ("none", "mixed") else 0,
        "promoted": sum(promoted for promoted, _, _ in done),
        "tpr_before": round(before[0], 5),
        "tpr_after": round(min(rates[0] for _, _, rates in done), 5),
        "fpr_before": round(before[1], 5),
        "fpr_after": round(max(rates[1] for _, _, rates in done), 5),
        "reason": done[-1][1],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, and print the worst fall of the true-positive rate."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--only", nargs="*", help="names of models; default is all")
    options.add_argument(
        "--results", type=Path, default=PROJECT / "benchmarks" / "results" / "loop" / "lying_reviewers.csv"
    )
    given = options.parse_args(arguments)
    torch.set_num_threads(1)
    remember_heads()
    rows: list[dict[str, object]] = []
    if given.results.is_file():
        with given.results.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    known = {(str(row["network"]), str(row["attacker"]), int(str(row["lies"]))) for row in rows}
    for name, n_clean in NETWORKS.items():
        wanted = [("none", 0), *((attacker, lies) for lies in LIES for attacker in ATTACKERS if attacker != "none")]
        missing = [(attacker, lies) for attacker, lies in wanted if (name, attacker, lies) not in known]
        if not missing or (given.only and name not in given.only):
            continue
        entry = scene(name, n_clean)
        for attacker, lies in missing:
            row = run(entry, attacker, lies)
            print(*(row[column] for column in COLUMNS), flush=True)
            rows.append(row)
            write(given.results, rows)
    fall = max(float(str(row["tpr_before"])) - float(str(row["tpr_after"])) for row in rows)
    print(f"the true-positive rate falls by {fall:.4f} at most, in {len(rows)} attacks")


def write(path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Write a tidy CSV file, in the order of networks, attackers and lies."""
    order = sorted(
        rows,
        key=lambda row: (
            list(NETWORKS).index(str(row["network"])),
            ATTACKERS.index(str(row["attacker"])),
            int(str(row["lies"])),
        ),
    )
    unfinished = path.with_suffix(".writing")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(COLUMNS), lineterminator="\n")
        writer.writeheader()
        writer.writerows(order)
    unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
