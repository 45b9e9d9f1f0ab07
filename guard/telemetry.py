"""What the guard counts: one table of metrics, and a buffer that is drained once a second instead of per request."""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass

from guard.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Metric:
    """Name, type and labels of one metric; a histogram names its upper bounds."""

    name: str
    kind: str  # "counter", "gauge" or "histogram"
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


#: Verdicts of a request; `received` is the sum of these five.
OUTCOMES = ("clean", "poisoned", "bypassed", "rejected", "failed")
#: Why a flagged input did not get into the queue: it is full, or did not answer.
SHED_REASONS = ("full", "unavailable")
#: Why an input could not be scored; bounded, so that it may be a label.
UNSCORED_REASONS = ("shape", "not_finite", "rows", "not_observed", "guard_error")

METRICS = {
    metric.name: metric
    for metric in (
        Metric("guard_requests_total", "counter", ("model", "code"), "Requests answered, by HTTP status."),
        Metric("guard_verdicts_total", "counter", ("model", "verdict", "action"), "Requests by verdict and action."),
        Metric("guard_bypassed_total", "counter", ("model", "reason"), "Requests answered without being scored."),
        Metric(
            "guard_detector_fired_total",
            "counter",
            ("model", "detector"),
            "Flagged requests in which this detector alone was as surprised as the requested rate asks for.",
        ),
        Metric(
            "guard_unflagged_low_total",
            "counter",
            ("model",),
            "Clean requests whose p-value lies in the lowest tenth of what is left to them; see guard_clean_drift.",
        ),
        Metric(
            "guard_shallow_total", "counter", ("model",), "Inputs judged by an early verdict, as time allowed no more."
        ),
        Metric(
            "guard_depth_floor_total",
            "counter",
            ("model",),
            "Inputs for which even the shallowest verdict allowed was expected to take longer than max_guard_ms.",
        ),
        Metric("guard_queued_total", "counter", ("model",), "Flagged requests that the queue took."),
        Metric("guard_shed_total", "counter", ("model", "reason"), "Flagged requests that it did not take, and why."),
        Metric("guard_audited_total", "counter", ("model",), "Unflagged requests that the queue took as audits."),
        Metric(
            "guard_audits_shed_total",
            "counter",
            ("model", "reason"),
            "Audits that it did not take, and why; `full`: or the hour had its own, `error`: they could not be made.",
        ),
        Metric("guard_bundle_swaps_total", "counter", ("model", "outcome"), "New ACTIVE bundles taken or refused."),
        Metric(
            "guard_batch_checks_total",
            "counter",
            ("model", "outcome"),
            "Batches of which one request was run again alone, and whether row and answer were its own.",
        ),
        Metric("guard_batching", "gauge", ("model",), "1 if batches share one call of the handler, 0 if one by one."),
        Metric("guard_bundle_info", "gauge", ("model", "digest"), "1 for the bundle in use, 0 for one used before."),
        Metric(
            "guard_p_value",
            "histogram",
            ("model",),
            "P-values of scored requests.",
            (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
        ),
        Metric(
            "guard_stage_duration_seconds",
            "histogram",
            ("model", "stage"),
            "Seconds per batch: `handler` is the user's own part, `guard` what the guard adds.",
            (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One increment of a counter, or one value of a gauge, under the name that Prometheus sees."""

    name: str
    kind: str
    labels: tuple[str, ...]
    value: float


class MetricBuffer:
    """Adds up counts in memory until they are drained; safe for threads.

    TorchServe's own metric call costs about 0.17 ms, so nothing is reported per request. A histogram is drained as the
    plain counters `<name>_bucket` (with a label `le` more), `<name>_sum` and `<name>_count`: TorchServe's own histogram
    has fixed bounds, and these add up over workers.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[tuple[str, tuple[str, ...]], float] = defaultdict(float)
        self._gauges: dict[tuple[str, tuple[str, ...]], float] = {}
        self._observations: dict[tuple[str, tuple[str, ...]], list[float]] = {}

    def count(self, name: str, *labels: str, amount: float = 1.0) -> None:
        """Add to a counter; an amount of 0 makes the series known, so that its first increase is seen."""
        _checked(name, "counter", labels)
        with self._lock:
            self._counters[name, labels] += amount

    def set(self, name: str, *labels: str, value: float) -> None:
        """Set a gauge."""
        _checked(name, "gauge", labels)
        with self._lock:
            self._gauges[name, labels] = value

    def observe(self, name: str, *labels: str, value: float) -> None:
        """Add one value to a histogram."""
        buckets = _checked(name, "histogram", labels).buckets
        with self._lock:
            cells = self._observations.get((name, labels))
            if cells is None:  # one cell per bound, one for +Inf, and the sum
                cells = self._observations[name, labels] = [0.0] * (len(buckets) + 2)
            cells[bisect_left(buckets, value)] += 1
            cells[-1] += value

    def declare_histogram(self, name: str, *labels: str) -> None:
        """Make a histogram's series known before its first value."""
        buckets = _checked(name, "histogram", labels).buckets
        with self._lock:
            self._observations.setdefault((name, labels), [0.0] * (len(buckets) + 2))

    def drain(self) -> list[Sample]:
        """Return what has come since the last drain, and forget it."""
        with self._lock:
            counters, self._counters = self._counters, defaultdict(float)
            gauges, self._gauges = self._gauges, {}
            observations, self._observations = self._observations, {}
        samples = [Sample(name, "counter", labels, value) for (name, labels), value in counters.items()]
        samples += [Sample(name, "gauge", labels, value) for (name, labels), value in gauges.items()]
        for (name, labels), cells in observations.items():
            total = 0.0
            for bound, cell in zip((*METRICS[name].buckets, float("inf")), cells[:-1], strict=True):
                total += cell
                le = "+Inf" if bound == float("inf") else f"{bound:g}"
                samples.append(Sample(f"{name}_bucket", "counter", (*labels, le), total))
            samples.append(Sample(f"{name}_sum", "counter", labels, cells[-1]))
            samples.append(Sample(f"{name}_count", "counter", labels, total))
        return samples


def label_value(text: str) -> str:
    """Return a text as the value of a label: TorchServe cannot pass on colons, commas, bars, or nothing at all."""
    return re.sub(r"[^\w./-]", "_", text.replace(":", "/"), flags=re.ASCII) or "_"


def prometheus_names() -> list[tuple[str, str, tuple[str, ...]]]:
    """Return (name, kind, labels) of every series as it is drained: what a server must declare beforehand."""
    names: list[tuple[str, str, tuple[str, ...]]] = []
    for metric in METRICS.values():
        if metric.kind == "histogram":
            names.append((f"{metric.name}_bucket", "counter", (*metric.labels, "le")))
            names.append((f"{metric.name}_sum", "counter", metric.labels))
            names.append((f"{metric.name}_count", "counter", metric.labels))
        else:
            names.append((metric.name, metric.kind, metric.labels))
    return names


def _checked(name: str, kind: str, labels: tuple[str, ...]) -> Metric:
    metric = METRICS.get(name)
    if metric is None or metric.kind != kind or len(labels) != len(metric.labels):
        raise ConfigError(f"no {kind} {name!r} with {len(labels)} labels is declared in guard/telemetry.py.")
    return metric
