"""What a guard catches and lets through on real traffic, estimated from what reviewers answered, with intervals.

The truth is a number of the window asked about, not a property of the guard: where every request was reviewed nothing
is uncertain. How the poisoned requests of each stratum are estimated: `guard.statistics.predicted_totals`. Ratios are
formed in draws of these, and an interval lies between quantiles of the draws.

Assumed is that within a stratum it does not depend on an item being poisoned whether it was answered, that reviewers
are right, and that each request was audited with the probability that is stored, which was never 0. How often the
intervals hold the truth: `docs/detection_rates.md`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from guard.errors import ConfigError
from guard.statistics.needed_reviews import (
    WIDEST,
    answers_needed,
    answers_to_narrow,
    audits_needed,
    audits_to_narrow,
)
from guard.statistics.predicted_totals import DRAWS, Uncertain, predicted_totals
from guard.statistics.review_sample import Stratum
from guard.types import Float64Array

Missing = Literal["audits", "answers", "poisoned inputs", "clean inputs", "flagged inputs", "inputs"]


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval: `lower <= value <= upper`."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.lower:.4g} to {self.upper:.4g})"


@dataclass(frozen=True)
class NotKnown:
    """Too little was decided for a number.

    Attributes
    ----------
    needed : int
        How many more decided items would do, as far as can be told; 0 where no number of them is sure to.
    of : str
        What is missing: decided "audits", or "answers" about flagged inputs; or "poisoned inputs", "clean inputs",
        "flagged inputs" where none was found and the figure is 0 / 0.
    """

    needed: int
    of: Missing

    def __str__(self) -> str:
        one = self.of.removesuffix("s")
        if not self.needed:
            return f"not known: no {one} was found"
        return f"not known yet, {self.needed} more {one if self.needed == 1 else self.of} needed"


@dataclass(frozen=True)
class DetectionRates:
    """What a guard did in a window: figures, each an `Estimate` or `NotKnown`.

    Attributes
    ----------
    poisoned_share : Estimate or NotKnown
        Share of all requests that are poisoned.
    detection_rate : Estimate or NotKnown
        Share of the poisoned requests that were flagged (recall).
    precision : Estimate or NotKnown
        Share of the flagged requests that are poisoned.
    false_positive_rate : Estimate or NotKnown
        Share of the clean requests that were flagged.
    missed : Estimate or NotKnown
        Number of poisoned requests that were not flagged.
    confidence : float
        Of the intervals, in (0, 1).
    decided_flagged, decided_audits : int
        Items that the figures rest on.
    """

    poisoned_share: Estimate | NotKnown
    detection_rate: Estimate | NotKnown
    precision: Estimate | NotKnown
    false_positive_rate: Estimate | NotKnown
    missed: Estimate | NotKnown
    confidence: float
    decided_flagged: int
    decided_audits: int


def estimate_rates(strata: Sequence[Stratum], confidence: float = 0.95, seed: int = 0) -> DetectionRates:
    """Return what the guard caught and let through; the same for the same input.

    Parameters
    ----------
    strata : sequence of Stratum
        All requests of a window, each in one stratum.
    confidence : float
        Share of windows whose truth the interval is to hold, in (0, 1).
    seed : int
        Of the draws, >= 0.

    Returns
    -------
    rates : DetectionRates
        - `missed` is known once the decided audits could show that at most `MOST_UNSEEN` (5 %) of the unflagged
          requests are poisoned: about 60 audits. Whether they did show it does not matter.
        - `precision` is known once its interval is at most `WIDEST` (0.5) wide whatever was answered: 16 answers, if
          every band of p-values has its part of them.
        - `poisoned_share` and `false_positive_rate` are known where both of these are.
        - `detection_rate` is known where both are and its interval is at most `WIDEST` wide.

    Raises
    ------
    ConfigError
        If `confidence` or `seed` is out of range.
    """
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must be in (0, 1), got {confidence!r}.")
    if seed < 0:
        raise ConfigError(f"seed must be >= 0, got {seed!r}.")
    flagged = [stratum for stratum in strata if stratum.is_flagged]
    unflagged = [stratum for stratum in strata if not stratum.is_flagged]
    rng = np.random.default_rng(seed)
    caught, false_alarms = predicted_totals(flagged, rng)
    missed, passed = predicted_totals(unflagged, rng)
    answers, audits = answers_needed(flagged, confidence), audits_needed(unflagged)
    without_answers = NotKnown(answers, "answers") if answers else None
    without_audits = NotKnown(audits, "audits") if audits else None
    without = without_audits or without_answers
    detection = without or _ratio(caught, missed, confidence, "poisoned inputs")
    if isinstance(detection, Estimate) and detection.upper - detection.lower > WIDEST:
        detection = _too_wide(flagged, unflagged, caught.value, detection, confidence)
    return DetectionRates(
        poisoned_share=without or _ratio(caught + missed, false_alarms + passed, confidence, "inputs"),
        detection_rate=detection,
        precision=without_answers or _ratio(caught, false_alarms, confidence, "flagged inputs"),
        false_positive_rate=without or _ratio(false_alarms, passed, confidence, "clean inputs"),
        missed=without_audits or _between(missed.value, missed.low, missed.high, confidence),
        confidence=confidence,
        decided_flagged=sum(stratum.decided.count for stratum in flagged),
        decided_audits=sum(stratum.decided.count for stratum in unflagged),
    )


def _ratio(part: Uncertain, others: Uncertain, confidence: float, what: Missing) -> Estimate | NotKnown:
    """The share that `part` has of itself and the others."""
    both = part.value + others.value
    if both <= 0:
        return NotKnown(0, what)
    least, most = part.low + others.high, part.high + others.low
    low = np.divide(part.low, least, out=np.zeros(DRAWS), where=least > 0)
    high = np.divide(part.high, most, out=np.ones(DRAWS), where=most > 0)
    return _between(part.value / both, low, high, confidence)


def _between(value: float, low: Float64Array, high: Float64Array, confidence: float) -> Estimate:
    tail = (1 - confidence) / 2
    lower = float(np.quantile(low, tail, method="lower"))
    upper = float(np.quantile(high, 1 - tail, method="higher"))
    return Estimate(min(max(value, lower), upper), lower, upper)


def _too_wide(
    flagged: Sequence[Stratum], unflagged: Sequence[Stratum], caught: float, wide: Estimate, confidence: float
) -> NotKnown:
    audits = audits_to_narrow(unflagged, caught, confidence)
    if audits:
        return NotKnown(audits, "audits")
    factor = WIDEST / (wide.upper - wide.lower)
    return NotKnown(max(1, answers_to_narrow(flagged, factor)), "answers")
