"""The review page in a real Chromium: the keys of a reviewer, and scripts that must not run."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from browser_helpers import PATIENCE, forget, log_in
from playwright.sync_api import Page, expect
from review_helpers import N_CLASSES, picture, small_bundle, workspace_of
from torch import nn

from guard import Activations, SuspectModel
from guard.observing.scrape import Series
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.review.known_bundles import KnownBundles
from guard.review.occlusion import Occlusion
from guard.review.server import serving_in_thread
from guard.review.status.sampler import Sampler
from guard.review.workspace import Workspace


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        yield opened


@pytest.fixture
def workspace(queue: Queue) -> Workspace:
    """Five flagged inputs of ten classes, the first the most suspicious."""
    queue.enqueue([picture(number) for number in range(5)])
    return workspace_of(queue)


def shows(page: Page, item: int) -> None:
    """Wait until an item is there, and has been long enough for a person to have seen it."""
    expect(page.locator("#work")).to_have_attribute("data-item", str(item), timeout=PATIENCE)
    page.wait_for_timeout(300)


def notice_says(page: Page, text: str) -> None:
    expect(page.locator("#notice")).to_contain_text(text, timeout=PATIENCE)


def answers(queue: Queue) -> list[tuple[int, bool, int | None]]:
    return [
        (decision.item_id, decision.is_poisoned, decision.true_label)
        for decision in queue.decisions()
        if decision.stands
    ]


def test_whole_review_by_keyboard(workspace, queue, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        shows(page, 1)
        page.keyboard.press("4")  # the label first, then the verdict
        page.keyboard.press("p")
        shows(page, 2)
        notice_says(page, "Saved: item 1 poisoned, true label 4.")
        page.keyboard.press("p")  # the verdict first, then the label
        notice_says(page, "Now its true label")
        page.keyboard.press("6")
        shows(page, 3)
        page.keyboard.type("ff")  # the suspect is right; the second key comes too soon
        shows(page, 4)
        page.keyboard.press("u")
        shows(page, 3)
        page.keyboard.press("p")
        page.keyboard.press("x")  # it cannot be told
        shows(page, 4)
        page.keyboard.press("s")
        shows(page, 5)
        page.keyboard.press(" ")  # an item without an answer goes back
        notice_says(page, "Item 5 went back")
        for _ in range(2):
            page.wait_for_timeout(300)
            item = page.locator("#work").get_attribute("data-item")
            page.keyboard.press("f")
            expect(page.locator("#work")).not_to_have_attribute("data-item", str(item), timeout=PATIENCE)
        expect(page.locator("#item-title")).to_have_text("Nothing waits for you")
        expect(page.locator("#item-title")).to_be_focused()
    assert answers(queue) == [(1, True, 4), (2, True, 6), (3, True, None), (4, False, 3), (5, False, 3)]


def test_audit_among_flagged_inputs_looks_like_these(queue, open_page):
    unlike = {"p_value": 0.5, "combined": -3.0, "surprise": {"lof": 0.1, "head": 0.2}, "reason": "", "request_id": "r"}
    drawn = {**unlike, "false_positive_rate": 0.01, "audit_probability": 0.25}
    queue.enqueue([picture(0, request_id="r"), picture(0, **drawn), picture(0, request_id="r", p_value=0.002)])
    workspace = workspace_of(queue)
    token = workspace.reviewers.add("ada")
    looks = {}
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        for _ in range(3):
            page.goto(f"{url}/review")
            expect(page.locator(".blinded")).to_contain_text("Scores are not shown", timeout=PATIENCE)
            item = page.locator("#work").get_attribute("data-item")
            assert item is not None
            look = page.locator("#work").evaluate("one => one.outerHTML")
            looks[item] = re.sub(rf"(Item |Input |/items/|data-item=.){item}\b", "THIS", look)
            page.wait_for_timeout(300)
            page.keyboard.press("f")
            expect(page.locator("#work")).not_to_have_attribute("data-item", item, timeout=PATIENCE)
    assert set(looks) == {"1", "2", "3"}
    assert len(set(looks.values())) == 1


def test_page_that_the_next_test_gets_knows_nothing_of_this_one(workspace, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.evaluate("localStorage.setItem('seen', 1)")
        page.context.new_page()
        forget(page)
        assert (page.context.cookies(), page.context.pages, page.evaluate("history.length")) == ([], [page], 1)
        page.goto(f"{url}/review")
        assert page.url.endswith("/login")
        assert page.evaluate("localStorage.length") == 0


def test_picture_tools_by_keyboard(queue, open_page):
    class Bright(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)
            self.fc = nn.Linear(4, N_CLASSES)

        def forward(self, images):
            return self.fc(self.conv(images).mean((2, 3)))

    queue.enqueue([picture(0), picture(1, body=b"no picture", content_type="text/html")])
    workspace = workspace_of(queue, occlusions={"": Occlusion(SuspectModel(Bright()))})
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.keyboard.press("+")
        page.keyboard.press("+")
        expect(page.locator("#zoom")).to_have_text("2×")
        page.keyboard.press("]")
        expect(page.locator("#contrast")).to_have_value("1.3")
        page.keyboard.press("\\")
        expect(page.locator("#zoom")).to_have_text("fit")
        expect(page.locator("#contrast")).to_have_value("1")
        page.keyboard.press("v")
        expect(page.locator("#picture")).to_have_attribute("src", "/images/items/1.png?view=sent")
        page.keyboard.press("v")
        page.keyboard.press("o")
        expect(page.locator("#looks")).to_contain_text("Orange", timeout=PATIENCE)
        expect(page.locator("#overlay img")).to_be_visible()
        page.keyboard.press("o")
        expect(page.locator("#overlay")).to_be_hidden()
        page.keyboard.press("?")
        expect(page.locator("#keys")).to_be_visible()
        page.keyboard.press("f")  # an open dialog takes no answers
        page.keyboard.press("Escape")
        expect(page.locator("#keys")).to_be_hidden()
        shows(page, 1)
        page.keyboard.press("f")
        shows(page, 2)
        page.keyboard.press("v")
        expect(page.locator("#no-picture")).to_be_visible(timeout=PATIENCE)


def test_many_classes_are_chosen_by_number_and_by_search(queue, open_page, tmp_path):
    names = [f"sign {label}" for label in range(42)] + ["Roundabout"]
    wide = Activations(np.zeros((1, 43), dtype=np.float32), np.zeros((1, 6), dtype=np.float32))
    digest = small_bundle(tmp_path / "bundles", names, np.eye(43, 6), np.arange(43))
    queue.enqueue([picture(number, activations=wide, bundle_digest=digest) for number in range(3)])
    workspace = workspace_of(queue, bundles=KnownBundles(tmp_path / "bundles"))
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        shows(page, 1)
        page.keyboard.type("1")
        expect(page.locator("#typed")).to_have_text("1")
        page.keyboard.type("4")
        page.keyboard.press("p")
        shows(page, 2)
        page.keyboard.press("p")
        page.keyboard.press("/")
        page.keyboard.type("round")
        page.keyboard.press("Enter")
        shows(page, 3)
        page.keyboard.type("43")  # there is none
        notice_says(page, "There is no class 43.")
        page.keyboard.type("9")
        page.keyboard.press("Escape")
        page.keyboard.type("05f")
        expect(page.locator("#item-title")).to_have_text("Nothing waits for you", timeout=PATIENCE)
    assert answers(queue) == [(1, True, 14), (2, True, 42), (3, False, 5)]


def test_group_label_with_exceptions_by_keyboard(workspace, queue, open_page):
    queue.set_groups(dict.fromkeys(range(1, 6), 7))
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.get_by_role("link", name="Groups").press("Enter")
        page.get_by_role("link", name=re.compile("Group 7")).press("Enter")
        page.locator("#rule").select_option("one")
        page.get_by_label("Class").fill("6")
        page.get_by_label("Include item 2").press(" ")
        page.get_by_label("True label of item 3").fill("8")
        page.get_by_label("Verdict of item 4").select_option("false alarm")
        expect(page.get_by_role("button", name="Label 4 items")).to_be_visible()
        page.get_by_role("button", name="Label 4 items").press("Enter")
        notice_says(page, "Saved: 4 items.")
        page.get_by_role("button", name="Leave").press("Enter")
        page.wait_for_url("**/groups")
    assert answers(queue) == [(1, True, 6), (3, True, 8), (4, False, 3), (5, True, 6)]
    assert queue.get(2).state is State.PENDING


def test_group_unticks_what_is_unsure_and_gives_back_what_is_left(queue, open_page):
    queue.enqueue([picture(number, backup_confidence=(0.9, 0.4)[number % 2]) for number in range(6)])
    queue.set_groups(dict.fromkeys(range(1, 7), 7))
    workspace = workspace_of(queue)
    token = workspace.reviewers.add("ada")
    workspace.reviewers.add("bob")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        page.goto(f"{url}/groups/7")
        label = page.locator("#group-form .primary")
        expect(label).to_have_text("Label 3 items")
        ticked = page.locator("[name=include]:checked")
        page.locator("#rule").select_option("backup")
        expect(label).to_have_text("Label 2 items")
        expect(page.locator(".doubt:visible")).to_have_text("Left out: the second opinion is only 40 % sure.")
        page.get_by_label("True label of item 2").fill("6")
        page.keyboard.press("Tab")
        expect(ticked).to_have_count(3)
        page.locator("#rule").select_option("suspect")
        expect(page.locator(".doubt:visible")).to_have_count(0)
        page.get_by_role("link", name="Progress").click()  # elsewhere, without an answer
        page.wait_for_url("**/progress")
        deadline = time.monotonic() + PATIENCE / 1000
        while queue.held_by("ada"):
            assert time.monotonic() < deadline
            page.wait_for_timeout(50)
        page.goto(f"{url}/groups/7")
        page.locator("#rule").select_option("backup")
        label.click()
        notice_says(page, "Saved: 2 items.")
    assert [answer[0] for answer in answers(queue)] == [1, 3]


def test_undo_in_a_later_session_and_change_of_an_old_answer(workspace, queue, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        for item in (1, 2):
            shows(page, item)
            page.keyboard.type("4p")
        shows(page, 3)
        page.get_by_role("button", name=re.compile("Log out")).press("Enter")
        page.wait_for_url("**/login")
        later = open_page(url)
        log_in(later, "ada", token)
        later.keyboard.press("u")
        notice_says(later, "Undone: item 2 is open again.")
        shows(later, 2)
        later.get_by_role("link", name="My answers").press("Enter")
        later.get_by_label("Change the answer for item 1").press("Enter")
        later.get_by_label("It is").select_option("a false alarm")
        later.get_by_role("button", name="Save").press("Enter")
        expect(later.locator("tbody tr").first).to_contain_text("false alarm", timeout=PATIENCE)
    assert answers(queue) == [(1, False, 4)]


def test_two_reviewers_at_once_share_the_work(workspace, queue, open_page):
    tokens = {name: workspace.reviewers.add(name) for name in ("ada", "bob")}
    with serving_in_thread(workspace) as url:
        pages = {name: open_page(url) for name in tokens}
        for name, page in pages.items():
            log_in(page, name, tokens[name])
        shows(pages["ada"], 1)
        shows(pages["bob"], 2)
        pages["ada"].keyboard.type("4p")
        shows(pages["ada"], 3)
        pages["bob"].keyboard.type("6p")
        shows(pages["bob"], 4)
        pages["bob"].get_by_role("button", name=re.compile("Log out")).click()
        pages["bob"].wait_for_url("**/login")
        pages["ada"].keyboard.press("f")
        shows(pages["ada"], 4)  # what bob had and gave back
    assert {(decision.item_id, decision.reviewer) for decision in queue.decisions()} == {
        (1, "ada"),
        (2, "bob"),
        (3, "ada"),
    }


def test_wrong_login_says_so_and_logout_closes_every_page(workspace, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        page.fill("#name", "ada")
        page.fill("#token", "wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("Name and token do not go together.", timeout=PATIENCE)
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type(token)
        page.keyboard.press("Enter")
        page.wait_for_url("**/review*")
        assert page.evaluate("document.cookie").find("guard_session") == -1
        second = page.context.new_page()
        second.goto(f"{url}/review")
        page.get_by_role("button", name=re.compile("Log out")).click()
        page.wait_for_url("**/login")
        second.keyboard.press("f")  # on a page that is still open
        second.wait_for_url("**/login")
        page.go_back()
        page.wait_for_url("**/login")
    assert workspace.queue.decisions() == []


def test_pictures_are_gone_from_the_browser_after_the_log_out(workspace, open_page):
    """The attack: who sits down at the browser next saw pictures that it had kept."""
    token = workspace.reviewers.add("ada")
    paths = ["/images/items/1.png", "/images/items/1.png?view=sent"]
    ask = "path => fetch(path, {cache: 'force-cache'}).then(answer => answer.status)"
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        shows(page, 1)
        assert [page.evaluate(ask, path) for path in paths] == [200, 200]
        page.get_by_role("button", name=re.compile("Log out")).click()
        page.wait_for_url("**/login")
        assert [page.evaluate(ask, path) for path in paths] == [401, 401]
        page.go_back()
        page.wait_for_url("**/login")
        assert page.locator("img").count() == 0


def hostile_metrics(evil: str) -> Sampler:
    """Return a source of the status page whose model, verdicts and detectors have hostile names."""
    counter = count(1)
    series = [
        Series.of("guard_verdicts_total", {"model": evil, "verdict": "poisoned", "action": evil}),
        Series.of("guard_detector_fired_total", {"model": evil, "detector": evil}),
    ]
    sampler = Sampler(["http://127.0.0.1:8082"], read=lambda _: dict.fromkeys(series, 10.0 * next(counter)))
    for ago in (120, 60, 0):
        sampler.look(datetime.now(UTC).timestamp() - ago)
    return sampler


def test_hostile_names_bodies_and_types_run_no_script(queue, open_page, tmp_path):
    evil = "\"'><img src=x onerror=\"alert('img')\"><script>alert('script')</script><svg onload=alert('svg')>"
    names = [f"{evil}{label}" for label in range(N_CLASSES)]
    digest = small_bundle(tmp_path / "bundles", names, np.eye(N_CLASSES, 6), np.arange(N_CLASSES))
    body = b"<html><script>alert('body')</script><img src=x onerror=alert('body')></html>"
    hostile = {
        "request_id": evil,
        "content_type": "text/html",
        "reason": evil,
        "model": evil,
        "body": body,
        "bundle_digest": digest,
        "surprise": {f"lof:{evil}": 9.0, evil: 9.0},
    }
    queue.enqueue([picture(number, **hostile) for number in range(3)])
    queue.set_groups({2: 7, 3: 7})
    workspace = workspace_of(queue, bundles=KnownBundles(tmp_path / "bundles"), metrics=hostile_metrics(evil))
    token = workspace.reviewers.add("ada", "admin")
    workspace.rounds.finish(
        workspace.rounds.begin(evil, 1), "refused", {"reasons": [evil], evil: evil, "before": {evil: evil}}
    )
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        for details in page.locator("details summary").all():
            details.click()
        page.keyboard.press("v")  # the body, as it was sent
        expect(page.locator("#no-picture")).to_be_visible(timeout=PATIENCE)
        page.keyboard.type("4p")
        notice_says(page, "Saved: item 1")
        expect(page.locator("#notice")).to_contain_text("<script>")  # as text
        for path in ("groups", "groups/7", "answers", "progress", "admin", "items/1", "images/items/1.png?view=sent"):
            page.goto(f"{url}/{path}")
        page.goto(f"{url}/admin")
        page.set_input_files("input[type=file]", {"name": f"{evil}.csv", "mimeType": evil, "buffer": evil.encode()})
        page.get_by_role("button", name="Import").click()
        notice_says(page, "the file needs the columns")
        page.fill("input[name=name]", evil)
        page.get_by_role("button", name="Add and show a token").click()
        notice_says(page, "a name must be")
        page.goto(f"{url}/review?order={quote(evil)}")
        page.goto(f"{url}/status?model={quote(evil)}&span={quote(evil)}")
        expect(page.locator(".uplot").first).to_be_visible(timeout=PATIENCE)
        for details in page.locator("details summary").all():
            details.click()
        expect(page.locator("table").first).to_be_visible(timeout=PATIENCE)
        assert page.locator("img[src=x]").count() == 0


def test_every_control_has_a_name_and_the_theme_is_kept(workspace, open_page):
    workspace.queue.set_groups(dict.fromkeys(range(1, 6), 7))
    token = workspace.reviewers.add("ada", "admin")
    nameless = """() =>
        [...document.querySelectorAll('button, a[href], input:not([type=hidden]), select, img, summary')].filter(e =>
             !(e.labels?.length && [...e.labels].some(l => l.textContent.trim())) && !e.ariaLabel
            && !e.textContent.trim() && !e.hasAttribute('alt') && !e.placeholder)
            .map(e => e.outerHTML)"""
    with serving_in_thread(workspace) as url:
        page = open_page(url, color_scheme="dark", viewport={"width": 390, "height": 844})
        log_in(page, "ada", token)
        for path in ("review", "answers", "progress", "admin", "groups", "groups/7"):
            page.goto(f"{url}/{path}")
            assert page.evaluate(nameless) == []
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
        page.get_by_role("button", name=re.compile("Theme|auto")).click()
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        page.goto(f"{url}/progress")
        expect(page.locator("html")).to_have_attribute("data-theme", "light")


def test_server_that_is_gone_is_said_and_nothing_is_lost(workspace, queue, open_page):
    token = workspace.reviewers.add("ada")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        log_in(page, "ada", token)
        shows(page, 1)
        page.route("**/items/*/decision", lambda route: route.fulfill(status=503, body="<p id=notice>gone</p>"))
        page.keyboard.type("4p")
        notice_says(page, "gone")
        shows(page, 1)
        page.unroute("**/items/*/decision")
        page.keyboard.press("p")  # the label is still chosen
        shows(page, 2)
    assert answers(queue) == [(1, True, 4)]
