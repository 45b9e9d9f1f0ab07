"""Metrics of the review page and the retrainer: what the queue's database says, at every scrape anew."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from queue_helpers import START, Clock, flagged
from test_audits import audit, fill

from guard.errors import ObservingError, QueueUnavailable
from guard.observing import statements
from guard.observing.collectors import (
    COMPANION_METRICS,
    DETECTION_METRICS,
    PAGE_METRICS,
    QueueCollector,
    RetrainerCollector,
)
from guard.observing.detection_watch import AGE_S
from guard.observing.exporting import exporting
from guard.relabel.database import Database
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds


@pytest.fixture
def queue(queue_url: str) -> Iterator[Queue]:
    """Six items of two models, one of them gold; answers given, withdrawn, overturned."""
    clock = Clock()
    with Queue.open(queue_url, clock=clock) as opened:
        for number in range(5):
            clock.advance(minutes=1)
            opened.enqueue([flagged(number, model="digits" if number < 4 else "signs", received_at=clock())])
        opened.add_gold(flagged(9), True, 1)
        yield opened


def samples(collector: QueueCollector | RetrainerCollector) -> dict[tuple[str, ...], float]:
    """Return what a scrape sees: (name, label values) -> value."""
    registry = CollectorRegistry()
    registry.register(collector)
    return {(s.name, *s.labels.values()): s.value for family in registry.collect() for s in family.samples}


def answer(queue: Queue, item_id: int, is_poisoned: bool, label: int | None, reviewer: str = "ada") -> int:
    queue.claim_items(reviewer, [item_id])
    return queue.decide(reviewer, item_id, is_poisoned=is_poisoned, true_label=label).id


def test_queue_collector_counts_items_by_model_and_state_without_gold(queue: Queue) -> None:
    queue.claim_items("ada", [2])
    answer(queue, 3, True, 1)
    found = samples(QueueCollector(queue))
    assert found["guard_queue_up",] == 1
    items = {key[1:]: value for key, value in found.items() if key[0] == "guard_queue_items"}
    assert set(items) == {(model, state) for model in ("digits", "signs") for state in State}
    assert {key: value for key, value in items.items() if value} == {
        ("digits", "pending"): 2,
        ("digits", "claimed"): 1,
        ("digits", "decided"): 1,
        ("signs", "pending"): 1,
    }


def test_queue_collector_tells_when_the_oldest_pending_item_came(queue: Queue) -> None:
    name = "guard_queue_oldest_item_timestamp_seconds"
    assert samples(QueueCollector(queue))[name, "digits"] == START.timestamp() + 60
    answer(queue, 1, False, 3)
    assert samples(QueueCollector(queue))[name, "digits"] == START.timestamp() + 120
    answer(queue, 5, False, 3)
    found = samples(QueueCollector(queue))
    assert (name, "signs") not in found  # nothing is pending, so that nothing is old
    assert found["guard_queue_items", "signs", "pending"] == 0


def test_queue_collector_counts_what_reviewers_said_and_took_back(queue: Queue) -> None:
    first = answer(queue, 1, True, 1)
    second = answer(queue, 2, False, 3)
    third = answer(queue, 3, True, 2, "bob")
    answer(queue, 6, True, 1)  # gold: measures the reviewer, and is nobody's request
    queue.withdraw("ada", second)
    queue.supersede("bob", first, is_poisoned=False, true_label=3)  # another's answer, something else
    queue.supersede("bob", third, is_poisoned=True, true_label=2, note="sure")  # one's own, the same again
    found = samples(QueueCollector(queue))
    message = {key[1]: value for key, value in found.items() if key[0] == "guard_review_decisions_total"}
    assert message == {"poisoned": 3, "false_alarm": 2, "withdrawn": 1}
    assert found["guard_review_overturned_total",] == 1
    last = answer(queue, 4, True, 2)
    queue.supersede("ada", last, is_poisoned=True, true_label=5)  # another label, by oneself
    assert samples(QueueCollector(queue))["guard_review_overturned_total",] == 2


def test_retrainer_collector_counts_runs_of_its_model_that_are_over(queue: Queue) -> None:
    rounds = Rounds(queue)
    for model, outcome in (("digits", "promoted"), ("digits", "refused"), ("digits", "refused"), ("signs", "failed")):
        rounds.finish(rounds.begin(model, 1), outcome, {})
    waiting = rounds.begin("digits", 1)
    rounds.finish(waiting, "canary", {})
    rounds.begin("digits", 1)
    collector = RetrainerCollector(queue, "digits")
    name = "guard_retrain_runs_total"
    expected = {(name, "digits", "promoted"): 1, (name, "digits", "refused"): 2, (name, "digits", "failed"): 0}
    assert samples(collector) == {("guard_queue_up",): 1, **expected}
    rounds.finish(waiting, "promoted", {})
    assert samples(collector)[name, "digits", "promoted"] == 2


def test_database_that_is_away_is_no_zero_and_no_crash(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: object) -> None:
        raise QueueUnavailable("gone.")

    monkeypatch.setattr(Database, "_transaction", away)
    assert samples(QueueCollector(queue)) == {("guard_queue_up",): 0}
    assert samples(RetrainerCollector(queue, "digits")) == {("guard_queue_up",): 0}
    monkeypatch.undo()
    assert samples(QueueCollector(queue))["guard_queue_up",] == 1


def test_sqlite_file_that_was_replaced_by_nonsense_is_away(sqlite_template, tmp_path) -> None:
    file = tmp_path / "queue.db"
    file.write_bytes(sqlite_template.read_bytes())
    with Queue.open(f"sqlite:///{file}") as queue:
        queue.database.engine.dispose()
        file.write_bytes(b"no database" * 1000)
        assert samples(QueueCollector(queue)) == {("guard_queue_up",): 0}


@pytest.mark.parametrize("statement", [statements.ITEMS, statements.DECISIONS], ids=["items", "decisions"])
def test_scrape_reads_each_table_once_and_no_images(queue: Queue, statement) -> None:
    text = str(statement.compile(queue.database.engine, compile_kwargs={"literal_binds": True}))
    assert "blobs" not in text
    if not queue.database.is_sqlite:
        return
    with queue.database.reading() as connection:
        plan = [row[-1] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}")]
    scans = [step for step in plan if step.startswith("SCAN")]
    assert len(scans) == 1
    assert all("INTEGER PRIMARY KEY" in step for step in plan if step.startswith("SEARCH"))


def test_queue_collector_tells_what_a_guard_with_audits_lets_through(queue: Queue) -> None:
    seconds = 1000.0
    collector = QueueCollector(queue, lambda: seconds)
    assert not {key[0] for key in samples(collector)} & {*DETECTION_METRICS}
    fill(queue, misses=2, hour=datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    seconds += AGE_S
    found = samples(collector)
    names = {key for key in found if key[0] in DETECTION_METRICS}
    assert names == {(name, "digits") for name in DETECTION_METRICS}  # no series of the model without audits
    assert found["guard_missed_poisoned", "digits"] == 2
    for name in ("guard_detection_rate", "guard_realised_false_positive_rate", "guard_precision", "guard_let_through"):
        assert found[f"{name}_lower", "digits"] <= found[name, "digits"] <= found[f"{name}_upper", "digits"]
    assert found["guard_precision", "digits"] == pytest.approx(0.8)
    queue.withdraw("ada", 1)  # of a flagged one
    assert samples(collector)["guard_precision", "digits"] == found["guard_precision", "digits"]  # of a moment ago
    seconds += AGE_S
    assert samples(collector)["guard_precision", "digits"] != found["guard_precision", "digits"]


def test_queue_collector_tells_no_estimate_that_is_not_known(queue: Queue) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    queue.note_traffic("signs", "ab" * 32, {(hour, "far"): 1000})
    found = {key: value for key, value in samples(QueueCollector(queue)).items() if key[0] in DETECTION_METRICS}
    assert found == {("guard_missed_poisoned", "signs"): 0}


def test_row_that_cannot_be_estimated_from_takes_only_the_estimates_of_its_model(queue: Queue, caplog) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    fill(queue, misses=2, hour=hour)
    queue.note_traffic("signs", "ab" * 32, {(hour, "far"): 1000})
    queue.enqueue([audit(900, model="signs", received_at=hour, false_positive_rate=0.0)])
    seconds = 1000.0
    collector = QueueCollector(queue, lambda: seconds)
    for _ in range(2):
        found = samples(collector)
        assert (found["guard_queue_up",], found["guard_queue_items", "signs", "pending"]) == (1, 2)
        assert found["guard_missed_poisoned", "signs"] == 0
        assert {key[1] for key in found if key[0] == "guard_precision"} == {"digits"}
        seconds += AGE_S
    (line,) = [record.getMessage() for record in caplog.records if "cannot be estimated" in record.getMessage()]
    assert line.startswith("what the guard of 'signs' lets through cannot be estimated: false_positive_rates must be")


def test_queue_collector_tells_no_estimate_of_a_week_without_an_audit_sample(queue: Queue) -> None:
    long_ago = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(days=30)
    queue.note_traffic("digits", "ab" * 32, {(long_ago, "far"): 1000})
    found = {key: value for key, value in samples(QueueCollector(queue)).items() if key[0] in DETECTION_METRICS}
    assert found == {("guard_missed_poisoned", "digits"): 0}


def test_every_exported_metric_is_declared_with_its_labels(queue: Queue) -> None:
    answer(queue, 1, True, 1)
    fill(queue, misses=1, hour=datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    for collector in (QueueCollector(queue), RetrainerCollector(queue, "digits")):
        for family in collector.collect():
            for sample in family.samples:
                declared = COMPANION_METRICS[sample.name]
                assert (family.type, tuple(sample.labels)) == (declared.kind, declared.labels)
                assert family.documentation == declared.help


# --- the endpoint


def test_exporting_serves_what_the_database_says_now(queue: Queue) -> None:
    with exporting(0, QueueCollector(queue)) as url:
        assert url.startswith("http://127.0.0.1:")
        for expected in (4, 3):
            with urllib.request.urlopen(url, timeout=30) as reply:
                page = reply.read().decode()
            found = {
                (sample.name, *sample.labels.values()): sample.value
                for family in text_string_to_metric_families(page)
                for sample in family.samples
            }
            assert found["guard_queue_items", "digits", "pending"] == expected
            assert {name for name, *_ in found} == {"guard_queue_up", *PAGE_METRICS} - {*DETECTION_METRICS}
            queue.claim_items("ada", [1])
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(url, timeout=5)


def test_port_that_is_taken_or_none_is_one_clear_line(queue: Queue) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(ObservingError, match=rf"^metrics cannot be served on port {port}: .*--metrics-port"),
            exporting(port, QueueCollector(queue)),
        ):
            pass
    with pytest.raises(ObservingError, match="--metrics-port must be in"), exporting(70000, QueueCollector(queue)):
        pass
