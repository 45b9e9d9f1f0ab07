"""Bring ended leases back, and remove what is older than the retention time, in small transactions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guard.relabel import statements
from guard.relabel.database import Database
from guard.relabel.enqueueing import remove_items, update_ledger
from guard.relabel.items import State, Swept
from guard.relabel.settings import QueueSettings

Rows = Sequence[sa.Row[Any]]

#: Items per transaction, so that nobody waits long for the sweep.
_AT_ONCE = 200


def sweep(database: Database, settings: QueueSettings, now: datetime) -> Swept:
    """Do all of it; safe to run in several processes at once, and to be killed at any moment."""
    kept_for = timedelta(days=settings.retention_days)

    def expire(find: sa.Select[Any]) -> int:
        return _in_steps(database, find, now - kept_for, _expire)

    def purge(state: State) -> int:
        return _in_steps(database, statements.unanswered(state), now - 2 * kept_for, _purge)

    return Swept(
        returned=_in_steps(database, statements.ENDED_LEASES, now, _return),
        expired=expire(statements.old_items(State.PENDING))
        + expire(statements.old_items(State.TRAINED))
        + expire(statements.OLD_CLEAN_ITEMS),
        purged=purge(State.EXPIRED) + purge(State.DISCARDED),
    )


def _in_steps(
    database: Database, find: sa.Select[Any], before: datetime, change: Callable[[Connection, Rows], None]
) -> int:
    values = {"before": before, "n": _AT_ONCE}
    total = 0
    while True:
        with database.reading() as connection:  # mostly there is nothing to do, and then nobody is to wait
            if connection.execute(find, values).first() is None:
                return total
        with database.writing() as connection:
            connection.execute(statements.LEDGER)  # the first of all locks, as in an enqueue
            rows = connection.execute(find.with_for_update(skip_locked=True), values).all()
            if rows:
                change(connection, rows)
        total += len(rows)
        if len(rows) < _AT_ONCE:
            return total


def _return(connection: Connection, rows: Rows) -> None:
    connection.execute(statements.RETURN, {"ids": [row.id for row in rows]})


def _expire(connection: Connection, rows: Rows) -> None:
    remove_items(connection, [row.id for row in rows], State.EXPIRED)
    update_ledger(connection, more_items=-len(rows), more_bytes=-sum(row.size for row in rows))


def _purge(connection: Connection, rows: Rows) -> None:
    connection.execute(statements.DELETE_ITEM, [{"item_id": row.id} for row in rows])
