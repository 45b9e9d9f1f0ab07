"""Metrics of the review page and of the retrainer, counted by the queue's database at every scrape."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy.engine import Connection

from guard.errors import GuardError
from guard.observing import statements
from guard.observing.detection_watch import DetectionWatch
from guard.relabel.audits import found_misses, sampled_models
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.statistics.detection_rates import Estimate
from guard.telemetry import Metric as Declared
from guard.telemetry import label_value

#: Estimates over the last seven days: name of the gauge -> attribute of `DetectionRates`, and what it is.
_ESTIMATES = {
    "guard_detection_rate": ("detection_rate", "Share of poisoned inputs that were flagged"),
    "guard_realised_false_positive_rate": ("false_positive_rate", "Share of clean inputs that were flagged"),
    "guard_precision": ("precision", "Share of flagged inputs that are poisoned"),
    "guard_poisoned_share": ("poisoned_share", "Share of all inputs that are poisoned"),
    "guard_let_through": ("missed", "Number of poisoned inputs that were not flagged"),
}
#: Suffix of the gauge -> attribute of an estimate, and what it is.
_ENDS = {"": ("value", ""), "_lower": ("lower", ", lower end"), "_upper": ("upper", ", upper end")}
DETECTION_METRICS = {
    metric.name: metric
    for metric in (
        Declared(
            "guard_missed_poisoned",
            "gauge",
            ("model",),
            "Poisoned inputs that reviewers found among the audits: they were not flagged. Of all time.",
        ),
        *(
            Declared(
                f"{name}{suffix}",
                "gauge",
                ("model",),
                f"{what} in the last 7 days, estimated from the answers{end}; no series while it is not known.",
            )
            for name, (_, what) in _ESTIMATES.items()
            for suffix, (_, end) in _ENDS.items()
        ),
    )
}

#: What the review page exports, and the retrainer; every scrape also says whether the queue answered.
QUEUE_UP = Declared("guard_queue_up", "gauge", (), "1 if the queue's database answered this scrape, else 0.")
PAGE_METRICS = {
    metric.name: metric
    for metric in (
        Declared("guard_queue_items", "gauge", ("model", "state"), "Flagged inputs in the queue, by state."),
        Declared(
            "guard_queue_oldest_item_timestamp_seconds",
            "gauge",
            ("model",),
            "When the oldest pending input came, in seconds since 1970; no series while none is pending.",
        ),
        Declared(
            "guard_review_decisions_total",
            "counter",
            ("decision",),
            "Answers that reviewers gave (poisoned, false_alarm), and answers that they took back (withdrawn).",
        ),
        Declared(
            "guard_review_overturned_total",
            "counter",
            (),
            "Answers that took the place of a standing one, anybody's, and say something else.",
        ),
    )
} | DETECTION_METRICS
RETRAINER_METRICS = {
    metric.name: metric
    for metric in (
        Declared(
            "guard_retrain_runs_total",
            "counter",
            ("model", "outcome"),
            "Retrainings that are over: promoted, refused by the gate, failed.",
        ),
    )
}
COMPANION_METRICS = {QUEUE_UP.name: QUEUE_UP, **PAGE_METRICS, **RETRAINER_METRICS}

_DECISIONS = ("poisoned", "false_alarm", "withdrawn")
_RUNS = ("promoted", "refused", "failed")


class _FromQueue(Collector):
    """Asks the queue's database at every scrape; where it does not answer, there is `guard_queue_up 0` and no more."""

    def __init__(self, queue: Queue) -> None:
        self._database = queue.database

    def collect(self) -> Iterator[Metric]:
        """Return what Prometheus sees."""
        try:
            with self._database.reading() as connection:
                found = self.read(connection)
            found += self.estimates()
        except GuardError:  # numbers that nobody knows are left out, not told as zeros
            found = []
        yield _gauge(QUEUE_UP, [((), float(bool(found)))])
        yield from found

    def read(self, connection: Connection) -> list[Metric]:
        """Return the metrics; one transaction sees one state of the queue."""
        raise NotImplementedError

    def estimates(self) -> list[Metric]:
        """Return metrics that are worked out from what the queue holds, and are left out where they cannot be."""
        return []


class QueueCollector(_FromQueue):
    """Items of the queue, answers of the reviewers and what they say of the guards, for the review page.

    Parameters
    ----------
    queue : Queue
    clock : callable
        -> seconds that only go forward; for tests.
    """

    def __init__(self, queue: Queue, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(queue)
        self._detection = DetectionWatch(queue, clock)

    def read(self, connection: Connection) -> list[Metric]:
        """See `_FromQueue.read`."""
        counts: Counter[tuple[str, str]] = Counter()
        oldest: dict[str, float] = {}
        for row in connection.execute(statements.ITEMS):
            counts[row.model, row.state] = row.n
            if row.oldest is not None:
                oldest[row.model] = row.oldest.timestamp()
        answers: Counter[str] = Counter()
        overturned = 0
        for row in connection.execute(statements.DECISIONS):
            kind = "withdrawn" if row.kind == "withdrawal" else "poisoned" if row.is_poisoned else "false_alarm"
            answers[kind] += row.n
            overturned += row.overturned
        models = sorted({model for model, _ in counts})
        states = [(model, state.value) for model in models for state in State]
        metric = PAGE_METRICS
        return [
            _gauge(metric["guard_queue_items"], [((label_value(key[0]), key[1]), counts[key]) for key in states]),
            _gauge(
                metric["guard_queue_oldest_item_timestamp_seconds"],
                [((label_value(model),), moment) for model, moment in sorted(oldest.items())],
            ),
            _counter(metric["guard_review_decisions_total"], [((kind,), answers[kind]) for kind in _DECISIONS]),
            _counter(metric["guard_review_overturned_total"], [((), overturned)]),
            *_missed(connection),
        ]

    def estimates(self) -> list[Metric]:
        """Return what the guards of models with an audit sample catch and let through, as far as it is known."""
        found = self._detection.of(None)
        metrics = []
        for name, (attribute, _) in _ESTIMATES.items():
            known = [(each.model, getattr(each.rates, attribute)) for each in found]
            estimates = [(model, estimate) for model, estimate in known if isinstance(estimate, Estimate)]
            for suffix, (end, _) in _ENDS.items():
                values = [((label_value(model),), getattr(estimate, end)) for model, estimate in estimates]
                metrics.append(_gauge(DETECTION_METRICS[f"{name}{suffix}"], values))
        return metrics


class RetrainerCollector(_FromQueue):
    """Retrainings of one model, for its retrainer."""

    def __init__(self, queue: Queue, model: str) -> None:
        super().__init__(queue)
        self._model = model

    def read(self, connection: Connection) -> list[Metric]:
        """See `_FromQueue.read`."""
        runs = {row.outcome: row.n for row in connection.execute(statements.ROUNDS, {"model": self._model})}
        run_counts = [((label_value(self._model), outcome), runs.get(outcome, 0)) for outcome in _RUNS]
        return [_counter(RETRAINER_METRICS["guard_retrain_runs_total"], run_counts)]


def _missed(connection: Connection) -> list[Metric]:
    """Return how many poisoned inputs were found among the audits, of models that have some."""
    misses = found_misses(connection)
    samples = [((label_value(model),), misses.get(model, 0)) for model in sampled_models(connection)]
    return [_gauge(DETECTION_METRICS["guard_missed_poisoned"], samples)]


def _gauge(metric: Declared, samples: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family


def _counter(metric: Declared, samples: Sequence[tuple[tuple[str, ...], float]]) -> Metric:
    family = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
    for labels, value in samples:
        family.add_metric(labels, value)
    return family
