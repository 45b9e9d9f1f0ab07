"""The audit sample: how an item was drawn, where reviewers are given it, whose room it takes, what it stands for."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_items = sa.table(
    "items", *map(sa.column, ("p_value", "combined", "suspect_label", "review_rank", "review_score", "room"))
)


def upgrade() -> None:
    """Add the columns and the table; all items so far were flagged."""
    op.add_column("items", sa.Column("audit_probability", sa.Float(53)))
    op.add_column("items", sa.Column("review_rank", sa.Float(53), nullable=False, server_default="0"))
    op.add_column("items", sa.Column("review_score", sa.Float(53), nullable=False, server_default="0"))
    op.add_column("items", sa.Column("room", sa.Integer, nullable=False, server_default="0"))
    op.add_column("items", sa.Column("is_counted", sa.Boolean, nullable=False, server_default=sa.false()))
    op.get_bind().execute(
        sa.update(_items).values(
            review_rank=_items.c.p_value, review_score=_items.c.combined, room=_items.c.suspect_label
        )
    )
    pending = "state = 'pending'"
    score = sa.text("review_score DESC")
    _replace_index("ix_items_suspicion", pending, "review_rank", score, "id")
    _replace_index("ix_items_group", pending, sa.text("group_id DESC"), "review_rank", score, "id")
    _replace_index("ix_items_ticket", pending, "model", "room", "ticket", "size", "spare_bytes")
    spare = "state = 'pending' AND spare_bytes > 0"
    _replace_index("ix_items_spare", spare, "model", "room", sa.text("spare_bytes DESC"))
    op.create_index("ix_items_arrival", "items", ["model", "received_at"])
    _create_index("ix_items_audits", "audit_probability IS NOT NULL", "model", "received_at")
    op.create_table(
        "traffic",
        sa.Column("model", sa.Text, primary_key=True),
        sa.Column("bundle_digest", sa.String(64), primary_key=True),
        sa.Column("hour", sa.BigInteger, primary_key=True),
        sa.Column("stratum", sa.String(16), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("model", "bundle_digest", "hour", "stratum", name="pk_traffic"),
    )


def _replace_index(name: str, where: str, *columns: str | sa.TextClause) -> None:
    op.drop_index(name, "items")
    _create_index(name, where, *columns)


def _create_index(name: str, where: str, *columns: str | sa.TextClause) -> None:
    condition = sa.text(where)
    op.create_index(name, "items", columns, sqlite_where=condition, postgresql_where=condition)
