"""What an item can do without when the queue is full, and gold items that look like all others."""

import random
import re
import uuid

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_items = sa.table(
    "items", *map(sa.column, ("id", "ticket", "size", "spare_bytes", "received_at", "request_id", "model"))
)
_blobs = sa.table("blobs", *map(sa.column, ("item_id", "body")))
_gold = sa.table("gold", *map(sa.column, ("item_id", "copy_of")))


def upgrade() -> None:
    """Add both columns, fill them, and give gold items an id and a time of their own."""
    op.add_column("items", sa.Column("spare_bytes", sa.BigInteger, nullable=False, server_default="0"))
    op.add_column("gold", sa.Column("copy_of", sa.BigInteger))
    op.add_column("gold", sa.Column("learned_to", sa.BigInteger, nullable=False, server_default="0"))
    connection = op.get_bind()
    body = sa.select(sa.func.length(_blobs.c.body)).where(_blobs.c.item_id == _items.c.id).scalar_subquery()
    connection.execute(
        sa.update(_items).where(_items.c.ticket < 1.0, 2 * body > _items.c.size).values(spare_bytes=body)
    )
    _disguise_gold(connection)
    op.drop_index("ix_items_ticket", "items")
    _create_index("ix_items_ticket", "state = 'pending'", "model", "suspect_label", "ticket", "size", "spare_bytes")
    _create_index(
        "ix_items_spare",
        "state = 'pending' AND spare_bytes > 0",
        "model",
        "suspect_label",
        sa.text("spare_bytes DESC"),
    )


def _create_index(name: str, where: str, *columns: str | sa.TextClause) -> None:
    condition = sa.text(where)
    op.create_index(name, "items", columns, sqlite_where=condition, postgresql_where=condition)


def _disguise_gold(connection: sa.Connection) -> None:
    """Until now, a gold item had the request id and the time of the answered item that it is a copy of."""
    copies = sa.select(_items.c.id, _items.c.request_id, _items.c.model).where(_items.c.ticket == 2.0)
    for item_id, request_id, model in connection.execute(copies).all():
        is_before = sa.and_(_items.c.id < item_id, _items.c.ticket < 1.0)
        is_original = sa.and_(is_before, _items.c.request_id == request_id, _items.c.model == model)
        original = connection.execute(sa.select(sa.func.max(_items.c.id)).where(is_original)).scalar()
        came_at = connection.execute(sa.select(sa.func.max(_items.c.received_at)).where(is_before)).scalar()
        values = {"request_id": _other_id(request_id)} | ({} if came_at is None else {"received_at": came_at})
        connection.execute(sa.update(_items).where(_items.c.id == item_id).values(**values))
        connection.execute(sa.update(_gold).where(_gold.c.item_id == item_id).values(copy_of=original))


def _other_id(text: str) -> str:
    if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", text):
        return str(uuid.uuid4())
    other = re.sub("[0-9]", lambda _: random.SystemRandom().choice("0123456789"), text)
    return _other_id(text) if other == text and re.search("[0-9]", text) else other
