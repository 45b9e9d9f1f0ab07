"""Settings that belong to the queue, and the rate at which an input was flagged."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Add both columns; NULL: the usual settings, and the rate of the bundle."""
    op.add_column("ledger", sa.Column("settings", sa.Text))
    op.add_column("items", sa.Column("false_positive_rate", sa.Float(53)))
