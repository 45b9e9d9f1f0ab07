"""Reviewers, their tokens and sessions; retraining rounds and the button that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from queue_helpers import Clock

from guard.errors import QueueError
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewer, Reviewers
from guard.relabel.rounds import Rounds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(queue_url: str, clock: Clock) -> Iterator[Queue]:
    with Queue.open(queue_url, clock=clock) as queue:
        yield queue


@pytest.fixture
def people(queue: Queue) -> Reviewers:
    return Reviewers(queue)


# --- reviewers ---


def test_token_names_its_reviewer_and_is_not_stored(people, queue):
    token = people.add("ana", "admin")
    assert people.check_token(token) == Reviewer("ana", "admin")
    assert people.check_token(token + "x") is None
    assert people.check_token("") is None
    with queue.database.reading() as connection:
        stored = str(connection.exec_driver_sql("SELECT * FROM reviewers").all())
    assert token not in stored


def test_names_lists_enabled_reviewers(people):
    people.add("ben")
    people.add("ana", "admin")
    assert people.names() == ["ana", "ben"]
    assert people.all()[1] == Reviewer("ben", "reviewer")


@pytest.mark.parametrize("name", ["", " ana", "a" * 65, "<script>", "a\nb"])
def test_odd_names_are_refused(people, name):
    with pytest.raises(QueueError, match="a name must be"):
        people.add(name)


def test_unknown_role_and_taken_name_are_refused(people):
    people.add("ana")
    with pytest.raises(QueueError, match="there is a reviewer 'ana' already"):
        people.add("ana")
    with pytest.raises(QueueError, match="role must be one of reviewer, admin, got 'owner'"):
        people.add("ben", "owner")


def test_disabled_reviewer_loses_token_and_sessions_and_may_come_back(people):
    token = people.add("ana")
    session = people.start_session("ana")
    people.disable("ana")
    assert people.check_token(token) is None
    assert people.find_session(session) is None
    assert people.names() == []
    for refused in (lambda: people.disable("ana"), lambda: people.start_session("ana"), lambda: people.disable("zoe")):
        with pytest.raises(QueueError, match="there is no reviewer"):
            refused()
    assert people.check_token(people.add("ana")) == Reviewer("ana", "reviewer")
    assert people.check_token(token) is None


def test_session_lasts_until_it_is_ended_or_too_old(people, clock):
    people.add("ana")
    first, second = people.start_session("ana"), people.start_session("ana", hours=1)
    assert people.find_session(first) == Reviewer("ana", "reviewer")
    clock.advance(hours=1)
    assert people.find_session(second) is None
    assert people.find_session(first) is not None
    people.end_session(first)
    assert people.find_session(first) is None
    people.end_session("nobody's")


# --- rounds ---


def test_round_is_begun_and_finished_once(queue, clock):
    rounds = Rounds(queue)
    assert rounds.last("digits") is None
    first = rounds.begin("digits", 12)
    assert (rounds.last("digits").outcome, rounds.last("digits").report) == (None, {})
    clock.advance(minutes=1)
    rounds.finish(first, "refused", {"reasons": ["clean accuracy fell"]}, "c" * 64)
    last = rounds.last("digits")
    assert (last.id, last.n_decisions, last.outcome) == (first, 12, "refused")
    assert (last.report, last.candidate_digest) == ({"reasons": ["clean accuracy fell"]}, "c" * 64)
    assert (last.finished_at - last.began_at).seconds == 60
    with pytest.raises(QueueError, match=f"there is no round {first}, or it is finished"):
        rounds.finish(first, "promoted", {})
    with pytest.raises(QueueError, match="there is no round 77"):
        rounds.finish(77, "failed", {})


def test_canary_round_is_finished_a_second_time(queue):
    rounds = Rounds(queue)
    number = rounds.begin("digits", 1)
    rounds.finish(number, "canary", {}, "c" * 64)
    rounds.finish(number, "promoted", {"agreed": 0.99}, "c" * 64)
    assert rounds.last("digits").outcome == "promoted"


def test_rounds_are_listed_newest_first_and_by_model(queue):
    rounds = Rounds(queue)
    ids = [rounds.begin(model, 1) for model in ("digits", "signs", "digits")]
    assert [entry.id for entry in rounds.all()] == ids[::-1]
    assert [entry.id for entry in rounds.all(1)] == ids[2:]
    assert [entry.id for entry in rounds.all(model="signs")] == [ids[1]]


def test_request_is_taken_once(queue):
    rounds = Rounds(queue)
    assert rounds.take_request("digits") is None
    rounds.request("digits", "ana")
    rounds.request("digits", "ben")
    assert rounds.take_request("signs") is None
    assert rounds.take_request("digits") == "ben"
    assert rounds.take_request("digits") is None
