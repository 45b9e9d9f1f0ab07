"""A full or flooded queue: who stays, what is counted, and that nothing grows without bound."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import sqlalchemy as sa
from queue_helpers import flagged

from guard.errors import ItemGone
from guard.relabel.items import FlaggedInput, State
from guard.relabel.queue import Queue
from guard.relabel.reservoir import Body, Reservoir, Share, Waiting
from guard.relabel.schema import items
from guard.relabel.settings import QueueSettings, QueueWaits

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
            Body(entry.is_held, -bodies[entry.item_id], entry.item_id)
            for entry in stored.get(group, [])
            if entry.item_id in bodies
        ]

    return Reservoir(
        free_items,
        free_bytes,
        lambda group: stored.get(group, []),
        largest,
        lambda: {
            group: Share(
                len(selected),
                sum(entry.size for entry in selected),
                sum(bodies.get(entry.item_id, 0) for entry in selected),
            )
            for group, selected in stored.items()
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


def test_reservoir_lets_large_bodies_go_before_any_item():
    stored = {A: [waiting(0.1, 1, 10), waiting(0.2, 2, 40)], B: [waiting(0.3, 3, 35)]}
    room = reservoir(9, 0, stored, {2: 30, 3: 25})
    assert room.offer(0, B, 0.9, 30)  # A holds more bytes than B would: the largest of its bodies goes
    assert (room.stripped, room.removed, room.bodiless) == ({2: 30}, {}, set())
    assert room.offer(1, B, 0.9, 30, spare=20)  # B would hold more than A: the new body itself goes, then B's own
    assert (room.stripped, room.removed, room.bodiless) == ({2: 30, 3: 25}, {}, {1})
    assert room.offer(2, B, 0.99, 25)  # 15 bytes are left, and no body that can be done without
    assert room.removed == {3: 35}
    assert 3 not in room.stripped
    assert room.free_bytes == 0


def test_reservoir_measures_groups_in_bytes_where_bytes_are_short():
    few_large = [waiting(0.1 * number, number, 100) for number in range(1, 4)]
    many_small = [waiting(0.1 * number, 10 + number, 10) for number in range(1, 9)]
    room = reservoir(9, 0, {A: few_large, B: many_small})
    assert room.offer(0, B, 0.001, 10)
    assert set(room.removed) == {1}  # of A, which has fewer items, and more bytes


def test_reservoir_shares_among_models_before_labels():
    other = "faces"
    stored = {(other, label): [waiting(0.5, label, 10)] for label in range(1, 9)}
    room = reservoir(0, stored={A: [waiting(0.5, 100, 10), waiting(0.6, 101, 10), waiting(0.7, 102, 10)], **stored})
    assert room.offer(0, B, 0.001, 10)
    [removed] = room.removed
    assert removed in range(1, 9)  # of the model with 8 items in 8 groups, not of this one with 3 in one
    assert not room.offer(1, (other, 20), 0.1, 10)  # the larger model takes from itself


def test_reservoir_takes_held_items_only_when_no_other_is_left():
    room = reservoir(0, stored={A: [waiting(0.1, 1, 10, is_held=True), waiting(0.8, 2, 10)]})
    assert room.offer(0, A, 0.9, 10)
    assert set(room.removed) == {2}
    held = reservoir(0, stored={A: [waiting(0.1, 1, 10, is_held=True)]})
    assert held.offer(0, A, 0.9, 10)
    assert set(held.removed) == {1}


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
    with Queue.open(queue_url, QueueSettings(max_items=10), waits=QueueWaits(enqueue_timeout_s=20)) as queue:
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


def test_full_queue_never_drops_decided_or_gold_items_and_held_ones_last(small):
    ids = small.enqueue([flagged(number) for number in range(9)]).ids
    gold = small.add_gold(flagged(99), True, 5)
    small.claim_items("ana", ids[:5])
    small.decide("ana", ids[0], is_poisoned=True, true_label=5)
    for start in range(100, 600, 100):
        small.enqueue([flagged(start + number) for number in range(100)])
    assert small.get(ids[0]).state is State.DECIDED
    assert [small.get(item_id).state for item_id in ids[1:5]] == [State.CLAIMED] * 4  # others gave way
    assert small.get(gold).state is State.PENDING
    assert small.counts().held_items == 10


def test_queue_that_is_held_altogether_takes_new_inputs_and_tells_who_held_them(small):
    """The attack: one reviewer held every item, and of 100 new ones none was kept."""
    ids = small.enqueue([flagged(number) for number in range(10)]).ids
    assert len(small.claim("eve", 200)) == 10
    done = small.enqueue([flagged(100 + number) for number in range(100)])
    assert any(done.ids)
    states = [_state_of(small, item_id) for item_id in ids]
    gone = next(item_id for item_id, state in zip(ids, states, strict=True) if state == "discarded")
    still = [item_id for item_id, state in zip(ids, states, strict=True) if state == "claimed"]
    with pytest.raises(ItemGone, match=f"item {gone} is discarded: it gave way to other inputs while the queue"):
        small.decide("eve", gone, is_poisoned=True, true_label=5)
    assert small.renew("eve", list(ids)) == still
    assert small.counts().held_items == 10


def _state_of(queue: Queue, item_id: int) -> str:
    with queue.database.reading() as connection:
        return connection.execute(sa.select(items.c.state).where(items.c.id == item_id)).scalar_one()


def test_flood_in_one_group_leaves_room_for_another(small):
    small.enqueue([flagged(number, suspect_label=1) for number in range(300)])
    small.enqueue([flagged(number, suspect_label=2) for number in range(3)])
    labels = Counter(item.input.suspect_label for item in small.items())
    assert labels == {1: 7, 2: 3}
    small.enqueue([flagged(number, suspect_label=1) for number in range(300)])
    assert Counter(item.input.suspect_label for item in small.items()) == labels


def test_full_of_bytes_keeps_below_the_bound(queue_url):
    with Queue.open(queue_url, QueueSettings(max_bytes=20_000), waits=QueueWaits(enqueue_timeout_s=20)) as queue:
        rng = np.random.default_rng(0)
        for _ in range(10):
            queue.enqueue([flagged(0, body=rng.bytes(int(rng.integers(100, 4000)))) for _ in range(10)])
        assert 10_000 < queue.counts().held_bytes <= 20_000
        (item_id,) = queue.enqueue([flagged(0, body=bytes(30_000))]).ids  # a body larger than the whole queue
        assert item_id is None or queue.get(item_id).input.body == b""


def test_flood_of_large_bodies_pushes_no_item_out_and_keeps_no_body(queue_url):
    """The attack: large requests under one label, by which all other labels lost their items."""
    tensors = queue_bytes_of(flagged(0, body=b""))
    with Queue.open(queue_url, QueueSettings(max_bytes=125 * tensors), waits=QueueWaits(enqueue_timeout_s=20)) as queue:
        real = [flagged(number, body=bytes(tensors // 10), suspect_label=number % 10) for number in range(100)]
        ids = queue.enqueue(real).ids
        for number in range(0, 50, 5):
            large = [flagged(200 + number + entry, body=bytes(8 * tensors), suspect_label=7) for entry in range(5)]
            queue.enqueue(large)
        kept = {item.id: item for item in queue.items(limit=1000)}
        assert queue.counts().held_bytes <= 125 * tensors
        lost = [item_id for item_id in ids if item_id not in kept]
        assert all(real[item_id - 1].suspect_label == 7 for item_id in lost)  # only among the label that is flooded
        assert all(item.input.body for item_id, item in kept.items() if item_id in ids)
        flood = [item.input for item_id, item in kept.items() if item_id not in ids]
        assert flood
        assert sum(bool(entry.body) for entry in flood) <= 2  # there was room for some
        assert all(entry.inputs.shape == (1, 4, 4) for entry in flood)  # what the network saw is there
        assert all((entry.content_type == "") == (not entry.body) for entry in flood)


def queue_bytes_of(flagged_input: FlaggedInput) -> int:
    from guard.relabel.blobs import pack_activations, pack_inputs

    return (
        len(flagged_input.body)
        + len(pack_inputs(flagged_input.inputs))
        + len(pack_activations(flagged_input.activations))
    )


def test_large_bodies_that_came_first_go_before_any_item(queue_url):
    tensors = queue_bytes_of(flagged(0, body=b""))
    with Queue.open(queue_url, QueueSettings(max_bytes=100 * tensors), waits=QueueWaits(enqueue_timeout_s=20)) as queue:
        large = queue.enqueue([flagged(number, body=bytes(4 * tensors), suspect_label=7) for number in range(20)]).ids
        small = queue.enqueue([flagged(number, suspect_label=number % 5) for number in range(50)]).ids
        assert None not in small
        kept = {item.id: item.input for item in queue.items(limit=1000)}
        assert set(kept) == {*large, *small}
        assert 0 < sum(not kept[item_id].body for item_id in large) < 20
        with queue.database.reading() as connection:
            sizes = connection.exec_driver_sql("SELECT sum(size), sum(spare_bytes) FROM items").one()
            stored = connection.exec_driver_sql(
                "SELECT sum(length(body) + length(inputs) + length(activations)) FROM blobs"
            ).scalar()
        assert sizes[0] == stored == queue.counts().held_bytes
        assert sizes[1] == sum(len(kept[item_id].body) for item_id in large)


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
    with Queue.open(queue_url, QueueSettings(max_items=4), waits=QueueWaits(enqueue_timeout_s=20)) as smaller:
        kept = [smaller.enqueue([flagged(number)]).ids[0] for number in range(60)]
        assert smaller.counts().held_items == 10
        assert any(kept)
        assert {item.id for item in smaller.items()} != set(first)
