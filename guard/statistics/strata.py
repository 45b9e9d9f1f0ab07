"""Strata of judged requests: what the audit sample is drawn by, and what counts and estimates are kept by."""

from __future__ import annotations

from typing import Literal

Stratum = Literal["flagged", "near", "far"]
STRATA: tuple[Stratum, ...] = ("flagged", "near", "far")

#: An unflagged request is near the threshold up to so many times the rate; missed attacks are more likely there.
NEAR_FACTOR = 10.0
#: A request near the threshold is drawn for the audit sample so many times as often as one that is far.
NEAR_WEIGHT = 5.0


def stratum_of(p_value: float, false_positive_rate: float, is_flagged: bool) -> Stratum:
    """Return the stratum of one judged request.

    Parameters
    ----------
    p_value : float
        In (0, 1].
    false_positive_rate : float
        The requested one, in (0, 1).
    is_flagged : bool
        In `paper` mode a flag does not depend on the p-value.
    """
    if is_flagged:
        return "flagged"
    return "near" if p_value <= NEAR_FACTOR * false_positive_rate else "far"


def audit_probability(p_value: float, false_positive_rate: float, audit_rate: float) -> float:
    """Return the probability with which an unflagged request is drawn for the audit sample.

    Parameters
    ----------
    p_value, false_positive_rate : float
        As for `stratum_of`.
    audit_rate : float
        Of a request far from the threshold, in [0, 1].
    """
    is_near = stratum_of(p_value, false_positive_rate, is_flagged=False) == "near"
    return min(1.0, NEAR_WEIGHT * audit_rate) if is_near else audit_rate
