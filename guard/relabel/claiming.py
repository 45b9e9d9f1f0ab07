"""Hand items to reviewers for a while, and take them back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from sqlalchemy.engine import Connection

from guard.relabel import statements
from guard.relabel.statements import Order


def claim(
    connection: Connection, reviewer: str, n: int, until: datetime, *, order: Order, group: int | None
) -> list[int]:
    """Give the reviewer up to `n` pending items, in order; skipped ones come last. Return their numbers."""
    values = {"reviewer": reviewer, "n": n}
    if group is not None:
        values["group"] = group
    ids = list(connection.execute(statements.pick(order, group is not None), values).scalars())
    if len(ids) < n:
        values["n"] = n - len(ids)
        ids += connection.execute(statements.pick_skipped(group is not None), values).scalars()
    _take(connection, reviewer, ids, until)
    return ids


def claim_items(connection: Connection, reviewer: str, ids: Sequence[int], until: datetime) -> list[int]:
    """Give the reviewer those of the named items that are pending, or already the reviewer's."""
    free = list(connection.execute(statements.PICK_NAMED, {"reviewer": reviewer, "ids": list(ids)}).scalars())
    _take(connection, reviewer, free, until)
    return free


def renew(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime, until: datetime) -> list[int]:
    """Lengthen the leases that have not ended; return their items."""
    mine = _mine(connection, reviewer, ids, now)
    _take(connection, reviewer, mine, until)
    return mine


def release(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime) -> list[int]:
    """Make items pending again; return those that were the reviewer's."""
    mine = _mine(connection, reviewer, ids, now)
    if mine:
        connection.execute(statements.RETURN, {"ids": mine})
    return mine


def skip(connection: Connection, reviewer: str, item_id: int, now: datetime) -> None:
    """Make an item pending again, and the last that this reviewer sees."""
    if release(connection, reviewer, [item_id], now):
        values = {"item_id": item_id, "reviewer": reviewer, "skipped_at": now}
        connection.execute(statements.note_skip(connection.dialect.name), values)


def _mine(connection: Connection, reviewer: str, ids: Sequence[int], now: datetime) -> list[int]:
    values = {"reviewer": reviewer, "ids": list(ids), "now": now}
    return list(connection.execute(statements.PICK_MINE, values).scalars())


def _take(connection: Connection, reviewer: str, ids: Sequence[int], until: datetime) -> None:
    if ids:
        connection.execute(statements.TAKE, {"ids": list(ids), "reviewer": reviewer, "until": until})
