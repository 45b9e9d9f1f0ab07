"""Bring an empty or older database to the newest schema, and refuse a newer one."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from guard.errors import QueueError
from guard.relabel import statements
from guard.relabel.database import Database
from guard.relabel.schema import REVISION

_ADVISORY_LOCK = 5_140_701


def migrate(database: Database) -> None:
    """Apply every migration that is missing, in one transaction; of several processes, one does it.

    Raises
    ------
    QueueError
        If a newer version of this package wrote the schema.
    QueueUnavailable
        If the database cannot be reached or written.
    """
    with database.reading() as connection:
        if revision_of(connection) == REVISION:
            return
    with database.writing(durable=True) as connection:
        if not database.is_sqlite:
            connection.execute(statements.advisory_lock(_ADVISORY_LOCK))
        if (revision := revision_of(connection)) != REVISION:
            _upgrade(connection, revision)


def revision_of(connection: Connection) -> str | None:
    """Return the revision of the schema; None for an empty database."""
    if not sa.inspect(connection).has_table(statements.VERSION_TABLE.name):
        return None
    return connection.execute(statements.REVISION_OF_SCHEMA).scalar()


def _upgrade(connection: Connection, revision: str | None) -> None:
    from alembic import command  # slow to import, and needed once in the life of a database
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if revision is not None and revision not in known:
        raise QueueError(
            f"the queue has schema revision {revision!r}, this program knows up to {REVISION!r}: a newer version wrote "
            "it. Upgrade backdoor-guard."
        )
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
