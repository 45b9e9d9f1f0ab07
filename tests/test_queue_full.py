"""A full or flooded queue: who stays, what is counted, and that nothing grows without bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from queue_helpers import flagged

from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.reservoir import Body, Reservoir, Share, Waiting
from guard.relabel.settings import QueueSettings

A, B = ("digits", 1), ("digits", 2)


def waiting(ticket: float, item_id: int, size: int, is_held: bool = False) -> Waiting:
    return Waiting(is_held, ticket, item_id, size)


def reservoir(
    free_items: int, free_bytes: int = 10**9, stored: dict | None = None, bodies: dict[int, int] | None = None
) -> Reservoir:
    """A full queue that holds these items per group, some with a body that they can do without."""
    stored, bodies = stored or {}, bodies or {}

    def largest(group: tuple[str, int]) -> list[Body]:
        return [
            Body(one.is_held, -bodies[one.item_id], one.item_id)
            for one in stored.get(group, [])
            if one.item_id in bodies
        ]

    return Reservoir(
        free_items,
        free_bytes,
        lambda group: stored.get(group, []),
        largest,
        lambda: {
            group: Share(len(own), sum(one.size for one in own), sum(bodies.get(one.item_id, 0) for one in own))
            for group, own in stored.items()
        },
    )


# --- the rule ---


def test_reservoir_with_room_keeps_everything():
    room = reservoir(3)
    assert [room.offer(place, A, 0.5, 10) for place in range(3)] == [True] * 3
    assert (room.free_items, room.free_bytes, room.removed) == (0, 10**9 - 30, {})


def test_reservoir_full_keeps_the_higher_ticket():
    room = reservoir(0, stored={A: [waiting(0.4, 11, 10), waiting(0.6, 12, 10)]})
    assert not room.offer(0, A, 0.3, 10)
    assert room.offer(1, A, 0.5, 10)
    assert room.removed == {11: 10}
    assert room.offer(2, A, 0.55, 10)  # takes the place of the one before
    assert list(room.kept) == [2]
    assert room.drops == {A: 3}


def test_reservoir_full_lets_a_smaller_group_in():
    room = reservoir(0, stored={A: [waiting(0.1 * number, number, 10) for number in range(1, 6)]})
    assert [room.offer(place, B, 0.001, 10) for place in range(4)] == [True, True, False, False]
    assert room.removed == {1: 10, 2: 10}  # 3 of A are left, then 2 of B: as even as it gets
    assert room.drops == {A: 2, B: 2}


def test_reservoir_full_makes_room_for_bytes():
    stored = {A: [waiting(0.1, 1, 10), waiting(0.2, 2, 10), waiting(0.9, 3, 10)]}
    room = reservoir(5, 0, stored)
    assert not room.offer(0, A, 0.5, 25)  # would need the one with 0.9 as well
    assert room.removed == {}
    assert room.offer(1, A, 0.5, 20)
    assert set(room.removed) == {1, 2}


def test_reservoir_never_removes_what_nobody_offered():
    room = reservoir(0)
    assert not room.offer(0, A, 0.99, 10)
    assert (room.kept, room.drops) == ({}, {A: 1})


def test_reservoir_sample_is_uniform_over_a_long_flood():
    rng = np.random.default_rng(0)
    seen = Counter()
    for _ in range(400):
        room = reservoir(10)
        for place in range(100):
            room.offer(place, A, rng.random(), 1)
        seen.update(room.kept.keys())
    early, late = (sum(seen[place] for place in span) for span in (range(50), range(50, 100)))
    assert early + late == 4000
    assert abs(early - 2000) < 4 * np.sqrt(4000 * 0.25)  # 4 standard deviations


# --- in the database ---


@pytest.fixture
def small(queue_url: str) -> Iterator[Queue]:
    with Queue.open(queue_url, QueueSettings(max_items=10, enqueue_timeout_s=20)) as queue:
        yield queue


def test_full_queue_stays_full_and_counts_every_drop(small):
    kept = dropped = 0
    for start in range(0, 200, 25):
        done = small.enqueue([flagged(start + number, suspect_label=3) for number in range(25)])
        kept += sum(item_id is not None for item_id in done.ids)
        dropped += done.dropped
    counts = small.counts()
    assert counts.held_items == counts.by_state[State.PENDING] == 10
    assert dropped == 190 == counts.dropped["digits", 3]
    assert kept - counts.by_state[State.DISCARDED] == 10
    assert counts.held_bytes < 200 * 2000


def test_full_queue_never_drops_claimed_decided_or_gold_items(small):
    ids = small.enqueue([flagged(number) for number in range(9)]).ids
    gold = small.add_gold(flagged(99), True, 5)
    small.claim_items("ana", ids[:5])
    small.decide("ana", ids[0], is_poisoned=True, true_label=5)
    for start in range(100, 600, 100):
        small.enqueue([flagged(start + number) for number in range(100)])
    assert small.get(ids[0]).state is State.DECIDED
    assert [small.get(item_id).state for item_id in ids[1:5]] == [State.CLAIMED] * 4
    assert small.get(gold).state is State.PENDING
    assert small.counts().held_items == 10


def test_flood_in_one_group_leaves_room_for_another(small):
    small.enqueue([flagged(number, suspect_label=1) for number in range(300)])
    small.enqueue([flagged(number, suspect_label=2) for number in range(3)])
    labels = Counter(item.input.suspect_label for item in small.items())
    assert labels == {1: 7, 2: 3}
    small.enqueue([flagged(number, suspect_label=1) for number in range(300)])
    assert Counter(item.input.suspect_label for item in small.items()) == labels


def test_full_of_bytes_keeps_below_the_bound(queue_url):
    with Queue.open(queue_url, QueueSettings(max_bytes=20_000, enqueue_timeout_s=20)) as queue:
        rng = np.random.default_rng(0)
        for _ in range(10):
            queue.enqueue([flagged(0, body=rng.bytes(int(rng.integers(100, 4000)))) for _ in range(10)])
        assert 10_000 < queue.counts().held_bytes <= 20_000
        assert queue.enqueue([flagged(0, body=bytes(30_000))]).ids == (None,)  # larger than the whole queue


def test_room_that_became_free_is_used_again(small):
    ids = small.enqueue([flagged(number) for number in range(10)]).ids
    small.claim_items("ana", ids)
    for item_id in ids:
        small.decide("ana", item_id, is_poisoned=True, true_label=5)
    assert small.enqueue([flagged(50)]).ids == (None,)  # answers that nobody learned from are never removed
    small.mark_trained(list(ids), "c" * 64)
    small.sweep(small.get(ids[0]).input.received_at.replace(year=2030))
    assert small.enqueue([flagged(50)]).ids[0] is not None


def test_capacity_that_was_lowered_still_lets_new_inputs_replace_old_ones(small, queue_url):
    first = small.enqueue([flagged(number) for number in range(10)]).ids
    with Queue.open(queue_url, QueueSettings(max_items=4, enqueue_timeout_s=20)) as smaller:
        kept = [smaller.enqueue([flagged(number)]).ids[0] for number in range(60)]
        assert smaller.counts().held_items == 10
        assert any(kept)
        assert {item.id for item in smaller.items()} != set(first)
