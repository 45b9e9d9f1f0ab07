"""Estimates of what the guards let through over the last week, kept for a while and told for each model by itself."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime

from guard.errors import DataError
from guard.observing.detection import WEEK, Detection, read_detection
from guard.relabel.audits import sampled_models
from guard.relabel.queue import Queue

#: So old may estimates be: they take longer to work out than counts.
AGE_S = 30.0
_log = logging.getLogger(__name__)


class DetectionWatch:
    """Estimates of all guards that have an audit sample, worked out every `AGE_S` at most.

    A row of the queue that nothing can be estimated from takes only the estimates of its model away; the log says so
    once.

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
        self._failed: dict[str, str] = {}
        self._read_at = float("-inf")
        self._lock = threading.Lock()

    def of(self, model: str | None) -> list[Detection]:
        """Return the estimates for one model, or for all.

        Raises
        ------
        QueueUnavailable
            If the queue does not answer.
        """
        with self._lock:
            self._refresh()
            return [found for found in self._found if model in (None, found.model)]

    def failed(self, model: str | None) -> list[str]:
        """Return which models, or whether the named one, had no estimates that could be worked out; as `of`."""
        with self._lock:
            self._refresh()
            return [name for name in self._failed if model in (None, name)]

    def _refresh(self) -> None:
        if self._clock() < self._read_at + AGE_S:
            return
        now = datetime.now(UTC)
        found, failed = [], {}
        with self._queue.database.reading() as connection:
            for model in sampled_models(connection):
                try:
                    found.append(read_detection(connection, now - WEEK, now, model))
                except DataError as error:
                    failed[model] = str(error)
        for model in failed.keys() - self._failed.keys():
            _log.warning("what the guard of %r lets through cannot be estimated: %s", model, failed[model])
        self._found, self._failed, self._read_at = found, failed, self._clock()
