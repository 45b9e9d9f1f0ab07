"""The queue over both databases: what goes in comes out, who may have what, and what an answer changes."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from datetime import datetime, timedelta, timezone

import numpy as np
import pytest
import sqlalchemy as sa
from queue_helpers import N_CLASSES, START, Clock, flagged, settled_items

from guard import Activations
from guard.errors import (
    AlreadyDecided,
    BodyTooLarge,
    ConfigError,
    DataError,
    ItemGone,
    LeaseExpired,
    QueueError,
    TooManyHeld,
    UnknownLabel,
)
from guard.relabel.items import Answer, QueueItem, State
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings, QueueWaits

OpenQueue = Callable[..., Queue]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_queue(queue_url: str, clock: Clock) -> Iterator[OpenQueue]:
    """Open the test's queue with some settings; several times if asked."""
    opened: list[Queue] = []

    def open_it(**settings: float) -> Queue:
        opened.append(Queue.open(queue_url, QueueSettings(**settings) if settings else None, clock=clock))
        return opened[-1]

    yield open_it
    for queue in opened:
        queue.close()


@pytest.fixture
def queue(open_queue: OpenQueue) -> Queue:
    return open_queue()


def ids_of(items: list[QueueItem]) -> list[int]:
    return [item.id for item in items]


def decide(queue: Queue, item_id: int, reviewer: str = "ana", *, is_poisoned: bool = True, label: int | None = 5):
    """Claim and answer."""
    assert queue.claim_items(reviewer, [item_id])
    return queue.decide(reviewer, item_id, is_poisoned=is_poisoned, true_label=label)


# --- in and out ---


def test_enqueue_then_get_gives_back_every_field(queue):
    given = flagged(7)
    [item_id] = queue.enqueue([given]).ids
    item = queue.get(item_id)
    assert item.state is State.PENDING
    assert (item.group, item.claimed_by, item.lease_expires_at, item.decision) == (None, None, None, None)
    for field in fields(given):
        if field.name not in ("inputs", "activations"):
            assert getattr(item.input, field.name) == getattr(given, field.name), field.name
    np.testing.assert_array_equal(item.input.inputs, given.inputs)
    assert list(item.input.activations.depths) == ["late", "early"]  # in the order of execution
    for (_, got), (_, expected) in zip(item.input.activations.items(), given.activations.items(), strict=True):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float32


def test_enqueue_without_backup_and_with_odd_text_is_kept_as_it_is(queue):
    given = flagged(1, backup_label=None, backup_confidence=None, reason="<b>'\u2028é\n", body=b"", content_type="")
    item = queue.get(queue.enqueue([given]).ids[0])
    assert (item.input.backup_label, item.input.backup_confidence) == (None, None)
    assert (item.input.reason, item.input.body) == ("<b>'\u2028é\n", b"")


def test_enqueue_of_nothing_is_nothing(queue):
    assert queue.enqueue([]).ids == ()


def test_enqueue_takes_numpy_numbers(queue):
    item = queue.get(queue.enqueue([flagged(0, suspect_label=np.int64(3), combined=np.float32(2.5))]).ids[0])
    assert (item.input.suspect_label, item.input.combined) == (3, 2.5)


def test_enqueue_numbers_items_in_order_and_never_again(queue, clock):
    first = queue.enqueue([flagged(number) for number in range(3)]).ids
    assert list(first) == sorted(first)
    clock.advance(days=200)
    queue.sweep()
    queue.sweep()
    assert queue.enqueue([flagged(4)]).ids[0] > first[-1]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"received_at": datetime(2026, 3, 1)}, "UTC"),
        ({"received_at": START.astimezone(timezone(timedelta(hours=1)))}, "UTC"),
        ({"inputs": np.zeros((4, 4), np.float32)}, "float32"),
        ({"inputs": np.zeros((1, 4, 4))}, "float32"),
        ({"suspect_label": N_CLASSES}, "suspect_label"),
        ({"suspect_label": -1}, "suspect_label"),
        ({"backup_label": N_CLASSES}, "backup_label"),
        ({"p_value": math.nan}, "p_value"),
        ({"combined": math.inf}, "combined"),
        ({"activations": Activations(np.zeros((2, 10), np.float32), np.zeros((2, 3), np.float32))}, "one row"),
    ],
)
def test_flagged_input_that_breaks_a_rule_is_refused(change, rule):
    with pytest.raises(DataError, match=rule):
        flagged(0, **change)


def test_enqueue_body_too_large_is_refused_and_nothing_is_stored(open_queue):
    queue = open_queue(max_body_bytes=10)
    with pytest.raises(BodyTooLarge, match=r"max_body_bytes is 10, got a body of 11 bytes \(input 1 of 3\)") as caught:
        queue.enqueue([flagged(0, body=b"x" * 10), flagged(1, body=b"x" * 11), flagged(2, body=b"x" * 12)])
    assert caught.value.positions == (1, 2)
    assert queue.counts().held_items == 0
    assert queue.enqueue([flagged(0, body=b"x" * 10)]).ids[0] is not None


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_items", 0), ("max_items", 1.5), ("quorum", True), ("lease_s", math.inf), ("retention_days", -1)],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        QueueSettings(**{name: value})


def test_settings_belong_to_the_queue_and_a_change_counts_at_once_for_every_process(open_queue, queue_url):
    first, second = open_queue(), open_queue()
    assert first.settings == second.settings == QueueSettings()
    assert second.change_settings(quorum=2, max_items=3, max_held=None) == QueueSettings(quorum=2, max_items=3)
    assert first.settings == open_queue().settings == QueueSettings(quorum=2, max_items=3)
    assert first.enqueue([flagged(number) for number in range(4)]).dropped == 1
    [item] = first.claim("ana")
    first.decide("ana", item.id, is_poisoned=True, true_label=5)
    assert first.get(item.id).state is State.PENDING  # the quorum is two
    second.change_settings(max_body_bytes=9, lease_s=1)
    with pytest.raises(BodyTooLarge, match=r"^max_body_bytes is 9, got .* guard review settings --max-body-bytes"):
        first.enqueue([flagged(9, body=b"x" * 10)])
    with pytest.raises(ConfigError, match=r"^the queue has no setting 'quorums': it has max_items, "):
        first.change_settings(quorums=3)
    for name, value in (("quorum", 0), ("retention_days", 1e300), ("lease_s", 1e12), ("max_held", 2**70)):
        with pytest.raises(ConfigError, match=rf"^{name} must be "):
            first.change_settings(**{name: value})
    first.change_settings(**asdict(QueueSettings()))
    assert second.settings == QueueSettings()


def test_settings_that_somebody_broke_are_told_and_can_be_set_anew(queue):
    with queue.database.writing() as connection:
        connection.execute(sa.text("UPDATE ledger SET settings = '[1]'"))
    with pytest.raises(ConfigError, match="guard review settings"):
        queue.claim("ana")
    assert queue.change_settings(quorum=2).quorum == 2
    assert queue.claim("ana") == []


def test_wait_of_a_server_comes_from_its_environment(monkeypatch):
    assert QueueWaits.from_environment().enqueue_timeout_s == 20.0  # conftest's
    monkeypatch.delenv("GUARD_QUEUE_TIMEOUT_S")
    assert QueueWaits.from_environment() == QueueWaits(enqueue_timeout_s=0.25, wait_s=10.0)
    monkeypatch.setenv("GUARD_QUEUE_TIMEOUT_S", "soon")
    with pytest.raises(ConfigError, match=r"^GUARD_QUEUE_TIMEOUT_S must be seconds above 0, got 'soon'\.$"):
        QueueWaits.from_environment()


# --- claims ---


def test_claim_orders_by_suspicion_age_or_group(queue):
    inputs = [
        flagged(0, p_value=0.02, received_at=START),
        flagged(1, p_value=0.01, combined=1.0, received_at=START + timedelta(seconds=1)),
        flagged(2, p_value=0.01, combined=9.0, received_at=START - timedelta(seconds=1)),
    ]
    low, middle, high = queue.enqueue(inputs).ids
    queue.set_groups({low: 4})
    for order, expected in {
        "suspicion": [high, middle, low],
        "age": [high, low, middle],
        "group": [low, high, middle],
    }.items():
        assert ids_of(queue.claim("ana", 3, order=order)) == expected, order
        queue.release("ana", [low, middle, high])
    assert ids_of(queue.claim("ana", 3, group=4)) == [low]


def test_claim_gives_an_item_to_one_reviewer_only(queue, clock):
    queue.enqueue([flagged(number) for number in range(3)])
    [item] = queue.claim("ana")
    assert (item.state, item.claimed_by) == (State.CLAIMED, "ana")
    assert item.lease_expires_at == clock.now + timedelta(seconds=600)
    rest = queue.claim("ben", 5)
    assert len(rest) == 2
    assert item.id not in ids_of(rest)
    assert queue.claim("cleo", 5) == []


def test_claim_items_takes_those_that_are_free(queue):
    a, b, c = queue.enqueue([flagged(number) for number in range(3)]).ids
    queue.claim_items("ben", [a])
    decide(queue, b)
    assert ids_of(queue.claim_items("ana", [a, b, c, 999])) == [c]
    assert ids_of(queue.claim_items("ana", [c])) == [c]  # again: it is the reviewer's already


def test_skip_shows_the_item_last_to_this_reviewer_only(queue, clock):
    last, first = queue.enqueue([flagged(0), flagged(1)]).ids
    queue.claim("ana")
    queue.skip("ana", first)
    assert ids_of(queue.claim("ben")) == [first]
    queue.release("ben", [first])
    assert ids_of(queue.claim("ana", 5)) == [last, first]
    for item_id in (last, first):
        clock.advance(seconds=1)
        queue.skip("ana", item_id)
    assert ids_of(queue.claim("ana", 5)) == [last, first]  # the longest ago first


def test_release_and_renew_touch_only_what_is_the_reviewers(queue, clock):
    a, b = queue.enqueue([flagged(0), flagged(1)]).ids
    queue.claim_items("ana", [a])
    queue.claim_items("ben", [b])
    clock.advance(seconds=500)
    assert queue.renew("ana", [a, b]) == [a]
    assert queue.release("ana", [b]) == []
    clock.advance(seconds=500)
    assert queue.sweep().returned == 1  # ben's
    assert queue.get(a).claimed_by == "ana"
    assert queue.release("ana", [a]) == [a]
    assert queue.get(a).state is State.PENDING


# --- how much one reviewer holds ---


def test_reviewer_holds_no_more_than_the_limit_in_all_ways(open_queue, clock):
    queue = open_queue(max_held=3)
    ids = queue.enqueue([flagged(number) for number in range(8)]).ids
    queue.set_groups(dict.fromkeys(ids, 4))
    assert len(queue.claim("ana", 2)) == 2
    assert len(queue.claim("ana", 50, group=4)) == 1
    held = queue.held_by("ana")
    assert len(held) == 3
    for ask in (lambda: queue.claim("ana"), lambda: queue.claim("ana", 5, group=4)):
        with pytest.raises(TooManyHeld, match="ana holds 3 items: max_held is 3"):
            ask()
    assert sorted(ids_of(queue.claim_items("ana", ids))) == sorted(held)  # those, and no more
    decision = queue.decide("ana", held[0], is_poisoned=True, true_label=5)
    assert len(queue.claim("ana", 5)) == 1
    queue.withdraw("ana", decision.id)  # would be the fourth
    assert queue.get(held[0]).state is State.PENDING
    assert len(queue.held_by("ana")) == 3
    assert len(queue.claim("ben", 8)) == 3  # the limit is each reviewer's own
    clock.advance(seconds=601)
    assert queue.held_by("ana") == []
    assert len(queue.claim("ana", 2)) == 2


def test_claims_at_once_never_hold_more_than_the_limit(open_queue):
    queue = open_queue(max_held=10)
    queue.enqueue([flagged(number % 9) for number in range(60)])
    start = threading.Barrier(4)

    def claim() -> None:
        start.wait()
        with contextlib.suppress(TooManyHeld):
            for _ in range(4):
                queue.claim("ana", 3)

    threads = [threading.Thread(target=claim) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(queue.held_by("ana")) == 10


def test_items_that_nobody_else_holds_are_answered_without_holding_them(open_queue, clock):
    queue = open_queue(max_held=1)
    free, claimed, late, taken = queue.enqueue([flagged(number) for number in range(4)]).ids
    queue.claim_items("ana", [late])
    clock.advance(seconds=601)
    queue.claim_items("ana", [claimed])
    queue.claim_items("ben", [taken])
    answers = [Answer(item_id=item_id, is_poisoned=True, true_label=5) for item_id in (free, claimed, late)]
    refused = Answer(item_id=taken, is_poisoned=True, true_label=5)
    with pytest.raises(LeaseExpired, match="ben has it"):
        queue.decide_many("ana", [*answers, refused], also_free=True)
    assert queue.decisions() == []
    assert len(queue.decide_many("ana", answers, also_free=True)) == 3


# --- answers ---


def test_decide_stores_the_answer_and_the_item_is_decided(queue, clock):
    [item_id] = queue.enqueue([flagged()]).ids
    queue.claim("ana")
    clock.advance(seconds=5)
    decision = queue.decide("ana", item_id, is_poisoned=True, true_label=5, note="a square")
    assert decision == queue.get(item_id).decision
    assert (decision.reviewer, decision.is_poisoned, decision.true_label) == ("ana", True, 5)
    assert (decision.note, decision.decided_at, decision.stands) == ("a square", clock.now, True)
    assert queue.get(item_id).state is State.DECIDED
    assert queue.decisions() == [decision]


def test_decide_after_the_lease_ended_is_refused_before_and_after_the_sweep(queue, clock):
    [item_id] = queue.enqueue([flagged()]).ids
    queue.claim("ana")
    clock.advance(seconds=600)
    with pytest.raises(LeaseExpired, match=r"the lease of ana on item \d+ ended at 2026-03-01T12:10:00"):
        queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    assert queue.sweep().returned == 1
    with pytest.raises(LeaseExpired, match=r"not claimed by ana: it is pending\. Claim it again"):
        queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    queue.claim("ben")
    with pytest.raises(LeaseExpired, match="not claimed by ana: ben has it"):
        queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    assert queue.decisions() == []


def test_decide_twice_is_refused(queue):
    [item_id] = queue.enqueue([flagged()]).ids
    decide(queue, item_id)
    with pytest.raises(AlreadyDecided, match=f"item {item_id} was decided already"):
        queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    assert len(queue.decisions()) == 1


@pytest.mark.parametrize("label", [-1, N_CLASSES])
def test_decide_with_an_unknown_label_is_refused(queue, label):
    [item_id] = queue.enqueue([flagged()]).ids
    queue.claim("ana")
    with pytest.raises(UnknownLabel, match=rf"true_label must be in \[0, 10\).*got {label}"):
        queue.decide("ana", item_id, is_poisoned=True, true_label=label)
    assert queue.get(item_id).state is State.CLAIMED


def test_decide_without_a_true_label_is_taken(queue):
    [item_id] = queue.enqueue([flagged()]).ids
    assert decide(queue, item_id, label=None).true_label is None


def test_decide_an_item_that_is_not_there_is_refused(queue):
    with pytest.raises(ItemGone, match="there is no item 77"):
        queue.decide("ana", 77, is_poisoned=True, true_label=5)
    with pytest.raises(ItemGone, match="there is no item 77"):
        queue.get(77)


def test_decide_many_is_all_or_nothing(queue):
    ids = queue.enqueue([flagged(number) for number in range(3)]).ids
    queue.claim("ana", 2)  # the most suspicious two, not the first
    answers = [Answer(item_id=item_id, is_poisoned=False, true_label=None) for item_id in ids]
    with pytest.raises(LeaseExpired):
        queue.decide_many("ana", answers)
    assert queue.decisions() == []
    assert len(queue.decide_many("ana", answers[1:])) == 2
    assert queue.decide_many("ana", []) == []


def test_decide_many_with_the_same_item_twice_is_refused(queue):
    [item_id] = queue.enqueue([flagged()]).ids
    queue.claim("ana")
    answer = Answer(item_id=item_id, is_poisoned=False, true_label=None)
    with pytest.raises(AlreadyDecided, match="twice"):
        queue.decide_many("ana", [answer, answer])


def test_supersede_keeps_the_old_row_and_asks_for_retraining(queue):
    [item_id] = queue.enqueue([flagged()]).ids
    old = decide(queue, item_id)
    queue.mark_trained([item_id], "c" * 64)
    new = queue.supersede("ben", old.id, is_poisoned=False, true_label=3, note="no trigger")
    assert (new.supersedes, new.reviewer) == (old.id, "ben")
    item = queue.get(item_id)
    assert (item.state, item.decision) == (State.DECIDED, new)
    kept, _ = queue.decisions()
    assert (kept.superseded_by, kept.stands, kept.is_poisoned) == (new.id, False, True)
    with pytest.raises(AlreadyDecided, match=f"superseded by decision {new.id}"):
        queue.supersede("ana", old.id, is_poisoned=True, true_label=5)
    with pytest.raises(UnknownLabel):
        queue.supersede("ana", new.id, is_poisoned=True, true_label=10)
    with pytest.raises(QueueError, match="there is no decision 99"):
        queue.supersede("ana", 99, is_poisoned=True, true_label=5)


def test_withdraw_gives_the_item_back_to_its_reviewer(queue):
    [item_id] = queue.enqueue([flagged()]).ids
    decision = decide(queue, item_id)
    with pytest.raises(QueueError, match=f"decision {decision.id} is by ana"):
        queue.withdraw("ben", decision.id)
    queue.withdraw("ana", decision.id)
    item = queue.get(item_id)
    assert (item.state, item.claimed_by, item.decision) == (State.CLAIMED, "ana", None)
    [kept] = queue.decisions()
    assert kept.withdrawn
    with pytest.raises(AlreadyDecided, match="withdrawn"):
        queue.withdraw("ana", decision.id)
    again = queue.decide("ana", item_id, is_poisoned=False, true_label=None)
    assert queue.get(item_id).decision == again
    assert queue.counts().decisions == {"poisoned": 1, "false_alarm": 1, "superseded": 0, "withdrawn": 1}
    assert queue.verify_decisions().problems == ()


def test_decisions_are_listed_by_reviewer_and_page(queue):
    ids = queue.enqueue([flagged(number) for number in range(4)]).ids
    for item_id, reviewer in zip(ids, ("ana", "ben", "ana", "ana"), strict=True):
        decide(queue, item_id, reviewer)
    claimed = queue.decisions(reviewer="ana")
    assert [entry.item_id for entry in claimed] == [ids[0], ids[2], ids[3]]
    assert queue.decisions(reviewer="ana", after_id=claimed[0].id, limit=1) == [claimed[1]]


# --- quorum ---


def test_quorum_of_two_needs_two_reviewers_with_one_label(open_queue):
    queue = open_queue(quorum=2)
    [item_id] = queue.enqueue([flagged()]).ids
    decide(queue, item_id, "ana", label=5)
    assert queue.get(item_id).state is State.PENDING
    assert queue.get(item_id).decision is None
    assert queue.claim("ana") == []  # not the same reviewer again
    assert queue.claim_items("ana", [item_id]) == []
    decide(queue, item_id, "ben", label=6)
    assert queue.get(item_id).state is State.PENDING
    decision = decide(queue, item_id, "cleo", label=5)
    assert queue.get(item_id).decision == decision
    assert ids_of(settled_items(queue, "digits")) == [item_id]


def test_quorum_false_alarm_needs_one_unless_somebody_said_poisoned(open_queue):
    queue = open_queue(quorum=2)
    calm, contested = queue.enqueue([flagged(0), flagged(1)]).ids
    decide(queue, calm, is_poisoned=False, label=None)
    assert queue.get(calm).state is State.DECIDED
    decide(queue, contested, "ana")
    decide(queue, contested, "ben", is_poisoned=False, label=3)
    assert queue.get(contested).state is State.PENDING
    decide(queue, contested, "cleo", is_poisoned=False, label=None)
    assert queue.get(contested).state is State.DECIDED
    assert not queue.get(contested).decision.is_poisoned


def test_quorum_withdrawn_answer_no_longer_counts(open_queue):
    queue = open_queue(quorum=2)
    [item_id] = queue.enqueue([flagged()]).ids
    first = decide(queue, item_id, "ana")
    queue.claim("ben")
    queue.withdraw("ana", first.id)
    assert queue.get(item_id).claimed_by == "ben"  # a withdrawal takes nothing out of another's hands
    queue.decide("ben", item_id, is_poisoned=True, true_label=5)
    second = decide(queue, item_id, "ana")
    assert queue.get(item_id).decision == second
    queue.withdraw("ana", second.id)
    item = queue.get(item_id)
    assert (item.state, item.claimed_by) == (State.CLAIMED, "ana")


def test_quorum_supersede_by_another_moves_the_vote(open_queue):
    queue = open_queue(quorum=2)
    [item_id] = queue.enqueue([flagged()]).ids
    first = decide(queue, item_id, "ana")
    decide(queue, item_id, "ben")
    queue.supersede("ben", first.id, is_poisoned=True, true_label=5)  # both votes are ben's now
    assert queue.get(item_id).state is State.PENDING


# --- retraining ---


def test_decided_lists_items_for_training_until_they_are_trained_with(queue):
    a, b, other = queue.enqueue([flagged(0), flagged(1), flagged(2, model="signs")]).ids
    for item_id in (a, b, other):
        decide(queue, item_id)
    assert ids_of(settled_items(queue, "digits")) == [a, b]
    queue.mark_trained([a], "c" * 64)
    assert queue.get(a).state is State.TRAINED
    assert ids_of(settled_items(queue, "digits")) == [a, b]
    assert ids_of(settled_items(queue, "digits", untrained_only=True)) == [b]


def test_mark_trained_leaves_an_answer_that_changed_meanwhile(queue):
    same, changed = queue.enqueue([flagged(0), flagged(1)]).ids
    learned = [decide(queue, same).id, decide(queue, changed).id]
    queue.supersede("ana", learned[1], is_poisoned=False, true_label=3)
    queue.mark_trained([same, changed], "c" * 64, decision_ids=learned)
    assert ids_of(settled_items(queue, "digits", untrained_only=True)) == [changed]


# --- sweeping ---


def test_sweep_removes_old_images_and_keeps_unlearned_answers(queue, clock):
    pending, decided, trained = queue.enqueue([flagged(number) for number in range(3)]).ids
    decide(queue, decided)
    decide(queue, trained)
    queue.mark_trained([trained], "c" * 64)
    clock.advance(days=29)
    [young] = queue.enqueue([flagged(9, received_at=clock.now)]).ids
    clock.advance(days=1)
    assert queue.sweep().expired == 2
    for gone in (pending, trained):
        with pytest.raises(ItemGone, match=f"item {gone} is expired: its images were removed"):
            queue.get(gone)
    assert ids_of(queue.items()) == [decided, young]
    counts = queue.counts()
    assert counts.held_items == 2
    assert counts.held_bytes == sum(len(queue.get(entry).input.body) for entry in (decided, young)) + _tensor_bytes(
        queue
    )
    assert len(queue.decisions()) == 2
    with pytest.raises(ItemGone):
        queue.supersede("ana", queue.decisions()[1].id, is_poisoned=False, true_label=None)


def test_sweep_removes_old_images_of_what_was_called_clean_audits_and_flagged_alike(queue, clock):
    ids = queue.enqueue(
        [flagged(0), flagged(1), flagged(2, audit_probability=0.1), flagged(3, audit_probability=0.1)]
    ).ids
    queue.claim("ana", 10)
    for item_id in ids:
        queue.decide("ana", item_id, is_poisoned=item_id in ids[::2], true_label=5)
    clock.advance(days=31)
    assert queue.sweep().expired == 2
    assert ids_of(queue.items()) == [*ids[::2]]
    assert len(queue.decisions()) == 4
    clock.advance(days=31)
    assert queue.sweep().purged == 0  # what was answered is counted on


def _tensor_bytes(queue: Queue) -> int:
    from guard.relabel.blobs import pack_activations, pack_inputs

    inputs = [item.input for item in queue.items()]
    return sum(len(pack_inputs(entry.inputs)) + len(pack_activations(entry.activations)) for entry in inputs)


def test_sweep_purges_rows_nobody_answered_and_keeps_answered_ones(queue, clock):
    silent, answered = queue.enqueue([flagged(0), flagged(1)]).ids
    decide(queue, answered)
    queue.mark_trained([answered], "c" * 64)
    clock.advance(days=31)
    assert queue.sweep().purged == 0
    clock.advance(days=31)
    assert queue.sweep().purged == 1
    with pytest.raises(ItemGone, match=f"there is no item {silent}"):
        queue.get(silent)
    with pytest.raises(ItemGone, match=f"item {answered} is expired"):
        queue.get(answered)
    assert queue.verify_decisions().problems == ()


def test_sweep_goes_on_until_all_is_done(open_queue, clock):
    queue = open_queue(max_held=450)
    queue.enqueue([flagged(number % 7) for number in range(450)])
    assert len(queue.claim("ana", 450)) == 450
    clock.advance(seconds=601)
    assert queue.sweep().returned == 450


# --- counts, lists, groups ---


def test_counts_of_an_empty_queue_are_zero(queue):
    counts = queue.counts()
    assert counts.by_state == dict.fromkeys(State, 0)
    assert counts.oldest_pending_at is None
    assert counts.dropped == {}


def test_counts_and_items_tell_states_apart(queue):
    times = [START + timedelta(seconds=number) for number in range(4)]
    ids = queue.enqueue([flagged(number, received_at=when) for number, when in enumerate(times)]).ids
    decide(queue, ids[0])
    queue.claim_items("ben", [ids[1]])
    counts = queue.counts()
    assert [counts.by_state[state] for state in (State.PENDING, State.CLAIMED, State.DECIDED)] == [2, 1, 1]
    assert counts.oldest_pending_at == times[2]
    assert ids_of(queue.items(state=State.PENDING)) == [ids[2], ids[3]]
    assert ids_of(queue.items(limit=2, after_id=ids[0])) == [ids[1], ids[2]]
    assert queue.items(model="another") == []


def test_groups_list_size_pending_labels_and_samples(queue):
    ids = queue.enqueue([flagged(number, suspect_label=number % 2) for number in range(5)]).ids
    queue.set_groups({ids[0]: 1, ids[1]: 1, ids[2]: 1, ids[3]: 2, ids[4]: -1})
    decide(queue, ids[0])
    first, second = queue.groups()
    assert (first.id, first.size, first.pending, first.suspect_labels) == (1, 3, 2, (0, 1))
    assert first.sample_ids == (ids[1], ids[2], ids[0])  # pending ones first
    assert (second.id, second.size, second.sample_ids) == (2, 1, (ids[3],))
    assert (queue.get(ids[0]).group, queue.get(ids[4]).group) == (1, None)


def test_pending_features_are_of_pending_items_newest_first(queue):
    times = [START + timedelta(seconds=number) for number in range(3)]
    inputs = [flagged(number, received_at=when) for number, when in enumerate(times)]
    a, b, c = queue.enqueue(inputs).ids
    decide(queue, b)
    ids, _, _, features = queue.pending_rows("digits", 10)
    assert ids.tolist() == [c, a]
    np.testing.assert_array_equal(features[1], inputs[0].activations.features[0])
    assert queue.pending_rows("digits", 1)[0].tolist() == [c]
    assert queue.pending_rows("another", 10)[3].shape == (0, 0)


# --- gold items ---


def test_gold_item_is_asked_once_of_everybody_and_never_trained_with(queue, clock):
    gold = queue.add_gold(flagged(0), True, 5)
    assert queue.counts().by_state[State.PENDING] == 0
    decide(queue, gold, "ana", label=5)
    decide(queue, gold, "ben", is_poisoned=False, label=None)
    decision = decide(queue, gold, "cleo", label=6)
    assert queue.claim("ana", 5) == []
    assert [queue.gold_results(name).right for name in ("ana", "ben", "cleo", "dan")] == [1, 0, 0, 0]
    assert [queue.gold_results(name).answered for name in ("ana", "ben", "cleo", "dan")] == [1, 1, 1, 0]
    queue.supersede("cleo", decision.id, is_poisoned=True, true_label=5)
    assert queue.gold_results("cleo").right == 1
    assert settled_items(queue, "digits") == []
    clock.advance(days=29)
    queue.sweep()
    assert ids_of(queue.claim("dan")) == [gold]


def test_gold_false_alarm_needs_no_label(queue):
    gold = queue.add_gold(flagged(0), False, 3)
    decide(queue, gold, is_poisoned=False, label=None)
    assert queue.gold_results("ana").right == 1
