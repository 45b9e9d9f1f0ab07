"""How much an answer about a pending item would tell: an order that reviewers may be given items in."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"


def upgrade() -> None:
    """Add the column; the next grouping fills it."""
    op.add_column("items", sa.Column("usefulness", sa.Float(53), nullable=False, server_default="0"))
    pending = sa.text("state = 'pending'")
    columns: list[str | sa.TextClause] = [sa.text("usefulness DESC"), "review_rank", "id"]
    op.create_index("ix_items_usefulness", "items", columns, sqlite_where=pending, postgresql_where=pending)
