"""The audit sample as the queue holds it: what is counted, what it stands for, and what is told of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import numpy as np
import pytest
from queue_helpers import START, Clock, flagged

from guard.cli import run
from guard.errors import ConfigError
from guard.observing.detection import FIGURES, Detection, detection_of, detection_of_models, percent
from guard.relabel.audits import SampledItems, found_misses, read_sample, whole_hours
from guard.relabel.items import Answer, FlaggedInput
from guard.relabel.queue import Queue
from guard.statistics.detection_rates import DetectionRates, Estimate, NotKnown
from guard.types import UNDECIDED

OTHER = "cd" * 32
DAY = timedelta(days=1)


@pytest.fixture
def queue(queue_url: str) -> Iterator[Queue]:
    with Queue.open(queue_url, clock=Clock()) as opened:
        yield opened


def judged(number: int, **changes: Any) -> FlaggedInput:
    return flagged(number, **{"false_positive_rate": 0.01, "is_counted": True, **changes})


def audit(number: int, **changes: Any) -> FlaggedInput:
    return judged(number, **{"p_value": 0.5, "audit_probability": 0.25, **changes})


def answer(queue: Queue, item_id: int | None, is_poisoned: bool) -> int:
    assert item_id is not None
    queue.claim_items("ada", [item_id])
    return queue.decide("ada", item_id, is_poisoned=is_poisoned, true_label=4).id


def sample(queue: Queue, start: datetime = START, hours: int = 1, **chosen: Any) -> SampledItems:
    with queue.database.reading() as connection:
        return read_sample(connection, start, start + timedelta(hours=hours), **{"model": "digits", **chosen})


def rows(found: SampledItems) -> list[tuple[bool, float, float, int]]:
    columns = (found.is_flagged, found.p_values, found.probabilities, found.answers)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


def test_sample_holds_flagged_inputs_and_audits_with_the_answer_that_counts(queue):
    queue.note_traffic("digits", "ab" * 32, {(START, "flagged"): 3, (START, "near"): 7, (START, "far"): 90})
    inputs = [
        judged(0, p_value=0.001),
        judged(1, p_value=0.002, false_positive_rate=None),
        judged(2, p_value=0.003),
        audit(3, p_value=0.05, audit_probability=0.5),
        audit(4),
        audit(5, p_value=0.6),
        audit(6, p_value=0.7),
    ]
    ids = queue.enqueue(inputs).ids
    answer(queue, ids[0], True)
    answer(queue, ids[3], True)
    changed = answer(queue, ids[4], True)
    queue.supersede("bo", changed, is_poisoned=False, true_label=3)
    queue.withdraw("ada", answer(queue, ids[5], True))
    queue.add_gold(audit(9), True, 4)  # known answers measure reviewers
    found = sample(queue)
    assert rows(found) == [
        (False, 0.05, 0.5, 1),
        (False, 0.5, 0.25, 0),
        (False, 0.6, 0.25, UNDECIDED),
        (False, 0.7, 0.25, UNDECIDED),
        (True, 0.001, 1.0, 1),
        (True, 0.002, 1.0, UNDECIDED),
        (True, 0.003, 1.0, UNDECIDED),
    ]
    assert np.isnan(found.false_positive_rates).sum() == 1
    assert (found.since, found.requests) == (START, {"flagged": 3, "near": 7, "far": 90})
    with queue.database.reading() as connection:
        assert found_misses(connection) == {"digits": 1}


def test_queue_is_blind_from_the_first_counted_request_on(queue):
    assert not queue.has_audits()
    assert not queue.blind([queue.get(queue.enqueue([judged(0)]).ids[0])])[0].is_blinded
    queue.note_traffic("signs", OTHER, {(START, "far"): 1})
    assert queue.has_audits()
    (item,) = queue.blind([queue.get(1)])
    assert item.is_blinded
    assert (item.input.p_value, item.input.raw, item.input.reason, item.input.false_positive_rate) == (
        1.0,
        {},
        "",
        None,
    )
    assert (item.input.suspect_label, item.input.backup_label, item.input.request_id) == (3, 5, "request-0")


def test_answered_item_counts_after_its_images_are_gone(queue):
    queue.note_traffic("digits", "ab" * 32, {(START, "far"): 1})
    [item_id] = queue.enqueue([audit(0)]).ids
    answer(queue, item_id, True)
    queue.mark_trained([item_id], OTHER)
    assert queue.sweep(START + 40 * DAY).expired == 1
    assert rows(sample(queue)) == [(False, 0.5, 0.25, 1)]


def test_sample_is_of_one_model_bundle_class_and_of_hours_that_were_counted(queue):
    later, uncounted = START + timedelta(minutes=90), START - timedelta(minutes=1)
    queue.note_traffic("digits", "ab" * 32, {(START, "far"): 10, (START + timedelta(hours=1), "far"): 20})
    queue.note_traffic("digits", OTHER, {(START, "far"): 40})
    queue.note_traffic("signs", "ab" * 32, {(START, "far"): 80})
    queue.enqueue(
        [
            audit(0, p_value=0.1),
            audit(1, p_value=0.2, received_at=later, suspect_label=7),
            audit(2, p_value=0.3, bundle_digest=OTHER),
            audit(3, p_value=0.4, model="signs"),
            judged(4, p_value=0.5, received_at=uncounted),  # there was no audit sample yet
            judged(5, p_value=0.6, bundle_digest="ef" * 32),  # nor with this bundle
            judged(6, p_value=0.7, is_counted=False),  # nor when that hour began
        ]
    )

    def seen(**chosen: Any) -> tuple[list[float], Any]:
        found = sample(queue, **chosen)
        return [row[1] for row in rows(found)], found.requests

    assert seen() == ([0.1, 0.3], {"far": 50})
    assert seen(hours=2) == ([0.1, 0.2, 0.3], {"far": 70})
    assert seen(start=START - DAY, hours=48) == ([0.1, 0.2, 0.3], {"far": 70})
    assert sample(queue, start=START - DAY, hours=48).since == START
    for start in (START + DAY, START - DAY):  # nobody counted
        nobody = sample(queue, start=start)
        assert (nobody.since, nobody.n_hours, nobody.requests) == (None, 0, {})
    assert [sample(queue, start=START - DAY, hours=hours).n_hours for hours in (24, 25, 48)] == [0, 1, 2]
    assert sample(queue, hours=2, bundle_digest=OTHER).n_hours == 1
    assert seen(bundle_digest=OTHER) == ([0.3], {"far": 40})
    assert seen(hours=2, suspect_label=7) == ([0.2], None)
    assert seen(model="signs") == ([0.4], {"far": 80})
    assert seen(model="none") == ([], {})


def test_whole_hours_hold_the_window_in_any_zone():
    zone = timezone(timedelta(hours=5, minutes=30))
    start = datetime(2026, 3, 1, 17, 40, 0, 1, zone)  # 12:10 UTC
    assert whole_hours(start, start + timedelta(minutes=1)) == (START, START + timedelta(hours=1))
    assert whole_hours(START, START + 3 * timedelta(hours=1)) == (START, START + timedelta(hours=3))
    assert whole_hours(START, START + timedelta(hours=3, microseconds=1))[1] == START + timedelta(hours=4)


def fill(queue: Queue, *, misses: int, audits: int = 200, hour: datetime = START) -> None:
    """Store 1,000 requests: 50 flagged, 40 of them poisoned, and audits of the others, all answered."""
    queue.note_traffic("digits", "ab" * 32, {(hour, "flagged"): 50, (hour, "near"): 95, (hour, "far"): 855})
    inputs = [judged(number, received_at=hour) for number in range(50)]
    drawn_with = {"received_at": hour, "audit_probability": audits / 950}
    inputs += [audit(number, p_value=0.5 if number % 10 else 0.05, **drawn_with) for number in range(audits)]
    queue.change_settings(max_audits_per_hour=1000, max_held=1000)
    ids = queue.enqueue(inputs).ids
    poisoned = {*ids[:40], *ids[50 : 50 + misses]}
    queue.claim_items("ada", [number for number in ids if number is not None])
    queue.decide_many(
        "ada", [Answer(item_id=int(number or 0), is_poisoned=number in poisoned, true_label=4) for number in ids]
    )


def test_detection_is_told_with_intervals_that_hold_what_was_stored(queue):
    fill(queue, misses=2)
    (found,) = detection_of_models(queue, START + timedelta(minutes=5), START + timedelta(minutes=6))
    assert (found.model, found.start, found.end) == ("digits", START, START + timedelta(hours=1))
    assert (found.requests, found.found) == (1000, (51, 52))
    rates = found.rates
    assert isinstance(rates.missed, Estimate)
    assert isinstance(rates.detection_rate, Estimate)
    assert rates.missed.lower <= 2 * 950 / 200 <= rates.missed.upper
    assert rates.detection_rate.lower < 40 / (40 + 2 * 950 / 200) < rates.detection_rate.upper
    low, high = found.missed_range or (0, 0)
    assert 2 <= low < 9.5 < high
    assert found.sentence("in the last 7 days") == (
        f"This guard let through between {low} and {high} poisoned inputs in the last 7 days (95 % confidence)."
    )
    assert found.lines()[-2:] == ["from 50 answered flagged inputs, 200 audits", "found among the audits: item 51, 52"]
    told = found.as_dict()
    assert told["let_through"] == {
        "known": True,
        "value": rates.missed.value,
        "lower": rates.missed.lower,
        "upper": rates.missed.upper,
    }
    of_class = detection_of(queue, START, START + DAY, model="digits", attacked_class=3)
    assert of_class.requests is None
    assert of_class.rates.decided_audits == 200
    assert detection_of(queue, START, START + DAY, model="digits", attacked_class=8).rates.decided_audits == 0


def test_detection_says_what_is_missing_and_since_when_there_are_audits(queue):
    fill(queue, misses=1, audits=10)
    (found,) = detection_of_models(queue, START - DAY, START + DAY)
    needed = found.rates.missed
    assert isinstance(needed, NotKnown)
    assert needed.needed > 20
    assert found.sentence("in the last 7 days") == (
        "How many poisoned inputs this guard let through in the last 7 days, in 1 of 48 hours counted, the first at "
        f"2026-03-01 12:00 UTC, is not known yet, {needed.needed} more audits needed; 1 found so far."
    )
    assert found.as_dict()["let_through"] == {"known": False, "needed": needed.needed, "of": "audits"}
    before = detection_of(queue, START - DAY, START - DAY / 2, model="digits")
    assert before.sentence("then") == (
        "How many poisoned inputs this guard let through then is not known: it had no audit sample in that time, or no "
        "request."
    )
    assert detection_of_models(queue, START, START + DAY, "signs") == []
    with pytest.raises(ConfigError, match="the window must end after it begins"):
        detection_of(queue, START, START, model="digits")


def test_lower_end_is_never_below_what_was_found():
    nothing = NotKnown(1, "answers")
    rates = DetectionRates(nothing, nothing, nothing, nothing, Estimate(3.2, 0.4, 8.0), 0.9, 0, 0)
    detection = Detection("digits", START, START + DAY, START, 24, rates, 10, (4, 7))
    assert detection.missed_range == (2, 8)
    assert detection.sentence("then").endswith("between 2 and 8 poisoned inputs then (90 % confidence).")
    assert (
        replace(detection, n_hours=2)
        .sentence("then")
        .endswith(
            "poisoned inputs then, in 2 of 24 hours counted, the first at 2026-03-01 12:00 UTC (90 % confidence)."
        )
    )


@pytest.mark.parametrize("days", [23, -37], ids=["after", "before"])
@pytest.mark.parametrize("chosen", [{}, {"bundle_digest": "ab" * 32}, {"attacked_class": 3}], ids=str)
def test_window_in_which_nobody_counted_says_nothing_of_what_passed(queue, days, chosen):
    queue.note_traffic("digits", "ab" * 32, {(START, "flagged"): 9, (START, "far"): 1000})
    queue.note_traffic("digits", "ab" * 32, {(START + (days + 1) * DAY, "far"): 0})  # a server began, and got none
    found = detection_of(queue, START + days * DAY, START + (days + 7) * DAY, model="digits", **chosen)
    assert found.lines() == [
        f"How many poisoned inputs this guard let through from {found.start:%Y-%m-%d} 12:00 UTC to "
        f"{found.end:%Y-%m-%d} 12:00 UTC is not known: it had no audit sample in that time, or no request."
    ]
    told = found.as_dict()
    assert (told["since"], told["hours_counted"], told["requests"]) == (None, 0, None)
    assert not any(told[name]["known"] for name in ("let_through", *FIGURES))


def test_figures_are_told_after_their_names():
    nothing = NotKnown(9, "audits")
    known = Estimate(0.5, 0.25, 0.75)
    rates = DetectionRates(nothing, nothing, known, nothing, nothing, 0.95, 1, 1)
    detection = Detection("digits", START, START + DAY, START, 24, rates, 10, ())
    assert detection.lines()[1:] == [
        "detection rate (of poisoned inputs, flagged): not known yet, 9 more audits needed",
        "false-positive rate (of clean inputs, flagged): not known yet, 9 more audits needed",
        "precision (of flagged inputs, poisoned): 50.0 % (25.0 % to 75.0 %)",
        "poisoned share (of all inputs, poisoned): not known yet, 9 more audits needed",
        "from 1 answered flagged input, 1 audit",
    ]
    assert detection.line() == (
        "let through: not known yet, 9 more audits needed; detection rate: not known yet, 9 more audits needed; "
        "from 1 answered flagged input, 1 audit"
    )


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0 %"), (1.0, "100 %"), (0.6123, "61.2 %"), (0.00234, "0.23 %"), (0.99951, "99.951 %")]
)
def test_percent_has_the_digits_that_a_share_is_worth(share, text):
    assert percent(share) == text


def test_sample_is_read_without_images(queue):
    from guard.relabel.audit_statements import sampled_items

    statement = sampled_items(START.astimezone(UTC), START + DAY, "digits", None, None)
    assert "blobs" not in str(statement)


def test_command_answers_in_one_line_how_many_were_let_through(sqlite_template, tmp_path, capsys):
    file = tmp_path / "queue.db"
    shutil.copy(sqlite_template, file)
    now = datetime.now(UTC)
    command = ["audit", "--queue", str(file)]
    with Queue.open(f"sqlite:///{file}") as queue:
        assert run(command) == 0
        assert "let through is not known: the queue has no audit sample" in capsys.readouterr().out
        fill(queue, misses=2, hour=now.replace(minute=0, second=0, microsecond=0))
    assert run(command) == 0  # the last 7 days
    said = capsys.readouterr().out
    line = re.search(r"^digits: This guard let through between (\d+) and (\d+) poisoned inputs from .*$", said, re.M)
    assert line is not None
    assert line[0].endswith("(95 % confidence).")
    assert "found among the audits: item 51, 52" in said
    assert run([*command, "--model", "digits", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["detection"]
    assert int(line[1]) <= told["let_through"]["value"] <= int(line[2])
    assert told["detection_rate"]["known"]
    for by, name in (("class", "3"), ("bundle", "ab" * 32)):
        assert run([*command, "--by", by]) == 0
        assert re.search(
            rf"^  {by} {name[:12]}: let through: \d+ to \d+; detection rate: ", capsys.readouterr().out, re.M
        )
        assert run([*command, "--by", by, "--json"]) == 0
        (told,) = json.loads(capsys.readouterr().out)["detection"]
        assert {part: figures["answered_audits"] for part, figures in told[f"by_{by}"].items()} == {name: 200}
    assert run([*command, "--by", "sender"]) == 2
    assert "--by must be one of bundle, class, got 'sender'" in capsys.readouterr().err
    assert run([*command, "--model", "signs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["detection"] == []
    assert run([*command, "--model", "digit"]) == 0
    assert "no audit sample of model 'digit', but one of 'digits'." in capsys.readouterr().out
