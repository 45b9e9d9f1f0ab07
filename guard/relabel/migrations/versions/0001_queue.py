"""The first schema. A migration never changes once it was released: new steps are new files."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_TIME = sa.BigInteger  # microseconds since 1970 UTC

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

_APPEND_ONLY = {
    "sqlite": (
        "CREATE TRIGGER decisions_no_update BEFORE UPDATE ON decisions "
        "BEGIN SELECT RAISE(ABORT, 'decisions are append-only'); END",
        "CREATE TRIGGER decisions_no_delete BEFORE DELETE ON decisions "
        "BEGIN SELECT RAISE(ABORT, 'decisions are append-only'); END",
        "CREATE TRIGGER decisions_no_replace BEFORE INSERT ON decisions "
        "WHEN EXISTS (SELECT 1 FROM decisions WHERE id = NEW.id OR supersedes = NEW.supersedes) "
        "BEGIN SELECT RAISE(ABORT, 'decisions are append-only'); END",
    ),
    "postgresql": (
        "CREATE FUNCTION decisions_are_append_only() RETURNS trigger LANGUAGE plpgsql AS "
        "'BEGIN RAISE EXCEPTION ''decisions are append-only''; END'",
        "CREATE TRIGGER decisions_no_change BEFORE UPDATE OR DELETE ON decisions "
        "FOR EACH ROW EXECUTE FUNCTION decisions_are_append_only()",
        "CREATE TRIGGER decisions_no_truncate BEFORE TRUNCATE ON decisions "
        "FOR EACH STATEMENT EXECUTE FUNCTION decisions_are_append_only()",
    ),
}


def upgrade() -> None:
    """Build every table, index and trigger."""
    _create_items()
    _create_decisions()
    _create_people_and_rounds()
    for statement in _APPEND_ONLY[op.get_context().dialect.name]:
        op.execute(statement)


def _create_items() -> None:
    op.create_table(
        "ledger",
        sa.Column("id", sa.Integer, autoincrement=False),
        sa.Column("last_item_id", sa.BigInteger, nullable=False),
        sa.Column("held_items", sa.BigInteger, nullable=False),
        sa.Column("held_bytes", sa.BigInteger, nullable=False),
        sa.Column("key_check", sa.LargeBinary),
        sa.PrimaryKeyConstraint("id", name="pk_ledger"),
    )
    op.execute(
        sa.insert(sa.table("ledger", *map(sa.column, ("id", "last_item_id", "held_items", "held_bytes")))).values(
            id=1, last_item_id=0, held_items=0, held_bytes=0
        )
    )
    op.create_table(
        "items",
        sa.Column("id", _ID, autoincrement=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("claimed_by", sa.Text),
        sa.Column("lease_expires_at", _TIME),
        sa.Column("group_id", sa.BigInteger, nullable=False),
        sa.Column("votes", sa.Integer, nullable=False),
        sa.Column("decision_id", sa.BigInteger),
        sa.Column("trained_bundle", sa.String(64)),
        sa.Column("ticket", sa.Float(53), nullable=False),
        sa.Column("size", sa.BigInteger, nullable=False),
        sa.Column("received_at", _TIME, nullable=False),
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("bundle_digest", sa.String(64), nullable=False),
        sa.Column("n_classes", sa.Integer, nullable=False),
        sa.Column("suspect_label", sa.Integer, nullable=False),
        sa.Column("backup_label", sa.Integer),
        sa.Column("backup_confidence", sa.Float(53)),
        sa.Column("combined", sa.Float(53), nullable=False),
        sa.Column("p_value", sa.Float(53), nullable=False),
        sa.Column("scores", sa.Text, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("content_type", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_items"),
    )
    combined = sa.text("combined DESC")
    _create_index("ix_items_suspicion", "state = 'pending'", "p_value", combined, "id")
    _create_index("ix_items_age", "state = 'pending'", "received_at", "id")
    _create_index("ix_items_group", "state = 'pending'", sa.text("group_id DESC"), "p_value", combined, "id")
    _create_index("ix_items_ticket", "state = 'pending'", "model", "suspect_label", "ticket")
    _create_index("ix_items_lease", "state = 'claimed'", "lease_expires_at")
    _create_index("ix_items_decided", "state = 'decided'", "id")
    _create_index("ix_items_trained", "state = 'trained'", "received_at")
    _create_index("ix_items_expired", "state = 'expired'", "received_at")
    _create_index("ix_items_discarded", "state = 'discarded'", "received_at")
    _create_index("ix_items_members", "group_id > 0", "group_id")
    op.create_table(
        "blobs",
        sa.Column("item_id", _ID, autoincrement=False),
        sa.Column("sealed", sa.Boolean, nullable=False),
        sa.Column("activations", sa.LargeBinary, nullable=False),
        sa.Column("inputs", sa.LargeBinary, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("item_id", name="pk_blobs"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_blobs_item_id"),
    )
    op.create_table(
        "drops",
        sa.Column("model", sa.Text),
        sa.Column("suspect_label", sa.Integer, autoincrement=False),
        sa.Column("dropped", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("model", "suspect_label", name="pk_drops"),
    )


def _create_index(name: str, where: str, *columns: str | sa.TextClause) -> None:
    condition = sa.text(where)
    op.create_index(name, "items", columns, sqlite_where=condition, postgresql_where=condition)


def _create_decisions() -> None:
    op.create_table(
        "decisions",
        sa.Column("id", _ID, autoincrement=False),
        sa.Column("item_id", sa.BigInteger, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("is_poisoned", sa.Boolean),
        sa.Column("true_label", sa.Integer),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("decided_at", _TIME, nullable=False),
        sa.Column("supersedes", sa.BigInteger),
        sa.Column("previous_hash", sa.String(64), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_decisions"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_decisions_item_id"),
        sa.ForeignKeyConstraint(["supersedes"], ["decisions.id"], name="fk_decisions_supersedes"),
        sa.UniqueConstraint("supersedes", name="uq_decisions_supersedes"),
    )
    op.create_index("ix_decisions_item_id", "decisions", ["item_id"])
    op.create_index("ix_decisions_reviewer", "decisions", ["reviewer", "id"])
    op.create_table(
        "gold",
        sa.Column("item_id", _ID, autoincrement=False),
        sa.Column("is_poisoned", sa.Boolean, nullable=False),
        sa.Column("true_label", sa.Integer),
        sa.PrimaryKeyConstraint("item_id", name="pk_gold"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_gold_item_id"),
    )
    op.create_table(
        "skips",
        sa.Column("reviewer", sa.Text),
        sa.Column("item_id", _ID, autoincrement=False),
        sa.Column("skipped_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("reviewer", "item_id", name="pk_skips"),
        sa.ForeignKeyConstraint(["item_id"], ["items.id"], name="fk_skips_item_id"),
    )
    op.create_index("ix_skips_item_id", "skips", ["item_id"])


def _create_people_and_rounds() -> None:
    op.create_table(
        "reviewers",
        sa.Column("name", sa.Text),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("token_hash", sa.String(64), nullable=False),
        sa.Column("added_at", _TIME, nullable=False),
        sa.Column("disabled_at", _TIME),
        sa.PrimaryKeyConstraint("name", name="pk_reviewers"),
        sa.UniqueConstraint("token_hash", name="uq_reviewers_token_hash"),
    )
    op.create_table(
        "sessions",
        sa.Column("token_hash", sa.String(64)),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("expires_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("token_hash", name="pk_sessions"),
        sa.ForeignKeyConstraint(["reviewer"], ["reviewers.name"], name="fk_sessions_reviewer"),
    )
    op.create_index("ix_sessions_reviewer", "sessions", ["reviewer"])
    op.create_table(
        "rounds",
        sa.Column("id", sa.Integer),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("n_decisions", sa.Integer, nullable=False),
        sa.Column("began_at", _TIME, nullable=False),
        sa.Column("finished_at", _TIME),
        sa.Column("outcome", sa.String(16)),
        sa.Column("report", sa.Text),
        sa.Column("candidate_digest", sa.String(64)),
        sa.PrimaryKeyConstraint("id", name="pk_rounds"),
    )
    op.create_index("ix_rounds_model", "rounds", ["model"])
    op.create_table(
        "retrain_requests",
        sa.Column("model", sa.Text),
        sa.Column("reviewer", sa.Text, nullable=False),
        sa.Column("requested_at", _TIME, nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_retrain_requests"),
    )
