"""What the audit sample stands for: judged requests per hour and stratum, added to the queue's counts now and then."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import UTC, datetime

from guard.statistics.strata import Stratum

#: So often are counts written; a worker that is killed loses those since.
SECONDS = 5.0

#: Digest of the bundle, and requests by begin of the hour and stratum -> whether they were taken.
Write = Callable[[str, Mapping[tuple[datetime, str], int]], bool]


class Traffic:
    """Counts judged requests in memory, and hands them on every few seconds, from a thread that the first one starts.

    Parameters
    ----------
    write : callable
        See `Write`; what it does not take is kept for the next time.
    """

    def __init__(self, write: Write) -> None:
        self._write = write
        self._counts: dict[str, Counter[tuple[datetime, str]]] = {}
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, bundle_digest: str) -> None:
        """Say that what a bundle judges is counted from now on, before the first request."""
        self._add(bundle_digest, "far", 0)

    def add(self, bundle_digest: str, stratum: Stratum) -> None:
        """Count one request that a bundle judged."""
        self._add(bundle_digest, stratum, 1)

    def _add(self, bundle_digest: str, stratum: Stratum, amount: int) -> None:
        hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
        with self._lock:
            self._counts.setdefault(bundle_digest, Counter())[hour, stratum] += amount
            if self._thread is None and not self._closed.is_set():
                self._thread = threading.Thread(target=self._write_on, name="guard-traffic", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Hand on what was counted since the last time."""
        with self._lock:
            counts, self._counts = self._counts, {}
        for digest, requests in counts.items():
            if not self._write(digest, requests):
                with self._lock:
                    self._counts.setdefault(digest, Counter()).update(requests)

    def close(self) -> None:
        """Stop the thread, and hand on what is left. Safe to call twice."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(timeout=SECONDS)  # a queue that does not answer keeps nobody from ending
            self._thread = None
            self.flush()

    def _write_on(self) -> None:
        self.flush()
        while not self._closed.wait(SECONDS):
            self.flush()
