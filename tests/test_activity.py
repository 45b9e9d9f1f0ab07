"""What came into the queue and what was answered, over time, with both databases."""

from __future__ import annotations

from datetime import timedelta

import pytest
from queue_helpers import START, Clock, flagged

from guard.relabel.activity import Activity, Share
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings

MINUTE, HOUR = timedelta(minutes=1), timedelta(hours=1)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_arrivals_and_answers_by_interval_without_gold_items(queue_url, clock):
    with Queue.open(queue_url, clock=clock) as queue:
        queue.enqueue([flagged(number, received_at=START + number * MINUTE) for number in range(5)])
        queue.enqueue([flagged(7, model="other", received_at=START + 2 * MINUTE)])
        queue.add_gold(flagged(9, received_at=START), True, 3)
        clock.advance(minutes=5)
        for item in queue.claim("ada", 8):
            queue.decide("ada", item.id, is_poisoned=True, true_label=4)
            clock.advance(seconds=40)
        activity = Activity(queue)
        end = START + HOUR
        assert activity.arrivals_per(2 * MINUTE, START, end, None) == {0: 2, 1: 3, 2: 1}
        assert activity.arrivals_per(2 * MINUTE, START + MINUTE, end, "digits") == {0: 2, 1: 2}
        assert activity.arrivals_per(MINUTE, START, START + 2 * MINUTE, "digits") == {0: 1, 1: 1}
        answered = activity.answers_per(2 * MINUTE, START + 5 * MINUTE, end, None)
        assert (sum(answered.values()), max(answered)) == (6, 2)
        assert sum(activity.answers_per(MINUTE, START, end, "other").values()) == 1
        assert activity.models() == ["digits", "other"]


def test_who_decided_what_and_what_became_of_it(queue_url, clock):
    with Queue.open(queue_url, clock=clock) as queue:
        queue.enqueue([flagged(number) for number in range(6)])
        queue.add_gold(flagged(9), True, 3)
        made = [
            queue.decide("ada", item.id, is_poisoned=True, true_label=4)
            for item in queue.claim("ada", 7, order="age")
            if not queue.gold_results("ada").answered
        ]
        ordinary = [decision for decision in made if decision.item_id <= 6]
        queue.supersede("bo", ordinary[0].id, is_poisoned=False, true_label=3)  # another verdict
        queue.supersede("bo", ordinary[1].id, is_poisoned=True, true_label=None)  # another label
        queue.supersede("ada", ordinary[2].id, is_poisoned=True, true_label=4)  # the same again
        queue.withdraw("ada", ordinary[3].id)
        shares = Activity(queue).by_reviewer(START, START + HOUR)
        assert shares == [
            Share("ada", poisoned=len(ordinary) + 1, false_alarm=0, overturned=2, taken_back=1),
            Share("bo", poisoned=1, false_alarm=1, overturned=0, taken_back=0),
        ]
        assert Activity(queue).by_reviewer(START + HOUR, START + 2 * HOUR) == []
        assert Activity(queue).by_reviewer(START, START + HOUR, "other") == []


def test_every_arrival_is_named_also_after_it_gave_way(queue_url, clock):
    with Queue.open(queue_url, QueueSettings(max_items=3), clock=clock) as queue:
        ids = [queue.enqueue([flagged(number, received_at=START + number * MINUTE)]).ids[0] for number in range(8)]
        activity = Activity(queue)
        found = list(activity.arrivals(START, START + HOUR))
        assert [entry.request_id for entry in found] == [
            f"request-{n}" for n, item in enumerate(ids) if item is not None
        ]
        assert sum(entry.state is State.PENDING for entry in found) == 3
        assert activity.turned_away() == activity.turned_away("digits") == ids.count(None)
        assert activity.turned_away("other") == 0
        assert list(activity.arrivals(START, START + HOUR, "other")) == []


def test_many_arrivals_are_read_in_parts(queue_url, clock, monkeypatch):
    monkeypatch.setattr("guard.relabel.activity._AT_ONCE", 3)
    with Queue.open(queue_url, clock=clock) as queue:
        queue.enqueue([flagged(number, received_at=START + number * MINUTE) for number in range(8)])
        found = Activity(queue).arrivals(START + MINUTE, START + 8 * MINUTE)
        assert [entry.received_at for entry in found] == [START + number * MINUTE for number in range(1, 8)]
