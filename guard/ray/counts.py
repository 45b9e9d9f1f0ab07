"""Counts of all replicas added up in one place, whatever becomes of the replicas."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from guard.local.totals import Series
from guard.telemetry import Sample

#: Gauges of a replica that has not been heard of for so long no longer count.
_SILENT_S = 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """What one replica has counted since it began, by series.

    Attributes
    ----------
    number : int
        Later reports of a replica have larger ones.
    counters, gauges : dict
    """

    number: int
    counters: dict[Series, float]
    gauges: dict[Series, float]


class Standing:
    """The counts of one replica since it began.

    It reports all of them every time, not what has been added: a report that is lost, comes twice, or is the first that
    a new `Counts` hears, changes nothing in the sums.
    """

    def __init__(self) -> None:
        self._counters: dict[Series, float] = {}
        self._gauges: dict[Series, float] = {}
        self._number = 0

    def report(self, samples: Iterable[Sample]) -> Report:
        """Add what was drained, and return all of it."""
        for sample in samples:
            series = (sample.name, sample.labels)
            if sample.kind == "gauge":
                self._gauges[series] = sample.value
            else:
                self._counters[series] = self._counters.get(series, 0.0) + sample.value
        self._number += 1
        return Report(self._number, dict(self._counters), dict(self._gauges))


class Tally:
    """Sums over replicas: counters over all that ever reported, gauges over those that are heard of.

    Parameters
    ----------
    clock : callable
        Seconds, as `time.monotonic`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[Report, float]] = {}
        self._ended: set[str] = set()
        self._of_ended: dict[Series, float] = {}

    def report(self, replica: str, report: Report, *, is_last: bool = False) -> None:
        """Take what a replica has counted so far; with `is_last` it has ended, and its place is given up."""
        known = self._reports.get(replica)
        if replica in self._ended or (known is not None and known[0].number > report.number):
            return  # it has overtaken another
        self._reports[replica] = (report, self._clock())
        if is_last:
            del self._reports[replica]
            self._ended.add(replica)
            _add(self._of_ended, report.counters)
            for series in report.gauges:
                self._of_ended.setdefault(series, 0.0)

    def totals(self) -> dict[Series, float]:
        """Return every series with its sum; of a gauge the largest value."""
        values = dict(self._of_ended)
        now = self._clock()
        for report, heard in self._reports.values():
            _add(values, report.counters)
            for series, value in report.gauges.items():
                values[series] = max(values.get(series, 0.0), value if now - heard < _SILENT_S else 0.0)
        return values


def _add(values: dict[Series, float], more: Mapping[Series, float]) -> None:
    for series, value in more.items():
        values[series] = values.get(series, 0.0) + value


class Counts:
    """The deployment of one `Tally`, for a whole application."""

    def __init__(self) -> None:
        self._tally = Tally()

    async def report(self, replica: str, report: Report, is_last: bool = False) -> None:
        """Take what a replica has counted so far."""
        self._tally.report(replica, report, is_last=is_last)

    async def totals(self) -> dict[Series, float]:
        """Return every series with its sum."""
        return self._tally.totals()
