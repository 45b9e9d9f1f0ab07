"""Anomalies of the traffic without a person's word: flagged inputs, less most of the false alarms among them."""

from __future__ import annotations

import numpy as np

from guard.pipeline import Guard
from guard.types import Activations, BoolArray

#: Of the range of p-values in which inputs are flagged, the more suspicious share that counts as purified.
PURE = 0.5


def purify(guard: Guard, flagged: Activations) -> BoolArray:
    """Return which flagged inputs are anomalies, shape (n,): those whose p-value is at most half the rate.

    P-values of clean inputs are uniform, so half of the false alarms are left out; poisoned inputs crowd at the lower
    end. The classifier that learns from what is left bears the rest: it is calibrated on clean images.
    """
    if not len(flagged):
        return np.zeros(0, dtype=bool)
    scores = guard.scores(flagged)
    pure: BoolArray = scores.is_poisoned & (scores.p_values <= PURE * guard.config.false_positive_rate)
    return pure
