"""Every retraining that was begun and what came of it, and the button that asks for one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from guard.errors import QueueError
from guard.relabel import statements
from guard.relabel.queue import Queue

RoundOutcome = Literal["promoted", "refused", "failed", "canary"]

#: What a round measures, in words, and the name that its figure has in a report.
MEASURES = (
    ("clean images answered rightly", "clean_right"),
    ("clean images flagged", "clean_flagged"),
    ("poisoned inputs of new look-alike groups flagged", "other_groups_flagged"),
    ("poisoned inputs of known look-alike groups flagged", "same_groups_flagged"),
    ("poisoned inputs flagged that were missed before", "misses_flagged"),
    ("poisoned inputs whose true label the guard finds", "recovered"),
    ("earlier false alarms still flagged", "false_alarms_flagged"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One retraining."""

    id: int
    model: str
    #: Answers that it was begun with.
    n_decisions: int
    began_at: datetime
    #: None while it runs, or if it was killed.
    finished_at: datetime | None
    outcome: RoundOutcome | None
    #: Whatever the retrainer reports; JSON.
    report: dict[str, Any]
    candidate_digest: str | None


class Rounds:
    """The retrainings of one queue."""

    def __init__(self, queue: Queue) -> None:
        self._database = queue.database
        self._clock = queue.clock

    def begin(self, model: str, n_decisions: int) -> int:
        """Note that a retraining begins, and return its number."""
        values = {"model": model, "n_decisions": n_decisions, "began_at": self._clock()}
        with self._database.writing(durable=True) as connection:
            return int(connection.execute(statements.INSERT_ROUND, values).scalar_one())

    def finish(
        self, round_id: int, outcome: RoundOutcome, report: Mapping[str, Any], candidate_digest: str | None = None
    ) -> None:
        """Note what came of a retraining; a canary may be finished again, as promoted or refused.

        Raises
        ------
        QueueError
            If there is no such round, or it is finished.
        """
        values = {
            "round_id": round_id,
            "new_outcome": outcome,
            "new_report": json.dumps(dict(report)),
            "new_digest": candidate_digest,
            "now": self._clock(),
        }
        with self._database.writing(durable=True) as connection:
            if connection.execute(statements.FINISH_ROUND, values).rowcount == 0:
                raise QueueError(f"there is no round {round_id}, or it is finished.")

    def last(self, model: str) -> Round | None:
        """Return the newest retraining of a model, None if there was none."""
        newest = self.all(1, model=model)
        return newest[0] if newest else None

    def all(self, limit: int = 100, *, model: str | None = None) -> list[Round]:
        """Return up to `limit` retrainings, newest first."""
        statement = statements.ROUNDS if model is None else statements.ROUNDS_OF_MODEL
        with self._database.reading() as connection:
            rows = connection.execute(statement, {"n": limit, "model": model}).mappings().all()
        return [Round(**{**row, "report": json.loads(row["report"] or "{}")}) for row in rows]

    def models(self) -> list[str]:
        """Return the names of the models that were retrained, sorted."""
        with self._database.reading() as connection:
            return sorted(connection.execute(statements.RETRAINED_MODELS).scalars())

    def unfinished(self, model: str) -> list[int]:
        """Return the numbers of the retrainings of a model that have no outcome, ascending."""
        with self._database.reading() as connection:
            return sorted(connection.execute(statements.UNFINISHED_ROUNDS, {"model": model}).scalars())

    def request(self, model: str, reviewer: str) -> None:
        """Ask for a retraining now; asking twice is asking once."""
        values = {"model": model, "reviewer": reviewer, "requested_at": self._clock()}
        with self._database.writing(durable=True) as connection:
            connection.execute(statements.TAKE_RETRAIN_REQUEST, {"of_model": model})
            connection.execute(statements.INSERT_RETRAIN_REQUEST, values)

    def take_request(self, model: str) -> str | None:
        """Return who asked for a retraining of this model, None if nobody did; the request is gone then."""
        with self._database.writing(durable=True) as connection:
            return connection.execute(statements.TAKE_RETRAIN_REQUEST, {"of_model": model}).scalar()
