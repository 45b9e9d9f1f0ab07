"""How judged requests are divided for the audit sample and the estimates: by p-value, relative to the rate in use.

Three parts: flagged, unflagged near the threshold, unflagged far from it. Audits are drawn with a higher probability
near the threshold, as misses are likelier there. Flagged inputs are divided further into bands, as reviewers answer
the most suspicious first: what they answered is no random sample of the flagged, but nearly one of each band.

Plain numbers, no arrays: a server asks this of every request.
"""

from __future__ import annotations

from typing import Literal

Stratum = Literal["flagged", "near", "far"]
STRATA: tuple[Stratum, ...] = ("flagged", "near", "far")

#: An unflagged request is near the threshold if its p-value is at most so many times the false-positive rate.
NEAR_FACTOR = 10.0
#: How many times likelier a request near the threshold is audited than one far from it.
NEAR_WEIGHT = 5.0
#: Upper ends of the bands of flagged inputs, as shares of the false-positive rate that they were flagged at.
FLAGGED_BANDS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
#: Band of flagged inputs whose rate was not kept.
UNKNOWN_BAND = len(FLAGGED_BANDS)


def stratum_of(p_value: float, false_positive_rate: float, is_flagged: bool) -> Stratum:
    """Return the stratum of one judged request.

    Parameters
    ----------
    p_value : float
        In (0, 1].
    false_positive_rate : float
        The rate in use when it was judged, in (0, 1).
    is_flagged : bool
        In `paper` mode a flag does not depend on the p-value.
    """
    if is_flagged:
        return "flagged"
    return "near" if p_value <= NEAR_FACTOR * false_positive_rate else "far"


def audit_probability(p_value: float, false_positive_rate: float, audit_rate: float) -> float:
    """Return the probability with which an unflagged request is drawn for the audit sample.

    To be stored with the item: its inverse is the item's weight.

    Parameters
    ----------
    p_value, false_positive_rate : float
        As for `stratum_of`.
    audit_rate : float
        Of a request far from the threshold, in [0, 1]; near it, `NEAR_WEIGHT` times as much, at most 1.
    """
    is_near = stratum_of(p_value, false_positive_rate, is_flagged=False) == "near"
    return min(1.0, NEAR_WEIGHT * audit_rate) if is_near else audit_rate
