"""Every page in a real Chromium can be read: contrast in both themes, and a phone on which nothing is cut."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from browser_helpers import PATIENCE, cut_texts, faint_texts, log_in
from metrics_helpers import Counters
from playwright.sync_api import Page, expect
from review_helpers import picture, small_bundle, workspace_of

from guard import Activations
from guard.relabel.queue import Queue
from guard.review.known_bundles import KnownBundles
from guard.review.server import serving_in_thread
from guard.review.status.sampler import Sampler
from guard.review.workspace import CleanImages, Workspace
from guard.storage.bundle import BundleStore

PAGES = ("review", "groups", "groups/7", "answers", "progress", "status", "admin", "items/1")
SIGNS = ["Speed limit (20 km/h)", "No passing for vehicles over 3.5 tons", "Right of way at the next intersection"]


def served(folder: Path, sqlite_template: Path, names: list[str]) -> Workspace:
    """Return a workspace that shows something of everything: groups, answers, rounds, bundles, trouble."""
    n = len(names)
    labels = np.repeat(np.arange(n), 2)
    digest = small_bundle(folder / "bundles", names, np.eye(2 * n, 6), labels)
    BundleStore(folder / "bundles").activate(digest)
    shutil.copy(sqlite_template, folder / "queue.db")
    queue = Queue.open(f"sqlite:///{folder / 'queue.db'}")
    logits = np.zeros((1, n), dtype=np.float32)
    logits[0, 1] = 3.0
    activations = Activations(logits, np.zeros((1, 6), dtype=np.float32))
    more = {"activations": activations, "bundle_digest": digest, "suspect_label": 1, "backup_confidence": 0.9}
    now = datetime.now(UTC)
    queue.enqueue([picture(i, **more, backup_label=(2, 1)[i % 2], received_at=now) for i in range(8)])
    queue.set_groups(dict.fromkeys(range(3, 9), 7))
    counters = Counters()
    sampler = Sampler(["http://127.0.0.1:8082"], read=lambda url: counters.series())
    sampler.look(now.timestamp() - 300)
    counters.answer("clean", 900)
    counters.answer("poisoned", 300)
    counters.answer("bypassed", 3)
    counters.add("guard_detector_fired_total", 2, detector="lof/features")
    counters.time("guard", {"0.001": 600, "0.002": 1200, "+Inf": 1200})
    sampler.look(now.timestamp() - 1)
    images = CleanImages(np.random.default_rng(0).random((2 * n, 1, 8, 8), dtype=np.float32), labels)
    workspace = workspace_of(queue, bundles=KnownBundles(folder / "bundles"), metrics=sampler, clean=images)
    for outcome in ("promoted", "refused", "failed", "canary"):
        report = {"reasons": ["too few inputs"], "why": "asked for", "before": {"clean_right": 1}, "after": {}}
        workspace.rounds.finish(workspace.rounds.begin("digits", 12), outcome, report, digest)
    return workspace


@pytest.fixture
def workspace(tmp_path: Path, sqlite_template: Path) -> Iterator[Workspace]:
    workspace = served(tmp_path, sqlite_template, SIGNS)
    yield workspace
    workspace.queue.close()


def answer_two(page: Page, url: str) -> None:
    """Give two answers and take one back, so that every page has something of each kind."""
    page.goto(f"{url}/review")
    for keys in ("2p", "f"):
        item = page.locator("#work").get_attribute("data-item")
        page.wait_for_timeout(300)
        page.keyboard.type(keys)
        expect(page.locator("#work")).not_to_have_attribute("data-item", str(item), timeout=PATIENCE)
    page.keyboard.press("u")
    expect(page.locator("#notice")).to_contain_text("Undone", timeout=PATIENCE)


def faint_in_a_theme(page: Page) -> list[str]:
    """Return the texts that are too faint in the light theme or in the dark one."""
    found = []
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        found += [f"{theme}: {text}" for text in faint_texts(page)]
    return found


def test_every_text_has_enough_contrast(workspace, open_page):
    token = workspace.reviewers.add("ada", "admin")
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        assert faint_in_a_theme(page) == []
        log_in(page, "ada", token)
        answer_two(page, url)
        for path in PAGES:
            page.goto(f"{url}/{path}")
            for details in page.locator("details:not(.pop) > summary").all():
                details.click()
            if path == "review":
                for choice in page.locator(".choice input").all():  # rows of suspect and of backup, selected
                    choice.check(force=True)
                    assert faint_in_a_theme(page) == []
                page.keyboard.press("Escape")
                page.keyboard.press("?")
            elif path == "groups/7":
                page.locator("[name=include]").first.uncheck()
            elif path == "status":
                expect(page.locator(".uplot").first).to_be_visible(timeout=PATIENCE)
            assert faint_in_a_theme(page) == [], path
        page.goto(f"{url}/items/99")  # there is none
        assert faint_in_a_theme(page) == []


def test_faint_texts_are_found_where_they_are(open_page, workspace):
    with serving_in_thread(workspace) as url:
        page = open_page(url)
        page.evaluate("document.querySelector('.lead').style.color = '#ccc'")
        page.evaluate("document.querySelector('.hint').style.opacity = 0.5")
        assert [re.match(r"[\d.]+ of [\d.]+: (An admin|Inputs)", text) is not None for text in faint_texts(page)[:2]]


def shows_both_answers_and_every_class(page: Page, width: int, height: int) -> None:
    page.evaluate("scrollTo(0, 0)")
    for name in ("Poisoned", "False alarm"):
        box = page.get_by_role("button", name=re.compile(name)).bounding_box()
        assert box is not None
        assert box["y"] >= 0, name
        assert box["y"] + box["height"] <= height, name
        assert box["x"] >= 0, name
        assert box["x"] + box["width"] <= width, name
    page.locator(".choice").last.scroll_into_view_if_needed()
    last, bar = page.locator(".choice").last.bounding_box(), page.locator(".actions").bounding_box()
    assert last is not None
    assert bar is not None
    assert last["y"] + last["height"] <= bar["y"]  # the bar hides no class


@pytest.mark.parametrize("n_classes", [3, 43])
def test_phone_shows_both_answers_at_once_and_cuts_no_label(tmp_path, sqlite_template, open_page, n_classes):
    names = [*SIGNS, *(f"End of the speed limit and of the ban on passing, {label}" for label in range(3, n_classes))]
    workspace = served(tmp_path, sqlite_template, names)
    token = workspace.reviewers.add("ada", "admin")
    with workspace.queue, serving_in_thread(workspace) as url:
        page = open_page(url, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
        log_in(page, "ada", token)
        for width, height in ((390, 844), (360, 640)):
            page.set_viewport_size({"width": width, "height": height})
            for path in PAGES:
                page.goto(f"{url}/{path}")
                if path == "review":
                    shows_both_answers_and_every_class(page, width, height)
                assert page.evaluate("document.documentElement.scrollWidth") <= width, path
                assert cut_texts(page) == [], path
                links = [link.bounding_box() for link in page.locator(".bar nav a").all()]
                assert len(links) == 6, path  # an admin's
                assert len({link["y"] for link in links}) == 1, path  # one line
                assert links[-1]["x"] + links[-1]["width"] <= width, path
