"""The metric buffer: what goes in comes out once, and what a server must declare is declared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from guard.errors import ConfigError
from guard.resources import resource_path
from guard.telemetry import METRICS, MetricBuffer, Sample, prometheus_names


@pytest.fixture
def buffer() -> MetricBuffer:
    return MetricBuffer()


def test_buffer_count_adds_up_per_series(buffer):
    buffer.count("guard_requests_total", "m", "200")
    buffer.count("guard_requests_total", "m", "200", amount=2)
    buffer.count("guard_requests_total", "m", "422")
    assert sorted(buffer.drain(), key=lambda sample: sample.labels) == [
        Sample("guard_requests_total", "counter", ("m", "200"), 3.0),
        Sample("guard_requests_total", "counter", ("m", "422"), 1.0),
    ]


def test_buffer_drain_forgets_what_it_returned(buffer):
    buffer.count("guard_requests_total", "m", "200")
    buffer.set("guard_bundle_info", "m", "abc", value=1)
    buffer.observe("guard_p_value", "m", value=0.5)
    assert buffer.drain()
    assert buffer.drain() == []
    buffer.count("guard_requests_total", "m", "200")
    assert [sample.value for sample in buffer.drain()] == [1.0]


def test_buffer_set_keeps_the_last_value(buffer):
    buffer.set("guard_bundle_info", "m", "abc", value=1)
    buffer.set("guard_bundle_info", "m", "abc", value=0)
    assert buffer.drain() == [Sample("guard_bundle_info", "gauge", ("m", "abc"), 0)]


def test_buffer_observe_drains_cumulative_buckets_sum_and_count(buffer):
    values = [0.0001, 0.0005, 0.01, 0.011, 1.0]
    for value in values:
        buffer.observe("guard_p_value", "m", value=value)
    samples = buffer.drain()
    buckets = {s.labels[1]: s.value for s in samples if s.name == "guard_p_value_bucket"}
    bounds = METRICS["guard_p_value"].buckets
    assert buckets == {
        **{f"{bound:g}": sum(value <= bound for value in values) for bound in bounds},  # a bound is inclusive
        "+Inf": 5,
    }
    assert list(buckets.values()) == sorted(buckets.values())
    totals = {s.name: (s.labels, s.value) for s in samples if s.name != "guard_p_value_bucket"}
    assert totals["guard_p_value_count"] == (("m",), 5.0)
    assert totals["guard_p_value_sum"] == (("m",), pytest.approx(sum(values)))


def test_buffer_observe_above_the_last_bound_counts_in_inf_only(buffer):
    buffer.observe("guard_stage_duration_seconds", "m", "guard", value=99.0)
    values = {s.labels[-1]: s.value for s in buffer.drain() if s.name.endswith("_bucket")}
    assert values.pop("+Inf") == 1
    assert set(values.values()) == {0.0}


def test_buffer_declared_series_are_drained_at_zero(buffer):
    buffer.count("guard_verdicts_total", "m", "poisoned", "flag", amount=0)
    buffer.declare_histogram("guard_p_value", "m")
    samples = buffer.drain()
    assert {sample.value for sample in samples} == {0.0}
    assert len(samples) == 1 + len(METRICS["guard_p_value"].buckets) + 3  # +Inf, sum, count


def test_buffer_declaring_again_keeps_what_was_observed(buffer):
    buffer.observe("guard_p_value", "m", value=0.3)
    buffer.declare_histogram("guard_p_value", "m")
    assert {s.name: s.value for s in buffer.drain()}["guard_p_value_count"] == 1


def test_buffer_unknown_name_wrong_kind_or_labels_is_refused(buffer):
    with pytest.raises(ConfigError, match=r"^no counter 'guard_total' with 1 labels is declared in guard/telemetry"):
        buffer.count("guard_total", "m")
    with pytest.raises(ConfigError, match=r"^no gauge 'guard_requests_total' with 2 labels"):
        buffer.set("guard_requests_total", "m", "200", value=1)
    with pytest.raises(ConfigError, match=r"^no counter 'guard_requests_total' with 1 labels"):
        buffer.count("guard_requests_total", "m")
    with pytest.raises(ConfigError, match=r"^no histogram 'guard_p_value' with 0 labels"):
        buffer.observe("guard_p_value", value=0.5)
    with pytest.raises(ConfigError, match=r"^no histogram 'guard_bundle_info' with 2 labels"):
        buffer.declare_histogram("guard_bundle_info", "m", "abc")
    assert buffer.drain() == []


def test_buffer_many_threads_while_drained_add_up_exactly(buffer):
    drained: list[Sample] = []

    def work(thread: int) -> None:
        for step in range(1000):
            buffer.count("guard_requests_total", "m", "200")
            buffer.observe("guard_p_value", "m", value=0.25)
            if step % 100 == thread:
                drained.extend(buffer.drain())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    drained.extend(buffer.drain())
    totals: dict[str, float] = {}
    for sample in drained:
        key = sample.name + (sample.labels[1] if sample.name == "guard_p_value_bucket" else "")
        totals[key] = totals.get(key, 0.0) + sample.value
    assert totals["guard_requests_total"] == 8000
    assert totals["guard_p_value_count"] == totals["guard_p_value_bucket+Inf"] == 8000
    assert totals["guard_p_value_bucket0.3"] == 8000
    assert totals["guard_p_value_bucket0.2"] == 0
    assert totals["guard_p_value_sum"] == 2000.0


def test_prometheus_names_are_those_that_a_full_buffer_drains(buffer):
    for metric in METRICS.values():
        labels = ("x",) * len(metric.labels)
        if metric.kind == "counter":
            buffer.count(metric.name, *labels)
        elif metric.kind == "gauge":
            buffer.set(metric.name, *labels, value=1)
        else:
            buffer.observe(metric.name, *labels, value=0.1)
    drained = {(sample.name, sample.kind, len(sample.labels)) for sample in buffer.drain()}
    assert drained == {(name, kind, len(labels)) for name, kind, labels in prometheus_names()}


def test_metrics_yaml_declares_exactly_the_series_that_are_drained():
    declared = yaml.safe_load(resource_path("metrics.yaml").read_text())["model_metrics"]
    ours = [
        (entry["name"], kind, tuple(entry["dimensions"]))
        for kind, entries in declared.items()
        for entry in entries
        if entry["name"].startswith("guard_")
    ]
    assert sorted(ours) == sorted(prometheus_names())
    assert len(set(ours)) == len(ours)


def test_metrics_names_and_buckets_follow_prometheus_habits():
    for metric in METRICS.values():
        assert metric.name.startswith("guard_")
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert (metric.kind == "histogram") == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert metric.labels[0] == "model"
