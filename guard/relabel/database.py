"""Connections to SQLite or PostgreSQL: transactions that say how long they wait and how durable they are."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry

from guard.errors import ConfigError, QueueError, QueueUnavailable
from guard.extras import require
from guard.files import close_to_others, make_private_file

#: How a transaction begins: it reads; it writes what may be forgotten; it writes; it writes and is flushed to disk.
Mode = Literal["read", "passing", "write", "durable"]

#: Seconds between two attempts to get SQLite's write lock.
_POLL_S = (0.0002, 0.002)
#: Connections of a parent process; kept, so that a forked child never closes its parent's connections.
_inherited: list[Any] = []


class Database:
    """One database and a pool of connections to it; safe to use from several threads and after a fork.

    Parameters
    ----------
    url : str
        `sqlite:///path` or `postgresql://user@host/name`.
    wait_s : float
        Seconds that a transaction waits for a lock, if it does not say otherwise.

    Raises
    ------
    ConfigError
        If the URL is of another kind.
    MissingExtraError
        If its driver is not installed.
    """

    def __init__(self, url: str, wait_s: float) -> None:
        self.wait_s = wait_s
        try:
            parsed = sa.make_url(url)
        except (exc.ArgumentError, ValueError):
            raise ConfigError(_bad_url("one that cannot be read")) from None  # it may hold a password
        kind = parsed.get_backend_name()
        self.is_sqlite = kind == "sqlite"
        if self.is_sqlite:
            if parsed.database in (None, "", ":memory:"):
                raise ConfigError(_bad_url("no file: a queue in memory would forget what it acknowledged"))
            _close_files(parsed.database)
            self.engine = sa.create_engine(parsed, max_overflow=-1, connect_args={"check_same_thread": False})
            event.listen(self.engine, "connect", _prepare_sqlite)
        elif kind == "postgresql":
            patience = {"connect_timeout": 2, "keepalives_idle": 5, "tcp_user_timeout": int(wait_s * 1000)}
            require("postgres")
            self.engine = sa.create_engine(
                parsed.set(drivername="postgresql+psycopg"),
                pool_pre_ping=True,
                pool_timeout=wait_s,
                connect_args=patience | dict(parsed.query),
            )
        else:
            raise ConfigError(_bad_url(repr(kind)))
        event.listen(self.engine, "connect", _remember_process)
        event.listen(self.engine, "checkout", _refuse_connection_of_parent)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Open a transaction that sees one state of the database and changes nothing.

        Raises
        ------
        QueueUnavailable
            If the database cannot be reached or read now.
        """
        with self._transaction("read", self.wait_s) as connection:
            yield connection

    @contextmanager
    def writing(
        self, *, durable: bool = False, passing: bool = False, wait_s: float | None = None
    ) -> Iterator[Connection]:
        """Open a transaction that writes: on SQLite it holds the only write lock from its start.

        Parameters
        ----------
        durable : bool
            True: flushed to disk before this returns. False: survives a killed process; on SQLite a power cut may take
            the last moments.
        passing : bool
            True: what is written may be forgotten if PostgreSQL itself crashes, for instance a lease.
        wait_s : float, optional
            Seconds to wait for a lock.

        Raises
        ------
        QueueUnavailable
            If the database cannot be reached or written now.
        """
        wait_s = self.wait_s if wait_s is None else wait_s
        mode: Mode = "durable" if durable else "passing" if passing else "write"
        with self._transaction(mode, wait_s) as connection:
            yield connection

    @contextmanager
    def _transaction(self, mode: Mode, wait_s: float) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                begin = _begin_sqlite if self.is_sqlite else _begin_postgresql
                begin(connection, mode, max(1, int(wait_s * 1000)))
                yield connection
                connection.commit()
        except (exc.DBAPIError, exc.TimeoutError, sqlite3.Error) as error:
            raise _translated(error, self.engine.url.database or "") from error
        except (OverflowError, UnicodeEncodeError) as error:  # from the driver, before the database sees the value
            kind = "a number of more than 64 bits" if isinstance(error, OverflowError) else "half a character"
            raise QueueError(f"the queue's database cannot hold {kind}. Send another value.") from error


def _translated(error: Exception, name: str) -> QueueError:
    """Return the error of this package for one of a database's of that name or path, in one line."""
    cause = getattr(error, "orig", None) or error
    text = " ".join(str(cause).split())
    sqlstate = getattr(cause, "sqlstate", None) or ""
    if isinstance(error, exc.TimeoutError) or "is locked" in text or sqlstate in ("55P03", "57014", "40P01"):
        return QueueUnavailable(f"the queue is locked by others for too long ({text}). Try again.")
    if "is full" in text or sqlstate.startswith("53"):
        return QueueUnavailable(
            f"the queue cannot grow ({text}). Make room on its disk, or lower max_bytes with guard review settings."
        )
    if isinstance(cause, sqlite3.OperationalError) or isinstance(error, exc.OperationalError):
        return QueueUnavailable(f"the queue's database cannot be used ({text}). Is it there, and may it be written?")
    if getattr(error, "connection_invalidated", False) or isinstance(error, exc.InterfaceError):
        return QueueUnavailable(f"the queue's database is gone ({text}). It is tried again by the next call.")
    if "not a database" in text or "malformed" in text:
        return QueueError(
            f"{name} is no queue, or it is damaged ({text}). Check the path; `guard snapshot restore` brings a "
            "queue back."
        )
    return QueueError(f"the queue's database refused ({text}).")


def _bad_url(got: str) -> str:
    return f"the queue's URL must be sqlite:///path or postgresql://user@host/name, got {got}."


def _close_files(path: str) -> None:
    """Make the file if it is missing, and let nobody else read it; SQLite gives its log and journal the same rights.

    Older ones that everybody may read are closed, as `guard snapshot restore` once left them.
    """
    with suppress(OSError):  # SQLite will say it better
        make_private_file(Path(path))
    for end in ("-wal", "-shm", "-journal"):
        close_to_others(Path(path + end))


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are begun below, not by the driver
    cursor = connection.cursor()
    for pragma in ("busy_timeout = 5000", "journal_mode = WAL", "foreign_keys = ON", "wal_autocheckpoint = 4000"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection, mode: Mode, wait_ms: int) -> None:
    driver = connection.connection.driver_connection
    assert driver is not None
    synchronous = "FULL" if mode == "durable" else "NORMAL"
    patience = wait_ms if mode == "read" else 0
    for name, value in (("synchronous", synchronous), ("busy_timeout", patience)):
        if connection.info.get(name) != value:  # cannot change inside a transaction
            driver.execute(f"PRAGMA {name} = {value}")
            connection.info[name] = value
    if mode == "read":
        driver.execute("BEGIN")
        return
    # SQLite's own waiting sleeps for up to 0.1 s at a time, so that the lock often goes to whoever came last.
    deadline = time.monotonic() + wait_ms / 1000
    while True:
        try:
            driver.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
        time.sleep(random.uniform(*_POLL_S))


def _begin_postgresql(connection: Connection, mode: Mode, wait_ms: int) -> None:
    if mode == "read":
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        return
    settings = f"SET LOCAL lock_timeout = {wait_ms:d}; SET LOCAL statement_timeout = {wait_ms:d}"
    if mode == "passing":
        settings += "; SET LOCAL synchronous_commit = off"
    connection.exec_driver_sql(settings)


def _remember_process(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    record.info["pid"] = os.getpid()


def _refuse_connection_of_parent(connection: DBAPIConnection, record: ConnectionPoolEntry, proxy: Any) -> None:
    if record.info["pid"] != os.getpid():
        _inherited.append(record.dbapi_connection)
        record.dbapi_connection = proxy.dbapi_connection = None  # type: ignore[misc]
        raise exc.DisconnectionError("this connection belongs to the parent process")
