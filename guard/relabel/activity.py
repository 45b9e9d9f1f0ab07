"""What came into the queue and what people answered, over time: the queue's own rows, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.schema import decisions, drops, items

_later = decisions.alias("later")
_is_answer = decisions.c.kind == "answer"
_is_ordinary = items.c.ticket < 1.0
#: Rows that are read at once where there may be many.
_AT_ONCE = 5000


@dataclass(frozen=True, slots=True)
class Share:
    """What one reviewer did.

    Attributes
    ----------
    reviewer : str
    poisoned, false_alarm : int
        Answers given, also such as do not stand any more.
    overturned : int
        Of these, replaced by another answer that says something else.
    taken_back : int
        Of these, withdrawn.
    """

    reviewer: str
    poisoned: int
    false_alarm: int
    overturned: int
    taken_back: int


@dataclass(frozen=True, slots=True)
class Arrival:
    """One flagged input, as the queue knows it even after its images are gone."""

    request_id: str
    model: str
    received_at: datetime
    state: State


class Activity:
    """Counts over time of one queue; nothing here writes.

    Parameters
    ----------
    queue : Queue
    with_gold : bool
        Whether counts hold gold items: a reviewer would know these by what does not rise. Single arrivals never do.
    """

    def __init__(self, queue: Queue, *, with_gold: bool = False) -> None:
        self._database = queue.database
        self._kinds = [] if with_gold else [_is_ordinary]

    def arrivals_per(self, width: timedelta, start: datetime, end: datetime, model: str | None) -> dict[int, int]:
        """Return how many flagged inputs came, by number of the interval since `start`; empty ones are left out."""
        place = _place(items.c.received_at, start, width)
        statement = (
            sa.select(place, sa.func.count())
            .where(*self._kinds, items.c.received_at >= start, items.c.received_at < end, *_of(model))
            .group_by(place)
        )
        return self._counted(statement)

    def answers_per(self, width: timedelta, start: datetime, end: datetime, model: str | None) -> dict[int, int]:
        """Return how many answers were given, as `arrivals_per`."""
        place = _place(decisions.c.decided_at, start, width)
        statement = (
            sa.select(place, sa.func.count())
            .join_from(decisions, items, items.c.id == decisions.c.item_id)
            .where(_is_answer, *self._kinds, decisions.c.decided_at >= start, decisions.c.decided_at < end, *_of(model))
            .group_by(place)
        )
        return self._counted(statement)

    def by_reviewer(self, start: datetime, end: datetime, model: str | None = None) -> list[Share]:
        """Return who answered what between two times, those with most answers first."""
        differs = sa.or_(
            _later.c.is_poisoned != decisions.c.is_poisoned,
            _later.c.true_label.is_distinct_from(decisions.c.true_label),
        )
        fate = sa.case(
            (_later.c.kind == "withdrawal", "taken_back"),
            (sa.and_(_later.c.kind == "answer", differs), "overturned"),
            else_="",
        )
        statement = (
            sa.select(decisions.c.reviewer, decisions.c.is_poisoned, fate, sa.func.count())
            .join_from(decisions, items, items.c.id == decisions.c.item_id)
            .join(_later, _later.c.supersedes == decisions.c.id, isouter=True)
            .where(_is_answer, *self._kinds, decisions.c.decided_at >= start, decisions.c.decided_at < end, *_of(model))
            .group_by(decisions.c.reviewer, decisions.c.is_poisoned, fate)
        )
        found: dict[str, dict[str, int]] = {}
        with self._database.reading() as connection:
            for reviewer, is_poisoned, became, count in connection.execute(statement):
                counts = found.setdefault(
                    reviewer, dict.fromkeys(("poisoned", "false_alarm", "overturned", "taken_back"), 0)
                )
                counts["poisoned" if is_poisoned else "false_alarm"] += count
                if became:
                    counts[became] += count
        shares = [Share(reviewer, **counts) for reviewer, counts in found.items()]
        return sorted(shares, key=lambda share: (-share.poisoned - share.false_alarm, share.reviewer))

    def arrivals(self, start: datetime, end: datetime, model: str | None = None) -> Iterator[Arrival]:
        """Yield every flagged input that came between two times, oldest first; images are not read."""
        statement = (
            sa.select(items.c.id, items.c.request_id, items.c.model, items.c.received_at, items.c.state)
            .where(_is_ordinary, items.c.received_at >= start, items.c.received_at < end, *_of(model))
            .order_by(items.c.id)
            .limit(_AT_ONCE)
        )
        last = 0
        while True:
            with self._database.reading() as connection:
                rows = connection.execute(statement.where(items.c.id > last)).all()
            for row in rows:
                yield Arrival(row.request_id, row.model, row.received_at, State(row.state))
            if len(rows) < _AT_ONCE:
                return
            last = rows[-1].id

    def turned_away(self, model: str | None = None) -> int:
        """Return how many inputs found no room since the queue was made and have no row: no time is kept of them."""
        dropped = sa.select(sa.func.coalesce(sa.func.sum(drops.c.dropped), 0))
        gave_way = sa.select(sa.func.count()).select_from(items).where(items.c.state == State.DISCARDED.value)
        if model is not None:
            dropped = dropped.where(drops.c.model == model)
        with self._database.reading() as connection:
            total = int(connection.execute(dropped).scalar_one())
            return max(0, total - int(connection.execute(gave_way.where(*_of(model))).scalar_one()))

    def models(self) -> list[str]:
        """Return the names of the models that flagged inputs came from, sorted."""
        with self._database.reading() as connection:
            return sorted(connection.execute(sa.select(items.c.model).distinct()).scalars())

    def _counted(self, statement: sa.Select[int, int]) -> dict[int, int]:
        with self._database.reading() as connection:
            return {int(place): int(count) for place, count in connection.execute(statement)}


def _place(column: sa.Column[Any], start: datetime, width: timedelta) -> sa.ColumnElement[int]:
    """Return the number of the interval that a time is in; times are whole microseconds in the database."""
    since = sa.type_coerce(column, sa.BigInteger) - sa.bindparam(None, start, type_=column.type)
    return sa.type_coerce(since, sa.BigInteger) // (width // timedelta(microseconds=1))


def _of(model: str | None) -> list[sa.ColumnElement[bool]]:
    return [] if model is None else [items.c.model == model]
