"""Audits cannot be told apart: the same requests against a queue with an audit, and one with a flagged input there."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from metrics_helpers import Counters
from queue_helpers import START
from review_helpers import log_in, picture, workspace_of
from starlette.testclient import TestClient
from test_audits import fill
from test_gold import HERE, Frozen, World
from test_review_api import program
from test_status_page import shown

from guard.observing.detection_watch import AGE_S, DetectionWatch
from guard.relabel.exchange import items_in, write_csv
from guard.relabel.items import FlaggedInput, State
from guard.relabel.queue import Queue
from guard.review.status.sampler import Sampler

#: Of an audit, and nowhere else.
SCORES: dict[str, Any] = {
    "p_value": 0.4321,
    "combined": -7.125,
    "raw": {"lof": 0.0625, "head": 9.375},
    "surprise": {"lof": 0.03125, "head": 0.15625},
    "reason": "",
    "audit_probability": 0.0123,
}


class Middle(random.Random):
    """Draws the middle every time."""

    def random(self) -> float:
        return 0.5


class AlikeFirst(random.Random):
    """Draws the place of `flagged_alike` for every audit."""

    def choice(self, seq: Any) -> Any:
        return 0.0055, 33.75


def unflagged(number: int, **changes: Any) -> FlaggedInput:
    return picture(number, false_positive_rate=0.011, **(SCORES | changes))


class AuditWorld(World):
    """A queue with an audit sample, whose item `HERE` is an audit or a flagged input."""

    def add_here(self, root: TestClient, is_special: bool) -> None:
        self.queue._random = Middle()
        self.queue.note_traffic("digits", "ab" * 32, {(START, "far"): 1})
        make = unflagged if is_special else flagged_alike
        self.queue.enqueue([make(0, request_id="request-99999999", received_at=self.clock.now)])


def flagged_alike(number: int, **changes: Any) -> FlaggedInput:
    return picture(
        number, p_value=0.0055, combined=33.75, reason="flagged: far off", false_positive_rate=0.011, **changes
    )


@pytest.mark.parametrize("quorum", [1, 2])
def test_nothing_that_a_reviewer_may_ask_tells_an_audit(
    sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quorum: int
):
    for module in ("pages", "status.page", "wording"):
        monkeypatch.setattr(f"guard.review.{module}.datetime", Frozen)
    monkeypatch.setattr("guard.relabel.enqueueing._random", AlikeFirst())
    worlds = []
    for is_audit in (True, False):
        path = tmp_path / f"{is_audit}.db"
        shutil.copy(sqlite_template, path)
        world = AuditWorld(path, is_special=is_audit, quorum=quorum)
        assert world.queue.get(HERE).input.is_audit is is_audit
        world.review()
        world.queue.close()
        worlds.append(world)
    audit, flagged = worlds
    assert len(audit.lines) == len(flagged.lines) > 100
    for place, (entry, other) in enumerate(zip(audit.lines, flagged.lines, strict=True)):
        assert entry == other, f"request {place}: {entry[0]}"
    everything = "\n".join(text for _, _, text in audit.lines + flagged.lines)
    assert "Scores are not shown: some of these inputs were not flagged" in everything
    for told in ("0.0055", "0.4321", "33.75", "-7.125", "far off", "far from every clean", "0.0123", "as unusual"):
        assert told not in everything, told


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        yield opened


def test_scores_are_shown_until_requests_are_drawn_and_then_of_no_item(queue):
    queue.enqueue([picture(0), picture(1)])
    workspace = workspace_of(queue)
    ada, robot = log_in(workspace), program(workspace, "robot", "admin")
    assert "1 in 1,000 clean images" in shown(ada.get("/review").text)
    before = robot.get("/api/v1/items/1").json()
    assert (before["p_value"], before["reason"]) == (0.001, "lof: far from every clean 3")
    assert robot.get("/api/v1/items/1").json()["detectors"]["surprise"] == {"lof": 4.0, "head": 0.5}
    queue.note_traffic("signs", "ab" * 32, {(datetime.now(UTC), "far"): 1})  # no audit came yet, and of another model
    page = ada.get("/review").text
    assert "clean images</strong>" not in page
    assert "Scores are not shown" in page
    after = robot.get("/api/v1/items/1").json()
    renewed = {"lease_expires_at": after["lease_expires_at"]}
    assert after == before | renewed | dict.fromkeys(("p_value", "score", "detectors", "reason"))
    csv = "".join(write_csv(items_in(queue, [State.PENDING, State.CLAIMED]), workspace.names))
    assert "0.001" not in csv
    assert csv.count("digits") == 2
    assert queue.get(1).input.p_value == 0.001  # what is stored stays as it was


def test_audit_is_looked_up_with_the_same_statements_as_a_flagged_input(queue):
    """So that no answer about one takes longer."""
    same = {"received_at": START, "request_id": "request-0"}
    queue.enqueue([picture(0, **same), unflagged(0, **same)])
    workspace = workspace_of(queue)
    ada, robot = log_in(workspace, "ada"), program(workspace, "robot", "admin")
    ran: list[str] = []
    sa.event.listen(queue.database.engine, "before_cursor_execute", lambda *given: ran.append(given[2]))

    def statements(client: TestClient, method: str, path: str, **more: Any) -> list[str]:
        ran.clear()
        assert client.request(method, path, **more).status_code < 400
        return list(ran)

    queue.claim_items("ada", [1, 2])
    answer = {"verdict": "poisoned", "true_label": "4", "advance": "0"}
    for client, method, path, more in (
        (robot, "GET", "/api/v1/items/{}", {}),
        (robot, "GET", "/api/v1/items/{}/image.png", {}),
        (ada, "GET", "/items/{}", {}),
        (ada, "GET", "/images/items/{}.png?view=sent", {}),
        (ada, "POST", "/items/{}/renew", {}),
        (ada, "POST", "/items/{}/decision", {"data": answer, "headers": {"HX-Request": "true"}}),
        (ada, "GET", "/items/{}", {}),
    ):
        if method == "GET":
            statements(client, method, path.format(1), **more)  # what the page remembers of both
        flagged_ran, audit_ran = (statements(client, method, path.format(item), **more) for item in (1, 2))
        assert flagged_ran == audit_ran, path
        assert flagged_ran


def test_gold_copy_of_an_audit_keeps_what_it_was(queue):
    queue.enqueue([unflagged(0), picture(1)])
    queue.claim_items("bo", [1])
    queue.decide("bo", 1, is_poisoned=False, true_label=3)
    workspace = workspace_of(queue)
    log_in(workspace, "root", "admin").post("/admin/gold", data={"item": "1"})
    assert queue.get(3).input.audit_probability == SCORES["audit_probability"]


def test_reviewer_is_not_told_how_many_were_flagged_where_audits_are_mixed_in(queue):
    """What came into the queue and was not flagged is an audit."""
    counters = Counters()
    sampler = Sampler(["http://127.0.0.1:8082"], read=lambda url: counters.series())
    now = datetime.now(UTC)
    sampler.look(now.timestamp() - 300)
    counters.answer("clean", 12011)
    counters.answer("poisoned", 3737)
    counters.add("guard_unflagged_low_total", 1217)
    counters.add("guard_detector_fired_total", 4141, detector="lof/features")
    counters.add("guard_shed_total", 4343, reason="full")
    sampler.look(now.timestamp() - 1)
    workspace = workspace_of(queue, metrics=sampler)
    reviewer, admin = log_in(workspace, "ada"), log_in(workspace, "root", "admin")
    queue.enqueue([picture(0, received_at=now - timedelta(minutes=2))])
    assert "3,737 of 15,748 requests flagged" in shown(reviewer.get("/status").text)
    queue.enqueue([unflagged(1, received_at=now - timedelta(minutes=1))])
    assert "3,737 of 15,748 requests flagged" in shown(admin.get("/status").text)
    for path in ("/status", "/status?span=day&model=digits", "/status/now"):
        page = reviewer.get(path).text
        assert "15,748 requests in the last" in shown(page)
        charts = json.loads(page.split("data-charts='")[1].split("'")[0].replace("&#34;", '"'))["charts"]
        assert {chart["id"] for chart in charts} == {"requests", "verdicts", "latency", "queue"}
        names = {line["name"] for chart in charts for line in chart["lines"]}
        assert names >= {"bypassed", "rejected", "failed", "came in"}
        assert not names & {"poisoned", "flagged", "clean"}
        for told in ("3,737", "4,141", "4,343", "12,011", "1,217", "lof/features"):
            assert told not in shown(page), told


def test_item_that_a_bundle_learned_from_looks_like_one_that_none_did(queue):
    """Of flagged inputs and of audits a bundle learns differently."""
    queue.enqueue([picture(0, received_at=START), unflagged(0, received_at=START, request_id="request-0")])
    workspace = workspace_of(queue)
    ada, robot = log_in(workspace, "ada"), program(workspace, "robot", "admin")
    for item_id in (1, 2):
        queue.claim_items("ada", [item_id])
        queue.decide("ada", item_id, is_poisoned=False, true_label=3)
    queue.mark_trained([1], "c" * 64)
    assert [robot.get(f"/api/v1/items/{item_id}").json()["state"] for item_id in (1, 2)] == ["decided", "decided"]
    page = ada.get("/answers").text
    assert page.count(">Take back</button>") == page.count(">Save</button>") == 2
    assert "decided" in "".join(write_csv(items_in(queue, [State.TRAINED]), workspace.names))
    assert "learned from" not in shown(ada.get("/progress").text).partition("Next retraining")[0]
    assert "learned from" not in shown(ada.get("/status").text)
    assert (program(workspace, "bo").get("/api/v1/counts").json()["by_state"]["decided"]) == 2
    assert robot.get("/api/v1/counts").json()["by_state"] == {**dict.fromkeys(State, 0), "decided": 1, "trained": 1}
    for decision in queue.decisions(reviewer="ada"):  # what looks open for a change is
        assert ada.post(f"/answers/{decision.id}/withdraw").status_code == 303
    assert [queue.get(item_id).state for item_id in (1, 2)] == [State.CLAIMED] * 2


# --- what is told of them all together


def test_admin_sees_what_the_guard_lets_through_and_a_reviewer_does_not(queue):
    """Every answered audit moves it."""
    workspace = workspace_of(queue)
    reviewer, admin = log_in(workspace, "ada"), log_in(workspace, "root", "admin")
    assert "Not known: no unflagged input goes to a person." in shown(admin.get("/status").text)
    fill(queue, misses=2, hour=datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    workspace = workspace_of(queue)
    admin = log_in(workspace, "chief", "admin")
    (found,) = workspace.detection.of(None)
    low, high = found.missed_range or (0, 0)
    for path in ("/status", "/status/now?model=digits"):
        page = admin.get(path).text
        told = shown(page)
        assert f"This guard let through between {low} and {high} poisoned inputs" in told
        assert "Detection rate of poisoned inputs, flagged" in told
        assert "80.0 % 80.0 % to 80.0 % 0 % 100 %" in told  # the precision: all flagged inputs were answered
        assert page.count('<svg class="interval"') == 4
        assert "2 found among the audits: guard audit names them." in told
        assert "item 51" not in told  # an answer about it can still be changed, by an admin, too
        for hidden in ("let through between", "of poisoned inputs, flagged", "found among"):
            assert hidden not in shown(reviewer.get(path).text)


def share(hits: int, of: int) -> dict[str, Any]:
    return {"hits": hits, "of": of, "rate": hits / of if of else None}


ROUND: dict[str, Any] = {
    "why": "9 new decisions",
    "learned_from": {"misses": 7101},
    "held_out": {"poisoned_other_groups": 7102, "misses": 7103, "clean_audits": 7104},
    "left_out": {"calls clean what somebody audited": 7105},
    "before": {
        name: share(7106, 10_000)
        for name in ("clean_right", "other_groups_flagged", "misses_flagged", "recovered", "clean_audits_flagged")
    },
    "after": {"clean_right": share(97, 100), "undecided_flagged": share(7107, 10_000), "misses_flagged": share(0, 0)},
    "traffic": {"misses": 7108, "clean_audits": 7109, "detection_rate": {"before": 0.7110, "after": 0.7111}},
    "checks": [
        {"name": "clean accuracy", "passed": False, "text": "clean accuracy fell."},
        {"name": "held-out misses", "passed": False, "text": "7112 of 7113 held-out of the audit sample are flagged."},
    ],
    "reasons": ["clean accuracy fell.", "7112 of 7113 held-out of the audit sample are flagged."],
    "seconds": 12.5,
}


def test_progress_of_a_blind_queue_tells_reviewers_nothing_of_the_audits_and_admins_all(queue):
    workspace = workspace_of(queue)
    ada, root = log_in(workspace, "ada"), log_in(workspace, "root", "admin")
    workspace.rounds.finish(workspace.rounds.begin("digits", 3), "refused", ROUND)
    before = shown(ada.get("/progress").text)
    assert "7,103" in before or "7103" in before  # no audits: nothing to hide
    queue.note_traffic("digits", "ab" * 32, {(START, "far"): 1})
    told, all_told = (shown(client.get("/progress").text) for client in (ada, root))
    for text in (
        "refused",
        "9 new decisions",
        "clean images answered rightly 71 % 97 %",
        "clean accuracy fell.",
        "12.5",
    ):
        assert text in told
    assert "An admin sees why: it would tell what the audit sample shows." in told
    for text in ("71,1", "7,1", "710", "711", "miss", "audits", "held-out", "traffic"):
        assert text not in told.replace("71 %", "")
    for number in range(7101, 7114):
        assert str(number) in all_told or f"{number:,}" in all_told or f"{number / 10_000:.4g}" in all_told


def test_row_that_cannot_be_estimated_from_leaves_the_status_page_up(queue):
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    queue.note_traffic("digits", "ab" * 32, {(hour, "far"): 1000})
    queue.enqueue([picture(0, **SCORES, false_positive_rate=0.0, received_at=hour, is_counted=True)])
    told = shown(log_in(workspace_of(queue), "root", "admin").get("/status").text)
    assert "digits: not known. The queue holds something of it that nothing can be estimated from" in told
    assert "no unflagged input goes to a person" not in told


def test_estimate_that_is_not_known_says_what_is_needed_and_draws_nothing(queue):
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    queue.note_traffic("digits", "ab" * 32, {(hour, "flagged"): 9, (hour, "far"): 1000})
    page = log_in(workspace_of(queue), "root", "admin").get("/status").text
    assert re.search(r"is not known yet, \d+ more audits needed\.", shown(page))
    assert "<svg" not in page


def test_estimates_are_worked_out_again_after_a_while(queue):
    seconds = 50.0
    watch = DetectionWatch(queue, lambda: seconds)
    assert watch.of(None) == []
    fill(queue, misses=2, hour=datetime.now(UTC).replace(minute=0, second=0, microsecond=0))
    assert watch.of(None) == []
    seconds += AGE_S
    assert [found.found for found in watch.of("digits")] == [(51, 52)]
    assert watch.of("signs") == []
