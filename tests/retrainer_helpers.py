"""A small made-up world for the tests of the retrainer: activations with triggers, flagged inputs, and reviewers.

Five classes in 12 dimensions. A trigger moves an input most of the way to class 0, which the "network" then answers,
and some way along a direction that each kind of trigger has for itself: kinds are look-alike groups.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from guard import Activations, Guard, GuardConfig
from guard.relabel.items import Decision, FlaggedInput, QueueItem, State
from guard.storage.bundle import BundleStore, read_bundle, write_bundle

N_CLASSES, WIDTH = 5, 12
TARGET = 0
START = datetime(2026, 1, 1, tzinfo=UTC)
_MEANS = np.random.default_rng(7).normal(0, 3, (N_CLASSES, WIDTH))
_TRIGGERS = np.random.default_rng(8).normal(0, 1, (4, WIDTH))
_TRIGGERS /= np.linalg.norm(_TRIGGERS, axis=1, keepdims=True)


def world(n: int, seed: int, trigger: int | None = None, strength: float = 2.5) -> tuple[Activations, np.ndarray]:
    """Return activations and true labels of n inputs, with a trigger of some kind or clean."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(1 if trigger is not None else 0, N_CLASSES, n)
    means = _MEANS[labels]
    if trigger is not None:
        means = 0.8 * _MEANS[TARGET] + 0.2 * means + strength * _TRIGGERS[trigger]
    features = means + rng.normal(0, 1, (n, WIDTH))
    logits = -((features[:, None] - _MEANS) ** 2).sum(axis=2) / 4
    arrays = [array.astype(np.float32) for array in (logits, features, features[:, :6])]
    return Activations(arrays[0], arrays[1], {"early": arrays[2]}), labels


def fit_guard(n: int = 500, seed: int = 0, **settings: object) -> Guard:
    config = {"false_positive_rate": 0.05, "folds": 2, "n_neighbors": 10, **settings}
    return Guard.fit_activations(*world(n, seed), GuardConfig(**config))


def save_as_of_a_network(guard: Guard, root: Path, digest: str = "a" * 64) -> str:
    """Save a guard as one fitted with a suspect model would be, make it active, and return its digest."""
    stored = read_bundle(guard.save(root / ".fitted"))
    points = {"split": "fc", "depths": list(guard.reference.depths)}
    path = write_bundle(root, {**stored.document, "weights_digest": digest, "split_points": points}, stored.arrays)
    BundleStore(root).activate(path.name)
    return path.name


def flagged_input(
    activations: Activations, digest: str = "0" * 64, name: str = "0", audit_probability: float | None = None
) -> FlaggedInput:
    label = int(activations.predicted_labels[0])
    return FlaggedInput(
        request_id=hashlib.sha256(name.encode()).hexdigest()[:16],
        model="mnist",
        bundle_digest=digest,
        suspect_label=label,
        backup_label=None,
        backup_confidence=None,
        raw={"lof:features": 2.0},
        surprise={"lof:features": 3.0},
        combined=3.0,
        p_value=0.01,
        reason="odd",
        content_type="image/png",
        body=b"not read by the retrainer",
        inputs=np.zeros((1, 2, 2), dtype=np.float32),
        activations=activations,
        received_at=START,
        audit_probability=audit_probability,
    )


@dataclass
class Workspace:
    """Makes decided items and the decisions about them, without a queue."""

    digest: str = "0" * 64

    def __post_init__(self) -> None:
        self.items: list[QueueItem] = []
        self.decisions: list[Decision] = []

    def add(
        self,
        activations: Activations,
        labels: Sequence[int | None] | np.ndarray,
        *,
        is_poisoned: bool,
        reviewer: str | Callable[[int], str] = "ann",
        group: int | None = None,
        state: State = State.DECIDED,
        audit_probability: float | None = None,
    ) -> list[int]:
        """Decide every row; return the items' ids."""
        ids = []
        for row, label in enumerate(labels):
            item_id = len(self.items) + 1
            name = reviewer if isinstance(reviewer, str) else reviewer(row)
            decision = self.say(item_id, name, is_poisoned=is_poisoned, label=None if label is None else int(label))
            given = flagged_input(activations[row : row + 1], self.digest, str(item_id), audit_probability)
            self.items.append(
                QueueItem(
                    id=item_id,
                    state=state,
                    input=given,
                    group=group,
                    claimed_by=None,
                    lease_expires_at=None,
                    decision=decision,
                )
            )
            ids.append(item_id)
        return ids

    def say(
        self, item_id: int, reviewer: str, *, is_poisoned: bool, label: int | None, withdrawn: bool = False
    ) -> Decision:
        """Write down what a reviewer says of an item."""
        decision = Decision(
            id=len(self.decisions) + 1,
            item_id=item_id,
            reviewer=reviewer,
            is_poisoned=is_poisoned,
            true_label=label,
            decided_at=START + timedelta(seconds=len(self.decisions)),
            supersedes=None,
            withdrawn=withdrawn,
            note="",
        )
        self.decisions.append(decision)
        return decision
