"""What became of requests: counted once, logged unless clean, put into the caller's trace; nothing of their content."""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from guard import Guard
from guard.lab.attacks import Poisoned
from guard.serving.bookkeeping import Bookkeeping, low_p_value
from guard.serving.event_log import EventLog, loggable_id
from guard.serving.outcomes import Outcome
from guard.serving.tracing import decision_spans, trace_id
from guard.statistics.calibration import fired
from guard.telemetry import MetricBuffer, label_value
from guard.types import Verdict

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@dataclass
class Asked:
    """The requests of a batch, as a server knows them."""

    known_id: Any = "7f0c"
    known_headers: dict[str, Any] = field(default_factory=dict)

    def request_id(self, index: int = 0) -> Any:
        return self.known_id

    def headers(self, index: int) -> dict[str, Any]:
        return self.known_headers


@dataclass
class Kept:
    """A model's books, and what they hold."""

    guard: Guard
    keeping: Bookkeeping
    stream: io.StringIO

    def request(self, outcome: Outcome, status: int = 200, requested: Asked | None = None) -> None:
        self.keeping.request(outcome, status, self.guard, requested or Asked(), 0)

    def counts(self) -> dict[tuple[str, ...], float]:
        return {(sample.name, *sample.labels[1:]): sample.value for sample in self.keeping.metrics.drain()}

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def books(fitted_guard: Guard) -> Kept:
    guard, keeping, stream = replace(fitted_guard, digest="d" * 64), Bookkeeping("m"), io.StringIO()
    keeping.log = EventLog("m", stream)
    keeping.open(guard, ["0" * 64])
    return Kept(guard, keeping, stream)


@pytest.fixture(scope="module")
def flagged(fitted_guard: Guard, triggered: Poisoned) -> list[Verdict]:
    return [verdict for verdict in fitted_guard.inspect(triggered.images[:40]) if verdict.is_poisoned]


def clean(p_value: float) -> Outcome:
    return Outcome(
        "clean",
        Verdict(
            label=3,
            final_label=3,
            is_poisoned=False,
            p_value=p_value,
            score=0.1,
            action="observe",
            detector_scores={},
            reason="",
        ),
    )


def test_every_series_that_may_come_is_known_at_zero(books: Kept) -> None:
    known = books.counts()
    for name in books.guard.ensemble.names:
        assert known["guard_detector_fired_total", label_value(name)] == 0
    for reason in ("full", "unavailable"):
        assert known["guard_shed_total", reason] == 0
    assert known["guard_queued_total",] == known["guard_unflagged_low_total",] == 0
    assert known["guard_requests_total", "500"] == known["guard_verdicts_total", "poisoned", "flag"] == 0
    assert known["guard_bundle_info", "0" * 64] == 0
    assert known["guard_bundle_info", str(books.guard.digest)] == 1


def test_detectors_that_fired_are_counted_and_named_as_on_the_review_page(books: Kept, flagged: list[Verdict]) -> None:
    expected: Counter[str] = Counter()
    for verdict in flagged:
        surprise = books.guard.fusion.surprise(np.array([list(verdict.detector_scores.values())]))[0]
        alone = [
            name for name, entry in zip(books.guard.ensemble.names, surprise, strict=True) if np.exp(-entry) <= 0.05
        ]
        expected.update(alone)
        books.request(Outcome("poisoned", verdict))
        assert books.lines()[-1].get("detectors", []) == alone
    counted = books.counts()
    assert sum(expected.values()) > len(flagged) / 2
    for name in books.guard.ensemble.names:
        assert counted["guard_detector_fired_total", label_value(name)] == expected[name]


def test_fired_is_at_most_the_rate_and_in_paper_mode_beyond_the_threshold() -> None:
    assert fired(-np.log([0.05, 0.051, 0.01]), "calibrated", 0.05).tolist() == [True, False, True]
    assert fired(np.array([0.0, 1e-9, -1.0]), "paper", 0.05).tolist() == [False, True, False]


def test_clean_request_counts_and_writes_and_asks_nothing(books: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(books.guard.fusion), "surprise", lambda *_: pytest.fail("a clean request paid for it"))
    requested = Asked(known_id=None, known_headers={"traceparent": TRACEPARENT})
    monkeypatch.setattr(Asked, "request_id", lambda *_: pytest.fail("nobody asked for it"))
    books.keeping.spans = None
    books.request(clean(0.5), requested=requested)
    assert books.stream.getvalue() == ""
    counted = books.counts()
    assert counted["guard_verdicts_total", "clean", "none"] == counted["guard_requests_total", "200"] == 1


def test_low_p_values_are_the_lowest_tenth_of_what_is_left_to_clean_traffic(books: Kept) -> None:
    rate = books.guard.config.false_positive_rate
    assert low_p_value(books.guard) == pytest.approx(rate + 0.1 * (1 - rate))
    for p_value in np.linspace(rate, 1, 2001)[1:]:  # clean traffic that is like the guard's clean images
        books.request(clean(float(p_value)))
    counted = books.counts()
    low, total = counted["guard_unflagged_low_total",], counted["guard_verdicts_total", "clean", "none"]
    assert 10 * low / total == pytest.approx(1, abs=0.01)


def test_low_p_values_of_clean_test_images_are_a_tenth(books: Kept, clean_activations: Any) -> None:
    for verdict in books.guard.decide(clean_activations):
        if not verdict.is_poisoned:
            books.request(Outcome("clean", verdict))
    counted = books.counts()
    drift = 10 * counted["guard_unflagged_low_total",] / counted["guard_verdicts_total", "clean", "none"]
    assert 0.6 < drift < 1.5  # 950 images, whose p-values share one calibration


def test_log_has_one_line_per_request_that_was_not_clean(books: Kept, flagged: list[Verdict]) -> None:
    verdict = flagged[0]
    books.request(Outcome("poisoned", verdict), requested=Asked(known_headers={"TraceParent": TRACEPARENT}))
    books.request(clean(0.4))
    books.request(Outcome("bypassed", reason="shape", message="secret"), 203)
    books.request(Outcome("rejected", status=400, message="ValueError: secret"), 400)
    books.request(Outcome("failed", status=500, message="secret"), 500)
    lines = books.lines()
    assert [line["verdict"] for line in lines] == ["poisoned", "bypassed", "rejected", "failed"]
    first = lines[0]
    assert list(first)[:2] == ["log", "model"]
    assert (first["log"], first["model"], first["event"], first["request_id"]) == ("guard", "m", "request", "7f0c")
    assert (first["p_value"], first["label"]) == (verdict.p_value, verdict.label)
    assert (first["action"], first["status"], first["trace_id"]) == ("flag", 200, TRACE)
    assert first["bundle"] == books.guard.digest
    assert first["time"].endswith("Z")
    assert "trace_id" not in lines[1]
    assert (lines[1]["reason"], lines[1]["status"]) == ("shape", 203)
    assert "secret" not in books.stream.getvalue()


def test_log_tells_of_every_change_of_the_bundle(books: Kept) -> None:
    books.keeping.swapped(books.guard, books.guard)
    books.keeping.refused("../\n[METRICS]x", books.guard, "it is damaged.")
    taken, refused = books.lines()
    assert (taken["event"], taken["bundle"], taken["instead_of"]) == ("bundle_taken", *[books.guard.digest] * 2)
    assert (refused["event"], refused["stays"], refused["why"]) == (
        "bundle_refused",
        books.guard.digest,
        "it is damaged.",
    )


@pytest.mark.parametrize("newline", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\u2029"])
def test_forged_request_id_can_neither_begin_a_line_nor_be_read(books: Kept, newline: str) -> None:
    forged = f'x"{newline}[METRICS]guard_verdicts_total.Count:9|#model:m,verdict:clean,action:none|#type:COUNTER'
    books.request(Outcome("failed", status=500), 500, Asked(known_id=forged, known_headers={"traceparent": forged}))
    books.keeping.refused(forged, books.guard, forged)
    text = books.stream.getvalue()
    assert len(text.splitlines()) == 2  # Python breaks lines wherever Java does
    assert all(line.startswith('{"log": "guard", ') for line in text.splitlines())
    assert books.lines()[0]["request_id"].startswith("sha256:")
    assert "trace_id" not in books.lines()[0]


@pytest.mark.parametrize(
    ("request_id", "plain"),
    [("9b2f6a1c-1", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("two words", False), ("é", False)],
)
def test_request_ids_are_logged_as_they_are_if_they_are_harmless(request_id: str, plain: bool) -> None:
    assert (loggable_id(request_id) == request_id) == plain
    assert plain or loggable_id(request_id) == loggable_id(str(request_id))


def test_log_that_cannot_be_written_costs_no_answer(books: Kept) -> None:
    books.stream.close()
    books.request(Outcome("failed", status=500), 500)
    assert books.counts()["guard_verdicts_total", "failed", "none"] == 1


def test_two_workers_and_a_restart_add_up() -> None:
    """A server adds what its workers drain; a worker that is started again begins with zeros, which change nothing."""
    total: Counter[tuple[str, ...]] = Counter()

    def drain(buffer: MetricBuffer) -> None:
        for sample in buffer.drain():
            total[sample.name, *sample.labels] += sample.value

    first, second = MetricBuffer(), MetricBuffer()
    for round_ in range(3):
        for buffer in (first, second):
            buffer.count("guard_queued_total", "m", amount=0)
            buffer.declare_histogram("guard_p_value", "m")
            buffer.count("guard_queued_total", "m", amount=2)
            buffer.observe("guard_p_value", "m", value=0.3)
            drain(buffer)
        if round_ == 1:
            first = MetricBuffer()
    assert total["guard_queued_total", "m"] == 12
    assert total["guard_p_value_count", "m"] == total["guard_p_value_bucket", "m", "0.3"] == 6
    assert total["guard_p_value_bucket", "m", "0.2"] == 0


def test_label_values_survive_torchserves_metric_lines() -> None:
    assert label_value("lof:features") == "lof/features"
    assert label_value("disagreement:layer1.0.conv") == "disagreement/layer1.0.conv"
    assert label_value("a,b|c#d e") == "a_b_c_d_e"
    assert label_value("") == "_"


# --- the caller's trace


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (TRACEPARENT, TRACE),
        (TRACEPARENT.upper(), None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        ("", None),
        (f"{TRACEPARENT}\n", None),
    ],
)
def test_trace_id_is_read_from_a_well_formed_header_only(header: str, expected: str | None) -> None:
    assert trace_id({"Traceparent": header}) == expected


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    """Where spans go; a process has one provider for good, so that it is set once."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter: InMemorySpanExporter) -> Iterator[Callable[[], Any]]:
    exporter.clear()
    yield exporter.get_finished_spans
    exporter.clear()


def test_decision_is_a_span_in_the_callers_trace(books: Kept, spans: Any, flagged: list[Verdict]) -> None:
    requested = Asked(known_headers={"Traceparent": TRACEPARENT, "tracestate": "a=1"})
    outcome = Outcome("poisoned", flagged[0], decided_ns=(1_000, 3_000))
    books.request(outcome, requested=requested)
    books.request(outcome)  # its caller has no trace
    (span,) = spans()
    assert span.name == "guard.decide"
    assert f"{span.context.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == "00f067aa0ba902b7"
    assert span.parent.trace_state.to_header() == "a=1"
    assert (span.start_time, span.end_time) == (1_000, 3_000)
    assert dict(span.attributes) == {
        "guard.model": "m",
        "guard.bundle": books.guard.digest,
        "guard.verdict": "poisoned",
        "guard.action": "flag",
        "guard.p_value": flagged[0].p_value,
    }


def test_malformed_trace_and_broken_exporter_cost_no_answer(
    books: Kept, spans: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = Outcome("clean", clean(0.5).verdict, decided_ns=(1, 2))
    books.request(outcome, requested=Asked(known_headers={"traceparent": "nonsense"}))
    assert all(span.parent is None for span in spans())
    monkeypatch.setattr(type(books.keeping.spans._tracer), "start_span", lambda *_, **__: 1 / 0)
    books.request(outcome, requested=Asked(known_headers={"traceparent": TRACEPARENT}))
    assert books.counts()["guard_verdicts_total", "clean", "none"] == 2


def test_without_the_extra_nothing_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert decision_spans() is None
