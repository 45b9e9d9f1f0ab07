"""What the queue does when its database is locked, full, gone, newer, tampered with or sealed with another key."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest
import sqlalchemy as sa
from cryptography.fernet import Fernet
from queue_helpers import PostgresServer, flagged, postgresql_folder

from guard.errors import AlreadyDecided, ConfigError, MissingExtraError, QueueError, QueueKeyError, QueueUnavailable
from guard.relabel import statements
from guard.relabel.database import Database
from guard.relabel.encryption import KEY_VARIABLE
from guard.relabel.items import Answer, State
from guard.relabel.migrating import migrate, revision_of
from guard.relabel.queue import Queue
from guard.relabel.schema import REVISION, metadata
from guard.relabel.settings import QueueWaits

HURRIED = QueueWaits(wait_s=0.2, enqueue_timeout_s=0.1)
#: Seconds that a hurried call may take on a busy machine; without its limit it would wait for ever.
SOON = 10.0


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    (tmp_path / "queue.db").write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{tmp_path / 'queue.db'}"


@pytest.fixture
def queue(queue_url: str) -> Iterator[Queue]:
    with Queue.open(queue_url) as queue:
        yield queue


@pytest.fixture
def hurried(queue_url: str, queue: Queue) -> Iterator[Queue]:
    """The same queue, for a caller that hardly waits: what fails here because the machine is busy, fails by chance."""
    with Queue.open(queue_url, waits=HURRIED) as hurried:
        yield hurried


def decide_one(queue: Queue, number: int = 0) -> int:
    [item_id] = queue.enqueue([flagged(number)]).ids
    queue.claim_items("ana", [item_id])
    return queue.decide("ana", item_id, is_poisoned=True, true_label=5).id


# --- locked ---


def test_locked_queue_is_unavailable_in_time_and_works_again_later(queue, hurried):
    [item_id] = queue.enqueue([flagged()]).ids
    queue.claim("ana")
    other = Database(str(queue.database.engine.url.render_as_string(hide_password=False)), 5)
    with other.writing() as connection:
        connection.execute(statements.LEDGER)
        connection.execute(statements.LOCK_ITEMS, {"ids": [item_id]})
        began = time.monotonic()
        with pytest.raises(QueueUnavailable, match=r"locked by others for too long|did not answer within"):
            hurried.enqueue([flagged(1)])
        with pytest.raises(QueueUnavailable, match="locked by others for too long"):
            hurried.decide("ana", item_id, is_poisoned=True, true_label=5)
        assert time.monotonic() - began < SOON
        assert queue.counts().by_state[State.CLAIMED] == 1  # reading goes on
    other.close()
    queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    assert queue.enqueue([flagged(1)]).ids[0] is not None


def test_threads_share_one_queue(queue_url):
    with Queue.open(queue_url) as queue:
        queue.enqueue([flagged(number) for number in range(40)])
        failures: list[Exception] = []

        def review(name: str) -> None:
            try:
                while found := queue.claim(name, 3):
                    answers = [Answer(item_id=item.id, is_poisoned=True, true_label=5) for item in found]
                    queue.decide_many(name, answers)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=review, args=(f"reviewer {number}",)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        assert queue.counts().by_state[State.DECIDED] == 40
        assert queue.verify_decisions().problems == ()


# --- disk full ---


def test_full_disk_is_unavailable_and_keeps_what_was_acknowledged(sqlite_url):
    with Queue.open(sqlite_url) as queue:
        sa.event.listen(queue.database.engine, "connect", _limit_pages)
        queue.database.engine.dispose()
        acknowledged: list[int] = []

        def fill() -> None:
            for number in range(1000):
                acknowledged.extend(queue.enqueue([flagged(number, body=bytes(3000))]).ids)

        with pytest.raises(QueueUnavailable, match=r"the queue cannot grow .*full.*Make room"):
            fill()
        assert len(acknowledged) > 10
        assert [item.id for item in queue.items(limit=1000)] == acknowledged
        assert queue.counts().held_items == len(acknowledged)
        sa.event.remove(queue.database.engine, "connect", _limit_pages)
        queue.database.engine.dispose()  # there is room again
        assert queue.enqueue([flagged(0)]).ids == (acknowledged[-1] + 1,)


def _limit_pages(connection: sqlite3.Connection, record: object) -> None:
    connection.execute("PRAGMA max_page_count = 150").close()


# --- gone ---


def test_database_that_cannot_be_reached_is_unavailable(tmp_path):
    with pytest.raises(QueueUnavailable, match="cannot be used"):
        Queue.open(f"sqlite:///{tmp_path}/no/such/folder/queue.db")
    began = time.monotonic()
    with pytest.raises(QueueUnavailable):
        Queue.open("postgresql://guard@127.0.0.1:1/queue")
    assert time.monotonic() - began < SOON


def test_file_that_is_no_database_is_refused(tmp_path):
    (tmp_path / "queue.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(QueueError, match=r"queue\.db is no queue, or it is damaged \(file is not a database\)\. Check"):
        Queue.open(f"sqlite:///{tmp_path}/queue.db")


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A PostgreSQL that a test may stop, and that flushes to disk as usual."""
    programs = postgresql_folder()
    if programs is None:
        pytest.skip("there is no PostgreSQL here: install Debian's postgresql, or put its programs on PATH")
    server = PostgresServer(programs)
    try:
        server.start()
        yield server
    finally:
        server.remove()


def test_postgresql_gone_for_a_while_loses_nothing_and_is_used_again(own_server):
    url = own_server.create_database()
    with Queue.open(url) as queue, Queue.open(url, waits=HURRIED) as hurried:
        ids = queue.enqueue([flagged(number) for number in range(5)]).ids
        queue.claim_items("ana", ids[:2])
        decision = queue.decide("ana", ids[0], is_poisoned=True, true_label=5)
        own_server.stop()
        began = time.monotonic()
        for _ in range(2):
            with pytest.raises(QueueUnavailable):
                hurried.enqueue([flagged(9)])
            with pytest.raises(QueueUnavailable):
                hurried.decide("ana", ids[1], is_poisoned=True, true_label=5)
        assert time.monotonic() - began < SOON
        own_server.start()
        queue.decide("ana", ids[1], is_poisoned=True, true_label=5)
        assert queue.get(ids[0]).decision == decision
        assert [item.id for item in queue.items()] == list(ids)
        assert queue.enqueue([flagged(9)]).ids[0] is not None
        assert queue.verify_decisions().rows == 2
        own_server.stop()
        own_server.start()
        assert queue.enqueue([flagged(9)]).ids[0] is not None  # a stale connection is not noticed by the caller


def test_postgresql_that_hangs_is_unavailable_in_time(own_server):
    url = own_server.create_database()
    with Queue.open(url) as queue, Queue.open(url, waits=HURRIED) as hurried:
        queue.enqueue([flagged(0)])
        own_server.freeze()
        try:
            began = time.monotonic()
            with pytest.raises(QueueUnavailable, match="did not answer within"):
                hurried.enqueue([flagged(1)])
            with pytest.raises(QueueUnavailable, match="still does not answer"):  # this one does not even try
                hurried.enqueue([flagged(1)])
            assert time.monotonic() - began < SOON
        finally:
            own_server.freeze(signal.SIGCONT)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with suppress(QueueUnavailable):
                if hurried.enqueue([flagged(2)]).ids[0] is not None:
                    break
        assert queue.items()[-1].input.request_id == "request-2"


# --- schema ---


def dump(url: str, *, by_migrations: bool) -> list[str]:
    """Build the schema one way or the other, and describe all of it."""
    database = Database(url, 5)
    try:
        if by_migrations:
            migrate(database)
        else:
            metadata.create_all(database.engine)
        with database.reading() as connection:
            return _describe_sqlite(connection) if database.is_sqlite else _describe_postgresql(connection)
    finally:
        database.close()


def _describe_sqlite(connection: sa.Connection) -> list[str]:
    rows = connection.exec_driver_sql(
        "SELECT type, name, tbl_name FROM sqlite_master WHERE tbl_name != 'alembic_version'"
    )
    found = []
    for kind, name, _ in rows.all():
        if kind == "table":
            found += [f"{name}: {tuple(row)}" for row in connection.exec_driver_sql(f"PRAGMA table_info({name})")]
            found += [f"{name}: {row[2:]}" for row in connection.exec_driver_sql(f"PRAGMA foreign_key_list({name})")]
        elif kind == "index":
            found += [f"{name}: {tuple(row)}" for row in connection.exec_driver_sql(f"PRAGMA index_xinfo({name})")]
        text = connection.exec_driver_sql("SELECT sql FROM sqlite_master WHERE name = ?", (name,)).scalar()
        if kind != "table":
            found.append(f"{name}: {' '.join((text or '').split())}")
    return sorted(found)


def _describe_postgresql(connection: sa.Connection) -> list[str]:
    questions = (
        "SELECT table_name, column_name, ordinal_position, data_type, character_maximum_length, is_nullable,"
        " column_default, is_identity FROM information_schema.columns WHERE table_schema = 'public'",
        "SELECT tablename, indexdef FROM pg_indexes WHERE schemaname = 'public'",
        "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint"
        " WHERE connamespace = 'public'::regnamespace",
        "SELECT tgrelid::regclass::text, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
        "SELECT proname, pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
    )
    rows = [tuple(row) for question in questions for row in connection.exec_driver_sql(question)]
    return sorted(str(row) for row in rows if row[0] != "alembic_version")


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_all_migrations_together_equal_the_schema(backend, tmp_path, request):
    if backend == "sqlite":
        urls = [f"sqlite:///{tmp_path / name}.db" for name in "ab"]
    else:
        server = request.getfixturevalue("postgresql_server")
        urls = [server.create_database() for _ in range(2)]
    migrated, created = (dump(url, by_migrations=way) for url, way in zip(urls, (True, False), strict=True))
    assert migrated == created
    assert len(created) > 60


def test_revision_is_the_newest_migration(sqlite_url):
    versions = Path(statements.__file__).parent / "migrations" / "versions"
    assert max(file.name for file in versions.glob("*.py")).startswith(REVISION)
    database = Database(sqlite_url, 5)
    with database.reading() as connection:
        assert revision_of(connection) == REVISION
    database.close()


def test_schema_newer_than_the_program_is_refused(queue_url):
    queue = Queue.open(queue_url)
    version = sa.table("alembic_version", sa.column("version_num"))
    with queue.database.writing() as connection:
        connection.execute(sa.update(version).values(version_num="9999"))
    try:
        with pytest.raises(QueueError, match=r"revision '9999', this program knows up to .* Upgrade backdoor-guard"):
            Queue.open(queue_url)
    finally:
        with queue.database.writing() as connection:
            connection.execute(sa.update(version).values(version_num=REVISION))
        queue.close()


def test_several_processes_may_open_a_new_queue_at_once(tmp_path):
    code = "import sys; from guard.relabel.queue import Queue; Queue.open(sys.argv[1]).close()"
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    running = [subprocess.Popen([sys.executable, "-c", code, url], stderr=subprocess.PIPE) for _ in range(2)]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()


@pytest.mark.parametrize(
    ("statement", "index"),
    [
        (statements.pick("suspicion", False), "ix_items_suspicion"),
        (statements.pick("age", False), "ix_items_age"),
        (statements.pick("group", False), "ix_items_group"),
        (statements.pick("suspicion", True), "ix_items_group"),
        (statements.LOWEST_TICKETS, "ix_items_ticket"),
        (statements.ENDED_LEASES, "ix_items_lease"),
        (statements.old_items(State.PENDING), "ix_items_age"),
        (statements.old_items(State.TRAINED), "ix_items_trained"),
    ],
)
def test_statement_walks_its_index_in_sqlite(sqlite_url, statement, index):
    database = Database(sqlite_url, 5)
    text = str(statement.compile(dialect=database.engine.dialect))
    with database.reading() as connection:
        plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (1,) * text.count("?"))]
    database.close()
    assert any(f"items USING INDEX {index}" in step for step in plan), plan
    assert not any("USE TEMP B-TREE" in step for step in plan) or index == "ix_items_group", plan


# --- tampering ---


def test_decisions_cannot_be_changed_or_removed(queue):
    decide_one(queue)
    for statement in (
        "UPDATE decisions SET reviewer = 'mallory'",
        "DELETE FROM decisions",
        "TRUNCATE decisions CASCADE"
        if not queue.database.is_sqlite
        else "REPLACE INTO decisions SELECT * FROM decisions",
    ):
        with pytest.raises(QueueError, match="append-only"), queue.database.writing() as connection:
            connection.exec_driver_sql(statement)
    assert queue.verify_decisions().problems == ()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("UPDATE decisions SET true_label = 7 WHERE id = 2", "decision 2 was changed"),
        ("UPDATE decisions SET reviewer = 'ben' WHERE id = 1", "decision 1 was changed"),
        ("DELETE FROM decisions WHERE id = 2", "decision 2 is missing: the next is 3"),
        ("DELETE FROM decisions WHERE id = 3", "item 3 counts as decided by decision 3"),
        ("UPDATE items SET decision_id = 1 WHERE id = 2", "item 2 counts as decided by decision 1"),
    ],
)
def test_tampering_shows(queue, change, problem):
    for number in range(3):
        decide_one(queue, number)
    before = queue.verify_decisions()
    assert (before.rows, before.problems) == (3, ())
    _without_triggers(queue, change)
    after = queue.verify_decisions()
    assert any(problem in entry for entry in after.problems), after.problems


def test_tampering_that_rehashes_one_row_still_shows(queue):
    from guard.relabel.chain import row_hash

    for number in range(2):
        decide_one(queue, number)
    with queue.database.reading() as connection:
        row = dict(connection.execute(statements.CHAIN).mappings().first())
    forged = row_hash(row | {"true_label": 7})
    _without_triggers(queue, f"UPDATE decisions SET true_label = 7, hash = '{forged}' WHERE id = 1")
    assert queue.verify_decisions().problems == ("decision 2 does not follow the one before it.",)


def _without_triggers(queue: Queue, statement: str) -> None:
    """Do what somebody with the database's own password, or the file, can do."""
    url = queue.database.engine.url
    if queue.database.is_sqlite:
        with sqlite3.connect(url.database) as connection:
            connection.execute("DROP TRIGGER decisions_no_update")
            connection.execute("DROP TRIGGER decisions_no_delete")
            connection.execute(statement)
        connection.close()
    else:
        with psycopg.connect(url.set(drivername="postgresql").render_as_string()) as connection:
            connection.execute("SET LOCAL session_replication_role = replica")
            connection.execute(statement)


# --- encryption ---


def test_encrypted_queue_hides_bodies_and_tensors(queue_url, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, Fernet.generate_key().decode())
    with Queue.open(queue_url) as queue:
        given = flagged(3, body=b"a secret face")
        item = queue.get(queue.enqueue([given]).ids[0])
        assert item.input.body == given.body
        assert item.input.inputs.tobytes() == given.inputs.tobytes()
        with queue.database.reading() as connection:
            stored = connection.exec_driver_sql("SELECT sealed, body, inputs, activations FROM blobs").one()
        assert stored[0]
        for part in map(bytes, stored[1:]):
            assert part.startswith(b"gAAAA")  # a Fernet token
            assert b"secret" not in part


def test_wrong_or_missing_key_is_refused_when_the_queue_is_opened(queue_url, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, Fernet.generate_key().decode())
    Queue.open(queue_url).close()
    monkeypatch.setenv(KEY_VARIABLE, Fernet.generate_key().decode())
    with pytest.raises(QueueKeyError, match="GUARD_QUEUE_KEY does not open what the queue holds"):
        Queue.open(queue_url)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(QueueKeyError, match=r"the queue is encrypted\. Set GUARD_QUEUE_KEY"):
        Queue.open(queue_url)


def test_malformed_key_is_refused_and_not_repeated(sqlite_url, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "hunter2")
    with pytest.raises(QueueKeyError, match="GUARD_QUEUE_KEY must hold 32 bytes") as caught:
        Queue.open(sqlite_url)
    assert "hunter2" not in str(caught.value)


def test_key_is_changed_by_naming_the_new_one_first(sqlite_url, monkeypatch):
    old, new = (Fernet.generate_key().decode() for _ in range(2))
    with Queue.open(sqlite_url) as queue:
        plain = queue.enqueue([flagged(0)]).ids[0]  # before there was a key
    for keys in (old, f"{new},{old}"):
        monkeypatch.setenv(KEY_VARIABLE, keys)
        with Queue.open(sqlite_url) as queue:
            queue.enqueue([flagged(1)])
            assert len(queue.items()) == len({item.id for item in queue.items()} | {plain})
    monkeypatch.setenv(KEY_VARIABLE, new)
    with Queue.open(sqlite_url) as queue:
        assert queue.get(3).input.request_id == "request-1"
        with pytest.raises(QueueKeyError):
            queue.get(2)


# --- addresses ---


def test_new_file_is_its_owners_only(tmp_path):
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as queue:
        queue.enqueue([flagged(0)])
        assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}


@pytest.mark.parametrize(
    "url", ["sqlite://", "sqlite:///:memory:", "mysql://host/queue", "no url", "postgresql+asyncpg:/x"]
)
def test_other_urls_are_refused(url):
    with pytest.raises(ConfigError, match="the queue's URL must be"):
        Queue.open(url)


def test_url_that_cannot_be_read_is_not_repeated():
    with pytest.raises(ConfigError) as caught:
        Queue.open("postgresql:secret-password")
    assert "secret" not in str(caught.value)


def test_missing_driver_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'backdoor-guard\[postgres\]'"):
        Queue.open("postgresql://guard@127.0.0.1:1/queue")


def test_answer_that_was_committed_before_the_connection_broke_is_not_taken_twice(queue):
    decision_id = decide_one(queue)
    with pytest.raises(AlreadyDecided):  # what a caller that saw no acknowledgement gets when it tries again
        queue.decide("ana", queue.decisions()[0].item_id, is_poisoned=True, true_label=5)
    assert [decision.id for decision in queue.decisions()] == [decision_id]
