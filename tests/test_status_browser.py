"""The status page in a real Chromium: charts are drawn and live, told in words, worked by keyboard, and fit a phone."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from browser_helpers import PATIENCE, log_in
from metrics_helpers import Counters
from playwright.sync_api import Page, expect
from review_helpers import picture, workspace_of
from test_status_page import bundle

from guard.errors import ObservingError
from guard.relabel.queue import Queue
from guard.review.known_bundles import KnownBundles
from guard.review.server import serving_in_thread
from guard.review.status.sampler import Sampler
from guard.review.workspace import Workspace
from guard.storage.bundle import BundleStore


class Server:
    """A server that the page's sampler reads whenever the test says so."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.is_away = False
        self.sampler = Sampler(["http://127.0.0.1:8082"], read=self._read)

    def _read(self, url: str):
        if self.is_away:
            raise ObservingError(f"{url} does not answer: Connection refused.")
        return self.counters.series()

    def look(self, ago: float = 0.0) -> None:
        self.sampler.look(datetime.now(UTC).timestamp() - ago)


@pytest.fixture
def server() -> Server:
    """Half an hour of clean traffic, with nobody looking for four minutes."""
    server = Server()
    for ago in range(1800, 0, -30):
        server.counters.answer("clean", 60)
        server.counters.add("guard_unflagged_low_total", 6)
        server.counters.time("guard", {"0.001": 9, "0.002": 10, "+Inf": 10})
        server.is_away = 600 < ago < 840
        server.look(ago)
    return server


@pytest.fixture
def workspace(server: Server, sqlite_template: Path, tmp_path: Path) -> Iterator[Workspace]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as queue:
        queue.enqueue([picture(number, received_at=datetime.now(UTC)) for number in range(3)])
        for digest in (first := bundle(tmp_path / "bundles", 0.01), bundle(tmp_path / "bundles", 0.011, first)):
            BundleStore(tmp_path / "bundles").activate(digest)
        server.counters.digest = digest
        server.look()
        yield workspace_of(queue, bundles=KnownBundles(tmp_path / "bundles"), metrics=server.sampler)


def painted(page: Page, chart: str, tone: str) -> int:
    """Return how many pixels of a chart have the colour of one of its lines."""
    return page.locator(f'[data-chart="{chart}"] canvas').evaluate(
        """(canvas, tone) => {
          const hex = getComputedStyle(document.documentElement).getPropertyValue(`--${tone}`).trim();
          const wanted = [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
          const seen = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          let n = 0;
          for (let at = 0; at < seen.length; at += 4) {
            n += seen[at + 3] > 200 && wanted.every((value, part) => Math.abs(seen[at + part] - value) < 8);
          }
          return n;
        }""",
        tone,
    )


def wait_for_paint(page: Page, chart: str, tone: str) -> None:
    """Wait until a chart is drawn: its page is there before its script has run."""
    deadline = time.monotonic() + PATIENCE / 1000
    while painted(page, chart, tone) <= 20:
        assert time.monotonic() < deadline, chart
        page.wait_for_timeout(50)


def refresh(page: Page) -> None:
    """Ask for what has changed now, and not in five seconds."""
    with page.expect_response(re.compile("/status/now")):
        page.evaluate("htmx.trigger('#status-live', 'refresh')")


def test_charts_are_drawn_and_follow_the_server(workspace, server, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.get_by_role("link", name="Status").press("Enter")
        answer = page.locator("#now-answer")
        expect(answer).to_contain_text("All well: 0 of 3,540 requests flagged in the last hour, no bypass")
        lines = {"flagged": "poison", "requests": "accent", "verdicts": "text", "latency": "poison", "drift": "accent"}
        for chart, tone in {**lines, "queue": "poison"}.items():
            wait_for_paint(page, chart, tone)  # drift lies on the line of "as calibrated"
        expect(page).to_have_title(re.compile("^All well · Status"))
        # A table that is open stays open, with the same numbers as the chart: a dash where nobody looked.
        page.get_by_text(re.compile("^As a table: Requests")).press("Enter")
        table = page.get_by_role("region", name="Requests as a table")
        expect(table.locator("tbody tr")).to_have_count(60)
        cells = table.locator("tbody td").all_inner_texts()
        assert cells.count("120") > 15
        assert cells[10:15].count("–") >= 2
        same = page.locator('[data-chart="requests"] canvas').element_handle()
        server.counters.answer("bypassed", 4)
        server.counters.add("guard_bypassed_total", 4, reason="shape")
        server.look()
        refresh(page)
        expect(answer).to_contain_text("Not well: 0 of 3,544 requests flagged in the last hour, 4 bypassed")
        expect(answer).to_contain_text("4 answered without being judged in the last hour (shape 4).")
        expect(page.get_by_role("status").nth(1)).to_contain_text("Not well")  # said once to screen readers
        expect(page).to_have_title(re.compile("^Not well"))
        assert same.evaluate("canvas => canvas.isConnected")  # drawn anew, not made anew: nothing flickers
        expect(table.locator("tbody tr")).to_have_count(60)
        server.is_away = True
        server.look()
        refresh(page)
        missing = "Numbers are missing: http://127.0.0.1:8082/metrics does not answer: Connection refused, since"
        expect(answer).to_contain_text(missing)
    refusal = page.evaluate("htmx.trigger('#status-live', 'refresh')")  # the page's own server has ended
    assert refusal is not None
    expect(page.locator("#notice")).to_contain_text("The page gets no answer since", timeout=PATIENCE)


def test_spans_theme_and_roll_back_by_keyboard(workspace, server, open_page, tmp_path):
    token = workspace.reviewers.add("ada", "admin")
    store = BundleStore(tmp_path / "bundles")
    before, after = store.active_digest(), store.previous_digest()
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.get_by_role("link", name="Status").press("Enter")
        page.get_by_role("button", name="Last week").press("Enter")
        expect(page.locator("#now-answer")).to_contain_text("in the last week")
        expect(page.get_by_role("button", name="Last week")).to_have_attribute("aria-pressed", "true")
        assert painted(page, "requests", "accent") > 1
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        light_line = page.locator('[data-chart="requests"] canvas').evaluate("canvas => canvas.toDataURL()")
        page.emulate_media(color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.wait_for_function(
            "before => document.querySelector('[data-chart=requests] canvas').toDataURL() !== before", arg=light_line
        )
        page.get_by_label("live").press(" ")
        expect(page.get_by_label("live")).not_to_be_checked()
        page.get_by_role("link", name="Roll back").press("Enter")
        page.get_by_role("button", name=f"Roll back to {after[:12]}").press("Enter")
        page.wait_for_url("**/status")
        expect(page.locator("#now-answer")).to_contain_text(f"Bundle {after[:12]} is active, but the server uses")
    assert (store.active_digest(), store.previous_digest()) == (after, None)
    assert before != after


def test_phone_shows_all_of_it_in_its_width(workspace, open_page):
    token = workspace.reviewers.add("ada", "admin")
    with serving_in_thread(workspace) as url:
        page = open_page(url, viewport={"width": 390, "height": 844}, has_touch=True, color_scheme="dark")
        log_in(page, "ada", token)
        page.goto(f"{url}/status")
        assert painted(page, "latency", "poison") > 60
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        answer = page.locator(".answer-line").bounding_box()
        assert answer is not None
        assert answer["y"] + answer["height"] < 300  # in the first glance
        for place in page.locator(".plot").all():
            box = place.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
