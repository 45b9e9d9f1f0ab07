"""The audit sample: who is drawn, what is kept of it, what its sender sees (nothing), and what it stands for."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa
from queue_helpers import START, Clock, flagged

from guard import Guard, GuardConfig
from guard.errors import ConfigError, DataError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.relabel.items import FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.schema import traffic
from guard.relabel.settings import QueueSettings
from guard.serving import audit_sample
from guard.serving.audit_sample import AuditSample
from guard.serving.guarded_model import GuardedModel, RowAnswer
from guard.serving.outcomes import judged, merge
from guard.serving.traffic import Traffic
from guard.statistics.strata import audit_probability, stratum_of
from guard.types import Verdict


def verdict(p_value: float, is_poisoned: bool = False) -> Verdict:
    return Verdict(
        label=0,
        final_label=0,
        is_poisoned=is_poisoned,
        p_value=p_value,
        score=0.0,
        action="observe",
        detector_scores={},
        reason="",
    )


@pytest.mark.parametrize(
    ("p_value", "is_flagged", "stratum"),
    [
        (0.0001, True, "flagged"),
        (0.01, True, "flagged"),
        (0.6, True, "flagged"),  # as in paper mode, where a flag has nothing to do with the p-value
        (0.0001, False, "near"),
        (0.1, False, "near"),
        (0.1001, False, "far"),
        (1.0, False, "far"),
    ],
)
def test_stratum_follows_flag_and_p_value(p_value: float, is_flagged: bool, stratum: str) -> None:
    assert stratum_of(p_value, 0.01, is_flagged) == stratum


def test_sample_draws_every_unflagged_row_with_the_probability_that_it_returns() -> None:
    sample, n = AuditSample(), 40_000
    rows = [verdict(0.001, is_poisoned=True), verdict(0.05), verdict(0.7)] * n
    drawn = sample.draw(rows, 0.01, 0.02)
    by_kind = [[drawn[row] for row in drawn if row % 3 == kind] for kind in range(3)]
    assert by_kind[0] == []  # a flagged one goes to the queue anyway
    assert {*by_kind[1]} == {0.1}  # near the threshold, five times as often
    assert {*by_kind[2]} == {0.02}
    for found, probability in zip(by_kind[1:], (0.1, 0.02), strict=True):  # six standard deviations
        assert abs(len(found) - n * probability) < 6 * np.sqrt(n * probability * (1 - probability))


def test_sample_of_rate_zero_draws_nothing_and_of_rate_one_everything() -> None:
    rows = [verdict(0.5), verdict(0.02)]
    assert AuditSample().draw(rows, 0.01, 0.0) == {}
    assert AuditSample().draw(rows, 0.01, 1.0) == {0: 1.0, 1: 1.0}
    assert audit_probability(0.02, 0.01, 0.5) == 1.0


def test_sample_thins_out_as_the_hour_fills_up_and_recovers(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(audit_sample.time, "monotonic", lambda: now)
    sample, rows = AuditSample(), [verdict(0.5)] * 20_000
    sample.note_left(0.5)
    assert {*sample.draw(rows, 0.01, 0.1).values()} == {0.1}  # half are left: nothing is thinned yet
    sample.note_left(0.1)
    thinned = sample.draw(rows, 0.01, 0.1)
    assert [*{*thinned.values()}] == [pytest.approx(0.02)]
    assert abs(len(thinned) - 400) < 6 * 20
    sample.note_left(0.0)
    assert sample.draw(rows, 0.01, 0.1) == {}
    now += 0.25 * 3600  # a quarter of the hour's audits have come free
    assert [*{*sample.draw(rows, 0.01, 0.1).values()}] == [pytest.approx(0.05)]


# --- serving ---


@pytest.fixture(scope="module")
def bundle(fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted_guard.save(tmp_path_factory.mktemp("bundles"))


@pytest.fixture(scope="module")
def images(fitted_guard: Guard, triggered: Poisoned, clean_split: Any) -> Any:
    """Two flagged images, and four that are not."""
    found = []
    for pictures, is_flagged, n in ((triggered.images[:20], True, 2), (clean_split.test.images[:40], False, 4)):
        kept = [row for row, one in enumerate(fitted_guard.inspect(pictures)) if one.is_poisoned == is_flagged]
        found.append(pictures[kept[:n]])
    return np.concatenate(found)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'queue.db'}"


def answered(
    network: MnistCnn, bundle: Path, images: Any, url: str, **settings: Any
) -> tuple[list[RowAnswer], dict[str, float]]:
    """Return the answers of a guarded model with this queue, and its counts."""
    with closing(GuardedModel(copy.deepcopy(network), bundle=bundle, name="m", queue_url=url, **settings)) as model:
        answers = model.answer(images)
        counts: dict[str, float] = {}
        for sample in model.runtime.metrics.drain():
            counts[sample.name] = counts.get(sample.name, 0) + sample.value
    return answers, counts


def inputs_of(url: str) -> list[FlaggedInput]:
    with Queue.open(url) as queue:
        return [item.input for item in queue.items()]


def test_audits_are_queued_as_flagged_inputs_are_and_nobody_outside_sees_it(
    badnet: MnistCnn, bundle: Path, images: Any, url: str, tmp_path: Path
) -> None:
    other = f"sqlite:///{tmp_path / 'other.db'}"
    without, _ = answered(badnet, bundle, images, other, verdict_detail="full", verdict_in_body=True)
    answers, counts = answered(badnet, bundle, images, url, verdict_detail="full", verdict_in_body=True, audit_rate=1.0)
    for answer, usual in zip(answers, without, strict=True):
        assert (answer.response.status, answer.response.headers) == (usual.response.status, usual.response.headers)
        assert np.array_equal(answer.response.body, usual.response.body)
    assert [answer.response.headers.get("Guard-Review") for answer in answers] == ["queued"] * 2 + [None] * 4
    kept = inputs_of(url)
    assert [one.audit_probability for one in kept] == [None] * 2 + [1.0] * 4
    assert all(one.is_counted for one in kept)
    assert not any(one.is_counted for one in inputs_of(other))
    assert [one.is_audit for one in inputs_of(other)] == [False, False]
    for one, image in zip(kept, images, strict=True):
        assert one.inputs.tobytes() == image.tobytes()
        assert (one.surprise.keys(), one.raw.keys()) == (kept[0].surprise.keys(), kept[0].raw.keys())
        assert one.backup_label is not None
        assert one.backup_confidence is not None
    assert (counts["guard_queued_total"], counts["guard_audited_total"]) == (2, 4)
    assert counts["guard_shed_total"] == counts["guard_audits_shed_total"] == 0
    assert counts["guard_verdicts_total"] == 6  # an audit is a clean request, and no other


def test_what_the_sample_stands_for_is_counted_in_the_queue(
    badnet: MnistCnn, bundle: Path, images: Any, url: str, fitted_guard: Guard
) -> None:
    before = datetime.now(UTC)
    answered(badnet, bundle, images, url, audit_rate=1e-9)
    rate = fitted_guard.config.false_positive_rate
    wanted: dict[str, int] = {}
    for one in fitted_guard.inspect(images):
        stratum = stratum_of(one.p_value, rate, one.is_poisoned)
        wanted[stratum] = wanted.get(stratum, 0) + 1
    with Queue.open(url) as queue, queue.database.reading() as connection:
        rows = connection.execute(sa.select(traffic)).all()
    assert {row.stratum: row.requests for row in rows} == wanted
    assert {(row.model, row.bundle_digest) for row in rows} == {("m", bundle.name)}
    for row in rows:
        assert timedelta(0) <= before - row.hour + timedelta(hours=1) < timedelta(hours=2)
        assert (row.hour.minute, row.hour.second, row.hour.microsecond) == (0, 0, 0)


def test_without_an_audit_rate_nothing_of_clean_traffic_is_kept(
    badnet: MnistCnn, bundle: Path, images: Any, url: str
) -> None:
    answered(badnet, bundle, images[2:], url)
    with Queue.open(url) as queue, queue.database.reading() as connection:
        assert queue.items() == []
        assert connection.execute(sa.select(traffic)).all() == []


def test_queue_is_blind_before_the_first_audit(badnet: MnistCnn, bundle: Path, images: Any, url: str) -> None:
    with closing(GuardedModel(copy.deepcopy(badnet), bundle=bundle, name="m", queue_url=url, audit_rate=1e-9)) as model:
        model.runtime.review_queue.traffic.close()  # type: ignore[union-attr]
        with Queue.open(url) as queue:
            assert queue.has_audits()
            assert queue.items() == []


def test_audit_that_cannot_be_made_costs_no_answer(
    badnet: MnistCnn, bundle: Path, images: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Guard, "examined", lambda *_: 1 / 0)
    answers, counts = answered(badnet, bundle, images, url, audit_rate=1.0)
    assert [answer.verdict for answer in answers] == ["poisoned"] * 2 + ["clean"] * 4
    assert [one.is_audit for one in inputs_of(url)] == [False, False]
    assert (counts["guard_audits_shed_total"], counts["guard_audited_total"]) == (4, 0)


def test_audits_that_time_out_cost_flagged_requests_nothing(
    badnet: MnistCnn, bundle: Path, images: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(GuardedModel(copy.deepcopy(badnet), bundle=bundle, name="m", queue_url=url, audit_rate=1.0)) as model:
        with monkeypatch.context() as broken:
            broken.setattr(Queue, "enqueue", lambda *_: 1 / 0)
            model.answer(images[2:])
        model.answer(images[:2])
    assert [one.is_audit for one in inputs_of(url)] == [False, False]


def test_audit_of_a_request_of_several_rows_shows_any_of_them(fitted_guard: Guard, images: Any) -> None:
    guard = fitted_guard.with_config(rows_per_request="any")
    verdicts = guard.inspect(images[2:])
    rows = [judged(one, SimpleNamespace(row=row)) for row, one in enumerate(verdicts)]  # type: ignore[arg-type]
    merged = [merge(guard, rows) for _ in range(200)]
    least = min(one.p_value for one in verdicts)
    assert {outcome.verdict.p_value for outcome in merged if outcome.verdict} == {least}  # what its sender is told
    assert {outcome.evidence.row for outcome in merged if outcome.evidence} == {0, 1, 2, 3}  # type: ignore[attr-defined]


def test_audit_rate_without_a_queue_is_told(
    badnet: MnistCnn, bundle: Path, images: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with closing(GuardedModel(copy.deepcopy(badnet), bundle=bundle, name="m", audit_rate=0.5)) as model:
        assert [answer.verdict for answer in model.answer(images)] == ["poisoned"] * 2 + ["clean"] * 4
    assert [record.getMessage() for record in caplog.records if "audit" in record.getMessage()] == [
        "audit_rate is set, and there is no audit sample without a queue: set queue_url."
    ]


def test_audits_that_the_queue_does_not_take_are_counted_apart(
    badnet: MnistCnn, bundle: Path, images: Any, url: str, tmp_path: Path
) -> None:
    Queue.open(url, QueueSettings(max_audits_per_hour=3)).close()
    _, counts = answered(badnet, bundle, images, url, audit_rate=1.0)
    assert (counts["guard_queued_total"], counts["guard_audited_total"]) == (2, 3)
    assert (counts["guard_shed_total"], counts["guard_audits_shed_total"]) == (0, 1)
    missing = f"sqlite:///{tmp_path / 'nowhere' / 'queue.db'}"
    answers, counts = answered(badnet, bundle, images, missing, audit_rate=1.0)
    assert [answer.response.status for answer in answers] == [200] * 6
    assert (counts["guard_shed_total"], counts["guard_audits_shed_total"]) == (2, 4)


def test_traffic_keeps_counts_that_were_not_taken_and_hands_each_on_once() -> None:
    taken: list[dict[Any, int]] = []
    is_open = False

    def write(digest: str, requests: Any) -> bool:
        if is_open:
            taken.append(dict(requests))
        return is_open

    counts = Traffic(write)
    for stratum in ("far", "near", "far"):
        counts.add("ab", stratum)  # type: ignore[arg-type]
    counts.flush()
    is_open = True
    counts.add("ab", "far")
    counts.close()
    counts.close()
    totals: dict[str, int] = {}
    for requests in taken:
        for (_, stratum), number in requests.items():
            totals[stratum] = totals.get(stratum, 0) + number
    assert totals == {"far": 3, "near": 1}


# --- the queue ---


def audit(number: int, **changes: Any) -> FlaggedInput:
    return flagged(number, **{"audit_probability": 0.01, "p_value": 0.6, "false_positive_rate": 0.01, **changes})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(queue_url: str, clock: Clock) -> Iterator[Queue]:
    with Queue.open(queue_url, clock=clock) as opened:
        yield opened


def test_queue_takes_so_many_audits_of_a_model_within_an_hour(queue: Queue) -> None:
    queue.change_settings(max_audits_per_hour=4)
    first = queue.enqueue([audit(0), flagged(1), audit(2), audit(3), audit(4, model="letters")])
    assert (first.ids, first.audit_share_left) == ((1, 2, 3, 4, 5), 0.25)
    later = START + timedelta(minutes=30)
    second = queue.enqueue([audit(5, received_at=later), audit(6, received_at=later), flagged(7, received_at=later)])
    assert (second.ids, second.dropped, second.audit_share_left) == ((6, None, 7), 1, 0.0)
    again = queue.enqueue([audit(8, received_at=START + timedelta(minutes=61))])  # three are an hour old
    assert (again.ids, again.audit_share_left) == ((8,), 0.5)
    assert queue.enqueue([flagged(9)]).audit_share_left is None
    assert queue.has_audits()
    assert queue.get(1).input.audit_probability == 0.01
    assert queue.get(2).input.audit_probability is None


@pytest.mark.parametrize("spread", ["an attack", "false alarms", "one batch"])
def test_place_of_an_audit_in_the_order_of_suspicion_is_that_of_a_flagged_item(queue: Queue, spread: str) -> None:
    n_clean = 199  # p-values lie on a grid of two steps within the rate, whatever is drawn
    steps = [1] * 100 if spread == "an attack" else [1, 2] * 50
    items = [flagged(number, p_value=step / (n_clean + 1)) for number, step in enumerate(steps)]
    audits = [audit(100 + number) for number in range(100)]
    for batch in [items + audits] if spread == "one batch" else [items, audits]:
        queue.enqueue(batch)
    order = np.array([item.input.is_audit for item in queue.claim("ann", 100) + queue.claim("bob", 100)])
    assert order.sum() == 100
    thirds = [part.mean() for part in np.array_split(order, 3)]
    assert all(0.25 < share < 0.75 for share in thirds)  # five standard deviations
    runs = 1 + int((order[1:] != order[:-1]).sum())
    assert runs > 50  # about 100 where both are mixed; blocks of one kind would show


def test_server_whose_clock_is_ahead_takes_no_audits_of_others(queue: Queue) -> None:
    queue.change_settings(max_audits_per_hour=1)
    ahead = START + timedelta(days=1)
    assert queue.enqueue([audit(0, received_at=ahead), audit(1, received_at=ahead)]).ids == (1, None)
    assert queue.enqueue([audit(2)]).ids == (2,)


def test_settings_of_a_later_version_are_passed_over() -> None:
    later = json.dumps({"quorum": 2, "a_setting_of_tomorrow": 7})
    assert QueueSettings.from_json(later) == QueueSettings(quorum=2)
    for text in ("[1]", "{", '{"quorum": 0}'):
        with pytest.raises(ConfigError):
            QueueSettings.from_json(text)


@pytest.mark.parametrize(("name", "value"), [("p_value", 1.5), ("p_value", -0.1), ("false_positive_rate", 2.0)])
def test_share_that_is_none_does_not_get_into_the_queue(name: str, value: float) -> None:
    with pytest.raises(DataError, match=f"{name} must be in"):
        flagged(0, **{name: value})


def test_audits_that_wait_start_no_round_that_flagged_inputs_would_start(queue: Queue) -> None:
    queue.enqueue([flagged(0), audit(1), audit(2)])
    assert queue.count_pending("digits") == 1


def test_flood_of_flagged_items_takes_no_room_of_audits(queue: Queue) -> None:
    queue.change_settings(max_items=40)
    queue.enqueue([audit(number, suspect_label=number % 10) for number in range(10)])
    for start in range(10, 310, 50):
        queue.enqueue([flagged(start + number) for number in range(50)])
    kept = queue.items()
    assert len(kept) == 40
    assert sum(item.input.is_audit for item in kept) == 10


def test_gold_copy_of_an_audit_is_placed_as_one_and_not_counted_against_the_hour(queue: Queue) -> None:
    queue.change_settings(max_audits_per_hour=2)
    queue.enqueue([audit(0)])
    number = queue.add_gold(queue.get(1).input, False, 3, copy_of=1)
    assert queue.get(number).input.audit_probability == 0.01
    assert queue.enqueue([audit(1)]).ids == (3,)


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, float("nan")])
def test_audit_with_an_impossible_probability_is_refused(probability: float) -> None:
    with pytest.raises(DataError, match="audit_probability must be in"):
        audit(0, audit_probability=probability)


def test_counts_of_judged_requests_add_up_over_processes(queue: Queue) -> None:
    later = START + timedelta(hours=1)
    queue.note_traffic("digits", "ab" * 32, {(START, "far"): 5, (later, "far"): 1})
    queue.note_traffic("digits", "ab" * 32, {(START, "far"): 2, (START, "near"): 1})
    queue.note_traffic("digits", "ab" * 32, {})
    with queue.database.reading() as connection:
        rows = connection.execute(sa.select(traffic)).all()
    assert {(row.hour, row.stratum): row.requests for row in rows} == {
        (START, "far"): 7,
        (START, "near"): 1,
        (later, "far"): 1,
    }


# --- settings ---


def test_audit_rate_is_a_share_and_leaves_older_readers_their_bundles() -> None:
    assert "audit_rate" not in GuardConfig().portable()
    assert GuardConfig(audit_rate=0.002).portable()["audit_rate"] == 0.002
    assert json.loads(json.dumps(GuardConfig(audit_rate=0.002).portable()))
    with pytest.raises(ConfigError, match="audit_rate"):
        GuardConfig(audit_rate=1.5)
    with pytest.raises(ConfigError, match="max_audits_per_hour must be above 0"):
        QueueSettings(max_audits_per_hour=0)
