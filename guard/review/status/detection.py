"""What the guards let through, as the status page shows it: estimates of the last week, and their intervals drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from guard.observing.detection import FIGURES, WEEK, Detection, detection_of_models, percent
from guard.relabel.queue import Queue
from guard.statistics.detection_rates import Estimate

#: So old may estimates be: they take longer to work out than counts.
AGE_S = 30.0
#: Ends of a drawn scale.
_SCALES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
#: Names of the figures on the page.
_NAMES = {
    "detection_rate": "Detection rate",
    "false_positive_rate": "False-positive rate",
    "precision": "Precision",
    "poisoned_share": "Poisoned share",
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One figure with its interval, drawn on a scale from 0; positions in percent of its length.

    Attributes
    ----------
    name, meaning : str
    value, between : str
        In words; `value` says what is missing where `between` is empty.
    place, left, width : float
        Of the value, of the interval's begin, and the interval's length.
    scale : str
        End of the scale.
    """

    name: str
    meaning: str
    value: str
    between: str = ""
    place: float = 0.0
    left: float = 0.0
    width: float = 0.0
    scale: str = ""


def bars(found: Detection) -> list[Bar]:
    """Return the figures of a guard in the order in which they are told."""
    drawn = []
    for name, meaning in FIGURES.items():
        figure = getattr(found.rates, name)
        meaning = meaning.partition(" (")[0]
        if not isinstance(figure, Estimate):
            drawn.append(Bar(_NAMES[name], meaning, str(figure)))
            continue
        end = 1.0 if name in ("detection_rate", "precision") else next(end for end in _SCALES if figure.upper <= end)
        drawn.append(
            Bar(
                _NAMES[name],
                meaning,
                percent(figure.value),
                f"{percent(figure.lower)} to {percent(figure.upper)}",
                round(100 * figure.value / end, 2),
                round(100 * figure.lower / end, 2),
                round(100 * (figure.upper - figure.lower) / end, 2),
                f"{100 * end:g} %",
            )
        )
    return drawn


class DetectionWatch:
    """Estimates over the last week of all guards that have an audit sample, worked out every `AGE_S` at most.

    Parameters
    ----------
    queue : Queue
    clock : callable
        -> seconds that only go forward; for tests.
    """

    def __init__(self, queue: Queue, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue = queue
        self._clock = clock
        self._found: list[Detection] = []
        self._read_at = float("-inf")
        self._lock = threading.Lock()

    def of(self, model: str | None) -> list[Detection]:
        """Return the estimates for one model, or for all."""
        with self._lock:
            if self._clock() >= self._read_at + AGE_S:
                now = datetime.now(UTC)
                self._found = detection_of_models(self._queue, now - WEEK, now)
                self._read_at = self._clock()
            return [found for found in self._found if model in (None, found.model)]
