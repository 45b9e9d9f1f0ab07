"""How requests are divided for the estimates of what the guard lets through: by p-value, relative to the rate in use.

Three parts: flagged, unflagged near the threshold, unflagged far from it. Audits are drawn with a higher probability
near the threshold, as misses are likelier there. Flagged inputs are divided further into bands, as reviewers answer
the most suspicious first: what they answered is no random sample of the flagged, but nearly one of each band.

Plain numbers, no arrays: a server asks this of every request.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

from guard.errors import ConfigError, DataError

Part = Literal["flagged", "near", "far"]

#: An unflagged request is near the threshold if its p-value is at most so many times the false-positive rate.
NEAR_FACTOR = 10.0
#: How many times likelier a request near the threshold is audited than one far from it.
NEAR_WEIGHT = 5.0
#: Upper ends of the bands of flagged inputs, as shares of the false-positive rate that they were flagged at.
FLAGGED_BANDS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
#: Band of flagged inputs whose rate was not kept.
UNKNOWN_BAND = len(FLAGGED_BANDS)


def part_of(p_value: float, false_positive_rate: float) -> Part:
    """Return where a request belongs.

    Parameters
    ----------
    p_value : float
        In [0, 1].
    false_positive_rate : float
        The rate in use when the request was judged, in (0, 1).

    Raises
    ------
    DataError
        If one of them is out of range.
    """
    _check(p_value, false_positive_rate)
    if p_value <= false_positive_rate:
        return "flagged"
    return "near" if p_value <= NEAR_FACTOR * false_positive_rate else "far"


def audit_probability(p_value: float, false_positive_rate: float, audit_rate: float, scale: float = 1.0) -> float:
    """Return the probability with which a request is to go to the queue.

    Parameters
    ----------
    p_value, false_positive_rate : float
        As in `part_of`.
    audit_rate : float
        Probability far from the threshold, in [0, 1]; `NEAR_WEIGHT` times as much near it, at most 1.
    scale : float
        In [0, 1]: what the hourly limit leaves. It may depend on the requests before this one, not on this one.
        At 0 a request cannot be drawn, and the estimates say nothing of such requests.

    Returns
    -------
    probability : float
        1 for a flagged request. To be stored with the item: its inverse is the item's weight.

    Raises
    ------
    ConfigError
        If `audit_rate` or `scale` is out of range.
    DataError
        If the p-value or the false-positive rate is.
    """
    for name, value in (("audit_rate", audit_rate), ("scale", scale)):
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} must be in [0, 1], got {value!r}.")
    part = part_of(p_value, false_positive_rate)
    if part == "flagged":
        return 1.0
    return scale * min(1.0, audit_rate * (NEAR_WEIGHT if part == "near" else 1.0))


def flagged_band(p_value: float, false_positive_rate: float | None) -> int:
    """Return the position in `FLAGGED_BANDS` of a flagged input; `UNKNOWN_BAND` if its rate is not known.

    A p-value above the rate counts as in the last band.

    Raises
    ------
    DataError
        If one of them is out of range.
    """
    if false_positive_rate is None:
        return UNKNOWN_BAND
    _check(p_value, false_positive_rate)
    return min(bisect_left(FLAGGED_BANDS, p_value / false_positive_rate), UNKNOWN_BAND - 1)


def _check(p_value: float, false_positive_rate: float) -> None:
    if not 0 <= p_value <= 1:
        raise DataError(f"p_value must be in [0, 1], got {p_value!r}.")
    if not 0 < false_positive_rate < 1:
        raise DataError(f"false_positive_rate must be in (0, 1), got {false_positive_rate!r}.")
