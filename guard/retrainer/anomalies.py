"""Anomalies of the traffic, less what is none: by the guard's own p-value, or by a line that has not seen them."""

from __future__ import annotations

import numpy as np

from guard.detection.detectors.base import NO_LABEL
from guard.detection.detectors.demarcation import Demarcation
from guard.detection.pipeline import Guard
from guard.types import Activations, BoolArray

#: Of the range of p-values in which inputs are flagged, the more suspicious share that counts as purified.
PURE = 0.5
#: Share of clean inputs that a line leaves below it where it recognises an anomaly.
_BEYOND = 0.99
_FOLDS = 5


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


def recognise(guard: Guard, anomalies: Activations) -> BoolArray:
    """Return which anomalies a line that was drawn between the others and clean images also tells from these, (n,).

    Inputs with one trigger have something in common that clean inputs lack, so a line knows those that it has not seen.
    Clean inputs that somebody calls poisoned are odd in as many ways as there are of them. Half of the clean reference
    draws the line, the other half says how far clean inputs go: one in a hundred beyond.
    """
    found = np.zeros(len(anomalies), dtype=bool)
    fold = np.arange(len(anomalies)) % _FOLDS
    for number in range(_FOLDS) if len(anomalies) >= _FOLDS else ():
        tested = fold == number
        found[tested] = resembles(guard, anomalies[~tested], anomalies[tested])
    return found


def resembles(guard: Guard, anomalies: Activations, inputs: Activations) -> BoolArray:
    """Return which inputs, shape (n,), a line between anomalies and half of the clean reference puts with these.

    That is beyond 99 % of the other half.
    """
    labels = np.concatenate([guard.reference_labels[::2], np.full(len(anomalies), NO_LABEL)])
    line = Demarcation().fit(Activations.concatenate([guard.reference[::2], anomalies]), labels)
    found: BoolArray = line.score(inputs) > np.quantile(line.score(guard.reference[1::2]), _BEYOND)
    return found
