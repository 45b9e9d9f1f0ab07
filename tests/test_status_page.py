"""The status page without a browser: who may see and do what, what it says, and the roll-back."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metrics_helpers import Counters
from review_helpers import client_of, log_in, picture, small_bundle, workspace_of

from guard.relabel.queue import Queue
from guard.review.headers import CONTENT_SECURITY_POLICY
from guard.review.known_bundles import KnownBundles
from guard.review.status.sampler import Sampler
from guard.review.workspace import Workspace
from guard.storage.bundle import JOURNAL, BundleStore, read_bundle, write_bundle


def bundle(folder: Path, rate: float, parent: str = "", **more: Any) -> str:
    more |= {"realised_false_positive_rate": rate, "lineage": {"retrained_from": parent}}
    return small_bundle(folder, None, np.eye(2, 6), np.arange(2), **more)


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        now = datetime.now(UTC)
        opened.enqueue([picture(number, received_at=now - timedelta(minutes=number + 4)) for number in range(5)])
        yield opened


@pytest.fixture
def digests(tmp_path: Path) -> tuple[str, str]:
    """Of two bundles: the first was active, the second is."""
    folder = tmp_path / "bundles"
    first = bundle(folder, 0.0098)
    second = bundle(folder, 0.0101, first)
    for digest in (first, second):
        BundleStore(folder).activate(digest)
    return first, second


@pytest.fixture
def workspace(queue: Queue, tmp_path: Path, digests: tuple[str, str]) -> Workspace:
    """A server that has answered 1,204 requests in the last minutes, 3 of them flagged; two reviewers."""
    counters = Counters()
    counters.digest = digests[1]
    sampler = Sampler(["http://127.0.0.1:8082"], read=lambda url: counters.series())
    now = datetime.now(UTC).timestamp()
    sampler.look(now - 300)
    counters.answer("clean", 1201)
    counters.answer("poisoned", 3)
    counters.add("guard_unflagged_low_total", 121)
    counters.add("guard_detector_fired_total", 2, detector="lof/features")
    counters.time("guard", {"0.001": 600, "0.002": 1200, "+Inf": 1200})
    sampler.look(now - 1)
    workspace = workspace_of(queue, bundles=KnownBundles(tmp_path / "bundles"), metrics=sampler)
    workspace.rounds.finish(workspace.rounds.begin("digits", 12), "promoted", {}, digests[1])
    for name in ("ann", "bo"):
        workspace.reviewers.add(name)
    for item in queue.claim("bo", 3):
        last = queue.decide("bo", item.id, is_poisoned=item.id != 2, true_label=4)
    queue.supersede("ann", last.id, is_poisoned=False, true_label=3)
    return workspace


def shown(page: str) -> str:
    """Return a page's text alone."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def test_first_line_answers_whether_it_is_all_right(workspace):
    page = log_in(workspace).get("/status")
    assert page.status_code == 200
    text = shown(page.text)
    assert "All well: 3 of 1,204 requests flagged in the last hour, no bypass, oldest waiting item 8 min." in text
    assert "3 flagged, 0.25 %" in text or "flagged, 0.25 % 3" in text
    assert re.search(r"drift, 1 = as calibrated 1\.01\b", text)
    assert "guard p50, p99 1.98 ms 1.00 ms" in text
    assert re.search(r"bo 2 1 1 0 (?!none)", text)  # poisoned, false alarm, overturned, taken back
    admins = shown(log_in(workspace, "root", "admin").get("/status").text)
    assert re.search(r"bo 2 1 1 0 none asked", admins)  # known items: the reviewer would learn which they were
    assert re.search(r"ann 0 1 0 0 none asked", admins)
    assert re.search(r"lof/features 2", text)
    assert "Requests, latency and drift: http://127.0.0.1:8082/metrics, since" in text


def test_part_that_refreshes_has_everything_that_changes(workspace):
    client = log_in(workspace)
    page, part = client.get("/status").text, client.get("/status/now?span=day").text
    moving = set(re.findall(r'id="(now-[\w-]+)"', page))
    assert moving == set(re.findall(r'id="(now-[\w-]+)" hx-swap-oob="innerHTML"', part))
    assert len(moving) > 10
    assert "in the last day" in part
    drawn = json.loads(html.unescape(re.search(r"data-charts='([^']*)'", part)[1]))
    assert [chart["id"] for chart in drawn["charts"]] == re.findall(r'data-chart="(\w+)"', page)
    assert len(drawn["times"]) == 96
    assert all(len(line["values"]) == 96 for chart in drawn["charts"] for line in chart["lines"])
    queue = next(chart for chart in drawn["charts"] if chart["id"] == "queue")
    assert [sum(line["values"]) for line in queue["lines"]] == [5, 4]


def test_every_chart_has_a_text_and_a_table_and_the_policy_is_as_strict(workspace):
    page = log_in(workspace).get("/status")
    assert page.headers["Content-Security-Policy"] == CONTENT_SECURITY_POLICY
    assert "unsafe" not in CONTENT_SECURITY_POLICY
    assert re.findall(r"<script(?! src=)", page.text) == []
    assert re.findall(r"\sstyle=|\son\w+=", page.text) == []
    for chart in re.findall(r'data-chart="(\w+)"', page.text):
        assert f'aria-labelledby="title-{chart}" aria-describedby="now-sum-{chart}"' in page.text
        assert re.search(rf'id="now-sum-{chart}"[^>]*>[^<]{{10,}}', page.text)
        assert f'data-table="{chart}"' in page.text


@pytest.mark.parametrize(("count", "is_noticed"), [(3, False), (58, True)])
def test_bundle_whose_clean_images_are_contradicted_is_told_of(workspace, tmp_path, count, is_noticed):
    store = BundleStore(tmp_path / "bundles")
    digest = bundle(store.root, 0.0101, contradictions={"count": count, "n": 2000})
    store.activate(digest)
    page = log_in(workspace).get("/status").text
    assert re.search(rf"{digest[:12]} active .*? {count / 20:.2g} %", shown(page))
    text = (
        f"The active bundle may be of little use: the network is sure of a wrong answer to {count} of 2000 clean images"
    )
    assert (text in shown(page)) == is_noticed
    assert f"a wrong answer to {count} of 2000 clean images" in page  # beside the number


def test_bundle_of_an_older_version_says_nothing_of_contradictions(workspace):
    assert "is sure of a wrong answer" not in log_in(workspace).get("/status").text


def test_span_and_model_that_do_not_exist_fall_back_and_are_escaped(workspace):
    client = log_in(workspace)
    text = client.get("/status", params={"span": "<year>", "model": "'><script>x"}).text
    assert "in the last hour" in text
    assert "<script>x" not in text
    workspace.queue.enqueue([picture(9, model="'\"><script>y", received_at=datetime.now(UTC))])
    text = client.get("/status", params={"model": "'\"><script>y"}).text
    assert "<script>y" not in text
    assert "no request in the last hour" in text  # of that model


def test_nobody_sees_it_without_logging_in(workspace):
    assert client_of(workspace).get("/status").headers["location"] == "/login"
    part = client_of(workspace).get("/status/now", headers={"HX-Request": "true"})
    assert (part.status_code, part.headers["HX-Redirect"]) == (401, "/login")


def test_without_metrics_the_queue_is_shown_and_the_rest_is_not_made_up(queue):
    text = shown(log_in(workspace_of(queue)).get("/status").text)
    assert "Look at this: no numbers of the server, oldest waiting item 8 min." in text
    assert "start it with --metrics-url" in text
    assert "– requests" in text or "requests –" in text
    assert "The page knows no bundles." in text


def test_roll_back_asks_first_and_goes_to_the_bundle_before(workspace, digests, tmp_path, caplog):
    first, second = digests
    store = BundleStore(tmp_path / "bundles")
    client = log_in(workspace, "ada", "admin")
    page = shown(client.get("/status").text)
    assert re.search(rf"{second[:12]} active in use round 1, from {first[:12]}", page)
    assert 'href="/status/rollback"' in client.get("/status").text
    requested = client.get("/status/rollback").text
    assert f"Roll back to {first[:12]}" in requested
    assert store.active_digest() == second
    fields = {"active": second, "target": first}
    done = client.post("/status/rollback", data=fields)
    assert (done.status_code, done.headers["location"]) == (303, "/status")
    assert store.active_digest() == first
    assert f"ada rolled the bundle back from {second[:12]} to {first[:12]}" in caplog.text
    text = shown(client.get("/status").text)
    assert f"Bundle {first[:12]} is active, but the server uses {second[:12]}." in text
    assert "Nothing to roll back to" in text
    again = client.post("/status/rollback", data=fields)  # the same form, sent twice
    assert again.status_code == 400
    assert "nothing was rolled back" in again.text
    assert store.active_digest() == first


def test_roll_back_to_a_bundle_that_says_nothing_sound_changes_nothing(workspace, digests, tmp_path):
    store = BundleStore(tmp_path / "bundles")
    stored = read_bundle(store.folder_of(digests[0]))
    absurd = write_bundle(store.root, stored.document, stored.arrays | {"labels": np.array([0, 7])}).name
    (store.root / "HISTORY").write_text(f"{absurd}\n{digests[1]}\n")
    client = log_in(workspace, "ada", "admin")
    done = client.post("/status/rollback", data={"active": digests[1], "target": absurd})
    assert done.status_code == 400
    assert "is not sound" in done.text
    assert store.active_digest() == digests[1]


def test_roll_back_is_refused_to_reviewers_forgers_and_while_a_promotion_runs(workspace, digests, tmp_path):
    first, second = digests
    fields = {"active": second, "target": first}
    reviewer = log_in(workspace)
    assert 'href="/status/rollback"' not in reviewer.get("/status").text
    assert reviewer.get("/status/rollback").status_code == 403
    assert reviewer.post("/status/rollback", data=fields).status_code == 403
    admin = log_in(workspace, "eve", "admin")
    token = admin.headers.pop("X-CSRF-Token")
    assert admin.post("/status/rollback", data=fields).status_code == 403
    assert admin.post("/status/rollback", data={**fields, "csrf": "0" * 64}).status_code == 403
    (tmp_path / "bundles" / JOURNAL).write_text("{}")
    busy = admin.post("/status/rollback", data={**fields, "csrf": token})
    assert busy.status_code == 400
    assert "a retraining is just switching the bundle" in busy.text
    (tmp_path / "bundles" / JOURNAL).unlink()
    (tmp_path / "bundles" / first / "guard.json").write_text("{}")
    assert admin.post("/status/rollback", data={**fields, "csrf": token}).status_code == 400
    assert BundleStore(tmp_path / "bundles").active_digest() == second
