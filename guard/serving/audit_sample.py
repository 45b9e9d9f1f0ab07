"""The audit sample: which unflagged requests a person judges as well, so that misses are seen."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence

from guard.statistics.strata import audit_probability
from guard.types import Verdict

#: Below this share of the audits of an hour that are left, fewer are drawn: the last ones are never used up.
_PLENTY = 0.5
_HOUR_S = 3600.0


class AuditSample:
    """Draws unflagged requests at random, each with a probability that is known and that no sender has a part in.

    When the queue has taken half of the audits that it takes within an hour, the probabilities fall in proportion to
    what is left, so that the sample is spread over the hour; the probability that held is returned with each draw.
    """

    def __init__(self) -> None:
        self._random = random.Random(random.SystemRandom().getrandbits(256))
        self._lock = threading.Lock()
        self._share_left, self._known_at = 1.0, time.monotonic()

    def draw(self, verdicts: Sequence[Verdict], false_positive_rate: float, audit_rate: float) -> dict[int, float]:
        """Return which unflagged rows are drawn: row -> the probability that it had.

        Parameters
        ----------
        verdicts : sequence of Verdict
        false_positive_rate : float
            The requested one.
        audit_rate : float
            In [0, 1]; 0 draws nothing.
        """
        drawn: dict[int, float] = {}
        if audit_rate == 0:
            return drawn
        for row, verdict in enumerate(verdicts):
            if verdict.is_poisoned:
                continue
            probability = audit_probability(verdict.p_value, false_positive_rate, audit_rate)
            number = self._random.random()
            if number < probability and number < (probability := probability * self._thinning()):
                drawn[row] = probability
        return drawn

    def note_left(self, share: float) -> None:
        """Note which share of the audits of an hour the queue still takes, in [0, 1]."""
        with self._lock:
            self._share_left, self._known_at = share, time.monotonic()

    def _thinning(self) -> float:
        with self._lock:
            since_s = time.monotonic() - self._known_at
            left = self._share_left + since_s / _HOUR_S
        return min(1.0, left / _PLENTY)
