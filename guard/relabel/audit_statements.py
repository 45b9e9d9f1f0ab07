"""Statements that read the audit sample: what came to the queue, what of it was answered, and what it stands for."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from guard.relabel.schema import decisions, items, traffic

_HOUR = timedelta(hours=1) // timedelta(microseconds=1)
_is_ordinary = items.c.ticket < 1.0  # gold items measure reviewers, and stand for no request
_received_at = sa.type_coerce(items.c.received_at, sa.BigInteger)
#: A server notes 0 requests when it begins to count.
_is_hour = traffic.c.requests > 0
#: Its request was counted, and that has come to the queue: only then is it known what its kind stands for.
_is_counted = items.c.is_counted & sa.exists().where(
    _is_hour,
    traffic.c.model == items.c.model,
    traffic.c.bundle_digest == items.c.bundle_digest,
    sa.type_coerce(traffic.c.hour, sa.BigInteger) == _received_at - _received_at % sa.literal_column(str(_HOUR)),
)


def sampled_items(
    start: datetime, end: datetime, model: str, bundle_digest: str | None, suspect_label: int | None
) -> sa.Select[Any]:
    """List the items of a window, answered or not, of hours whose requests were counted; images are not read."""
    chosen = [
        _is_ordinary,
        items.c.model == model,
        items.c.received_at >= start,
        items.c.received_at < end,
        _is_counted,
    ]
    chosen += [] if bundle_digest is None else [items.c.bundle_digest == bundle_digest]
    chosen += [] if suspect_label is None else [items.c.suspect_label == suspect_label]
    return (
        sa.select(
            items.c.id,
            items.c.p_value,
            items.c.false_positive_rate,
            items.c.audit_probability,
            decisions.c.is_poisoned,
        )
        .join_from(items, decisions, decisions.c.id == items.c.decision_id, isouter=True)
        .where(*chosen)
    )


def counted_requests(start: datetime, end: datetime, model: str, bundle_digest: str | None) -> sa.Select[Any]:
    """Count the judged requests of the hours that begin in a window, by stratum."""
    chosen = [_is_hour, traffic.c.model == model, traffic.c.hour >= start, traffic.c.hour < end]
    chosen += [] if bundle_digest is None else [traffic.c.bundle_digest == bundle_digest]
    return sa.select(traffic.c.stratum, sa.func.sum(traffic.c.requests)).where(*chosen).group_by(traffic.c.stratum)


def sampled_bundles(start: datetime, end: datetime, model: str) -> sa.Select[Any]:
    """List the bundles that judged requests in a window."""
    chosen = (_is_hour, traffic.c.model == model, traffic.c.hour >= start, traffic.c.hour < end)
    return sa.select(traffic.c.bundle_digest).where(*chosen).distinct().order_by(traffic.c.bundle_digest)


def sampled_classes(start: datetime, end: datetime, model: str) -> sa.Select[Any]:
    """List the suspect labels of the items of a window."""
    chosen = (
        _is_ordinary,
        items.c.model == model,
        items.c.received_at >= start,
        items.c.received_at < end,
        _is_counted,
    )
    return sa.select(items.c.suspect_label).where(*chosen).distinct().order_by(items.c.suspect_label)


def counted_hours(start: datetime, end: datetime, model: str, bundle_digest: str | None) -> sa.Select[Any, int]:
    """Find the first hour of a window whose requests were counted, NULL if there is none, and how many there are."""
    chosen = [_is_hour, traffic.c.model == model, traffic.c.hour >= start, traffic.c.hour < end]
    chosen += [] if bundle_digest is None else [traffic.c.bundle_digest == bundle_digest]
    return sa.select(sa.func.min(traffic.c.hour), sa.func.count(traffic.c.hour.distinct())).where(*chosen)


#: Models that have an audit sample.
SAMPLED_MODELS = sa.select(traffic.c.model).distinct().order_by(traffic.c.model)
#: Per model, audits that the answer that counts calls poisoned: found misses, of all time.
FOUND_MISSES = (
    sa.select(items.c.model, sa.func.count())
    .join_from(items, decisions, decisions.c.id == items.c.decision_id)
    .where(items.c.audit_probability.is_not(None), _is_ordinary, decisions.c.is_poisoned)
    .group_by(items.c.model)
)
