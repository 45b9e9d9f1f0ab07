"""Reviewers who lie, on a real backdoored network, through the real queue and retrainer with its default settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from retrainer_helpers import flagged_input, save_as_of_a_network

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.storage.bundle import BundleStore

MODEL = "mnist"
#: The worst that lies may do to the true-positive rate.
ALLOWED = 0.02


@pytest.fixture(scope="module")
def guard(fitted_guard, suspect, clean_split) -> Guard:
    """The session's guard with two folds, at a rate of 0.01, because it is fitted again for every round."""
    validation = clean_split.validation
    activations = suspect.activations(validation.images)
    config = GuardConfig(false_positive_rate=0.01, folds=2)
    return Guard.fit_activations(activations, validation.labels, config)


@pytest.fixture(scope="module", autouse=True)
def heads_once() -> Iterator[None]:
    """Train a head once per training set: the same rows and seed give the same head."""
    known: dict[bytes, object] = {}
    fit = HeadDisagreement.fit

    def remembered(self, activations, labels):
        key = activations.at(self.depth).tobytes() + labels.astype(np.int64).tobytes() + self.depth.encode()
        if key not in known:
            known[key] = fit(self, activations, labels).head_
        self.head_ = known[key]
        return self

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadDisagreement, "fit", remembered)
        yield


@pytest.fixture(scope="module")
def flagged(guard, triggered_activations) -> Activations:
    """Half of the triggered inputs, those that the guard flags: what an attacker may lie about."""
    half = triggered_activations[np.arange(0, len(triggered_activations), 2)]
    return half[guard.scores(half).is_poisoned]


@pytest.fixture(scope="module")
def unseen(triggered_activations) -> Activations:
    """The other half: what the guard is measured on."""
    return triggered_activations[np.arange(1, len(triggered_activations), 2)]


def spread(guard: Guard, activations: Activations, n: int) -> Activations:
    """Inputs pairwise farther apart than a clean image of the class usually is from its k-th neighbour."""
    label = int(activations.predicted_labels[0])
    clean = guard.reference.features[guard.reference_labels == label].astype(np.float64)
    distances = np.sort(np.linalg.norm(clean[:, None] - clean, axis=2), axis=1)
    radius = np.median(distances[:, min(guard.config.n_neighbors, len(clean) - 1)])
    kept: list[int] = []
    for row, features in enumerate(activations.features.astype(np.float64)):
        if len(kept) < n and all(np.linalg.norm(features - activations.features[other]) > radius for other in kept):
            kept.append(row)
    return activations[np.array(kept)]


class Office:
    """A folder of bundles, a queue and its reviewers."""

    def __init__(self, root: Path, guard: Guard, reviewers: tuple[str, ...] = ("mallory",)) -> None:
        (root / "bundles").mkdir()
        self.store = BundleStore(root / "bundles")
        self.digest = save_as_of_a_network(guard, self.store.root)
        self.queue = Queue.open(f"sqlite:///{root / 'queue.db'}")
        for name in reviewers:
            Reviewers(self.queue).add(name)

    def say(
        self, activations: Activations, labels: np.ndarray, *, is_poisoned: bool, reviewer: str = "mallory"
    ) -> list:
        rows = [flagged_input(activations[row : row + 1], self.digest) for row in range(len(activations))]
        ids = [item_id for item_id in self.queue.enqueue(rows).ids if item_id is not None]
        self.queue.claim_items(reviewer, ids)
        answers = [
            Answer(item_id=item_id, is_poisoned=is_poisoned, true_label=int(label))
            for item_id, label in zip(ids, labels, strict=True)
        ]
        return self.queue.decide_many(reviewer, answers, also_free=True)

    def confirm(self, decisions: list, reviewer: str) -> None:
        for decision in decisions:
            self.queue.supersede(
                reviewer, decision.id, is_poisoned=decision.is_poisoned, true_label=decision.true_label
            )

    def retrain(self, **settings: object):
        Rounds(self.queue).request(MODEL, "boss")
        with Retrainer(self.queue, self.store.root, MODEL, RetrainerSettings(**settings)) as worker:
            return worker.step()

    def rate(self, activations: Activations) -> float:
        return float(Guard.load(self.store.active_path()).scores(activations).is_poisoned.mean())


@pytest.mark.parametrize("lies", [15, 60, 175])
def test_a_lone_reviewer_who_calls_a_trigger_clean_changes_nothing_much(tmp_path, guard, flagged, unseen, lies):
    """Each lie is a look-alike group of its own, so no cap per group holds."""
    office = Office(tmp_path, guard)
    before = office.rate(unseen)
    chosen = spread(guard, flagged, lies)
    assert len(chosen) == lies
    office.say(chosen, chosen.predicted_labels, is_poisoned=False)
    office.retrain()
    assert office.rate(unseen) >= before - ALLOWED


def test_two_accounts_that_back_each_others_lies_change_nothing_much(tmp_path, guard, flagged, unseen):
    office = Office(tmp_path, guard, ("mallory", "trudy"))
    before = office.rate(unseen)
    chosen = spread(guard, flagged, 120)
    for first, second, rows in (("mallory", "trudy", slice(0, 60)), ("trudy", "mallory", slice(60, 120))):
        selected = chosen[rows]
        office.confirm(office.say(selected, selected.predicted_labels, is_poisoned=False, reviewer=first), second)
        office.retrain()
        assert office.rate(unseen) >= before - ALLOWED


@pytest.mark.parametrize("lies", [15, 60])
def test_clean_inputs_called_poisoned_with_the_attackers_label_change_nothing_much(
    tmp_path, guard, suspect, clean_split, flagged, unseen, lies
):
    """Heads that learn this would expect the attacker's class everywhere, and be surprised by the trigger no more."""
    office = Office(tmp_path, guard)
    before, target = office.rate(unseen), int(flagged.predicted_labels[0])
    clean = suspect.activations(clean_split.train.images[:4000])
    clean = clean[clean.predicted_labels != target]
    suspicious = clean[np.argsort(guard.scores(clean).p_values, kind="stable")[:lies]]
    office.say(suspicious, np.full(lies, target), is_poisoned=True)
    office.retrain()
    assert office.rate(unseen) >= before - ALLOWED
