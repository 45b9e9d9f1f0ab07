"""What came into the queue and what people answered, over time: the queue's own rows, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from guard.relabel import statements
from guard.relabel.items import State
from guard.relabel.queue import Queue

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
    """One flagged input or audit, as the queue knows it even after its images are gone."""

    request_id: str
    model: str
    received_at: datetime
    state: State
    is_audit: bool


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
        self._with_gold = with_gold

    def arrivals_per(self, width: timedelta, start: datetime, end: datetime, model: str | None) -> dict[int, int]:
        """Return how many flagged inputs came, by number of the interval since `start`; empty ones are left out."""
        return self._counted(statements.arrivals_per(width, start, end, model, self._with_gold))

    def answers_per(self, width: timedelta, start: datetime, end: datetime, model: str | None) -> dict[int, int]:
        """Return how many answers were given, as `arrivals_per`."""
        return self._counted(statements.answers_per(width, start, end, model, self._with_gold))

    def by_reviewer(self, start: datetime, end: datetime, model: str | None = None) -> list[Share]:
        """Return who answered what between two times, those with most answers first."""
        statement = statements.answers_by_reviewer(start, end, model, self._with_gold)
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
        """Yield every flagged input and audit that came between two times, oldest first; images are not read."""
        statement = statements.arrivals(start, end, model).execution_options(yield_per=_AT_ONCE)
        with self._database.reading() as connection:
            for rows in connection.execute(statement).partitions():
                for row in rows:
                    yield Arrival(row.request_id, row.model, row.received_at, State(row.state), bool(row.is_audit))

    def turned_away(self, model: str | None = None) -> int:
        """Return how many inputs found no room since the queue was made and have no row: no time is kept of them."""
        dropped, gave_way = statements.turned_away(model)
        with self._database.reading() as connection:
            total = int(connection.execute(dropped).scalar_one())
            return max(0, total - int(connection.execute(gave_way).scalar_one()))

    def models(self) -> list[str]:
        """Return the names of the models that flagged inputs came from, sorted."""
        with self._database.reading() as connection:
            return sorted(connection.execute(statements.MODELS).scalars())

    def _counted(self, statement: sa.Select[int, int]) -> dict[int, int]:
        with self._database.reading() as connection:
            return {int(place): int(count) for place, count in connection.execute(statement)}
