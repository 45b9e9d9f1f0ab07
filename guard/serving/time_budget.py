"""How deep a guard can look in the time that it is given: measured, not guessed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from guard.detection.pipeline import Guard
from guard.types import BACKUP, Activations

_SIZES = (1, 32)  # rows of the two batches that are measured; what lies between is interpolated
_REPEATS = 5
_MEMORY = 0.9  # share of the running mean of the slowness that stays with every batch
_FASTEST, _SLOWEST = 0.05, 20.0  # below 1: a guard that was measured while the machine was busy


class TimeBudget:
    """Chooses the deepest verdict that fits a time, above a floor.

    When a guard is loaded, verdicts at every depth are timed on its own clean reference, for one row and for many.
    While it serves, the ratio of real to measured time is followed, so that a busy machine looks less deep: as the
    senders of a flood would like, hence the floor. The time of a second opinion on flagged inputs does not count.

    Parameters
    ----------
    guard : Guard
        With early verdicts, or without any: then there is nothing to choose.
    clock : callable
        Returns seconds.
    """

    def __init__(self, guard: Guard, clock: Callable[[], float] = time.perf_counter) -> None:
        self._early = [guard.at_depth(early.depth) for early in guard.early]
        self._costs = {
            fitted.depth: [_seconds(fitted, size, clock) for size in _SIZES] for fitted in (*self._early, guard)
        }  # by depth, not to keep the guard alive
        self.slowness = 1.0

    def deepest_within(self, milliseconds: float, guard: Guard, n_rows: int) -> tuple[Guard, bool]:
        """Return the deepest guard that is expected to be done in time, and whether the floor breaks `max_guard_ms`.

        None is below the floor, the setting `min_depth`; without one, the deepest of the early verdicts.
        """
        floor = guard.config.min_depth or self._early[-1].depth
        places = [early.depth for early in self._early]
        choices = [*self._early[places.index(floor) :], guard]
        fitting = [early for early in choices if 1000 * self._expected(early, n_rows) <= milliseconds]
        most = guard.config.max_guard_ms  # a client's own deadline is no reason to wake anybody
        is_late = most is not None and 1000 * self._expected(choices[0], n_rows) > most
        return fitting[-1] if fitting else choices[0], is_late

    def took(self, guard: Guard, n_rows: int, seconds: float) -> None:
        """Take note of how long a verdict without a second opinion took."""
        if n_rows:
            ratio = self.slowness * seconds / max(self._expected(guard, n_rows), 1e-9)
            self.slowness = min(max(_MEMORY * self.slowness + (1.0 - _MEMORY) * ratio, _FASTEST), _SLOWEST)

    def _expected(self, guard: Guard, n_rows: int) -> float:
        few, many = self._costs[guard.depth]
        per_row = max(0.0, many - few) / (_SIZES[1] - _SIZES[0])
        return self.slowness * (few + per_row * (n_rows - _SIZES[0]))


def allowed_milliseconds(guard: Guard, headers: Iterable[Mapping[str, str]]) -> float | None:
    """Return the time that the settings allow for one batch, or its requests if all of them ask for less; None = any.

    Of several deadlines the longest counts, and one request without any has time: no sender may weaken the verdict on
    somebody else's request. A header that is no number above 0 is passed over: a deadline is a wish, no reason to
    refuse a request.
    """
    allowed = math.inf if guard.config.max_guard_ms is None else guard.config.max_guard_ms
    name = guard.config.deadline_header
    if name is not None:
        deadlines = [_deadline(headers_of_request, name.lower()) for headers_of_request in headers]
        allowed = min(allowed, max(deadlines, default=math.inf))
    return None if math.isinf(allowed) else allowed


def _deadline(headers: Mapping[str, str], name: str) -> float:
    return min((_number(value) for key, value in headers.items() if key.lower() == name), default=math.inf)


def _number(text: object) -> float:
    try:
        number = float(str(text))
    except ValueError:
        return math.inf
    return number if number > 0 else math.inf


def _seconds(guard: Guard, n_rows: int, clock: Callable[[], float]) -> float:
    rows = np.arange(n_rows) % len(guard.reference)
    clean = guard.reference[rows]
    depths = {name: array for name, array in clean.depths.items() if name != BACKUP}
    bare = Activations(clean.logits, clean.features, depths)
    images = np.zeros((n_rows, *(guard.input_shape or ())), dtype=np.float32)
    times = []
    for _ in range(_REPEATS):
        started = clock()
        guard.scores(guard.complete(bare, images))
        times.append(clock() - started)
    return statistics.median(times)
