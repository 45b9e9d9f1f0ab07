"""What the metrics say of a window of time: exact counts, and how many of them lie so near an end that they may not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

from guard.errors import ObservingError
from guard.observing.scrape import Prometheus, Series, increase, metrics_address, read_endpoint, selector
from guard.telemetry import OUTCOMES, label_value

#: Counts leave a worker once a second.
FLUSH_S = 1.0
#: A counter's value before the window is looked for as far back.
_LOOK_BACK_S = 3600.0
#: Seconds between two scrapes, where there was one only.
_USUAL_STEP_S = 15.0
#: The first values after the window are looked for as far on.
_LOOK_ON_S = 120.0
_METRICS = (
    "guard_requests_total",
    "guard_verdicts_total",
    "guard_queued_total",
    "guard_shed_total",
    "guard_audited_total",
    "guard_audits_shed_total",
)


@dataclass(slots=True)
class WindowCounts:
    """Counts of one source over one window.

    Attributes
    ----------
    requests : Counter
        Requests answered, by HTTP status.
    verdicts : Counter
        Requests by verdict.
    queued : int
        Flagged requests that the queue took.
    shed : Counter
        Flagged requests that it did not take, by reason.
    audited : int
        Unflagged requests that the queue took as audits.
    audits_unavailable : int
        Audits that the queue did not answer for in time; it may have stored them.
    near_ends : int
        Requests counted so near an end of the window that they may belong to the other side of it.
    edge_s : float
        How near that is, in seconds.
    has_begin : bool
        False if everything since the servers' start was counted: then nothing lies near the begin of the window.
    notes : list of str
        What a reader must know of these counts.
    """

    requests: Counter[str] = field(default_factory=Counter)
    verdicts: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(OUTCOMES, 0)))
    queued: int = 0
    shed: Counter[str] = field(default_factory=Counter)
    audited: int = 0
    audits_unavailable: int = 0
    near_ends: int = 0
    edge_s: float = FLUSH_S
    has_begin: bool = True
    notes: list[str] = field(default_factory=list)

    def add(self, series: Series, amount: float) -> None:
        """Add what one series counted."""
        number = round(amount)
        if series.name == "guard_requests_total":
            self.requests[series.label("code")] += number
        elif series.name == "guard_verdicts_total":
            self.verdicts[series.label("verdict")] += number
        elif series.name == "guard_queued_total":
            self.queued += number
        elif series.name == "guard_shed_total":
            self.shed[series.label("reason")] += number
        elif series.name == "guard_audited_total":
            self.audited += number
        elif series.name == "guard_audits_shed_total" and series.label("reason") == "unavailable":
            self.audits_unavailable += number


def totals_since_start(urls: Sequence[str], model: str | None) -> WindowCounts:
    """Return what metrics endpoints have counted since their servers started; several add up.

    Raises
    ------
    ObservingError
        If one does not answer.
    """
    counted = WindowCounts(
        has_begin=False, notes=["metrics addresses know totals since the server's start only, not the window"]
    )
    for url in urls:
        for series, value in read_endpoint(metrics_address(url)).items():
            if model is None or series.label("model") == label_value(model):
                counted.add(series, value)
    return counted


def between(prometheus: Prometheus, start: datetime, end: datetime, model: str | None) -> WindowCounts:
    """Return what a Prometheus has seen counted between two times.

    Exact values of each counter at both ends with resets handled; not `increase()`, which extrapolates.

    Raises
    ------
    ObservingError
        If it does not answer, or has no such counter.
    """
    first, last = start.timestamp(), end.timestamp()
    counted, began_late, seen = WindowCounts(), 0, 0
    steps: list[float] = []
    kept: list[tuple[Series, list[tuple[float, float]]]] = []
    for metric in _METRICS:
        found = prometheus.samples(selector(metric, model), first - _LOOK_BACK_S, last + _LOOK_ON_S)
        for series, samples in found.items():
            named = Series(series.name or metric, series.labels)
            kept.append((named, samples))
            counted.add(named, increase(samples, first, last))
            inside = [time for time, _ in samples if first < time <= last]
            seen += bool(inside)
            began_late += bool(inside) and samples[0][0] > first and samples[0][1] > 0
            steps += [later - earlier for (earlier, _), (later, _) in pairwise(samples)]
    if not seen:
        raise ObservingError(
            f"{prometheus.url} has no counts of the guard in that window. Does it scrape the metrics address, "
            "and are the times right?"
        )
    counted.edge_s = (
        sorted(steps)[len(steps) // 2] if steps else _USUAL_STEP_S
    ) + FLUSH_S  # a scrape comes up to one interval after the flush
    for at in (first, last):
        counted.near_ends += sum(
            round(increase(samples, at - counted.edge_s, at + counted.edge_s))
            for series, samples in kept
            if series.name == "guard_requests_total"
        )
    if began_late:
        counted.notes.append(
            f"{began_late} counters were not there yet when the window began: they count from 0, as of a server that "
            "started in it"
        )
    newest = max((samples[-1][0] for _, samples in kept if samples), default=first)
    if newest < last - counted.edge_s:
        counted.notes.append(
            f"the last scrape was at {datetime.fromtimestamp(newest, UTC):%H:%M:%S} UTC, before the end"
        )
    return counted
