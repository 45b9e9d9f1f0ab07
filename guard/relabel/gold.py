"""Gold items: their answer is known, and every reviewer sees them as all others, before an answer and after it."""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from guard.relabel import statements
from guard.relabel.deciding import outcome
from guard.relabel.enqueueing import insert_rows, update_ledger
from guard.relabel.items import Counts, Decision, FlaggedInput, QueueItem, State
from guard.relabel.reading import answer_kinds
from guard.relabel.rows import Rows, decision_of, detectors_of

_random = random.SystemRandom()
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def disguised(connection: Connection, original: FlaggedInput, now: datetime) -> FlaggedInput:
    """Return a flagged input as if it had come just now: with other request id and time, newest bundle and rate.

    The bundle stays where the newest one has other detectors: its scores would not fit.
    """
    newest = connection.execute(statements.NEWEST_OF_MODEL, {"model": original.model}).mappings().one_or_none()
    served = {}
    if newest is not None and detectors_of(newest) == (set(original.raw), set(original.surprise)):
        served = {name: newest[name] for name in ("bundle_digest", "false_positive_rate")}
    return replace(original, request_id=other_request_id(original.request_id), received_at=now, **served)


def other_request_id(text: str) -> str:
    """Return another request id of the same form: random hex digits, or digits; letters only where it has no digits."""
    if _UUID.fullmatch(text):
        return str(uuid.uuid4())
    kinds = ["0123456789"] if re.search("[0-9]", text) else ["abcdefghijklmnopqrstuvwxyz"]
    if not re.search("[g-zG-Z]", text):
        kinds = ["0123456789", "abcdef"]
    other = "".join(next((_random.choice(kind) for kind in kinds if letter in kind), letter) for letter in text)
    return other_request_id(text) if other == text and re.search("[0-9a-z]", text) else other


def insert_gold(
    connection: Connection, rows: Rows, is_poisoned: bool, true_label: int | None, copy_of: int | None
) -> int:
    """Store an item whose answer is known, and return its number; there is always room for it."""
    last_id = connection.execute(statements.LEDGER).one().last_item_id
    insert_rows(connection, {last_id + 1: rows})
    values: dict[str, Any] = {
        "item_id": last_id + 1,
        "is_poisoned": is_poisoned,
        "true_label": true_label,
        "copy_of": copy_of,
        "learned_to": 0,
    }
    connection.execute(statements.INSERT_GOLD, values)
    update_ledger(connection, new_ids=1, more_items=1, more_bytes=rows.size)
    return int(last_id + 1)


def note_learned(connection: Connection, ids: Sequence[int]) -> None:
    """After a bundle learned from items, show answers about gold items of that time as learned from, too.

    They are those up to the next answer that it did not learn from.
    """
    last = connection.execute(statements.LAST_DECISION).first()
    for model, learned in connection.execute(statements.LEARNED_TO, {"ids": list(ids)}).all():
        values = {"of_model": model, "decision_id": learned}
        following = connection.execute(statements.NEXT_NOT_LEARNED, values).scalar()
        newest = following - 1 if following is not None else last.id if last is not None else 0
        connection.execute(statements.NOTE_LEARNED, {"of_model": model, "decision_id": newest})


class Eyes:
    """How one reviewer sees items: a gold item as an ordinary one that nobody else has answered, and none of the
    answers of others.

    Parameters
    ----------
    connection : Connection
    reviewer : str
    quorum : int
    """

    def __init__(self, connection: Connection, reviewer: str, quorum: int) -> None:
        self._connection = connection
        self._reviewer = reviewer
        self._quorum = quorum

    def see(self, items: Sequence[QueueItem]) -> list[QueueItem]:
        """Return the items as the reviewer sees them; all take the same statements, whatever they are."""
        ids = [item.id for item in items]
        answers = self._own_answers(ids)
        learned_to = {row.item_id: row.learned_to for row in self._rows(statements.GOLD_BY_ID, ids)}
        return [self._see(item, answers.get(item.id), learned_to.get(item.id)) for item in items]

    def has_answered(self, item_id: int) -> bool:
        """Return whether the reviewer ever answered an item, even if the answer does not stand."""
        return bool(self._rows(statements.OWN_ANSWERS, [item_id]))

    def count(self, counts: Counts) -> Counts:
        """Return counts that hold gold items as well, each in the state that the reviewer sees."""
        by_state, oldest = dict(counts.by_state), counts.oldest_pending_at
        rows = self._connection.execute(statements.GOLD_STATES, {"reviewer": self._reviewer}).mappings().all()
        answers = self._own_answers([row["id"] for row in rows])
        for row in rows:
            state = self._state(State(row["state"]), row["claimed_by"], answers.get(row["id"]), row["learned_to"])
            by_state[state] += 1
            if state is State.PENDING:
                oldest = min(oldest or row["received_at"], row["received_at"])
        others = self._connection.execute(statements.COUNT_GOLD_ANSWERS_OF_OTHERS, {"reviewer": self._reviewer})
        hidden = answer_kinds(others)
        decisions = {kind: count - hidden[kind] for kind, count in counts.decisions.items()}
        return replace(counts, by_state=by_state, oldest_pending_at=oldest, decisions=decisions)

    def count_settled(self, model: str, since: datetime | None) -> int:
        """Return how many gold items of a model the reviewer sees as answered, after a time."""
        rows = self._connection.execute(statements.GOLD_STATES, {"reviewer": self._reviewer}).mappings().all()
        rows = [row for row in rows if row["model"] == model]
        answers = self._own_answers([row["id"] for row in rows])
        settled = 0
        for row in rows:
            answer = answers.get(row["id"])
            state = self._state(State(row["state"]), row["claimed_by"], answer, row["learned_to"])
            is_late = answer is not None and (since is None or answer.decided_at > since)
            settled += is_late and state in (State.DECIDED, State.TRAINED)
        return settled

    def _see(self, item: QueueItem, answer: Decision | None, learned_to: int | None) -> QueueItem:
        state = item.state if learned_to is None else self._state(item.state, item.claimed_by, answer, learned_to)
        is_mine = state is State.CLAIMED and item.claimed_by == self._reviewer
        return replace(
            item,
            state=state,
            decision=answer if state in (State.DECIDED, State.TRAINED) else None,
            claimed_by=self._reviewer if is_mine else None,
            lease_expires_at=item.lease_expires_at if is_mine else None,
        )

    def _state(self, state: State, holder: str | None, answer: Decision | None, learned_to: int) -> State:
        if state not in (State.PENDING, State.CLAIMED) or holder == self._reviewer:
            return state
        if answer is None or outcome([answer], self._quorum) is None:
            return state
        return State.TRAINED if answer.id <= learned_to else State.DECIDED

    def _own_answers(self, ids: Sequence[int]) -> dict[int, Decision]:
        rows = self._rows(statements.OWN_ANSWERS, ids)
        found = (decision_of(row._mapping) for row in rows)
        return {decision.item_id: decision for decision in found if decision.stands}

    def _rows(self, statement: Any, ids: Sequence[int]) -> Sequence[Any]:
        values: Mapping[str, Any] = {"ids": list(ids), "reviewer": self._reviewer}
        return self._connection.execute(statement, values).all()
