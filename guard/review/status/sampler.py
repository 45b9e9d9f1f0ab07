"""Metrics addresses read every few seconds into memory, so that the status page has a past without a Prometheus."""

from __future__ import annotations

import logging
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise

import numpy as np

from guard.errors import ObservingError
from guard.observing.scrape import Series, metrics_address, read_endpoint
from guard.review.status.history import BUNDLE_INFO, WANTED, History, Key, Span, add_up, kept_values
from guard.telemetry import label_value
from guard.types import Float64Array

#: Seconds between two samples, and how far back they are kept: fine for the hour, coarse for day and week.
RINGS = ((5.0, 3600.0), (60.0, 86400.0), (600.0, 7 * 86400.0))
#: A sample this many steps old says nothing of now.
_STALE_STEPS = 3
#: Series of one address that are kept; a hostile one cannot fill the memory.
_MOST_SERIES = 5000

_log = logging.getLogger(__name__)
Column = tuple[str, Key]


class Ring:
    """The newest samples of one address, at least `step` seconds apart."""

    def __init__(self, step: float, seconds: float) -> None:
        self.step, self.seconds = step, seconds
        self.times: deque[float] = deque(maxlen=round(seconds / step) + 2)
        self.counts: deque[Float64Array] = deque(maxlen=self.times.maxlen)

    def add(self, now: float, counts: Float64Array) -> None:
        """Keep a sample, unless the last one is too young."""
        if not self.times or now - self.times[-1] >= self.step - 0.5 * RINGS[0][0]:
            self.times.append(now)
            self.counts.append(counts)


class Endpoint:
    """One metrics address: what it counted since we began to look, and how that grew.

    Counters that fall began anew at 0, as Prometheus takes it. A series that comes later began at 0 too; of those that
    were there at the first look nobody knows how old they are, so only what comes after counts.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.rings = [Ring(*sizes) for sizes in RINGS]
        self.columns: list[Column] = []
        self.since: float | None = None
        self.newest = 0.0
        self.error = ""
        self.error_since: float | None = None
        self.in_use: frozenset[tuple[str, str]] = frozenset()
        self._place: dict[Column, int] = {}
        self._last: dict[Series, float] = {}
        self._counts: list[float] = []

    def note(self, now: float, found: Mapping[Series, float]) -> None:
        """Take in what the address says now."""
        for series, value in found.items():
            if series.name not in WANTED or (len(self._last) >= _MOST_SERIES and series not in self._last):
                continue
            place = self._column(series)
            last = self._last.get(series, value if self.since is None else 0.0)
            self._counts[place] += value - last if value >= last else value
            self._last[series] = value
        self.in_use = frozenset(
            (series.label("model"), series.label("digest"))
            for series, value in found.items()
            if series.name == BUNDLE_INFO and value == 1
        )
        if self.since is None:
            self.since = now
        self.error, self.error_since, self.newest = "", None, now
        counts = np.array(self._counts)
        for ring in self.rings:
            ring.add(now, counts)

    def failed(self, now: float, why: str) -> None:
        """Note that it does not answer."""
        if self.error_since is None:
            self.error_since = now
        self.error = why

    def rates(self, span: Span, now: float) -> dict[Column, list[float | None]]:
        """Return how fast every column grew, per interval; None where the address did not answer."""
        ring = next(candidate for candidate in self.rings if candidate.seconds >= span.seconds)
        times, counts = list(ring.times), list(ring.counts)
        if times and self.newest > times[-1]:
            times.append(self.newest)
            counts.append(np.array(self._counts))
        table = _table(counts, len(self.columns))
        stale = _STALE_STEPS * ring.step
        rows = [_grown(times, table, *ends, stale) for ends in pairwise(span.edges(now))]
        return {
            column: [None if row is None else float(row[place]) for row in rows]
            for place, column in enumerate(self.columns)
        }

    def totals(self, span: Span, now: float) -> dict[Column, float]:
        """Return by how much every column grew over the span, also while the address was away."""
        ring = next(candidate for candidate in self.rings if candidate.seconds >= span.seconds)
        if not ring.times:
            return {}
        begin = max(0, bisect_right(ring.times, now - span.seconds) - 1)
        first = ring.counts[begin]
        grown = np.array(self._counts)
        grown[: len(first)] -= first
        return {column: float(grown[place]) for place, column in enumerate(self.columns)}

    def _column(self, series: Series) -> int:
        column = (series.label("model"), Key(series.name, kept_values(series.name, series.label)))
        if column not in self._place:
            self._place[column] = len(self.columns)
            self.columns.append(column)
            self._counts.append(0.0)
        return self._place[column]


class Sampler:
    """Reads metrics addresses in a thread, and tells their history. Bounded in memory; forgets all when it ends.

    Parameters
    ----------
    urls : sequence of str
        Metrics addresses; several add up.
    read : callable
        Address -> its series; for tests.

    Raises
    ------
    ConfigError
        If an address is none.
    """

    def __init__(self, urls: Sequence[str], *, read: Callable[[str], Mapping[Series, float]] = read_endpoint) -> None:
        self.endpoints = [Endpoint(metrics_address(url)) for url in urls]
        self._read = read
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to read."""
        self._thread = threading.Thread(target=self._run, name="review-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop reading."""
        self._stopping.set()
        if self._thread is not None:
            self._thread.join(10)

    def look(self, now: float) -> None:
        """Read every address once."""
        for endpoint in self.endpoints:
            try:
                found = self._read(endpoint.url)
                with self._lock:
                    endpoint.note(now, found)
            except (ObservingError, ValueError) as error:  # ValueError: a bound that is no number
                with self._lock:
                    endpoint.failed(now, str(error))

    def history(self, span: Span, model: str | None, now: float) -> History:
        """Return what was counted over a span that ends now."""
        wanted = None if model is None else label_value(model)
        rates: dict[Key, list[float | None]] = {}
        totals: dict[Key, float] = {}
        with self._lock:
            for endpoint in self.endpoints:
                for (owner, key), column in endpoint.rates(span, now).items():
                    if wanted in (None, owner):
                        rates[key] = add_up([rates[key], column]) if key in rates else column
                for (owner, key), total in endpoint.totals(span, now).items():
                    if wanted in (None, owner):
                        totals[key] = totals.get(key, 0.0) + total
            begun = [source.since for source in self.endpoints if source.since is not None]
            away = [source for source in self.endpoints if source.error]
            return History(
                span=span,
                edges=span.edges(now),
                rates=rates,
                totals=totals,
                since=max(min(begun), now - span.seconds) if begun else None,
                read_from=", ".join(source.url for source in self.endpoints),
                away=tuple(_trouble(source) for source in away),
                is_away=len(away) == len(self.endpoints),
                models=tuple(sorted({owner for source in self.endpoints for owner, _ in source.columns})),
                in_use=tuple(
                    sorted({use[1] for source in self.endpoints for use in source.in_use if wanted in (None, use[0])})
                ),
            )

    def _run(self) -> None:
        step = RINGS[0][0]
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                self.look(time.time())
            except Exception:  # whatever an address says, the page goes on
                _log.exception("reading the metrics failed, and will be tried again")
            self._stopping.wait(max(0.5, step - (time.monotonic() - began)))


def _table(counts: Sequence[Float64Array], width: int) -> Float64Array:
    """Return all samples as one array (n, width); a column that came later was 0 before."""
    table = np.zeros((len(counts), width))
    for place, row in enumerate(counts):
        table[place, : len(row)] = row
    return table


def _grown(times: list[float], table: Float64Array, begin: float, end: float, stale: float) -> Float64Array | None:
    """Return growth per second between two times, from the samples nearest to them; None where there are not two."""
    last = bisect_right(times, end) - 1
    first = bisect_right(times, begin) - 1
    if first < 0 or begin - times[first] > stale:
        first += 1  # the first one inside
    if last <= first or times[last] <= begin:
        return None
    grown: Float64Array = (table[last] - table[first]) / (times[last] - times[first])
    return grown


def _trouble(endpoint: Endpoint) -> str:
    since = datetime.fromtimestamp(endpoint.error_since or 0.0, UTC)
    return f"{endpoint.error.rstrip('.')}, since {since:%H:%M} UTC"
