"""Hand items to reviewers for a while, and take them back."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from datetime import datetime, timedelta

from sqlalchemy.engine import Connection

from guard.errors import TooManyHeld
from guard.relabel import statements
from guard.relabel.settings import QueueSettings
from guard.relabel.statements import Order

#: Any number, the same in every process: with a reviewer's name, who holds it in PostgreSQL may claim for them.
_ADVISORY_LOCK = 5_140_703


class Claiming:
    """Claims of one reviewer within one transaction; nobody holds more than `max_held` items."""

    def __init__(self, connection: Connection, reviewer: str, settings: QueueSettings, now: datetime) -> None:
        self._connection = connection
        self._reviewer = reviewer
        self._most = settings.max_held
        self._until = now + timedelta(seconds=settings.lease_s)
        lock_holder(connection, reviewer)
        self._held = set(held_by(connection, reviewer, now))

    @property
    def room(self) -> int:
        """How many more items the reviewer may hold."""
        return max(0, self._most - len(self._held))

    def claim(self, n: int, *, order: Order, group: int | None) -> list[int]:
        """Give the reviewer up to `n` pending items, in order; skipped ones come last. Return their numbers."""
        if n > 0 and not self.room:
            raise TooManyHeld(
                f"{self._reviewer} holds {len(self._held)} items: max_held is {self._most}. "
                "Answer, skip or release some first."
            )
        n = min(n, self.room)
        values = {"reviewer": self._reviewer, "n": n}
        if group is not None:
            values["group"] = group
        ids = list(self._connection.execute(statements.pick(order, group is not None), values).scalars())
        if len(ids) < n:
            values["n"] = n - len(ids)
            ids += self._connection.execute(statements.pick_skipped(group is not None), values).scalars()
        self._take(ids)
        return ids

    def claim_items(self, ids: Sequence[int]) -> list[int]:
        """Give the reviewer those of the named items that are pending, as many as may be held; return what is held."""
        values = {"reviewer": self._reviewer, "ids": list(ids)}
        free = list(self._connection.execute(statements.PICK_NAMED, values).scalars())
        claimed = [item_id for item_id in free if item_id in self._held]
        claimed += [item_id for item_id in free if item_id not in self._held][: self.room]
        self._take(claimed)
        return claimed

    def _take(self, ids: Sequence[int]) -> None:
        _take(self._connection, self._reviewer, ids, self._until)


def lock_holder(connection: Connection, reviewer: str) -> None:
    """Let nobody else change how many items a reviewer holds, until the transaction ends; before any item is locked."""
    if connection.dialect.name == "postgresql":  # on SQLite the transaction itself is the lock
        key = zlib.crc32(reviewer.encode("utf-8", "surrogatepass")) - 2**31
        connection.execute(statements.advisory_lock(_ADVISORY_LOCK, with_key=True), {"key": key})


def held_by(connection: Connection, reviewer: str, now: datetime) -> list[int]:
    """Return what a reviewer holds, what ends first at first."""
    return list(connection.execute(statements.HELD_BY, {"reviewer": reviewer, "now": now}).scalars())


def renew(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime, until: datetime) -> list[int]:
    """Lengthen the leases that have not ended; return their items."""
    held = _held_ids(connection, reviewer, ids, now)
    _take(connection, reviewer, held, until)
    return held


def release(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime) -> list[int]:
    """Make items pending again; return those that were the reviewer's."""
    held = _held_ids(connection, reviewer, ids, now)
    if held:
        connection.execute(statements.RETURN, {"ids": held})
    return held


def skip(connection: Connection, reviewer: str, item_id: int, now: datetime) -> None:
    """Make an item pending again, and the last that this reviewer sees."""
    if release(connection, reviewer, [item_id], now):
        values = {"item_id": item_id, "reviewer": reviewer, "skipped_at": now}
        connection.execute(statements.note_skip(connection.dialect.name), values)


def _held_ids(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime) -> list[int]:
    values = {"reviewer": reviewer, "ids": list(ids), "now": now}
    return list(connection.execute(statements.PICK_HELD, values).scalars())


def _take(connection: Connection, reviewer: str, ids: Sequence[int], until: datetime) -> None:
    if ids:
        connection.execute(statements.TAKE, {"ids": list(ids), "reviewer": reviewer, "until": until})
