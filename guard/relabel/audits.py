"""The audit sample as the queue holds it: items of a window with their answers, and the requests that they stand for.

Gold items never count. An item is answered once an answer counts: the quorum is met, and it was not taken back; also
when its images were removed later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
from sqlalchemy.engine import Connection

from guard.relabel import audit_statements
from guard.types import UNDECIDED, BoolArray, Float64Array, IntArray

_HOUR = timedelta(hours=1)


@dataclass(frozen=True, slots=True, eq=False)
class SampledItems:
    """Items of some whole hours; n of them, in no order.

    Attributes
    ----------
    ids : ndarray of shape (n,), int64
    is_flagged : ndarray of shape (n,), bool
        False: an audit.
    p_values : ndarray of shape (n,), float64
    false_positive_rates : ndarray of shape (n,), float64
        That they were judged at; NaN where it was not kept.
    probabilities : ndarray of shape (n,), float64
        With which they came to the queue: 1 for a flagged one.
    answers : ndarray of shape (n,), int64
        1 poisoned, 0 clean, or `guard.types.UNDECIDED`.
    since : datetime or None
        Begin of the first of these hours whose requests were counted; None: nobody counted any of them.
    n_hours : int
        How many of these hours were counted: an audit sample was drawn, and there were requests.
    requests : mapping of str to int, or None
        Judged requests by stratum (`guard.statistics.strata`); a stratum without any is left out. None: nobody counted
        these, as requests of one class.
    """

    ids: IntArray
    is_flagged: BoolArray
    p_values: Float64Array
    false_positive_rates: Float64Array
    probabilities: Float64Array
    answers: IntArray
    since: datetime | None
    n_hours: int
    requests: Mapping[str, int] | None


def whole_hours(start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """Return the whole hours that hold a window, both in UTC: requests are counted per hour."""
    first, last = (time.astimezone(UTC).replace(minute=0, second=0, microsecond=0) for time in (start, end))
    return first, last if last == end else last + _HOUR


def read_sample(
    connection: Connection,
    start: datetime,
    end: datetime,
    *,
    model: str,
    bundle_digest: str | None = None,
    suspect_label: int | None = None,
) -> SampledItems:
    """Return the items of a model that came between two whole hours, while its requests were counted.

    Parameters
    ----------
    connection : Connection
    start, end : datetime
        From `whole_hours`; `end` is left out.
    model : str
    bundle_digest : str, optional
        Only what this bundle judged.
    suspect_label : int, optional
        Only inputs that the suspect model gives this label; requests are not counted by label.
    """
    found = connection.execute(audit_statements.sampled_items(start, end, model, bundle_digest, suspect_label)).all()
    ids, p_values, rates, drawn_with, is_poisoned = zip(*found, strict=True) if found else ((),) * 5
    probabilities = _numbers(drawn_with)
    is_flagged = np.isnan(probabilities)
    counted = connection.execute(audit_statements.counted_requests(start, end, model, bundle_digest)).all()
    since, n_hours = connection.execute(audit_statements.counted_hours(start, end, model, bundle_digest)).one()
    return SampledItems(
        np.array(ids, dtype=np.int64),
        is_flagged,
        _numbers(p_values),
        _numbers(rates),
        np.where(is_flagged, 1.0, probabilities),
        np.array([UNDECIDED if said is None else int(said) for said in is_poisoned], dtype=np.int64),
        since,
        n_hours,
        {stratum: int(requests) for stratum, requests in counted} if suspect_label is None else None,
    )


def sampled_models(connection: Connection) -> list[str]:
    """Return the names of the models that have an audit sample, sorted."""
    return list(connection.execute(audit_statements.SAMPLED_MODELS).scalars())


def sampled_parts(connection: Connection, start: datetime, end: datetime, model: str) -> tuple[list[str], list[int]]:
    """Return the digests of the bundles that judged requests between two whole hours, and the suspect labels."""
    bundles = connection.execute(audit_statements.sampled_bundles(start, end, model)).scalars().all()
    labels = connection.execute(audit_statements.sampled_classes(start, end, model)).scalars().all()
    return list(bundles), list(labels)


def found_misses(connection: Connection) -> dict[str, int]:
    """Return how many poisoned inputs were found among the audits of each model, of all time; 0 is left out."""
    return {model: int(count) for model, count in connection.execute(audit_statements.FOUND_MISSES)}


def _numbers(values: tuple[Any, ...]) -> Float64Array:
    """Return a column as numbers, NaN where there is none."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)
