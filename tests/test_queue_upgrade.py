"""A queue of the first schema, with items of every kind, is brought to the newest one and goes on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from queue_helpers import flagged

from guard.relabel import migrating
from guard.relabel.database import Database
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.rows import Codec
from guard.relabel.schema import blobs, items

FIRST = "0001"


def first_schema(url: str) -> None:
    database = Database(url, 5)
    config = Config()
    config.set_main_option("script_location", str(Path(migrating.__file__).parent / "migrations"))
    with database.writing(durable=True) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, FIRST)
        large = flagged(1, body=bytes(5000))
        _insert(connection, 1, flagged(0), 0.5)
        _insert(connection, 2, large, 0.25)
        _insert(connection, 3, flagged(0), 2.0)  # a gold copy of item 1, as the first version made them
        connection.execute(sa.text("INSERT INTO gold (item_id, is_poisoned, true_label) VALUES (3, true, 5)"))
        connection.execute(sa.text("UPDATE ledger SET last_item_id = 3, held_items = 3"))
    database.close()


def _insert(connection: sa.Connection, number: int, flagged_input: Any, ticket: float) -> None:
    rows = Codec(None).encode(flagged_input, ticket)
    later = (
        "spare_bytes",
        "false_positive_rate",
        "audit_probability",
        "review_rank",
        "review_score",
        "room",
        "is_counted",
    )
    old = {name: value for name, value in rows.item.items() if name not in later}
    table = sa.table(items.name, *(sa.column(column.name, column.type) for column in items.columns))
    connection.execute(sa.insert(table).values(id=number, **old))
    connection.execute(sa.insert(blobs).values(item_id=number, **rows.blobs))


@pytest.mark.parametrize("backend", ["sqlite", "postgresql"])
def test_queue_of_the_first_schema_is_upgraded(backend, tmp_path, request):
    if backend == "sqlite":
        url = f"sqlite:///{tmp_path / 'queue.db'}"
    else:
        url = request.getfixturevalue("postgresql_server").create_database()
    first_schema(url)
    with Queue.open(url) as queue:
        with queue.database.reading() as connection:
            spare = dict(tuple(row) for row in connection.execute(sa.select(items.c.id, items.c.spare_bytes)))
            placed = [tuple(row) for row in connection.execute(sa.select(items.c.review_rank, items.c.room))]
            copy_of = connection.exec_driver_sql("SELECT copy_of FROM gold").scalar()
        assert spare == {1: 0, 2: 5000, 3: 0}  # a body larger than the tensors, and none of a gold item
        assert copy_of == 1
        assert placed == [(0.004, 3), (0.004, 3), (0.004, 3)]  # p-value and suspect label: all were flagged
        assert not queue.has_audits()
        original, copy = queue.get(1).input, queue.get(3).input
        assert copy.request_id != original.request_id
        assert copy.request_id.startswith("request-")
        assert copy.inputs.tobytes() == original.inputs.tobytes()
        assert [item.id for item in queue.items()] == [1, 2, 3]
        assert queue.enqueue([flagged(5)]).ids == (4,)
        assert len(queue.claim("ann", 10)) == 4
        queue.decide("ann", 3, is_poisoned=True, true_label=5)
        assert queue.gold_results("ann").right == 1
        assert queue.counts().by_state[State.CLAIMED] == 3


def test_copy_of_the_first_schema_never_keeps_a_request_id_of_one_digit():
    other_id = importlib.import_module("guard.relabel.migrations.versions.0002_shares")._other_id
    others = {other_id("request-0") for _ in range(200)}
    assert "request-0" not in others
    assert len(others) > 1
