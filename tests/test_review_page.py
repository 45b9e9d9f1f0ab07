"""The review page without a browser: who gets in, what an answer does, and what a hostile input cannot do."""

from __future__ import annotations

import html
import io
import json
import re
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from review_helpers import N_CLASSES, client_of, csrf_of, log_in, picture, shown_item, small_bundle, workspace_of
from starlette.testclient import TestClient

from guard.errors import AlreadyDecided, QueueUnavailable
from guard.relabel.enqueueing import remove_items
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.request_body import pack_body
from guard.relabel.settings import QueueSettings
from guard.review.access import LoginLimit, TooManyAttemptsError
from guard.review.headers import SECURITY_HEADERS
from guard.review.known_bundles import KnownBundles
from guard.review.workspace import CleanImages, ReviewSettings, Workspace
from guard.storage.bundle import RETRAINER_LOCK, BundleStore

FORM = "application/x-www-form-urlencoded"
PAGES = ("/review", "/groups", "/groups/1", "/answers", "/progress", "/admin", "/items/1")


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        yield opened


@pytest.fixture
def workspace(queue: Queue) -> Workspace:
    """Three flagged inputs; number 1 is the most suspicious."""
    queue.enqueue([picture(number) for number in range(3)])
    return workspace_of(queue)


@pytest.fixture
def ada(workspace: Workspace) -> TestClient:
    return log_in(workspace)


def answer(client: TestClient, item: int, verdict: str = "poisoned", label: str = "4", part: bool = False):
    headers = {"HX-Request": "true"} if part else {}
    return client.post(f"/items/{item}/decision", data={"verdict": verdict, "true_label": label}, headers=headers)


# --- getting in ---


def test_login_with_name_and_token_starts_a_session_that_scripts_cannot_read(workspace):
    token = workspace.reviewers.add("ada")
    client = client_of(workspace)
    assert client.post("/login", data={"name": "ada", "token": "wrong"}).status_code == 401
    assert client.post("/login", data={"name": "bob", "token": token}).status_code == 401
    response = client.post("/login", data={"name": "ada", "token": token})
    assert (response.status_code, response.headers["location"]) == (303, "/review")
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert "secure" not in cookie
    assert token.lower() not in cookie
    assert client.get("/login").headers["location"] == "/review"


def test_login_over_https_marks_the_cookie_secure(workspace):
    token = workspace.reviewers.add("ada")
    response = client_of(workspace, "https://localhost").post("/login", data={"name": "ada", "token": token})
    assert "secure" in response.headers["set-cookie"].lower()


def test_logout_ends_the_session_and_gives_items_back(workspace, ada):
    assert shown_item(ada.get("/review").text) == 1
    assert workspace.queue.get(1).claimed_by == "ada"
    assert ada.post("/logout").headers["location"] == "/login"
    assert workspace.queue.get(1).state is State.PENDING
    assert ada.get("/review").headers["location"] == "/login"


def test_logged_out_session_cookie_is_worthless(workspace, ada):
    cookie = ada.cookies["guard_session"]
    ada.post("/logout")
    client = client_of(workspace)
    client.cookies["guard_session"] = cookie
    assert client.get("/review").status_code == 303


def test_disabled_reviewer_is_out_at_once(workspace, ada):
    workspace.reviewers.disable("ada")
    assert ada.get("/review").headers["location"] == "/login"


def test_sixth_failed_login_is_told_to_wait_and_the_right_token_passes_all_the_same(workspace):
    """The attack: five wrong tokens a minute under somebody's name kept that one out."""
    token = workspace.reviewers.add("ada")
    client = client_of(workspace)
    for _ in range(5):
        assert client.post("/login", data={"name": "ada", "token": "wrong"}).status_code == 401
    response = client.post("/login", data={"name": "ada", "token": "wrong"})
    assert response.status_code == 429
    assert 1 <= int(response.headers["retry-after"]) <= 60
    assert client.post("/login", data={"name": "bob", "token": "wrong"}).status_code == 401  # another name
    assert client.post("/login", data={"name": "ada", "token": token}).status_code == 303


def test_login_limit_forgets_after_its_window_and_counts_each_key():
    now = 0.0
    limit = LoginLimit(2, window_s=60, clock=lambda: now)
    for _ in range(2):
        limit.failed("ada")
    limit.failed("bob")
    with pytest.raises(TooManyAttemptsError, match="Try again in 60 s"):
        limit.failed("ada")
    now = 60.1
    limit.failed("ada")


def test_login_limit_is_bounded_whatever_names_are_tried():
    limit = LoginLimit(5)
    for number in range(11_000):
        limit.failed(f"{number} {'x' * 5000}")
    assert len(limit._failed) <= 10_000
    assert max(map(len, limit._failed)) <= 200


def test_login_makes_a_new_session_and_ends_the_one_that_was_there(workspace):
    """Session fixation: a cookie that somebody else planted is never raised to the reviewer's session."""
    client = client_of(workspace)
    token = workspace.reviewers.add("ada")
    planted = {"Cookie": "guard_session=planted"}
    client.post("/login", data={"name": "ada", "token": token}, headers=planted)
    first = client.cookies["guard_session"]
    assert first != "planted"
    assert workspace.reviewers.find_session("planted") is None
    client.post("/login", data={"name": "ada", "token": token})
    assert client.cookies["guard_session"] != first
    assert workspace.reviewers.find_session(first) is None


def test_session_over_https_is_taken_from_its_prefixed_cookie_only(workspace):
    """`__Host-` cookies cannot be set by another host of the domain, nor over plain http."""
    token = workspace.reviewers.add("ada")
    client = client_of(workspace, "https://localhost")
    response = client.post("/login", data={"name": "ada", "token": token})
    assert response.headers["set-cookie"].startswith("__Host-guard_session=")
    assert client.get("/review").status_code == 200
    secret = client.cookies["__Host-guard_session"]
    other = client_of(workspace, "https://localhost")
    other.cookies["guard_session"] = secret
    assert other.get("/review").status_code == 303
    client.headers["X-CSRF-Token"] = csrf_of(client)
    assert client.post("/logout").status_code == 303
    assert workspace.reviewers.find_session(secret) is None


@pytest.mark.parametrize("path", PAGES)
def test_page_without_login_goes_to_the_login(workspace, path):
    response = client_of(workspace).get(path)
    assert (response.status_code, response.headers["location"]) == (303, "/login")


def test_part_of_a_page_without_login_sends_the_browser_to_the_login(workspace):
    response = client_of(workspace).post("/items/1/decision", headers={"HX-Request": "true"})
    assert (response.status_code, response.headers["hx-redirect"]) == (401, "/login")


@pytest.mark.parametrize("path", ["/images/items/1.png", "/images/items/1/occlusion.png", "/images/clean/0.png"])
def test_picture_without_login_is_refused(workspace, path):
    assert client_of(workspace).get(path).status_code == 401


def test_form_without_its_token_changes_nothing(workspace, ada):
    ada.get("/review")
    del ada.headers["X-CSRF-Token"]
    assert answer(ada, 1).status_code == 403
    ada.headers["X-CSRF-Token"] = "0" * 64
    assert answer(ada, 1).status_code == 403
    assert workspace.queue.decisions() == []


@pytest.mark.parametrize("headers", [{"Origin": "https://evil.example"}, {"Sec-Fetch-Site": "cross-site"}])
@pytest.mark.parametrize("path", ["/items/1/decision", "/login", "/logout", "/admin/reviewers"])
def test_form_from_another_site_is_refused(workspace, ada, headers, path):
    assert ada.post(path, headers=headers).status_code == 403


def test_page_answers_to_its_own_names_only(workspace, queue):
    assert client_of(workspace, "http://evil.example").get("/login").status_code == 400
    named = workspace_of(queue, settings=ReviewSettings(allowed_hosts=("guard.example",)))
    assert client_of(named, "http://guard.example").get("/login").status_code == 200


@pytest.mark.parametrize(
    "host", ["[::1]:8090", "[::1]", "127.0.0.1:8090", "localhost", "[2001:DB8::7]:8090", "guard.example:8090"]
)
def test_page_answers_to_addresses_with_and_without_a_port(queue, host):
    named = workspace_of(queue, settings=ReviewSettings(allowed_hosts=("guard.example", "2001:db8::7")))
    assert client_of(named).get("/login", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["[::2]:8090", "[::1", "::1", "[::1].evil.example", "127.0.0.1.evil.example", "[2001:db8::7]"]
)
def test_page_answers_to_no_address_like_its_own(workspace, host):
    assert client_of(workspace).get("/login", headers={"Host": host}).status_code == 400


@pytest.mark.parametrize("path", ["/login", "/review", "/nowhere", "/static/review.css", "/images/items/1.png"])
def test_every_answer_carries_the_security_headers(ada, path):
    response = ada.get(path)
    for name, value in SECURITY_HEADERS.items():
        assert response.headers[name] == value
    assert "unsafe" not in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/login", "/review", "/groups", "/answers", "/progress"])
def test_pages_have_no_inline_script_or_style(ada, path):
    ada.get("/review")
    html = ada.get(path, follow_redirects=True).text
    assert "<script>" not in html
    assert "<style" not in html
    assert " style=" not in html
    assert " onclick=" not in html
    assert "http://" not in html.replace("http://localhost", "")
    assert "https://" not in html


@pytest.mark.parametrize(
    "path", ["/review", "/images/items/1.png", "/images/items/1.png?view=sent", "/answers", "/progress", "/status"]
)
def test_page_and_picture_are_kept_by_no_cache(ada, path):
    assert ada.get(path).headers["cache-control"] == "no-store"


def test_logout_clears_what_an_earlier_page_let_the_browser_keep(ada):
    assert ada.post("/logout").headers["clear-site-data"] == '"cache"'


def test_request_that_is_too_large_is_refused(workspace, ada):
    response = ada.post("/items/1/decision", data={"true_label": "x" * (2**20)})
    assert response.status_code == 413
    chunks = (b"x" * 2**16 for _ in range(20))
    assert ada.post("/login", content=chunks, headers={"Content-Type": FORM}).status_code == 413


# --- answering ---


def test_answer_is_saved_and_the_next_item_shown(workspace, ada):
    assert shown_item(ada.get("/review").text) == 1
    response = answer(ada, 1, part=True)
    assert shown_item(response.text) == 2
    assert "Saved: item 1 poisoned, true label 4." in response.text
    [decision] = workspace.queue.decisions()
    assert (decision.item_id, decision.reviewer, decision.is_poisoned, decision.true_label) == (1, "ada", True, 4)
    assert workspace.queue.get(1).state is State.DECIDED


def test_answer_without_script_goes_back_to_the_page(workspace, ada):
    ada.get("/review")
    response = answer(ada, 1)
    assert (response.status_code, response.headers["location"]) == (303, "/review?order=suspicion")


def test_reload_shows_the_same_item(ada):
    assert shown_item(ada.get("/review").text) == shown_item(ada.get("/review").text) == 1


def test_order_by_age_shows_the_oldest(queue):
    queue.enqueue([picture(9), picture(0)])
    assert shown_item(log_in(workspace_of(queue)).get("/review?order=age").text) == 1
    assert shown_item(log_in(workspace_of(queue), "bob").get("/review?order=suspicion").text) == 2


def test_false_alarm_without_a_label_means_that_the_suspect_is_right(workspace, ada):
    ada.get("/review")
    answer(ada, 1, "false_alarm", "")
    assert workspace.queue.get(1).decision.true_label == workspace.queue.get(1).input.suspect_label


def test_poisoned_needs_a_label_or_that_it_cannot_be_told(workspace, ada):
    ada.get("/review")
    response = answer(ada, 1, label="", part=True)
    assert response.status_code == 422
    assert 'role="alert"' in response.text
    assert "choose the true label first" in response.text
    answer(ada, 1, label="none")
    assert workspace.queue.get(1).decision.true_label is None


@pytest.mark.parametrize("label", [str(N_CLASSES), "-1", "1e3", "٣", "cat"])
def test_unknown_label_is_refused(workspace, ada, label):
    ada.get("/review")
    assert answer(ada, 1, label=label).status_code == 422
    assert workspace.queue.decisions() == []


def test_item_of_a_group_that_gave_way_is_told_and_the_rest_of_the_form_stays(queue, ada):
    queue.set_groups({1: 4, 2: 4, 3: 4})
    ada.get("/groups/4")
    with queue.database.writing() as connection:
        remove_items(connection, [2], State.DISCARDED)
    form = {"verdict": "poisoned", "rule": "one", "group_label": "4", "include": ["1", "2", "3"], "label_3": "6"}
    response = ada.post("/groups/4/decisions", data=form)
    assert response.status_code == 409
    assert "item 2 is discarded: it gave way to other inputs while the queue was full" in response.text
    assert "Nothing was saved; the others are still here." in response.text
    assert 'name="label_3" value="6"' in response.text
    assert 'value="2"' not in response.text.split('class="tiles"')[1]
    assert queue.decisions() == []
    assert ada.post("/groups/4/decisions", data=form | {"include": ["1", "3"]}).status_code == 303
    assert [decision.true_label for decision in queue.decisions()] == [4, 6]


def test_page_shows_what_a_program_holds_for_the_reviewer_at_the_limit(sqlite_template, tmp_path):
    shutil.copy(sqlite_template, tmp_path / "held.db")
    with Queue.open(f"sqlite:///{tmp_path / 'held.db'}", QueueSettings(max_held=2)) as queue:
        queue.enqueue([picture(number) for number in range(6)])
        workspace = workspace_of(queue)
        queue.claim("ada", 2)
        ada = log_in(workspace)
        assert shown_item(ada.get("/review").text) == 1
        assert shown_item(answer(ada, 1, part=True).text) in (2, 3)
        program = client_of(workspace)
        program.headers["Authorization"] = f"Bearer {workspace.reviewers.add('robot')}"
        assert len(program.get("/api/v1/items/next?n=200").json()["items"]) == 2
        response = program.get("/api/v1/items/next?n=1")
        assert response.status_code == 409
        assert "robot holds" in response.json()["error"]


def test_body_that_gave_way_is_told(queue):
    queue.enqueue([picture(0, body=b"", content_type="")])
    ada = log_in(workspace_of(queue))
    response = ada.get("/images/items/1.png?view=sent")
    assert (response.status_code, "the body was not kept" in response.text) == (422, True)
    assert "The body was not kept" in ada.get("/review").text


def test_item_that_somebody_else_answered_is_told_and_not_shown_again(workspace, ada):
    ada.get("/review")
    workspace.queue.release("ada", [1])
    workspace.queue.claim_items("bob", [1])
    workspace.queue.decide("bob", 1, is_poisoned=True, true_label=2)
    response = answer(ada, 1, part=True)
    assert response.status_code == 409
    assert "decided already" in response.text
    assert shown_item(ada.get("/review").text) == 2


def test_lease_that_ended_unnoticed_is_taken_again(workspace, ada):
    ada.get("/review")
    workspace.queue.release("ada", [1])
    assert answer(ada, 1).status_code == 303
    assert workspace.queue.get(1).decision.reviewer == "ada"


def test_item_with_somebody_else_is_not_answered(workspace, ada):
    workspace.queue.claim_items("bob", [1])
    response = answer(ada, 1, part=True)
    assert response.status_code == 409
    assert "bob has it" in response.text


def test_two_reviewers_never_see_the_same_item(workspace, ada):
    bob = log_in(workspace, "bob")
    assert {shown_item(ada.get("/review").text), shown_item(bob.get("/review").text)} == {1, 2}


def test_skipped_item_comes_last(workspace, ada):
    ada.get("/review")
    seen = [1]
    for _ in range(3):
        seen.append(shown_item(ada.post(f"/items/{seen[-1]}/skip", headers={"HX-Request": "true"}).text))
    assert seen == [1, 2, 3, 1]


def test_undo_works_in_a_later_session(workspace):
    token = workspace.reviewers.add("ada")
    first = log_in(workspace, token=token)
    first.get("/review")
    answer(first, 1)
    first.post("/logout")
    later = log_in(workspace_of(workspace.queue), token=token)
    response = later.post("/undo", headers={"HX-Request": "true"})
    assert shown_item(response.text) == 1
    assert "Undone: item 1 is open again." in response.text
    assert workspace.queue.get(1).claimed_by == "ada"
    assert workspace.queue.decisions()[0].withdrawn


def test_undo_with_nothing_to_undo_says_so(ada):
    response = ada.post("/undo", headers={"HX-Request": "true"})
    assert response.status_code == 409
    assert "nothing to undo" in response.text


def test_undo_goes_back_one_answer_at_a_time(workspace, ada):
    for item in (1, 2, 3):
        ada.get("/review")
        answer(ada, item)
    undone = [shown_item(ada.post("/undo", headers={"HX-Request": "true"}).text) for _ in range(3)]
    assert undone == [3, 2, 1]
    with pytest.raises(AlreadyDecided):
        workspace.undo("ada")


def test_advance_by_hand_shows_the_answer_first(workspace, ada):
    ada.get("/review")
    data = {"verdict": "poisoned", "true_label": "4", "advance": "0"}
    response = ada.post("/items/1/decision", data=data, headers={"HX-Request": "true"})
    assert shown_item(response.text) == 1
    assert "Poisoned, true label 4." in response.text
    assert shown_item(ada.post("/next", headers={"HX-Request": "true"}).text) == 2


def test_answers_page_takes_back_and_changes(workspace, ada):
    for item in (1, 2):
        ada.get("/review")
        answer(ada, item)
    html = ada.get("/answers").text
    assert html.index("item 2") < html.index("item 1")
    assert ada.post("/answers/1/withdraw").status_code == 303
    data = {"verdict": "false_alarm", "true_label": "3"}
    assert ada.post("/answers/2/change", data={"true_label": "3"}).status_code == 422  # says neither
    assert ada.post("/answers/2/change", data=data).status_code == 303
    states = {item: workspace.queue.get(item).state for item in (1, 2)}
    assert states == {1: State.CLAIMED, 2: State.DECIDED}
    decision = workspace.queue.get(2).decision
    assert (decision.is_poisoned, decision.true_label, decision.supersedes) == (False, 3, 2)
    assert "withdrawn" in ada.get("/answers").text


def test_answer_of_somebody_else_cannot_be_changed(workspace, ada):
    ada.get("/review")
    answer(ada, 1)
    bob = log_in(workspace, "bob")
    for action in ("withdraw", "change"):
        response = bob.post(f"/answers/1/{action}", data={"verdict": "false_alarm", "true_label": "3"})
        assert response.status_code == 403
    assert workspace.queue.get(1).decision.stands


def test_answers_are_paged(queue):
    queue.enqueue([picture(number) for number in range(60)])
    workspace = workspace_of(queue)
    ada = log_in(workspace)
    for _ in range(60):
        ada.get("/review")
        [held] = workspace.held_items.of("ada")
        answer(ada, held)
    assert "page 1 of 2" in ada.get("/answers").text
    assert ada.get("/answers?page=2").text.count("<tr") == 10 + 1  # and the headings
    assert len(workspace.log.newest("ada", 1000)) == 60


def test_model_that_came_after_many_items_of_others_is_known_and_can_be_retrained(queue):
    queue.enqueue([picture(number, model="first") for number in range(25)])
    queue.enqueue([picture(99, model="newer")])
    workspace = workspace_of(queue)
    assert workspace.models() == ["first", "newer"]
    workspace.ask_for_retraining("newer", "ada")
    assert workspace.rounds.take_request("newer") == "ada"


def test_quorum_of_two_needs_a_second_reviewer(queue, tmp_path):
    queue.enqueue([picture()])
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}", QueueSettings(quorum=2)) as opened:
        workspace = workspace_of(opened)
        for name, state in (("ada", State.PENDING), ("bob", State.DECIDED)):
            client = log_in(workspace, name)
            assert shown_item(client.get("/review").text) == 1
            data = {"verdict": "poisoned", "true_label": "4", "advance": "0"}
            html = client.post("/items/1/decision", data=data, headers={"HX-Request": "true"}).text
            assert "It counts once 2 reviewers say so." in html
            assert opened.get(1).state is state
        assert shown_item(log_in(workspace, "eve").get("/review").text) is None


def test_queue_that_is_gone_is_said_with_503(workspace, ada, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise QueueUnavailable("the queue is locked. Try again.")

    monkeypatch.setattr(Queue, "claim", fail)
    response = ada.get("/review")
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert "the queue is locked" in response.text


# --- groups ---


@pytest.fixture
def group_of_three(workspace: Workspace) -> Workspace:
    workspace.queue.set_groups({1: 7, 2: 7, 3: 7})
    return workspace


def test_group_is_labelled_with_its_exceptions(group_of_three):
    ada = log_in(group_of_three)
    assert "/groups/7" in ada.get("/groups").text
    assert ada.get("/groups/7").text.count('name="include"') == 3
    data = {
        "verdict": "poisoned",
        "rule": "one",
        "group_label": "4",
        "include": ["1", "2"],
        "verdict_2": "false_alarm",
    }
    html = ada.post("/groups/7/decisions", data=data).text
    assert "Saved: 2 items." in html
    assert html.count('name="include"') == 1
    entry, two = (group_of_three.queue.get(item).decision for item in (1, 2))
    assert (entry.is_poisoned, entry.true_label) == (True, 4)
    assert (two.is_poisoned, two.true_label) == (False, 3)  # as the suspect says
    assert ada.post("/groups/7/leave").status_code == 303
    assert group_of_three.queue.get(3).state is State.PENDING


def test_group_by_the_backups_answers_refuses_one_that_agrees_with_the_suspect(queue):
    queue.enqueue([picture(0), picture(1, backup_label=3)])
    queue.set_groups({1: 7, 2: 7})
    ada = log_in(workspace_of(queue))
    ada.get("/groups/7")
    data = {"verdict": "poisoned", "rule": "backup", "include": ["1", "2"], "label_1": ""}
    response = ada.post("/groups/7/decisions", data=data)
    assert response.status_code == 422
    assert "item 2: its second opinion says what the suspect says" in response.text
    assert queue.decisions() == []
    response = ada.post("/groups/7/decisions", data={**data, "label_2": "6"})
    assert response.headers["location"] == "/groups"
    assert [decision.true_label for decision in queue.decisions()] == [5, 6]


@pytest.mark.parametrize(
    ("data", "answer"),
    [
        ({"verdict": "poisoned", "rule": "one", "group_label": "4"}, "no item is chosen"),
        ({"verdict": "poisoned", "include": "1"}, "choose what the true label is"),
        ({"verdict": "poisoned", "rule": "one", "include": "1", "group_label": "dog"}, "none of the 10 classes"),
        ({"verdict": "poisoned", "rule": "none", "include": "1", "label_1": "dog"}, "item 1:"),
        ({"rule": "none", "include": "1"}, "say whether the group is poisoned"),
    ],
)
def test_group_form_that_is_incomplete_says_what_is_missing_and_keeps_the_rest(group_of_three, data, answer):
    ada = log_in(group_of_three)
    ada.get("/groups/7")
    response = ada.post("/groups/7/decisions", data=data)
    assert response.status_code == 422
    assert answer in response.text
    assert group_of_three.queue.decisions() == []


def included(html: str) -> dict[int, bool]:
    """Return which items a group's form has, and whether they are ticked."""
    found = re.findall(r'name="include" value="(\d+)"( checked)?', html)
    return {int(item): bool(ticked) for item, ticked in found}


def test_items_of_a_group_are_for_one_reviewer_and_half_of_what_waits_is_left_to_others(group_of_three):
    queue = group_of_three.queue
    ada, bob, eve = log_in(group_of_three), log_in(group_of_three, "bob"), log_in(group_of_three, "eve")
    first = included(ada.get("/groups/7").text)
    assert len(first) == 2
    assert included(ada.get("/groups/7").text) == first  # looking again takes no more
    second = included(bob.get("/groups/7").text)
    assert len(second) == 1
    assert not first.keys() & second.keys()
    assert "Nothing in this group waits for you" in eve.get("/groups/7").text
    queue.enqueue([picture(number) for number in range(10, 70)])
    queue.set_groups(dict.fromkeys(range(4, 64), 8))
    assert len(included(ada.get("/groups/8").text)) == 30
    assert shown_item(eve.get("/review").text) is not None
    assert "29 more of this group wait" in ada.get("/groups/8").text


def test_reviewer_who_is_alone_gets_a_whole_page_of_a_group(queue):
    queue.enqueue([picture(number) for number in range(60)])
    queue.set_groups(dict.fromkeys(range(1, 61), 7))
    assert len(included(log_in(workspace_of(queue)).get("/groups/7").text)) == 48


def test_group_leaves_out_what_the_second_opinion_is_not_sure_of_and_says_why(queue):
    sure, unsure, agrees, none = (
        {"backup_confidence": 0.95},
        {"backup_confidence": 0.36},
        {"backup_label": 3, "backup_confidence": 0.95},
        {"backup_label": None, "backup_confidence": None},
    )
    queue.enqueue([picture(number, **kind) for number, kind in enumerate((sure, unsure, agrees, none))])
    queue.set_groups(dict.fromkeys(range(1, 5), 7))
    ada = log_in(workspace_of(queue))
    page = ada.get("/groups/7").text
    assert re.findall(r'data-doubt="(\w+)"', page) == ["always", "poisoned", "always"]
    data = {"verdict": "poisoned", "rule": "backup", "include": ["1", "2", "3", "4"]}
    refused = ada.post("/groups/7/decisions", data=data)
    assert refused.status_code == 422
    assert "item 2: its second opinion is only 36 % sure. Give its own label, or leave it out." in refused.text
    assert included(refused.text) == {1: True, 2: False, 3: False, 4: False}
    whys = re.findall(r'<p class="doubt">(.*?)</p>', refused.text)
    assert whys == [
        f"Left out: the second opinion {why}."
        for why in ("is only 36 % sure", "says what the suspect says", "has no answer")
    ]
    ada.post("/groups/7/decisions", data={**data, "include": ["1", "2"], "label_2": "5"})  # a person looked at it
    assert [(decision.item_id, decision.true_label) for decision in queue.decisions()] == [(1, 5), (2, 5)]
    ada.post("/groups/7/decisions", data={"verdict": "false_alarm", "rule": "backup", "include": "3"})
    assert queue.get(3).decision.true_label == 3


# --- progress and admin ---


def test_progress_and_admin_say_how_many_answers_start_a_retraining(queue, tmp_path):
    queue.enqueue([picture(number) for number in range(12)])
    digest = small_bundle(tmp_path, None, np.eye(N_CLASSES, 6), np.arange(N_CLASSES))
    workspace = workspace_of(queue, bundles=KnownBundles(tmp_path))
    BundleStore(tmp_path).activate(digest)
    root = log_in(workspace, "root", "admin")
    for number in range(9):
        answer(root, number + 1)

    def told(path: str) -> str:
        return " ".join(re.sub(r"<[^>]*>", "", root.get(path).text).split())

    assert "digits: 9 new answers (no retrainer works on this folder of bundles yet)" in told("/progress")
    known = {"model": "digits", "enough_decisions": 20, "every_hours": 24.0, "min_decisions": 10}
    (tmp_path / RETRAINER_LOCK).write_text(json.dumps(known))
    assert "digits: 9 of 20 answers" in told("/progress")
    assert "digits: 9 of 20 answers" in told("/admin")
    (tmp_path / RETRAINER_LOCK).write_text(json.dumps({**known, "enough_decisions": 0}))
    assert "digits: 9 of 10 answers" in told("/progress")
    for damaged in ("", "[]", "{}", '{"model": 1, "enough_decisions": "x"}'):
        (tmp_path / RETRAINER_LOCK).write_text(damaged)
        assert "digits: 9 new answers" in told("/progress")
    workspace.rounds.finish(workspace.rounds.begin("digits", 9), "promoted", {}, digest)
    refused = root.post("/admin/retrain", data={"model": "digits"})
    assert "no answer is new since round 1 of digits: there is nothing to learn." in refused.text
    assert workspace.rounds.take_request("digits") is None
    answer(root, 10)
    assert "digits: 1 new answer" in told("/progress")
    assert root.post("/admin/retrain", data={"model": "digits"}).status_code < 400
    assert workspace.rounds.take_request("digits") == "root"


def test_withdrawn_and_replaced_answers_are_not_counted_as_todays(ada, workspace):
    def today() -> str:
        return re.search(r"<b>(\d+)</b> today", ada.get("/review").text)[1]

    answer(ada, 1)
    answer(ada, 2)
    assert today() == "2"
    ada.post("/undo")
    assert today() == "1"
    ada.post("/answers/1/change", data={"verdict": "false_alarm", "true_label": "3"})
    assert today() == "1"
    assert re.search(r"answered by you</dt><dd>1<", ada.get("/progress").text)
    assert re.search(r"by you this hour</dt><dd>1<", ada.get("/progress").text)


def test_progress_shows_what_answers_changed(workspace, ada):
    report = {
        "before": {"clean_accuracy": 0.9, "attack_success": {"digits": 0.5}},
        "after": {"clean_accuracy": 0.95, "attack_success": {"digits": 0.1}},
        "reasons": ["all <b>passed</b>"],
        "seconds": 12.5,
    }
    workspace.rounds.finish(workspace.rounds.begin("digits", 3), "promoted", report)
    html = ada.get("/progress").text
    for text in ("promoted", "clean accuracy", "+0.05", "attack success / digits", "−0.4", "12.5"):
        assert text in html
    assert "all &lt;b&gt;passed&lt;/b&gt;" in html


@pytest.mark.parametrize("path", ["/admin", "/admin/export"])
def test_admin_pages_are_for_admins(ada, path):
    assert ada.get(path).status_code == 403


@pytest.mark.parametrize("path", ["reviewers", "reviewers/disable", "retrain", "gold", "import"])
def test_admin_actions_are_for_admins(workspace, ada, path):
    data = {"name": "eve", "role": "admin", "model": "digits", "item": "1"}
    assert ada.post(f"/admin/{path}", data=data).status_code == 403
    assert workspace.reviewers.names() == ["ada"]


def test_admin_adds_a_reviewer_whose_token_is_shown_once(workspace):
    root = log_in(workspace, "root", "admin")
    html = root.post("/admin/reviewers", data={"name": "eve", "role": "reviewer"}).text
    token = html.split('<code id="new-token">')[1].split("</code>")[0]
    assert workspace.reviewers.check_token(token).name == "eve"
    assert token not in root.get("/admin").text
    assert root.post("/admin/reviewers", data={"name": "eve", "role": "reviewer"}).status_code == 422
    assert root.post("/admin/reviewers/disable", data={"name": "eve"}).status_code == 303
    assert workspace.reviewers.check_token(token) is None
    assert root.post("/admin/reviewers/disable", data={"name": "root"}).status_code == 422


def test_retrain_button_asks_for_a_round(workspace):
    root = log_in(workspace, "root", "admin")
    root.post("/admin/retrain", data={"model": "digits"})
    assert workspace.rounds.take_request("digits") == "root"


def test_gold_items_measure_reviewers_and_look_like_others(workspace, queue):
    queue.enqueue([picture(50)])
    root = log_in(workspace, "root", "admin")
    root.get("/review")
    answer(root, 1, label="4")
    assert root.post("/admin/gold", data={"item": "1"}).status_code == 303
    assert root.post("/admin/gold", data={"item": "2"}).status_code == 422  # not answered yet
    bob = log_in(workspace, "bob")
    seen = []
    for label in ("4", "4", "4", "4"):
        html = bob.get("/review").text
        assert "gold" not in html.lower()
        seen.append(shown_item(html))
        answer(bob, seen[-1], label=label)
    assert 5 in seen
    assert "1 of 1" in root.get("/admin").text


# --- pictures ---


def test_picture_of_an_item_is_a_png_of_what_the_model_saw(ada):
    response = ada.get("/images/items/1.png")
    assert response.headers["content-type"] == "image/png"
    with Image.open(io.BytesIO(response.content)) as image:
        assert image.size == (8, 8)
        assert np.array_equal(np.asarray(image), np.rint(255 * picture(0).inputs[0]).astype(np.uint8))


def huge_png() -> bytes:
    """A PNG of a few bytes that says it is 60,000 pixels wide and high."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "body",
    [
        b"<script>alert(1)</script>",
        b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"/>',
        b"GIF89a/*<script>*/",
        b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
        b"",
        huge_png(),
    ],
    ids=["html", "svg", "gif", "damaged", "empty", "huge"],
)
def test_hostile_body_is_never_sent_on(queue, body):
    queue.enqueue([picture(0, body=body, content_type="text/html")])
    response = log_in(workspace_of(queue)).get("/images/items/1.png?view=sent")
    assert response.status_code == 422
    assert response.headers["content-type"] == "text/plain; charset=utf-8"
    assert b"alert" not in response.content
    assert response.headers["x-content-type-options"] == "nosniff"


def test_body_with_script_behind_a_real_picture_loses_it(queue):
    original = picture(0)
    queue.enqueue([picture(0, body=original.body + b"<script>alert(1)</script>", content_type="text/html")])
    response = log_in(workspace_of(queue)).get("/images/items/1.png?view=sent")
    assert response.headers["content-type"] == "image/png"
    assert b"script" not in response.content


def test_page_shows_every_picture_of_a_request_the_models_input_first(queue):
    evil = '"><img src=x onerror=alert(1)>'
    clean, triggered = picture(7), picture(0)
    body, content_type = pack_body({"data": clean.body, evil: "words", "body": triggered.body}, "multipart/form-data")
    queue.enqueue([picture(0, body=body, content_type=content_type)])
    client = log_in(workspace_of(queue))
    page = client.get("/review").text
    views = re.findall(r'data-(model|sent\d+)="([^"]+)"', page)
    assert [name for name, _ in views] == ["model", "sent0", "sent1"]
    assert re.findall(r">(As [^<]+)</button>", page) == ["As the model saw it", "As sent: 1 data", "As sent: 2 body"]
    assert "3 fields" in page
    assert "<img src=x" not in page
    shown = [client.get(html.unescape(path)).content for _, path in views]
    pixels = [np.asarray(Image.open(io.BytesIO(entry))) for entry in shown]
    originals = [np.asarray(Image.open(io.BytesIO(entry.body))) for entry in (triggered, clean, triggered)]
    for entry, original in zip(pixels, originals, strict=True):
        np.testing.assert_array_equal(entry, original)
    assert client.get("/images/items/1.png?view=sent&place=2").status_code == 404
    assert client.get("/images/items/1.png?view=sent&place=-1").status_code == 404


def test_fields_without_a_picture_are_said_to_be_none(queue):
    body, content_type = pack_body({"data": b"<script>", "body": "words"}, "")
    queue.enqueue([picture(0, body=body, content_type=content_type)])
    client = log_in(workspace_of(queue))
    assert client.get("/images/items/1.png?view=sent").status_code == 422
    assert "<script>" not in client.get("/images/items/1.png?view=sent").text


def test_hostile_names_are_text(queue, tmp_path):
    evil = '"><img src=x onerror=alert(1)><script>alert(2)</script>'
    names = [f"{evil} {label}" for label in range(N_CLASSES)]
    digest = small_bundle(tmp_path / "bundles", names, np.eye(N_CLASSES, 6), np.arange(N_CLASSES))
    hostile = picture(
        0,
        request_id=evil,
        content_type=evil,
        reason=evil,
        bundle_digest=digest,
        surprise={f"lof:{evil}": 9.0, evil: 8.0},
        model=evil,
    )
    queue.enqueue([hostile])
    queue.set_groups({1: 7})
    workspace = workspace_of(queue, bundles=KnownBundles(tmp_path / "bundles"))
    root = log_in(workspace, "root", "admin")
    root.get("/review")
    pages = [root.get(path).text for path in ("/review", "/groups/7", "/groups", "/items/1", "/admin")]
    pages.append(answer(root, 1, part=True).text)
    pages.append(root.get("/answers").text)
    for text in pages:
        assert "<img src=x" not in text
        assert "<script>alert" not in text
    assert "&lt;script&gt;alert(2)" in pages[0]


# --- what the page knows of the model ---


def test_nearest_clean_images_of_both_classes_are_shown(queue, tmp_path):
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(40, 6)).astype(np.float32), np.repeat(np.arange(10), 4)
    flagged = picture(0)
    features[12] = flagged.activations.features[0]  # of class 3, which the suspect says
    names = [f"class {label}" for label in range(10)]
    digest = small_bundle(tmp_path / "bundles", names, features, labels)
    queue.enqueue([picture(0, bundle_digest=digest)])
    clean = CleanImages(rng.random((40, 1, 8, 8), dtype=np.float32), labels)
    bundles = KnownBundles(tmp_path / "bundles")
    workspace = workspace_of(queue, bundles=bundles, clean=clean)
    suspects, backups = workspace.view(queue.get(1)).neighbours
    assert (suspects.name, suspects.rows[0], len(suspects.rows)) == ("class 3", 12, 4)
    assert (backups.name, set(backups.rows)) == ("class 5", {20, 21, 22, 23})
    ada = log_in(workspace)
    assert "/images/clean/12.png" in ada.get("/review").text
    assert ada.get("/images/clean/12.png").headers["content-type"] == "image/png"
    assert ada.get("/images/clean/40.png").status_code == 404
    other = workspace_of(queue, bundles=bundles, clean=CleanImages(clean.images[:39], labels[:39]))
    assert "not those of this guard" in other.view(queue.get(1)).no_neighbours


def test_page_says_why_there_are_no_clean_images_and_no_map(ada):
    html = ada.get("/review").text
    assert "No clean images were given" in html
    assert "No map of where it looks" in html
    assert ada.get("/images/items/1/occlusion").status_code == 404


# --- the backup ---


@pytest.mark.parametrize(
    ("backup", "expected"),
    [(4, [(4, "{}"), (2, "suspect")]), (2, [(2, "{} and suspect"), (1, "second choice")])],
)
@pytest.mark.parametrize(
    ("about", "name"), [({"kind": "twin"}, "backup"), (None, "replacement head"), ("unknown", "second opinion")]
)
def test_second_opinion_goes_by_its_name_and_its_label_is_the_first_choice(
    queue, backup, expected, about, name, tmp_path
):
    digest = small_bundle(tmp_path, None, np.eye(N_CLASSES, 6), np.arange(N_CLASSES), backup=about)
    more = {} if about == "unknown" else {"bundle_digest": digest}
    queue.enqueue([picture(suspect_label=2, backup_label=backup, backup_confidence=0.84, **more)])
    html = log_in(workspace_of(queue, bundles=KnownBundles(tmp_path))).get("/review").text
    expected = [(label, who.format(name)) for label, who in expected]
    assert f"<dt>{name.capitalize()} says</dt>" in html
    assert name == "backup" or "backup" not in re.sub(r"<[^>]*>", " ", html).lower()
    likely = html[html.index('class="likely"') : html.index('class="choices"')]
    offered = re.findall(r'for="label-(\d+)".*?<i>(.*?)</i>', likely)
    assert offered[0] == (str(expected[0][0]), expected[0][1])
    assert offered[1][1] == expected[1][1]
    assert "84 % sure" in html


def test_guard_without_an_opinion_offers_the_models_second_choice(queue):
    queue.enqueue([picture(suspect_label=2, backup_label=None, backup_confidence=None)])
    html = log_in(workspace_of(queue)).get("/review").text
    assert "nothing about this input" in html
    assert re.findall(r"<i>(.*?)</i>", html[html.index('class="likely"') :])[0] == "second choice"
