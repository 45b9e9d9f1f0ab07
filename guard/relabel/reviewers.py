"""Who may answer: names, roles, tokens and sessions. Tokens are kept as hashes only."""

from __future__ import annotations

import hashlib
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import sqlalchemy as sa

from guard.errors import QueueError
from guard.relabel.queue import Queue
from guard.relabel.schema import reviewers, sessions

Role = Literal["reviewer", "admin"]
ROLES: tuple[Role, ...] = ("reviewer", "admin")

#: Hours after which a reviewer has to log in again.
SESSION_HOURS = 12.0
_NAME = re.compile(r"[\w.@-][\w.@ -]{0,62}[\w.@-]|[\w.@-]")

#: A reviewer by the hash of a token.
_BY_TOKEN = sa.select(reviewers.c.name, reviewers.c.role).where(
    reviewers.c.token_hash == sa.bindparam("token_hash"), reviewers.c.disabled_at.is_(None)
)
#: A reviewer by the hash of a session's token.
_BY_SESSION = (
    sa.select(reviewers.c.name, reviewers.c.role)
    .join_from(sessions, reviewers, sessions.c.reviewer == reviewers.c.name)
    .where(
        sessions.c.token_hash == sa.bindparam("token_hash"),
        sessions.c.expires_at > sa.bindparam("now"),
        reviewers.c.disabled_at.is_(None),
    )
)


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
        values = {"role": role, "token_hash": _hash(token), "added_at": self._clock(), "disabled_at": None}
        by_name = reviewers.c.name == name
        with self._database.writing(durable=True) as connection:
            known = connection.execute(
                sa.select(reviewers.c.disabled_at).where(by_name).with_for_update()
            ).one_or_none()
            if known is None:
                connection.execute(sa.insert(reviewers).values(name=name, **values))
            elif known.disabled_at is None:
                raise QueueError(f"there is a reviewer {name!r} already. Disable it first to give it a new token.")
            else:
                connection.execute(sa.update(reviewers).where(by_name).values(**values))
        return token

    def check_token(self, token: str) -> Reviewer | None:
        """Return whose token it is; None if nobody's, or of a disabled reviewer."""
        with self._database.reading() as connection:
            row = connection.execute(_BY_TOKEN, {"token_hash": _hash(token)}).one_or_none()
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
            is_enabled = sa.select(reviewers.c.name).where(reviewers.c.name == name, reviewers.c.disabled_at.is_(None))
            if connection.execute(is_enabled).scalar() is None:
                raise QueueError(f"there is no reviewer {name!r}, or it is disabled.")
            connection.execute(sa.delete(sessions).where(sessions.c.expires_at <= now))
            values = {"token_hash": _hash(token), "reviewer": name, "expires_at": now + timedelta(hours=hours)}
            connection.execute(sa.insert(sessions).values(**values))
        return token

    def find_session(self, token: str) -> Reviewer | None:
        """Return who is logged in; None if the session ended or its reviewer is disabled."""
        with self._database.reading() as connection:
            row = connection.execute(_BY_SESSION, {"token_hash": _hash(token), "now": self._clock()}).one_or_none()
        return None if row is None else Reviewer(row.name, row.role)

    def end_session(self, token: str) -> None:
        """Log out."""
        with self._database.writing(durable=True) as connection:
            connection.execute(sa.delete(sessions).where(sessions.c.token_hash == _hash(token)))

    def names(self) -> list[str]:
        """Return the names of enabled reviewers, sorted."""
        return [reviewer.name for reviewer in self.all()]

    def all(self) -> list[Reviewer]:
        """Return enabled reviewers, sorted by name."""
        enabled = sa.select(reviewers.c.name, reviewers.c.role).where(reviewers.c.disabled_at.is_(None))
        with self._database.reading() as connection:
            return sorted((Reviewer(*row) for row in connection.execute(enabled)), key=lambda reviewer: reviewer.name)

    def disable(self, name: str) -> None:
        """Make a reviewer's token and sessions worthless; what the reviewer decided stays.

        Raises
        ------
        QueueError
            If there is no such enabled reviewer.
        """
        is_enabled = sa.and_(reviewers.c.name == name, reviewers.c.disabled_at.is_(None))
        with self._database.writing(durable=True) as connection:
            done = connection.execute(sa.update(reviewers).where(is_enabled).values(disabled_at=self._clock()))
            if done.rowcount == 0:
                raise QueueError(f"there is no reviewer {name!r}, or it is disabled already.")
            connection.execute(sa.delete(sessions).where(sessions.c.reviewer == name))


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()  # a token has 256 random bits: no salt and no slow hash needed
