"""Counts of guarded models added up for Prometheus."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from guard.telemetry import METRICS, Metric, MetricBuffer

#: Name of a series as it is drained, and the values of its labels.
Series = tuple[str, tuple[str, ...]]


class Totals(Collector):
    """What several buffers have counted since the process began.

    Parameters
    ----------
    buffers : iterable of MetricBuffer
        Drained at every scrape.
    """

    def __init__(self, buffers: Iterable[MetricBuffer]) -> None:
        self._buffers = tuple(buffers)
        self._lock = threading.Lock()
        self._values: dict[Series, float] = {}

    def collect(self) -> Iterator[Family]:
        """Yield every metric of `guard.telemetry`."""
        with self._lock:
            for sample in (sample for buffer in self._buffers for sample in buffer.drain()):
                before = self._values.get((sample.name, sample.labels), 0.0) if sample.kind == "counter" else 0.0
                self._values[sample.name, sample.labels] = before + sample.value
            values = dict(self._values)
        yield from families(values)


class ValuesCollector(Collector):
    """Values that were added up elsewhere.

    Parameters
    ----------
    values : mapping of Series to float
    """

    def __init__(self, values: Mapping[Series, float]) -> None:
        self._values = values

    def collect(self) -> Iterator[Family]:
        """Yield every metric of `guard.telemetry`."""
        yield from families(self._values)


def families(values: Mapping[Series, float]) -> Iterator[Family]:
    """Yield every metric of `guard.telemetry` with these values."""
    for metric in METRICS.values():
        yield _family(metric, values)


def _family(metric: Metric, values: Mapping[Series, float]) -> Family:
    if metric.kind == "histogram":
        histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
        cells: dict[tuple[str, ...], list[tuple[str, float]]] = {}
        for (name, labels), value in values.items():
            if name == f"{metric.name}_bucket":
                cells.setdefault(labels[:-1], []).append((labels[-1], value))
        for labels, buckets in cells.items():
            ordered = sorted(buckets, key=lambda cell: float(cell[0]))
            histogram.add_metric(labels, ordered, values[f"{metric.name}_sum", labels])
        return histogram
    make: type[CounterMetricFamily] | type[GaugeMetricFamily]
    make = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = make(metric.name, metric.help, labels=metric.labels)
    for (name, labels), value in values.items():
        if name == metric.name:
            family.add_metric(labels, value)
    return family
