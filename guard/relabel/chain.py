"""The chain of decisions: every row holds a hash over itself and the row before, so that tampering shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.engine import Connection

from guard.relabel import statements

#: What the first row calls the hash of the row before.
GENESIS = "0" * 64
_ADVISORY_LOCK = 5_140_702
_SIGNED = ("id", "item_id", "kind", "reviewer", "is_poisoned", "true_label", "note", "supersedes", "previous_hash")
#: Problems that are reported; more of them say nothing new.
_MOST_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Audit:
    """Outcome of one check of the chain."""

    rows: int
    #: Hash of the newest row. Keep it elsewhere: with it, even a chain that was cut or rewritten as a whole shows.
    head: str
    #: What is wrong, one line each; empty = nothing.
    problems: tuple[str, ...]


def row_hash(row: Mapping[Any, Any]) -> str:
    """Return the SHA-256 of one row, as 64 hex digits."""
    decided_at: datetime = row["decided_at"]
    signed = [*(row[name] for name in _SIGNED), decided_at.isoformat(timespec="microseconds")]
    return hashlib.sha256(json.dumps(signed, separators=(",", ":")).encode()).hexdigest()


def append(connection: Connection, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add rows to the chain in the caller's transaction, and return them with number and hashes."""
    if connection.dialect.name == "postgresql":  # on SQLite the transaction itself is the lock
        connection.execute(statements.advisory_lock(_ADVISORY_LOCK))
    last = connection.execute(statements.LAST_DECISION).one_or_none()
    number, previous = (last.id, last.hash) if last is not None else (0, GENESIS)
    chained = []
    for row in rows:
        number += 1
        full = row | {"id": number, "previous_hash": previous}
        full["hash"] = previous = row_hash(full)
        chained.append(full)
    connection.execute(statements.INSERT_DECISION, chained)
    return chained


def audit(connection: Connection) -> Audit:
    """Check every row against the one before, and every decided item against its decision."""
    count, head = 0, GENESIS
    problems: list[str] = []
    for row in connection.execute(statements.CHAIN).mappings():
        count += 1
        if row["id"] != count:
            problems.append(f"decision {count} is missing: the next is {row['id']}.")
            count = row["id"]
        elif row["previous_hash"] != head:
            problems.append(f"decision {count} does not follow the one before it.")
        if row_hash(row) != row["hash"]:
            problems.append(f"decision {count} was changed.")
        head = row["hash"]
        if len(problems) >= _MOST_PROBLEMS:
            break
    for item_id, decision_id in connection.execute(statements.UNFOUNDED):
        problems.append(f"item {item_id} counts as decided by decision {decision_id}, which does not say so.")
    return Audit(count, head, tuple(problems[:_MOST_PROBLEMS]))
