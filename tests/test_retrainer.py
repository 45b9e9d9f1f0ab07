"""The retrainer with a real queue and real bundles: rounds, refusals, hostile reviewers, crashes, roll-back."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
from object_store_helpers import BUCKET
from queue_helpers import settled_items
from retrainer_helpers import fit_guard, flagged_input, save_as_of_a_network, world

from guard import Activations, Guard
from guard.cli import run
from guard.detection.detectors import DETECTORS
from guard.errors import BundleError, QueueUnavailable, RetrainingError, StoreUnavailable
from guard.relabel.items import Answer, State
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.rounds import Rounds
from guard.retrainer import worker
from guard.retrainer.candidate import Pair, fit_candidate, try_candidate, with_final
from guard.retrainer.gate import Check, Judgement
from guard.retrainer.material import gather
from guard.retrainer.promotion import Lineage
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.storage.bundle import JOURNAL, RETRAINER_LOCK, BundleStore, read_bundle
from guard.storage.stores import open_store

MODEL = "mnist"
STRONG = 4.0


class Clock:
    """Moves when told, and a little whenever it is read."""

    def __init__(self) -> None:
        self.now = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        self.now += timedelta(milliseconds=1)
        return self.now

    def forward(self, **by: float) -> None:
        self.now += timedelta(**by)


@dataclasses.dataclass
class Place:
    """A folder of bundles with an active one, and a queue."""

    root: Path
    queue: Queue
    clock: Clock
    guard: Guard
    digest: str

    @property
    def store(self) -> BundleStore:
        return BundleStore(self.root / "bundles")

    def traffic(self, n: int, seed: int, trigger: int | None = None) -> tuple[Activations, np.ndarray]:
        """Inputs that the guard flags, with true labels."""
        activations, labels = world(n, seed, trigger, STRONG)
        flagged = self.guard.scores(activations).is_poisoned
        return activations[flagged], labels[flagged]

    def passing(self, n: int, seed: int, trigger: int | None = None) -> tuple[Activations, np.ndarray]:
        """Inputs that the guard lets pass, with true labels."""
        activations, labels = world(n, seed, trigger, STRONG)
        passes = ~self.guard.scores(activations).is_poisoned
        return activations[passes], labels[passes]

    def enqueue(self, activations: Activations, group: int = 0, audit_probability: float | None = None) -> list[int]:
        inputs = [
            flagged_input(activations[row : row + 1], self.digest, audit_probability=audit_probability)
            for row in range(len(activations))
        ]
        ids = [item_id for item_id in self.queue.enqueue(inputs).ids if item_id is not None]
        self.queue.set_groups(dict.fromkeys(ids, group))
        return ids

    def decide(self, ids: list[int], labels: np.ndarray, *, is_poisoned: bool, reviewer: str = "ann") -> None:
        answers = [
            Answer(item_id=entry, is_poisoned=is_poisoned, true_label=int(label))
            for entry, label in zip(ids, labels, strict=True)
        ]
        self.queue.decide_many(reviewer, answers, also_free=True)

    def review(self, *, reviewer: str = "ann", triggers: tuple[int, ...] = (0, 1), n: int = 60, seed: int = 10) -> None:
        """Send traffic and answer it truly."""
        for trigger in triggers:
            activations, labels = self.traffic(n, seed + trigger, trigger)
            self.decide(self.enqueue(activations, 1000 * (trigger + 1)), labels, is_poisoned=True, reviewer=reviewer)
        activations, labels = self.traffic(20 * n, seed + 50)
        self.decide(self.enqueue(activations), labels, is_poisoned=False, reviewer=reviewer)

    def retrainer(self, **settings: object) -> Retrainer:
        return Retrainer(self.queue, self.root / "bundles", MODEL, RetrainerSettings(**settings))

    def step(self, **settings: object):
        with self.retrainer(**settings) as worker:
            return worker.step()


@pytest.fixture(scope="module")
def fitted() -> Guard:
    return fit_guard()


@pytest.fixture
def place(tmp_path, sqlite_template, fitted) -> Iterator[Place]:
    clock = Clock()
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    (tmp_path / "bundles").mkdir()
    digest = save_as_of_a_network(fitted, tmp_path / "bundles")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}", clock=clock) as queue:
        yield Place(tmp_path, queue, clock, fitted, digest)


@pytest.fixture(scope="module")
def pair(reviewed, fitted) -> Pair:
    """A guard and a good candidate, for tests that are about what is done with one."""
    with Queue.open(f"sqlite:///{reviewed / 'queue.db'}") as queue:
        items = settled_items(queue, MODEL)
        decisions = queue.decisions(limit=10_000)
    material = gather(fitted, items, decisions, RetrainerSettings())
    return with_final(fitted, fit_candidate(fitted, material), material)


@pytest.fixture
def quick(pair, monkeypatch) -> None:
    """Every round has the same candidate, and takes no time."""
    monkeypatch.setattr("guard.retrainer.worker.fit_candidate", lambda *_, **__: pair)


def rates(guard: Guard, seed: int = 900) -> tuple[float, float]:
    """False- and true-positive rate on 3,000 clean and 1,000 triggered inputs that nobody has seen."""
    clean = guard.scores(world(3000, seed)[0]).is_poisoned.mean()
    poisoned = [guard.scores(world(500, seed + 1 + kind, kind, STRONG)[0]).is_poisoned.mean() for kind in (0, 1)]
    return float(clean), float(np.mean(poisoned))


@pytest.fixture
def hold_out(request, monkeypatch):
    """Another draw of what a round holds out: what holds for one draw may be luck."""
    monkeypatch.setattr("guard.retrainer.material._key", lambda _guard: hashlib.sha256(bytes([request.param])).digest())
    return request.param


# --- a round ---


def test_look_at_a_queue_where_nothing_is_due_reads_no_image_and_no_tensor(place, monkeypatch):
    place.review()
    retrainer = Retrainer(
        place.queue, place.root / "bundles", MODEL, RetrainerSettings(enough_decisions=10_000, every_hours=0)
    )
    statements: list[str] = []
    sa.event.listen(place.queue.database.engine, "before_cursor_execute", lambda *event: statements.append(event[2]))
    with retrainer:
        assert retrainer.step() is None
    assert 3 < len(statements) < 12
    assert not [text for text in statements if "blobs" in text or "scores" in text]


def test_round_promotes_a_better_guard_and_marks_what_it_learned_from(place):
    place.review()
    finished = place.step()
    assert finished.outcome == "promoted", finished.report
    assert place.store.active_digest() == finished.candidate != place.digest
    again = Guard.load(place.store.active_path())
    fpr, tpr = rates(again)
    assert tpr > rates(place.guard)[1]
    assert fpr < 0.05 + 0.03
    trained = place.queue.items(state=State.TRAINED, limit=1000)
    learned = sum(finished.report["learned_from"].values())
    assert 0 < len(trained) == learned <= 8  # 2 % of about 100 clean images for each of four true labels
    last = Rounds(place.queue).last(MODEL)
    assert (last.outcome, last.candidate_digest, last.n_decisions) == (
        "promoted",
        finished.candidate,
        len(settled_items(place.queue, MODEL)),
    )
    assert any(line.startswith("poisoned inputs whose true label the guard finds: ") for line in last.report["changes"])
    assert finished.line == f"round 1: promoted {finished.candidate[:12]}"


def test_candidate_is_a_bundle_that_a_server_of_the_same_network_takes(place, quick):
    place.review()
    finished = place.step()
    parent, stored = (read_bundle(place.store.root / entry) for entry in (place.digest, finished.candidate))
    for name in ("weights_digest", "split_points", "class_names", "settings", "clean_images", "depths"):
        assert stored.document[name] == parent.document[name]
    assert stored.document["lineage"]["retrained_from"] == place.digest
    for name in ("labels", "reference.features", "reference.logits"):  # whole, for the rounds to come
        np.testing.assert_array_equal(stored.arrays[name], parent.arrays[name])
    # What serves has all clean images, and the guard that was measured in its place lacks the hold-outs.
    assert len(stored.arrays["clean_scores"]) == len(parent.arrays["clean_scores"])
    measured = read_bundle(place.store.root / stored.document["lineage"]["measured"])
    held_out = finished.report["held_out"]["clean_images"]
    assert len(measured.arrays["clean_scores"]) == len(parent.arrays["clean_scores"]) - held_out
    for name in ("retrained_from", "holdout_share", "locked_items", "learned"):
        assert measured.document["lineage"][name] == stored.document["lineage"][name]


def test_no_candidate_learns_from_a_hold_out_in_any_round(place, quick):
    place.review()
    first = place.step()
    place.review(seed=200)
    second = place.step()
    assert second.outcome in ("promoted", "refused")
    locked = [{*Lineage.read(place.store.root / entry.candidate).locked_items} for entry in (first, second)]
    assert locked[0] <= locked[1]
    trained = {item.id for item in place.queue.items(state=State.TRAINED, limit=2000)}
    assert not trained & locked[1]
    assert "locked" not in json.dumps(second.report)  # reviewers read it


def test_round_is_due_by_number_by_schedule_and_by_the_button(place, quick):
    assert place.step() is None
    place.review(n=12)
    settings = {"enough_decisions": 500, "every_hours": 24}
    assert place.step(**settings).report["why"].endswith("hours since the last round")
    assert place.step(**settings) is None
    activations, labels = place.traffic(30, 77, 0)
    place.decide(place.enqueue(activations), labels, is_poisoned=True)
    assert place.step(**settings) is None
    place.clock.forward(hours=25)
    assert place.step(enough_decisions=500, every_hours=0) is None
    assert place.step(**settings) is not None
    place.clock.forward(hours=25)
    assert place.step(**settings) is None  # nothing new
    activations, labels = place.traffic(3, 78, 0)
    assert len(labels) > 0
    place.decide(place.enqueue(activations), labels, is_poisoned=True)
    Rounds(place.queue).request(MODEL, "boss")
    assert place.step(**settings).report["why"] == "asked for by boss"
    assert place.step(**settings) is None
    assert place.step(enough_decisions=1, every_hours=0) is None


def test_same_answers_begin_no_second_round_until_something_changes(place, quick):
    place.review()
    first = place.step()
    assert first.outcome == "promoted"
    for _ in range(2):
        Rounds(place.queue).request(MODEL, "ann")
        assert place.step() is None
        assert Rounds(place.queue).take_request(MODEL) is None  # the wish is answered, not kept
    assert [entry.id for entry in Rounds(place.queue).all()] == [1]
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step(holdout_share=0.3) is not None  # another question to the same answers
    activations, labels = place.traffic(3, 78, 0)
    place.decide(place.enqueue(activations), labels, is_poisoned=True)
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step() is not None


def test_refused_answers_are_not_tried_again_and_failed_ones_are(place):
    activations, labels = place.traffic(20, 5, 0)
    place.decide(place.enqueue(activations)[:5], labels[:5], is_poisoned=True)
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step().outcome == "refused"
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step() is None
    (refused,) = Rounds(place.queue).all()
    failed = Rounds(place.queue).begin(MODEL, 5)
    Rounds(place.queue).finish(failed, "failed", refused.report)
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step().outcome == "refused"


def test_candidate_that_does_the_same_on_everything_measured_is_not_promoted(place, quick, monkeypatch):
    place.review()
    monkeypatch.setattr(
        worker, "try_candidate", lambda *args: (trial := try_candidate(*args))._replace(after=trial.before)
    )
    finished = place.step()
    assert finished.outcome == "refused"
    assert finished.report["reasons"] == [
        "the candidate does on every kind of input what the active guard does: nothing is gained by it."
    ]
    assert place.store.active_digest() == place.digest


def test_retrainer_says_in_its_folder_when_a_round_starts(place):
    place.step(enough_decisions=20)
    known = json.loads((place.store.root / RETRAINER_LOCK).read_text())
    assert known == {"model": MODEL, "enough_decisions": 20, "every_hours": 24.0, "min_decisions": 10}


# --- refusals ---


def test_too_few_decisions_are_refused_and_the_old_guard_stays(place):
    activations, labels = place.traffic(20, 5, 0)
    place.decide(place.enqueue(activations)[:5], labels[:5], is_poisoned=True)
    assert place.step() is None
    Rounds(place.queue).request(MODEL, "ann")
    finished = place.step()
    assert finished.line == "round 1: refused: 5 inputs are decided, min_decisions asks for 10."
    assert place.store.active_digest() == place.digest


def test_false_alarms_need_as_many_reviewers_as_min_reviewers_says(place, quick):
    place.review(n=12)
    settings = {"max_false_alarms_per_class": 100}
    reports = []
    for wanted in (1, 2, None):
        Rounds(place.queue).request(MODEL, "ann")
        reports.append(place.step(**settings, min_reviewers=wanted).report)
    alone = "false alarms without a second reviewer"
    assert [alone in report["left_out"] for report in reports] == [False, True, False]
    for name in ("ann", "bob"):  # now a second one can decide
        Reviewers(place.queue).add(name)
    Rounds(place.queue).request(MODEL, "ann")
    assert alone in place.step(**settings).report["left_out"]


def test_only_false_alarms_are_nothing_to_learn_from(place):
    place.review(triggers=())
    finished = place.step()
    assert finished.outcome == "refused"
    assert "nothing is left to learn from: " in finished.line
    assert " false alarms, which are only measured on" in finished.line


def test_round_without_anything_poisoned_says_what_could_not_be_measured(place):
    place.review(triggers=(), n=200, seed=20)
    finished = place.step(max_false_alarms_per_class=20)
    assert finished.outcome == "promoted"
    unmeasured = [check["text"] for check in finished.report["checks"] if check["passed"] is None]
    assert "no poisoned input of other groups is held out: nothing to measure by." in unmeasured


def call_triggers_clean(place: Place, n: int = 150) -> None:
    """Everything decided is a lie."""
    for trigger in (0, 1):
        activations, _ = place.traffic(n, trigger, trigger)
        lies = activations.predicted_labels
        place.decide(place.enqueue(activations, trigger + 1), lies, is_poisoned=False, reviewer="mallory")


def test_a_trigger_that_is_called_clean_is_not_learned_as_a_normal_sight(place):
    call_triggers_clean(place)
    assert place.step().outcome == "refused"
    assert place.store.active_digest() == place.digest


@pytest.mark.parametrize("hold_out", [0, 1, 2], indirect=True)
def test_lies_by_the_hundred_cost_the_default_detectors_some_points_and_no_more(place, hold_out):
    call_triggers_clean(place)
    finished = place.step(max_false_alarms_per_class=1000)
    assert finished.outcome == "promoted"  # a cap that only a person raises, and nothing poisoned is held out to tell
    assert finished.report["learned_from"]["false_alarms"] > 100
    (false_before, true_before), (false_after, true_after) = (
        rates(guard) for guard in (place.guard, Guard.load(place.root / "bundles" / finished.candidate))
    )
    assert true_after > true_before - 0.12  # 0.045 to 0.113 over six draws of what is held out; a seventh was refused
    assert false_after < false_before + 0.03


def test_false_alarms_that_let_other_inputs_pass_are_dropped_however_high_the_cap(place, monkeypatch):
    """Only the local outlier factor learns from false alarms; alone with the heads it can be moved."""
    few = {kind: DETECTORS[kind] for kind in ("lof", "disagreement", "demarcation")}
    monkeypatch.setattr("guard.detection.ensemble.DETECTORS", few)
    place.guard = fit_guard()
    save_as_of_a_network(place.guard, place.root / "bundles")
    call_triggers_clean(place, 600)
    finished = place.step(max_false_alarms_per_class=1000)
    assert finished.outcome == "refused"
    assert " false alarms that would let other inputs pass" in finished.line
    assert finished.report["learned_from"] == {"poisoned": 0, "false_alarms": 0}


def test_clean_inputs_called_poisoned_bear_each_other_out_no_more_than_chance_does(place):
    activations, labels = place.traffic(2500, 7)
    assert len(labels) > 40
    place.decide(place.enqueue(activations), (labels + 1) % 5, is_poisoned=True)
    finished = place.step()
    assert finished.outcome == "refused"
    assert " poisoned, unlike the others called so" in finished.line
    assert place.store.active_digest() == place.digest


def review_with_a_liar(place: Place, share: float) -> None:
    """Two reviewers answer as many poisoned inputs each; the second calls a share of them clean."""
    rng = np.random.default_rng(0)
    for reviewer, seed in (("ann", 10), ("mallory", 300)):
        for trigger in (0, 1):
            activations, labels = place.traffic(100, seed + trigger, trigger)
            ids = place.enqueue(activations, 1000 * (trigger + 1))
            lie = np.array([reviewer == "mallory" and rng.random() < share for _ in ids])
            for flag in (True, False):
                chosen = [entry for entry, is_lie in zip(ids, lie, strict=True) if is_lie != flag]
                message = labels if flag else activations.predicted_labels
                place.decide(chosen, message[lie != flag], is_poisoned=flag, reviewer=reviewer)


def test_a_hostile_reviewer_who_mislabels_a_fifth_does_not_get_a_worse_guard_promoted(place):
    review_with_a_liar(place, 0.2)
    finished = place.step()
    assert finished.outcome in ("promoted", "refused")
    (fpr, tpr), (old_fpr, old_tpr) = rates(Guard.load(place.store.active_path())), rates(place.guard)
    assert tpr > old_tpr - 0.02
    assert fpr < max(0.08, old_fpr + 0.02)


def test_a_hostile_reviewer_does_not_get_a_worse_guard_promoted_where_no_cap_holds(place):
    review_with_a_liar(place, 0.2)
    place.step(max_class_share=1, max_false_alarms_per_class=1000, max_reviewer_share=1)
    (fpr, tpr), (old_fpr, old_tpr) = rates(Guard.load(place.store.active_path())), rates(place.guard)
    assert tpr > old_tpr - 0.02
    assert fpr < max(0.08, old_fpr + 0.02)


def test_round_learns_from_misses_and_measures_both_guards_on_the_traffic(place):
    place.queue.change_settings(max_audits_per_hour=1000)
    place.review()
    missed, labels = place.passing(1500, 77, 1)
    assert len(labels) > 25
    place.decide(place.enqueue(missed, audit_probability=0.5), labels, is_poisoned=True)
    clean, labels = place.passing(150, 78)
    place.decide(place.enqueue(clean, audit_probability=0.1), labels, is_poisoned=False)
    finished = place.step()
    assert finished.outcome == "promoted", finished.report
    traffic, checks = finished.report["traffic"], {entry["name"]: entry for entry in finished.report["checks"]}
    assert len(labels) - 5 <= traffic["clean_audits"] <= len(labels)  # a few look like the attack
    assert traffic["misses"] == finished.report["held_out"]["misses"] > 1
    assert traffic["detection_rate"]["after"] > traffic["detection_rate"]["before"]
    assert traffic["false_positive_rate"]["after"] < 0.1
    assert checks["held-out misses"]["before"] == 0
    assert checks["held-out misses"]["passed"] is True
    assert rates(Guard.load(place.store.active_path()))[1] > rates(place.guard)[1] - 0.02
    assert any(
        line.startswith("poisoned inputs flagged that were missed before: 0 of ") for line in finished.report["changes"]
    )


def test_a_reviewer_who_lies_about_audits_does_not_get_a_worse_guard_promoted(place):
    """Clean audits called poisoned, with a wrong label, and misses called clean, beside another's true answers."""
    place.queue.change_settings(max_audits_per_hour=1000)
    place.review()
    clean, labels = place.passing(80, 78)
    place.decide(place.enqueue(clean, audit_probability=0.02), (labels + 1) % 5, is_poisoned=True, reviewer="mallory")
    missed, _ = place.passing(1500, 77, 1)
    lies = missed.predicted_labels
    place.decide(place.enqueue(missed, audit_probability=0.02), lies, is_poisoned=False, reviewer="mallory")
    finished = place.step()
    assert finished.report["left_out"]["poisoned, unlike the others called so"] > 40
    assert finished.report["left_out"]["clean audits, which are only measured on"] > 15
    (fpr, tpr), (old_fpr, old_tpr) = rates(Guard.load(place.store.active_path())), rates(place.guard)
    assert tpr > old_tpr - 0.02
    assert fpr < max(0.08, old_fpr + 0.02)


def test_reviewers_who_contradict_each_other_stop_the_round(place, quick):
    place.review()
    items = settled_items(place.queue, MODEL)
    for item in items[-30:]:  # false alarms: what is poisoned is enough to learn from
        place.queue.supersede("mallory", item.decision.id, is_poisoned=not item.decision.is_poisoned, true_label=0)
    finished = place.step()
    assert finished.outcome == "refused"
    assert "reviewers agree on 0.0 % of 30 inputs" in finished.line
    assert finished.report["left_out"]["reviewers disagree"] == 30
    Rounds(place.queue).request(MODEL, "boss")
    assert place.step(leave_out_reviewers=("mallory",)).outcome in ("promoted", "refused")


def test_a_worse_candidate_is_refused_with_the_reason_and_kept(place, pair, monkeypatch):
    place.review()
    calls_all_clean = dataclasses.replace(pair.candidate, clean_scores=pair.candidate.clean_scores + 1e6)
    worse = pair._replace(candidate=calls_all_clean)
    monkeypatch.setattr("guard.retrainer.worker.fit_candidate", lambda *_, **__: worse)
    finished = place.step()
    assert finished.outcome == "refused"
    assert "held-out poisoned inputs of" in finished.report["reasons"][0]
    assert place.store.active_digest() == place.digest
    kept = {entry.digest: entry.is_active for entry in place.store.entries()}
    measured = Lineage.read(place.store.root / finished.candidate).measured
    assert kept == {place.digest: True, finished.candidate: False, measured: False}
    assert not place.queue.items(state=State.TRAINED)
    assert Rounds(place.queue).last(MODEL).report["reasons"] == finished.report["reasons"]


def test_items_of_another_network_are_left_out(place, fitted):
    place.review()
    other = save_as_of_a_network(fitted, place.root / "bundles", "b" * 64)
    assert place.store.active_digest() == other
    finished = place.step()
    assert finished.outcome == "refused"
    assert "nothing is left to learn from: " in finished.line
    assert "flagged by a guard of another network" in finished.line


def test_a_round_that_fails_says_why_and_the_next_goes_on(place, quick, monkeypatch):
    place.review()
    with monkeypatch.context() as patch:
        patch.setattr("guard.retrainer.worker.fit_candidate", lambda *_, **__: 1 / 0)
        finished = place.step()
    assert finished.line == "round 1: failed: ZeroDivisionError: division by zero"
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step().outcome == "promoted"


def test_a_rate_that_the_hold_out_leaves_too_few_images_for_fails_with_what_to_do(tmp_path):
    guard = fit_guard(32, folds=None)
    (tmp_path / "bundles").mkdir()
    digest = save_as_of_a_network(guard, tmp_path / "bundles")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as queue:
        place = Place(tmp_path, queue, Clock(), guard, digest)
        place.review(n=150)
        Rounds(queue).request(MODEL, "ann")
        finished = place.step(holdout_share=0.5)
    assert "needs at least 19 clean images, got 1" in finished.line
    assert "are held out: lower holdout_share." in finished.line


# --- canary and roll-back ---


def waiting_canary(place, n=10):
    place.review()
    finished = place.step(canary_inputs=n)
    assert finished.outcome == "canary"
    assert place.store.active_digest() == place.digest
    assert place.step(canary_inputs=n) is None
    return finished


def test_canary_is_promoted_after_enough_further_inputs(place, quick):
    finished = waiting_canary(place)
    activations, _ = place.traffic(80, 400, 1)
    place.enqueue(activations[:9])
    assert place.step(canary_inputs=10) is None
    place.enqueue(activations[9:12])
    ended = place.step(canary_inputs=10)
    assert (ended.round_id, ended.outcome, ended.candidate) == (finished.round_id, "promoted", finished.candidate)
    assert ended.report["canary"]["flagged_since"] == 10
    assert place.queue.items(state=State.TRAINED)


def test_canary_is_refused_when_it_would_let_pass_what_is_flagged(place, quick, monkeypatch):
    waiting_canary(place)
    place.enqueue(place.traffic(80, 400, 1)[0][:10])
    failed = Judgement((Check("canary", False, "half of it would pass."),))
    monkeypatch.setattr("guard.retrainer.worker.compare_on", lambda *_: failed)
    ended = place.step(canary_inputs=10)
    assert ended.line.endswith("half of it would pass.")
    assert ended.outcome == "refused"
    assert place.store.active_digest() == place.digest


def test_canary_is_judged_by_what_there_is_after_its_time(place, quick):
    waiting_canary(place)
    place.clock.forward(hours=25)
    assert place.step(canary_inputs=10).outcome == "promoted"


def test_canary_is_dropped_when_another_bundle_became_active(place, quick, fitted):
    waiting_canary(place)
    other = save_as_of_a_network(fitted, place.root / "bundles", "b" * 64)
    Rounds(place.queue).request(MODEL, "ann")
    ended = place.step(canary_inputs=10)
    assert ended.outcome == "failed"
    assert "another bundle became active" in ended.line
    assert place.store.active_digest() == other


def test_roll_back_after_a_promotion_gives_the_old_guard_and_rounds_go_on_from_it(place, quick):
    place.review()
    promoted = place.step().candidate
    assert run(["bundle", "rollback", "--bundles", str(place.store.root)]) == 0
    assert place.store.active_digest() == place.digest
    assert place.step() is None
    Rounds(place.queue).request(MODEL, "ann")
    again = place.step()
    assert again.report["parent"] == place.digest
    assert again.outcome == "promoted"
    assert again.candidate == promoted  # the same answers, the same guard


# --- crashes ---

#: Runs a round in a child that dies by SIGKILL at one of the calls that write, for every case on stdin.
CRASH = """
import json, os, signal, sys
from pathlib import Path
import scipy.optimize, scipy.stats, sklearn.metrics, sklearn.svm  # once, and not in every child
import guard.retrainer.worker as worker
from guard.storage.bundle import BundleStore
from guard.detection.pipeline import Guard
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.retrainer.candidate import Pair
from guard.retrainer.settings import RetrainerSettings

places = {
    "candidate": (worker, "write_candidate"),
    "journal": (BundleStore, "begin_promotion"),
    "activate": (BundleStore, "activate"),
    "trained": (Queue, "mark_trained"),
    "finish": (Rounds, "finish"),
    "clean up": (BundleStore, "end_promotion"),
}

def dying(function, when):
    def call(*args, **kwargs):
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)
    return call

pair = Pair(*map(Guard.load, sys.argv[1:3]))
for name, step, when in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        root = Path(name)
        worker.fit_candidate = lambda *_, **__: pair
        owner, attribute = places[step]
        setattr(owner, attribute, dying(getattr(owner, attribute), when))
        settings = RetrainerSettings(enough_decisions=1)
        with Queue.open(f"sqlite:///{root / 'queue.db'}") as queue:
            with worker.Retrainer(queue, root / "bundles", "mnist", settings) as retrainer:
                retrainer.step()
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
#: Where it dies, and whether the new bundle is active then.
CRASHES = {
    ("candidate", "after"): False,
    ("journal", "before"): False,
    ("journal", "after"): False,
    ("activate", "after"): True,
    ("trained", "after"): True,
    ("finish", "after"): True,
    ("clean up", "after"): True,
}


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory, fitted) -> Path:
    """A folder with bundles and a queue that is due for a round; copied by every test that crashes."""
    root = tmp_path_factory.mktemp("reviewed")
    (root / "bundles").mkdir()
    digest = save_as_of_a_network(fitted, root / "bundles")
    with Queue.open(f"sqlite:///{root / 'queue.db'}") as queue:
        Place(root, queue, Clock(), fitted, digest).review()
    return root


@pytest.fixture(scope="module")
def crashed(reviewed, pair, tmp_path_factory) -> dict[tuple[str, str], Path]:
    """A copy of the folder per case, left as the dead process left it."""
    top = tmp_path_factory.mktemp("crashed")
    roots = {case: top / "-".join(case) for case in CRASHES}
    for root in roots.values():
        shutil.copytree(reviewed, root)
    guards = [str(entry.save(top / "guards")) for entry in pair]
    cases = json.dumps([[str(root), *case] for case, root in roots.items()])
    done = subprocess.run(
        [sys.executable, "-c", CRASH, *guards],
        input=cases,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(CRASHES), done.stderr
    return roots


@pytest.mark.parametrize("case", CRASHES, ids=" ".join)
def test_kill_at_any_step_leaves_the_old_or_the_new_bundle_and_the_next_start_puts_it_right(crashed, reviewed, case):
    root, is_promoted = crashed[case], CRASHES[case]
    store, old = BundleStore(root / "bundles"), BundleStore(reviewed / "bundles").active_digest()
    Guard.load(store.active_path())  # whole, whichever it is
    assert (store.active_digest() != old) == is_promoted
    with (
        Queue.open(f"sqlite:///{root / 'queue.db'}") as queue,
        Retrainer(queue, root / "bundles", MODEL, RetrainerSettings(enough_decisions=0, every_hours=0)) as worker,
    ):
        assert worker.step() is None
        last = worker.rounds.last(MODEL)
        assert last.outcome == ("promoted" if is_promoted else "failed")
        assert bool(queue.items(state=State.TRAINED)) == is_promoted
        if is_promoted:
            assert last.candidate_digest == store.active_digest()
            assert last.report["changes"]
            assert store.roll_back() == old
    assert not (root / "bundles" / JOURNAL).exists()
    assert not list((root / "bundles").glob(".candidate-*"))


def test_a_full_disk_while_the_journal_is_written_fails_the_round_and_changes_nothing(place, quick, monkeypatch):
    place.review()

    def full(*_):
        raise BundleError("no room")

    monkeypatch.setattr(BundleStore, "begin_promotion", full)
    finished = place.step(enough_decisions=1)
    assert finished.line.endswith("no room")
    assert finished.outcome == "failed"
    assert place.store.active_digest() == place.digest


def test_a_damaged_journal_is_refused_with_what_to_do(place):
    (place.store.root / JOURNAL).write_text("{")
    with pytest.raises(BundleError, match=r"\.promotion\.json is damaged\. .* then remove the file\.$"):
        place.step()


def test_a_round_switches_below_a_url_and_another_machine_finishes_what_was_begun(place, quick, s3, monkeypatch):
    url = f"s3://{BUCKET}/retrained"
    place.review()
    store = open_store(url)
    shutil.copytree(place.store.root / place.digest, store.root / place.digest)
    store.publish(place.digest)
    store.activate(place.digest)

    def step(machine: str):
        monkeypatch.setenv("GUARD_CACHE_DIR", str(place.root / machine))
        settings = RetrainerSettings(enough_decisions=1, every_hours=0)
        with Retrainer(place.queue, url, MODEL, settings) as retrainer:
            return retrainer.step()

    def dies(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Queue, "mark_trained", dies)
        with pytest.raises(KeyboardInterrupt):
            step("first")
    candidate = store.active_digest()
    assert candidate != place.digest
    assert not place.queue.items(state=State.TRAINED)
    assert store.begun_promotion() is not None
    assert step("second") is None
    assert Rounds(place.queue).last(MODEL).outcome == "promoted"
    assert place.queue.items(state=State.TRAINED)
    assert store.begun_promotion() is None
    assert Guard.load(store.fetch(candidate)).digest == candidate
    assert store.roll_back() == place.digest
    s3.go_down()
    with pytest.raises(StoreUnavailable, match="no connection"):
        step("second")


def test_run_goes_on_when_the_queue_is_away_for_a_while(place, monkeypatch, caplog):
    stop, calls = threading.Event(), []

    def step(self):
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        raise QueueUnavailable("database gone")

    monkeypatch.setattr(Retrainer, "step", step)
    with place.retrainer() as worker:
        worker.run(0.01, stop)
    assert len(calls) == 3
    assert "no round: database gone" in caplog.text


def test_one_retrainer_per_folder_at_a_time(place):
    with place.retrainer(), pytest.raises(RetrainingError, match=r"^another retrainer works on "), place.retrainer():
        pass
    with place.retrainer():
        pass


def test_retrainer_without_a_folder_of_bundles_is_refused(place):
    with (
        pytest.raises(RetrainingError, match=r"No such file or directory\. A folder of bundles is needed"),
        Retrainer(place.queue, place.root / "none", MODEL),
    ):
        pass


# --- command line ---


def arguments(place, *more):
    queue = f"sqlite:///{place.root / 'queue.db'}"
    return ["retrainer", "--queue", queue, "--model", MODEL, "--bundles", str(place.store.root), *more]


def test_command_runs_one_round_at_low_priority_and_says_what_changed(place, quick, capsys, monkeypatch):
    niceness = []
    monkeypatch.setattr(os, "nice", niceness.append)
    assert run(arguments(place, "--once")) == 0
    assert capsys.readouterr().out == "nothing to do: no round is due\n"
    place.review()
    assert run(arguments(place, "--once", "--now")) == 0
    out = capsys.readouterr().out
    assert out.startswith("round 1: promoted ")
    assert "  clean images answered rightly: " in out
    assert niceness == [15, 15]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--interval", "0"], "--interval must be above 0 seconds, got 0."),
        (["--now"], "--now goes with --once. Add --once, or press the button on the review page."),
        (
            ["--once", "--enough-decisions", "-1"],
            "enough_decisions: input should be greater than or equal to 0, got -1.",
        ),
        (["--once", "--settings", "no.toml"], "settings file no.toml cannot be read: "),
    ],
)
def test_command_refuses_wrong_settings_in_one_line(place, capsys, more, message):
    assert run(arguments(place, *more)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_report_is_json_and_keeps_no_image(place, quick):
    place.review()
    report = place.step().report
    assert json.loads(json.dumps(report)) == report
    assert len(json.dumps(report)) < 20_000


# --- the demarcation ---


@pytest.mark.parametrize("hold_out", [0, 1, 2], indirect=True)
def test_round_with_poisoned_decisions_draws_a_line(place, hold_out):
    place.review()
    finished = place.step()
    assert finished.report["anomalies"] > finished.report["learned_from"]["poisoned"]  # those over a class's cap too
    assert finished.outcome == "promoted"
    candidate = Guard.load(place.store.active_path())
    assert candidate.ensemble.names[-1] == "demarcation:features"
    missed, missed_before = (
        np.array([(~guard.scores(world(1000, 950 + kind, kind, STRONG)[0]).is_poisoned).mean() for kind in range(4)])
        for guard in (candidate, place.guard)
    )
    learned, *others = 1, 0, 2, 3  # the other answers are held out: those of the larger group never are
    assert missed[learned] < 0.5 * missed_before[learned]
    assert missed[others].mean() < missed_before[others].mean() + 0.04  # -0.01 to 0.037 over seven draws


def test_round_without_a_person_learns_from_what_was_flagged(place):
    for trigger in (0, 1):
        place.enqueue(place.traffic(60, 100 + trigger, trigger)[0])
    place.enqueue(place.traffic(1200, 60)[0])
    assert place.step(enough_flagged=50) is None  # a person is asked for by default
    assert place.step(demarcation="purified", enough_flagged=1000) is None
    settings = {"demarcation": "purified", "enough_flagged": 50}
    finished = place.step(**settings)
    assert finished.report["why"] == "50 further flagged inputs"
    assert finished.outcome == "promoted", finished.line
    assert 10 <= finished.report["anomalies"] < 100
    assert finished.report["learned_from"] == {"poisoned": 0, "false_alarms": 0}
    (fpr, tpr), (_, old_tpr) = rates(Guard.load(place.store.active_path())), rates(place.guard)
    assert tpr > old_tpr
    assert fpr < 0.08
    assert place.step(**settings) is None


def test_round_without_the_demarcation_and_too_few_anomalies_draw_no_line(place):
    place.review()
    finished = place.step(demarcation="off")
    assert finished.report["anomalies"] == 0
    assert "demarcation:features" not in Guard.load(place.store.active_path()).ensemble.names
    Rounds(place.queue).request(MODEL, "ann")
    assert place.step(min_anomalies=5000).report["anomalies"] == 0
