"""The answers of each reviewer, newest first, without reading all of them again for every page."""

from __future__ import annotations

import threading
from datetime import datetime

from guard.relabel.items import Decision
from guard.relabel.queue import Queue

_AT_ONCE = 1000


class AnswerLog:
    """Remembers which answers there are and when they were given; what became of them is read anew each time.

    Parameters
    ----------
    queue : Queue
    """

    def __init__(self, queue: Queue) -> None:
        self._queue = queue
        self._known: dict[str, list[tuple[int, datetime]]] = {}
        self._lock = threading.Lock()

    def count(self, reviewer: str) -> int:
        """Return how many answers a reviewer gave, also such as do not stand any more."""
        return len(self._ids(reviewer))

    def newest(self, reviewer: str, n: int, skip: int = 0) -> list[Decision]:
        """Return up to n answers, newest first, after the `skip` newest ones."""
        ids = self._ids(reviewer)
        chosen = ids[max(0, len(ids) - skip - n) : max(0, len(ids) - skip)]
        if not chosen:
            return []
        return self._queue.decisions(after_id=chosen[0][0] - 1, reviewer=reviewer, limit=len(chosen))[::-1]

    def since(self, reviewer: str, time: datetime) -> list[Decision]:
        """Return the answers that stand and were given at or after a time, newest first."""
        later = sum(decided_at >= time for _, decided_at in self._ids(reviewer))
        return [decision for decision in self.newest(reviewer, later) if decision.stands]

    def count_standing(self, reviewer: str, time: datetime | None = None) -> int:
        """Return how many answers stand, of all or of those given at or after a time; one count by the database."""
        ids = [decision_id for decision_id, decided_at in self._ids(reviewer) if time is None or decided_at >= time]
        return self._queue.count_standing(reviewer, after_id=ids[0] - 1) if ids else 0

    def last_standing(self, reviewer: str) -> Decision | None:
        """Return the newest answer that stands; None if none does."""
        skip = 0
        while part := self.newest(reviewer, 20, skip):
            for decision in part:
                if decision.stands:
                    return decision
            skip += len(part)
        return None

    def decision_of(self, reviewer: str, decision_id: int) -> Decision | None:
        """Return a reviewer's answer by its number; None if it is not theirs."""
        found = self._queue.decisions(after_id=decision_id - 1, reviewer=reviewer, limit=1)
        return found[0] if found and found[0].id == decision_id else None

    def _ids(self, reviewer: str) -> list[tuple[int, datetime]]:
        with self._lock:
            known = self._known.setdefault(reviewer, [])
            while True:
                part = self._queue.decisions(after_id=known[-1][0] if known else 0, reviewer=reviewer, limit=_AT_ONCE)
                known += [(decision.id, decision.decided_at) for decision in part]
                if len(part) < _AT_ONCE:
                    return list(known)
