"""Take the answers of reviewers: check, append to the chain, and see whether the quorum is met."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy.engine import Connection

from guard.errors import AlreadyDecided, ItemGone, LeaseExpired, QueueError, UnknownLabel
from guard.relabel import chain, statements
from guard.relabel.claiming import held_by, lock_holder
from guard.relabel.items import Answer, Decision, State
from guard.relabel.rows import decision_of
from guard.relabel.settings import QueueSettings

Row = Mapping[Any, Any]


class Deciding:
    """Answers of one reviewer within one transaction."""

    def __init__(
        self,
        connection: Connection,
        reviewer: str,
        settings: QueueSettings,
        now: datetime,
        *,
        also_free: bool = False,
    ) -> None:
        self._connection = connection
        self._reviewer = reviewer
        self._also_free = also_free
        self._most_held = settings.max_held
        self._quorum = settings.quorum
        self._until = now + timedelta(seconds=settings.lease_s)
        self._now = now

    def answer(self, answers: Sequence[Answer]) -> list[Decision]:
        """Answer claimed items, all or none."""
        if not answers:
            return []
        items = self._lock([answer.item_id for answer in answers])
        if len(items) < len(answers):
            raise AlreadyDecided("the same item is answered twice at once. Send one answer per item.")
        for answer in answers:
            item = items[answer.item_id]
            _check_label(item, answer.true_label)  # first: an answer that cannot be saved tells nothing of others
            self._check_claim(item)
        rows = [self._row(answer.item_id, answer.is_poisoned, answer.true_label, answer.note) for answer in answers]
        appended = chain.append(self._connection, rows)
        settled = []
        for row in appended:
            item = items[row["item_id"]]
            if _is_gold(item):  # as quick as any other
                settled.append(_settled(item, State.PENDING, item["votes"] + 1, None))
            elif item["votes"] == 0 and (self._quorum == 1 or not row["is_poisoned"]):
                settled.append(_settled(item, State.DECIDED, 1, row["id"]))
            else:
                settled.append(self._recount(item, State.PENDING))
        self._connection.execute(statements.SETTLE, settled)
        return [_as_decision(row) for row in appended]

    def supersede(self, decision_id: int, is_poisoned: bool, true_label: int | None, note: str) -> Decision:
        """Put another answer in the place of one that stands, anybody's."""
        old, item = self._standing(decision_id)
        _check_label(item, true_label)
        row = self._row(old.item_id, is_poisoned, true_label, note, supersedes=old.id)
        [appended] = chain.append(self._connection, [row])
        self._connection.execute(statements.SETTLE, self._recount(item, State.PENDING))
        return _as_decision(appended)

    def withdraw(self, decision_id: int) -> None:
        """Take back one's own answer; the item is the reviewer's again, unless others hold or decided it.

        A reviewer who holds as many as may be held gets it when it is next claimed.
        """
        lock_holder(self._connection, self._reviewer)
        held = held_by(self._connection, self._reviewer, self._now)
        old, item = self._standing(decision_id)
        if old.reviewer != self._reviewer:
            raise QueueError(f"decision {decision_id} is by {old.reviewer}. Supersede it instead.")
        row = self._row(old.item_id, None, None, "", supersedes=old.id) | {"kind": "withdrawal"}
        chain.append(self._connection, [row])
        otherwise = State.CLAIMED if len(held) < self._most_held else State.PENDING
        self._connection.execute(statements.SETTLE, self._recount(item, otherwise))

    def _lock(self, ids: Sequence[int]) -> dict[int, Row]:
        found = self._connection.execute(statements.LOCK_ITEMS, {"ids": list(ids)}).mappings()
        items: dict[int, Row] = {row["id"]: row for row in found}
        for item_id in ids:
            if item_id not in items:
                raise ItemGone(f"there is no item {item_id}. It may have been removed long ago.")
            state = items[item_id]["state"]
            if state in (State.EXPIRED, State.DISCARDED):
                raise ItemGone(gone(item_id, State(state)))
        return items

    def _check_claim(self, item: Row) -> None:
        item_id, state, holder = item["id"], item["state"], item["claimed_by"]
        if state in (State.DECIDED, State.TRAINED):
            raise AlreadyDecided(_decided_already(item_id))
        if state == State.PENDING and item["votes"] and self._has_answered(item_id):
            raise AlreadyDecided(_decided_already(item_id))
        if self._is_free(item):
            return
        if state != State.CLAIMED or holder != self._reviewer:
            held = f"it is {state}" if state != State.CLAIMED else f"{holder} has it"
            raise LeaseExpired(f"item {item_id} is not claimed by {self._reviewer}: {held}. Claim it again.")
        if item["lease_expires_at"] <= self._now:
            ended = item["lease_expires_at"].isoformat(timespec="seconds")
            raise LeaseExpired(f"the lease of {self._reviewer} on item {item_id} ended at {ended}. Claim it again.")

    def _is_free(self, item: Row) -> bool:
        if not self._also_free or item["state"] not in (State.PENDING, State.CLAIMED):
            return False
        return item["state"] == State.PENDING or bool(
            item["claimed_by"] == self._reviewer  # the lease has ended, and nobody else took it
        )

    def _has_answered(self, item_id: int) -> bool:
        standing = self._connection.execute(statements.STANDING, {"item_id": item_id}).mappings()
        return any(row["reviewer"] == self._reviewer for row in standing)

    def _standing(self, decision_id: int) -> tuple[Decision, Row]:
        item_id = self._find(decision_id).item_id
        item = self._lock([item_id])[item_id]
        decision = self._find(decision_id)  # again, now that nobody else can replace it
        if not decision.stands:
            how = "withdrawn" if decision.withdrawn else f"superseded by decision {decision.superseded_by}"
            raise AlreadyDecided(f"decision {decision_id} was {how}. Look at the item again.")
        return decision, item

    def _find(self, decision_id: int) -> Decision:
        row = self._connection.execute(statements.ANSWER, {"decision_id": decision_id}).mappings().one_or_none()
        if row is None:
            raise QueueError(f"there is no decision {decision_id}.")
        return decision_of(row)

    def _row(
        self, item_id: int, is_poisoned: bool | None, true_label: int | None, note: str, supersedes: int | None = None
    ) -> dict[str, Any]:
        return {
            "item_id": item_id,
            "kind": "answer",
            "reviewer": self._reviewer,
            "is_poisoned": None if is_poisoned is None else bool(is_poisoned),
            "true_label": None if true_label is None else int(true_label),
            "note": note,
            "decided_at": self._now,
            "supersedes": supersedes,
        }

    def _recount(self, item: Row, otherwise: State) -> dict[str, Any]:
        standing = self._connection.execute(statements.STANDING, {"item_id": item["id"]}).mappings()
        votes = [decision_of(row) for row in standing]
        decision_id = None if _is_gold(item) else outcome(votes, self._quorum)
        if decision_id is not None:
            return _settled(item, State.DECIDED, len(votes), decision_id)
        if item["state"] == State.CLAIMED and item["claimed_by"] != self._reviewer:
            return _settled(item, State.CLAIMED, len(votes), None, item["claimed_by"], item["lease_expires_at"])
        if otherwise is State.CLAIMED:
            return _settled(item, State.CLAIMED, len(votes), None, self._reviewer, self._until)
        return _settled(item, otherwise, len(votes), None)


def gone(item_id: int, state: State) -> str:
    """Return why an item cannot be looked at or answered any more, for a person."""
    if state is State.DISCARDED:
        why = "is discarded: it gave way to other inputs while the queue was full, and its images were removed"
    else:
        why = f"is {state.value}: its images were removed"
    return f"item {item_id} {why}. Take the next one."


def outcome(votes: Sequence[Decision], quorum: int) -> int | None:
    """Return the decision that counts, None while the quorum is not met.

    One "false alarm" is enough as long as nobody says "poisoned". Otherwise `quorum` reviewers must say the same: false
    alarm, or poisoned with the same true label. Of several answers of one reviewer the last counts.

    Parameters
    ----------
    votes : sequence of Decision
        Answers about one item that stand, oldest first.
    quorum : int
    """
    last = {vote.reviewer: vote for vote in votes}.values()
    if not last:
        return None
    if not any(vote.is_poisoned for vote in last):
        return max(vote.id for vote in last)
    vote_of = {vote.id: (vote.is_poisoned, vote.true_label if vote.is_poisoned else None) for vote in last}
    count = Counter(vote_of.values())
    return max((number for number, content in vote_of.items() if count[content] >= quorum), default=None)


def _decided_already(item_id: int) -> str:
    return f"item {item_id} was decided already. Supersede the decision to change it."


def _check_label(item: Row, true_label: int | None) -> None:
    if true_label is not None and not 0 <= true_label < item["n_classes"]:
        raise UnknownLabel(
            f"true_label must be in [0, {item['n_classes']}), the classes of item {item['id']}'s model, "
            f"got {true_label}."
        )


def _is_gold(item: Row) -> bool:
    return bool(item["ticket"] == statements.GOLD_TICKET)


def _settled(
    item: Row,
    state: State,
    votes: int,
    decision_id: int | None,
    claimed_by: str | None = None,
    lease: datetime | None = None,
) -> dict[str, Any]:
    return {
        "item_id": item["id"],
        "new_state": state.value,
        "new_claimed_by": claimed_by,
        "new_lease": lease,
        "new_votes": votes,
        "new_decision_id": decision_id,
    }


def _as_decision(row: dict[str, Any]) -> Decision:
    return decision_of(row | {"replaced_by": None, "replaced_by_kind": None})
