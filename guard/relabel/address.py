"""Where a queue is: the URL of its database, as every process of one machine understands it."""

from __future__ import annotations

import re
from pathlib import Path

from guard.errors import ConfigError

_SQLITE = "sqlite:///"
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_POSTGRESQL = re.compile(r"postgresql(\+[a-z0-9]+)?://")


def queue_url(text: str) -> str:
    """Return the URL of a queue that a person has named; relative paths become absolute.

    A server's workers, the review page and the retrainer run in folders of their own, where a relative path would name
    another file.

    Parameters
    ----------
    text : str
        `postgresql+psycopg://...`, `sqlite:///file`, or the file alone.

    Raises
    ------
    ConfigError
        If it is empty, or names another kind of database.
    """
    if text.startswith(_SQLITE):
        text = text.removeprefix(_SQLITE)
    elif scheme := _SCHEME.match(text):  # also without slashes: a mistyped URL must not become the name of a file
        if not _POSTGRESQL.match(text):
            raise ConfigError(
                f"a queue lives in SQLite or PostgreSQL, got {scheme[1]!r}. "
                "Give a file, sqlite:///FILE, or postgresql+psycopg://USER@HOST/NAME."
            )
        return text
    if not text:
        raise ConfigError("the queue's URL is empty. Give a file, or postgresql+psycopg://USER@HOST/NAME.")
    return _SQLITE + str(Path(text).absolute())
