"""Who may answer: names, roles, tokens and sessions. Tokens are kept as hashes only."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

from guard.errors import QueueError
from guard.relabel import statements
from guard.relabel.queue import Queue

Role = Literal["reviewer", "admin"]
ROLES: tuple[Role, ...] = ("reviewer", "admin")

#: Hours after which a reviewer has to log in again.
SESSION_HOURS = 12.0
_NAME = re.compile(r"[\w.@-][\w.@ -]{0,62}[\w.@-]|[\w.@-]")


@dataclass(frozen=True, slots=True)
class Reviewer:
    """Somebody who may answer; an admin may also add reviewers and start retrainings."""

    name: str
    role: Role


class Reviewers:
    """The people of one queue."""

    def __init__(self, queue: Queue) -> None:
        self._database = queue.database
        self._clock = queue.clock

    def add(self, name: str, role: Role = "reviewer") -> str:
        """Add a reviewer, or enable one again, and return a new token; it is shown once and kept nowhere.

        Raises
        ------
        QueueError
            If the name is taken by an enabled reviewer, or name or role break their rule.
        """
        if role not in ROLES:
            raise QueueError(f"role must be one of {', '.join(ROLES)}, got {role!r}.")
        if not _NAME.fullmatch(name):
            raise QueueError(f"a name must be 1 to 64 letters, digits, spaces or _.@-, got {name!r}.")
        token = secrets.token_urlsafe(32)
        hashed, now = _hash(token), self._clock()
        with self._database.writing(durable=True) as connection:
            known = connection.execute(statements.LOCK_REVIEWER, {"reviewer": name}).one_or_none()
            if known is None:
                values = {"name": name, "role": role, "token_hash": hashed, "added_at": now}
                connection.execute(statements.INSERT_REVIEWER, values)
            elif known.disabled_at is None:
                raise QueueError(f"there is a reviewer {name!r} already. Disable it first to give it a new token.")
            else:
                changes = {"reviewer": name, "new_role": role, "new_token_hash": hashed, "now": now}
                connection.execute(statements.ENABLE_REVIEWER, changes)
        return token

    def check_token(self, token: str) -> Reviewer | None:
        """Return whose token it is; None if nobody's, or of a disabled reviewer."""
        with self._database.reading() as connection:
            row = connection.execute(statements.REVIEWER_BY_TOKEN, {"token_hash": _hash(token)}).one_or_none()
        return None if row is None else Reviewer(row.name, row.role)

    def start_session(self, name: str, hours: float = SESSION_HOURS) -> str:
        """Log a reviewer in, and return the session's token, for a cookie.

        Raises
        ------
        QueueError
            If there is no such reviewer, or it is disabled.
        """
        token = secrets.token_urlsafe(32)
        now = self._clock()
        with self._database.writing(durable=True) as connection:
            if connection.execute(statements.REVIEWER_BY_NAME, {"reviewer": name}).one_or_none() is None:
                raise QueueError(f"there is no reviewer {name!r}, or it is disabled.")
            connection.execute(statements.DELETE_ENDED_SESSIONS, {"now": now})
            values = {"token_hash": _hash(token), "reviewer": name, "expires_at": now + timedelta(hours=hours)}
            connection.execute(statements.INSERT_SESSION, values)
        return token

    def find_session(self, token: str) -> Reviewer | None:
        """Return who is logged in; None if the session ended or its reviewer is disabled."""
        with self._database.reading() as connection:
            values = {"token_hash": _hash(token), "now": self._clock()}
            row = connection.execute(statements.REVIEWER_BY_SESSION, values).one_or_none()
        return None if row is None else Reviewer(row.name, row.role)

    def end_session(self, token: str) -> None:
        """Log out."""
        with self._database.writing(durable=True) as connection:
            connection.execute(statements.DELETE_SESSION, {"of_token_hash": _hash(token)})

    def names(self) -> list[str]:
        """Return the names of enabled reviewers, sorted."""
        return [reviewer.name for reviewer in self.all()]

    def all(self) -> list[Reviewer]:
        """Return enabled reviewers, sorted by name."""
        with self._database.reading() as connection:
            found = [Reviewer(*row) for row in connection.execute(statements.REVIEWERS)]
        return sorted(found, key=lambda reviewer: reviewer.name)

    def disable(self, name: str) -> None:
        """Make a reviewer's token and sessions worthless; what the reviewer decided stays.

        Raises
        ------
        QueueError
            If there is no such enabled reviewer.
        """
        with self._database.writing(durable=True) as connection:
            done = connection.execute(statements.DISABLE_REVIEWER, {"reviewer": name, "now": self._clock()})
            if done.rowcount == 0:
                raise QueueError(f"there is no reviewer {name!r}, or it is disabled already.")
            connection.execute(statements.DELETE_SESSIONS_OF, {"of_reviewer": name})


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()  # a token has 256 random bits: no salt and no slow hash needed
