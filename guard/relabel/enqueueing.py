"""Put flagged inputs into the queue: one transaction per batch, and a fair sample when there is no room."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guard.errors import BodyTooLarge
from guard.relabel import statements
from guard.relabel.items import Enqueued, State
from guard.relabel.reservoir import Body, GroupKey, Reservoir, Share, Waiting
from guard.relabel.rows import Rows
from guard.relabel.settings import QueueSettings

#: Items and bodies of a group that are looked at per new input, when room is sought.
_LOOK_AT = 2
#: Flagged items of a model among which its audits are hidden.
_NEWEST_RANKS = 200
#: Seconds for which the shares of the groups are believed.
_SHARES_AGE_S = 1.0
_random = random.SystemRandom()


def _check_bodies(sizes: Sequence[int], largest: int) -> None:
    """Raise `BodyTooLarge` if a body is larger than the settings allow; nothing of the batch is stored then."""
    positions = tuple(place for place, size in enumerate(sizes) if size > largest)
    if positions:
        raise BodyTooLarge(
            f"max_body_bytes is {largest}, got a body of {sizes[positions[0]]} bytes (input {positions[0]} of "
            f"{len(sizes)}). Raise it with guard review settings --max-body-bytes, or leave the input out.",
            positions,
        )


class Admission:
    """Writes batches of new items; remembers for a moment what every group holds."""

    def __init__(self) -> None:
        self._shares: dict[GroupKey, Share] = {}
        self._shares_at = float("-inf")

    def admit(self, connection: Connection, batch: Sequence[Rows], body_sizes: Sequence[int]) -> Enqueued:
        """Store what there is room for, and count what is dropped, in the caller's transaction.

        Parameters
        ----------
        connection : Connection
        batch : sequence of Rows
        body_sizes : sequence of int
            Bytes of each body as it came.

        Raises
        ------
        BodyTooLarge
            If one is above `max_body_bytes`.
        """
        if not batch:
            return Enqueued((), 0)
        last_id, held_items, held_bytes, text = connection.execute(statements.LEDGER).one()
        settings = QueueSettings.from_json(text)
        _check_bodies(body_sizes, settings.max_body_bytes)
        stored = _Stored(connection, max(16, _LOOK_AT * len(batch)))
        reservoir = Reservoir(
            max(0, settings.max_items - held_items),  # below 0 after a setting was lowered: then none is added
            max(0, settings.max_bytes - held_bytes),
            stored.lowest,
            stored.largest,
            lambda: self._known_shares(connection),
        )
        audits_left = _audits_left(connection, batch, settings.max_audits_per_hour)  # of the hour, by model
        batch = hidden_among_flagged(connection, batch)
        for place, rows in enumerate(batch):
            if rows.is_audit:
                if audits_left[rows.model] == 0:
                    reservoir.drops[rows.group_key] += 1
                    continue
                audits_left[rows.model] -= 1
            reservoir.offer(place, rows.group_key, rows.item["ticket"], rows.size, rows.spare)
        remove_items(connection, list(reservoir.removed), State.DISCARDED)
        stripped = {item_id: size for item_id, size in reservoir.stripped.items() if item_id > 0}
        if stripped:
            named = [{"of_item": item_id} for item_id in stripped]
            connection.execute(statements.REMOVE_BODY, named)
            connection.execute(statements.NOTE_BODY_REMOVED, named)
        numbers = {place: last_id + 1 + rank for rank, place in enumerate(reservoir.kept)}
        new = {
            number: batch[place].without_body() if place in reservoir.bodiless else batch[place]
            for place, number in numbers.items()
        }
        insert_rows(connection, new)
        gone = sum(reservoir.removed.values()) + sum(stripped.values())
        update_ledger(
            connection,
            new_ids=len(new),
            more_items=len(new) - len(reservoir.removed),
            more_bytes=sum(rows.size for rows in new.values()) - gone,
        )
        drops = [
            {"model": model, "suspect_label": room, "dropped": count}
            for (model, room), count in sorted(reservoir.drops.items())
        ]
        if drops:
            connection.execute(statements.count_drops(connection.dialect.name), drops)
        ids = tuple(numbers.get(place) for place in range(len(batch)))
        share_left = min(audits_left.values()) / settings.max_audits_per_hour if audits_left else None
        return Enqueued(ids, sum(reservoir.drops.values()), share_left)

    def _known_shares(self, connection: Connection) -> dict[GroupKey, Share]:
        if time.monotonic() - self._shares_at > _SHARES_AGE_S:
            self._shares = {}
            for model, room, *amounts in connection.execute(statements.SHARES):
                share = self._shares.setdefault((model, room), Share())
                share.items, share.bytes, share.spare = (
                    had + int(more) for had, more in zip((share.items, share.bytes, share.spare), amounts, strict=True)
                )
            self._shares_at = time.monotonic()
        return self._shares


def _audits_left(connection: Connection, batch: Sequence[Rows], most: int) -> dict[str, int]:
    """Return how many audits the queue takes within the hour, by each model that has some in the batch."""
    newest: dict[str, datetime] = {}
    for rows in batch:
        if rows.is_audit:
            newest[rows.model] = max(rows.item["received_at"], newest.get(rows.model, rows.item["received_at"]))
    left = {}
    for model, latest in newest.items():
        values = {"model": model, "since": latest - timedelta(hours=1), "until": latest}
        left[model] = max(0, most - connection.execute(statements.COUNT_AUDITS, values).scalar_one())
    return left


def hidden_among_flagged(connection: Connection, batch: Sequence[Rows]) -> list[Rows]:
    """Return the rows with every audit at the place of a random one of the newest flagged items of its model.

    Nothing less hides them: p-values of flagged items lie on a grid, and how they are spread depends on the attack.
    Where a model has no flagged item yet, its audits stay at their own place.
    """
    ranks: dict[str, Sequence[Any]] = {}
    for model in {rows.model for rows in batch if rows.is_audit}:
        values = {"model": model, "n": _NEWEST_RANKS}
        of_batch = [
            (rows.item["review_rank"], rows.item["review_score"])
            for rows in batch
            if rows.model == model and not rows.is_audit
        ]
        ranks[model] = [*of_batch, *connection.execute(statements.NEWEST_RANKS, values).all()]
    return [
        rows.placed(*_random.choice(ranks[rows.model])) if rows.is_audit and ranks[rows.model] else rows
        for rows in batch
    ]


class _Stored:
    """What the stored items of a group would give up first; those that a reviewer holds only if others do not do."""

    def __init__(self, connection: Connection, n: int) -> None:
        self._connection = connection
        self._n = n

    def lowest(self, group: GroupKey) -> Iterable[Waiting]:
        rows = self._rows(group, statements.LOWEST_TICKETS, statements.LOWEST_TICKETS_HELD)
        return [Waiting(is_held, *row) for is_held, row in rows]

    def largest(self, group: GroupKey) -> Iterable[Body]:
        rows = self._rows(group, statements.LARGEST_BODIES, statements.LARGEST_BODIES_HELD)
        return [Body(is_held, *row) for is_held, row in rows]

    def _rows(self, group: GroupKey, pending: sa.Select[Any], held: sa.Select[Any]) -> list[tuple[bool, Any]]:
        found: list[tuple[bool, Any]] = []
        for is_held, statement in ((False, pending), (True, held)):
            if len(found) < self._n:
                values = {"model": group[0], "room": group[1], "n": self._n - len(found)}
                found += [(is_held, row) for row in self._connection.execute(statement, values).all()]
        return found


def insert_rows(connection: Connection, batch: dict[int, Rows]) -> None:
    """Insert items under their numbers."""
    if batch:
        connection.execute(statements.INSERT_ITEM, [{"id": number} | rows.item for number, rows in batch.items()])
        connection.execute(
            statements.INSERT_BLOBS, [{"item_id": number} | rows.blobs for number, rows in batch.items()]
        )


def remove_items(connection: Connection, ids: Sequence[int], state: State) -> None:
    """Take items out of the queue: their images go, their row stays."""
    if ids:
        named = [{"item_id": item_id} for item_id in ids]
        connection.execute(statements.DELETE_BLOBS, named)
        connection.execute(statements.DELETE_SKIPS, named)
        connection.execute(statements.REMOVE_ITEM, [item | {"new_state": state.value} for item in named])


def update_ledger(connection: Connection, *, new_ids: int = 0, more_items: int, more_bytes: int) -> None:
    """Note what came and went."""
    values = {"new_ids": new_ids, "more_items": more_items, "more_bytes": more_bytes}
    connection.execute(statements.UPDATE_LEDGER, values)
