"""The tables of the queue: one schema for SQLite and PostgreSQL. `migrations/` builds the same, step by step."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import sqlalchemy as sa

#: The newest migration; a test holds it to `migrations/versions`.
REVISION = "0004"

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


class UtcTime(sa.types.TypeDecorator[datetime]):
    """An aware time, kept as whole microseconds since 1970 UTC: exact, and in order, in both databases."""

    impl = sa.BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Any) -> int | None:
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: int | None, dialect: Any) -> datetime | None:
        return None if value is None else _EPOCH + value * _MICROSECOND


#: A whole number of 64 bits; in SQLite only INTEGER may be a table's own row number.
Id = sa.BigInteger().with_variant(sa.Integer, "sqlite")

metadata = sa.MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
    }
)

#: One row: the last item's number, what is held, the sealed constant that proves the encryption key, and settings.
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("last_item_id", sa.BigInteger, nullable=False),
    sa.Column("held_items", sa.BigInteger, nullable=False),
    sa.Column("held_bytes", sa.BigInteger, nullable=False),
    sa.Column("key_check", sa.LargeBinary),
    #: JSON of the settings that are not as usual; NULL = all are.
    sa.Column("settings", sa.Text),
)

#: One row per flagged input. Bodies and tensors are in `blobs`, so that a claim touches little.
items = sa.Table(
    "items",
    metadata,
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("claimed_by", sa.Text),
    sa.Column("lease_expires_at", UtcTime),
    #: Number of look-alikes; 0 = none, so that ungrouped items sort last.
    sa.Column("group_id", sa.BigInteger, nullable=False),
    #: Answers that stand; above 0 while the quorum is not met.
    sa.Column("votes", sa.Integer, nullable=False),
    #: The answer that counts.
    sa.Column("decision_id", sa.BigInteger),
    #: Digest of the bundle that learned from it.
    sa.Column("trained_bundle", sa.String(64)),
    #: Drawn from [0, 1) for an ordinary item, 2 for a gold one; the lowest gives way when the queue is full.
    sa.Column("ticket", sa.Float(53), nullable=False),
    #: Bytes in `blobs`.
    sa.Column("size", sa.BigInteger, nullable=False),
    sa.Column("received_at", UtcTime, nullable=False),
    sa.Column("request_id", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("bundle_digest", sa.String(64), nullable=False),
    sa.Column("n_classes", sa.Integer, nullable=False),
    sa.Column("suspect_label", sa.Integer, nullable=False),
    sa.Column("backup_label", sa.Integer),
    sa.Column("backup_confidence", sa.Float(53)),
    sa.Column("combined", sa.Float(53), nullable=False),
    sa.Column("p_value", sa.Float(53), nullable=False),
    #: JSON: {"raw": {detector: score}, "surprise": {detector: score}}.
    sa.Column("scores", sa.Text, nullable=False),
    sa.Column("reason", sa.Text, nullable=False),
    sa.Column("content_type", sa.Text, nullable=False),
    #: Bytes of `size` that the item can do without: its body, where that is larger than its tensors; else 0.
    sa.Column("spare_bytes", sa.BigInteger, nullable=False, server_default="0"),
    #: Rate that it was judged at; NULL for an item of an earlier version.
    sa.Column("false_positive_rate", sa.Float(53)),
    #: NULL = flagged; else the probability with which an unflagged request was drawn for the audit sample.
    sa.Column("audit_probability", sa.Float(53)),
    #: What reviewers are given by: p-value, and score where that is the same; of an audit those of a flagged item.
    sa.Column("review_rank", sa.Float(53), nullable=False, server_default="0"),
    sa.Column("review_score", sa.Float(53), nullable=False, server_default="0"),
    #: Whose room it takes while the queue is full: the suspect label of a flagged item; -1 for all audits of a model.
    sa.Column("room", sa.Integer, nullable=False, server_default="0"),
    #: True if the server counted what it judged in `traffic`.
    sa.Column("is_counted", sa.Boolean, nullable=False, server_default=sa.false()),
)


def _index(name: str, where: str, *columns: sa.ColumnElement[Any]) -> None:
    condition = sa.text(where)
    sa.Index(name, *columns, sqlite_where=condition, postgresql_where=condition)


# Each covers the items of one state only: a claim searches among pending ones, however many were decided.
_index("ix_items_suspicion", "state = 'pending'", items.c.review_rank, items.c.review_score.desc(), items.c.id)
_index("ix_items_age", "state = 'pending'", items.c.received_at, items.c.id)
_index(
    "ix_items_group",
    "state = 'pending'",
    items.c.group_id.desc(),
    items.c.review_rank,
    items.c.review_score.desc(),
    items.c.id,
)
# Holds the sizes as well, so that the shares of all groups are added up without a look at the items.
_index(
    "ix_items_ticket",
    "state = 'pending'",
    items.c.model,
    items.c.room,
    items.c.ticket,
    items.c.size,
    items.c.spare_bytes,
)
_index(
    "ix_items_spare",
    "state = 'pending' AND spare_bytes > 0",
    items.c.model,
    items.c.room,
    items.c.spare_bytes.desc(),
)
sa.Index("ix_items_arrival", items.c.model, items.c.received_at)
_index("ix_items_audits", "audit_probability IS NOT NULL", items.c.model, items.c.received_at)
_index("ix_items_lease", "state = 'claimed'", items.c.lease_expires_at)
_index("ix_items_decided", "state = 'decided'", items.c.id)
_index("ix_items_trained", "state = 'trained'", items.c.received_at)
_index("ix_items_expired", "state = 'expired'", items.c.received_at)
_index("ix_items_discarded", "state = 'discarded'", items.c.received_at)
_index("ix_items_members", "group_id > 0", items.c.group_id)

#: What is large; removed when an item expires or gives way. The column that is read most comes first.
blobs = sa.Table(
    "blobs",
    metadata,
    sa.Column("item_id", Id, sa.ForeignKey("items.id"), primary_key=True, autoincrement=False),
    #: True if the three below are encrypted.
    sa.Column("sealed", sa.Boolean, nullable=False),
    #: safetensors
    sa.Column("activations", sa.LargeBinary, nullable=False),
    #: safetensors
    sa.Column("inputs", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
)

#: What reviewers said: rows are added, never changed or removed (triggers below), each chained to the one before.
decisions = sa.Table(
    "decisions",
    metadata,
    #: 1, 2, 3, ... without a gap.
    sa.Column("id", Id, primary_key=True, autoincrement=False),
    sa.Column("item_id", sa.BigInteger, sa.ForeignKey("items.id"), nullable=False, index=True),
    #: "answer" or "withdrawal".
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("reviewer", sa.Text, nullable=False),
    sa.Column("is_poisoned", sa.Boolean),
    sa.Column("true_label", sa.Integer),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("decided_at", UtcTime, nullable=False),
    #: The row that this one takes the place of, or takes back; no row is replaced twice.
    sa.Column("supersedes", sa.BigInteger, sa.ForeignKey("decisions.id"), unique=True),
    sa.Column("previous_hash", sa.String(64), nullable=False),
    #: SHA-256 over the row and `previous_hash`.
    sa.Column("hash", sa.String(64), nullable=False),
)
sa.Index("ix_decisions_reviewer", decisions.c.reviewer, decisions.c.id)

#: Items whose answer is known, to measure reviewers.
gold = sa.Table(
    "gold",
    metadata,
    sa.Column("item_id", Id, sa.ForeignKey("items.id"), primary_key=True, autoincrement=False),
    sa.Column("is_poisoned", sa.Boolean, nullable=False),
    sa.Column("true_label", sa.Integer),
    #: The answered item that it is a copy of: who answered that one is not asked. Not a reference: it may go first.
    sa.Column("copy_of", sa.BigInteger),
    #: Answers up to this decision are shown as learned from: a bundle learned from others of that time.
    sa.Column("learned_to", sa.BigInteger, nullable=False, server_default="0"),
)

#: Items that a reviewer did not want to answer now; they come last for this reviewer.
skips = sa.Table(
    "skips",
    metadata,
    sa.Column("reviewer", sa.Text, primary_key=True),
    sa.Column("item_id", Id, sa.ForeignKey("items.id"), primary_key=True, autoincrement=False, index=True),
    sa.Column("skipped_at", UtcTime, nullable=False),
)

#: Inputs that the queue had no room for, counted per group: by suspect label, audits of a model under -1.
drops = sa.Table(
    "drops",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("suspect_label", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("dropped", sa.BigInteger, nullable=False),
)

#: Requests that were judged where there is an audit sample, counted per hour: what the sample stands for.
traffic = sa.Table(
    "traffic",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("bundle_digest", sa.String(64), primary_key=True),
    #: Begin of the hour.
    sa.Column("hour", UtcTime, primary_key=True),
    #: A stratum of `guard.statistics.strata`.
    sa.Column("stratum", sa.String(16), primary_key=True),
    sa.Column("requests", sa.BigInteger, nullable=False),
)

#: Who may answer.
reviewers = sa.Table(
    "reviewers",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("role", sa.String(16), nullable=False),
    #: SHA-256 of the token; the token itself is shown once and kept nowhere.
    sa.Column("token_hash", sa.String(64), nullable=False, unique=True),
    sa.Column("added_at", UtcTime, nullable=False),
    sa.Column("disabled_at", UtcTime),
)

#: Who is logged in.
sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("token_hash", sa.String(64), primary_key=True),
    sa.Column("reviewer", sa.Text, sa.ForeignKey("reviewers.name"), nullable=False, index=True),
    sa.Column("expires_at", UtcTime, nullable=False),
)

#: Every retraining, whatever came of it.
rounds = sa.Table(
    "rounds",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("model", sa.Text, nullable=False, index=True),
    sa.Column("n_decisions", sa.Integer, nullable=False),
    sa.Column("began_at", UtcTime, nullable=False),
    sa.Column("finished_at", UtcTime),
    sa.Column("outcome", sa.String(16)),
    #: JSON.
    sa.Column("report", sa.Text),
    sa.Column("candidate_digest", sa.String(64)),
)

#: "Retrain now", at most one per model.
retrain_requests = sa.Table(
    "retrain_requests",
    metadata,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("reviewer", sa.Text, nullable=False),
    sa.Column("requested_at", UtcTime, nullable=False),
)

#: Per dialect: what forbids to change or remove a decision.
APPEND_ONLY = {
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
for _dialect, _statements in APPEND_ONLY.items():
    for _statement in _statements:
        _ddl = sa.DDL(_statement)  # type: ignore[no-untyped-call]
        sa.event.listen(metadata, "after_create", _ddl.execute_if(dialect=_dialect))
