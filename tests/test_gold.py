"""Gold items cannot be told apart: the same requests against a queue with one, and one with an ordinary input."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from queue_helpers import START, Clock, flagged, settled_items
from review_helpers import client_of, log_in, picture, workspace_of
from starlette.testclient import TestClient

from guard.errors import UnknownLabel
from guard.relabel.gold import other_request_id
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer, State
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings
from guard.review.workspace import Workspace

#: The number of the gold item, and of the ordinary one in its place; item 1 is its original.
HERE = 7
NOW = START + timedelta(hours=1)


class Frozen(datetime):
    """A clock for pages that stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return NOW


@pytest.fixture(autouse=True)
def _frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("pages", "status.page", "wording"):
        monkeypatch.setattr(f"guard.review.{module}.datetime", Frozen)


class World:
    """A queue whose item `HERE` is gold or ordinary, and a reviewer `bob` who writes down all answers."""

    def __init__(self, path: Path, *, is_special: bool, quorum: int) -> None:
        self.clock = Clock()
        self.queue = Queue.open(f"sqlite:///{path}", QueueSettings(quorum=quorum), clock=self.clock)
        self.workspace: Workspace = workspace_of(self.queue)
        self.lines: list[tuple[str, int, str]] = []
        self._enqueue(range(6))
        for reviewer in ("ann", "cleo")[:quorum]:
            self.queue.claim_items(reviewer, [1])
            self.queue.decide(reviewer, 1, is_poisoned=True, true_label=4)
        root = log_in(self.workspace, "root", "admin")
        self.clock.advance(minutes=5)
        self.add_here(root, is_special)
        self.request_id = self.queue.get(HERE).input.request_id
        self.clock.advance(minutes=5)
        self._enqueue(range(10, 13))
        self.queue.set_groups(dict.fromkeys((1, 2, 3, HERE), 2))
        for subject in ("open", "all"):
            for form in ("csv", "label-studio"):
                self.ask(root, "GET", f"/admin/export?what={subject}&file_format={form}")
        token = self.workspace.reviewers.add("bob")
        self.page = log_in(self.workspace, "bob", token=token)
        self.page.headers["HX-Request"] = "false"
        self.program = client_of(self.workspace)
        self.program.headers["Authorization"] = f"Bearer {token}"

    def add_here(self, root: TestClient, is_special: bool) -> None:
        """Add the item `HERE`."""
        if is_special:
            assert root.post("/admin/gold", data={"item": "1"}).status_code == 303
        else:
            self.queue.enqueue([picture(0, request_id="request-99999999", received_at=self.clock.now)])

    def _enqueue(self, numbers: range) -> None:
        ids = {number: f"request-{number:08d}" for number in numbers}
        self.queue.enqueue([picture(number, request_id=ids[number], received_at=self.clock.now) for number in numbers])

    def ask(self, client: TestClient, method: str, path: str, **more: Any) -> None:
        response = client.request(method, path, **more)
        text = response.content.hex() if response.headers.get("content-type") == "image/png" else response.text
        text = text.replace(self.request_id, "THE-REQUEST")
        headers = sorted(
            f"{name}: {value}"
            for name, value in response.headers.items()
            if name not in ("set-cookie", "content-length")
        )
        text = re.sub(r"\b[0-9a-f]{64}\b", lambda found: found[0] if found[0] == "ab" * 32 else "SECRET", text)
        self.lines.append((f"{method} {path}", response.status_code, "\n".join([*headers, text])))

    def look(self) -> None:
        """Ask everything that a reviewer may ask."""
        for path in ("/progress", "/status", "/status/now", "/groups", "/answers", f"/items/{HERE}"):
            self.ask(self.page, "GET", path)
        for path in (f"/images/items/{HERE}.png", f"/images/items/{HERE}.png?view=sent"):
            self.ask(self.page, "GET", path)
        for path in ("counts", f"items/{HERE}", f"items/{HERE}/image.png"):
            self.ask(self.program, "GET", f"/api/v1/{path}")

    def answer(self, label: int = 4) -> None:
        self.ask(
            self.program, "POST", f"/api/v1/items/{HERE}/decision", json={"is_poisoned": True, "true_label": label}
        )

    def review(self) -> None:
        """Do all that a reviewer may do with the item."""
        self.look()
        self.ask(self.program, "GET", "/api/v1/items/next?n=4&order=group")
        self.look()
        self.ask(self.program, "GET", "/api/v1/items/next?n=2&order=age")
        self.ask(self.program, "GET", "/api/v1/items/next?n=20")
        self.ask(self.page, "GET", "/groups/2")
        self.look()
        self.answer()
        self.clock.advance(seconds=20)
        self.look()
        self.answer()  # a second time
        form = {"verdict": "poisoned", "true_label": "4", "advance": "0"}
        self.ask(self.page, "POST", f"/items/{HERE}/decision", data=form)
        self.ask(self.page, "POST", f"/items/{HERE}/skip")
        self.ask(self.page, "POST", f"/items/{HERE}/renew")
        self.ask(self.page, "GET", "/groups/2")
        self.ask(self.program, "POST", "/api/v1/undo")
        self.look()
        self.ask(self.page, "GET", "/review")
        self.ask(self.page, "POST", f"/items/{HERE}/decision", data=form)
        self.look()
        newest = self.workspace.log.newest("bob", 1)[0].id
        self.ask(self.page, "POST", f"/answers/{newest}/change", data={"verdict": "false_alarm", "true_label": "3"})
        self.look()
        self.ask(self.page, "POST", f"/answers/{newest + 1}/withdraw")
        group = {"verdict": "poisoned", "rule": "one", "group_label": "4", "include": ["2", str(HERE)]}
        self.ask(self.page, "POST", "/groups/2/decisions", data=group)
        self.look()
        self.ask(self.program, "POST", f"/api/v1/items/{HERE}/skip")
        self.ask(self.page, "POST", "/logout")
        self.queue.mark_trained([item.id for item in settled_items(self.queue, "digits")], "c" * 64)
        self.page = log_in(self.workspace, "bob", token=self.program.headers["Authorization"].split()[1])
        self.look()
        self.ask(self.program, "GET", "/api/v1/items/next?n=20")


@pytest.mark.parametrize("quorum", [1, 2])
def test_reviewer_sees_the_same_of_a_gold_item_as_of_any_other(sqlite_template: Path, tmp_path: Path, quorum: int):
    worlds = []
    for is_gold in (True, False):
        path = tmp_path / f"{is_gold}.db"
        shutil.copy(sqlite_template, path)
        world = World(path, is_special=is_gold, quorum=quorum)
        world.review()
        world.queue.close()
        worlds.append(world)
    gold, ordinary = worlds
    assert len(gold.lines) == len(ordinary.lines) > 100
    for place, (entry, other) in enumerate(zip(gold.lines, ordinary.lines, strict=True)):
        assert entry == other, f"request {place}: {entry[0]}"
    answered = sum("THE-REQUEST" in text for _, _, text in gold.lines)
    assert answered > 10  # it was shown, and not only refused
    assert gold.request_id != "request-00000000"
    assert re.fullmatch(r"request-\d{8}", gold.request_id)


@pytest.fixture
def queue(queue_url: str) -> Iterator[Queue]:
    with Queue.open(queue_url, clock=Clock()) as opened:
        yield opened


def decide(queue: Queue, item_id: int, reviewer: str) -> None:
    queue.claim_items(reviewer, [item_id])
    queue.decide(reviewer, item_id, is_poisoned=True, true_label=5)


def test_answers_of_others_are_shown_to_admins_only(queue):
    [item_id] = queue.enqueue([picture(0)]).ids
    queue.enqueue([picture(1)])
    decide(queue, item_id, "ann")
    workspace = workspace_of(queue)
    paths = (f"/items/{item_id}", f"/images/items/{item_id}.png", f"/images/items/{item_id}.png?view=sent")
    bob, root = log_in(workspace, "bob"), log_in(workspace, "root", "admin")
    assert [bob.get(path).status_code for path in paths] == [403] * 3
    assert [root.get(path).status_code for path in paths] == [200] * 3
    program = client_of(workspace)
    program.headers["Authorization"] = f"Bearer {workspace.reviewers.add('eve')}"
    assert program.get(f"/api/v1/items/{item_id}").status_code == 403
    assert program.get(f"/api/v1/items/{item_id}/image.png").status_code == 403
    program.headers["Authorization"] = f"Bearer {workspace.reviewers.add('chief', 'admin')}"
    assert program.get(f"/api/v1/items/{item_id}").json()["decision"]["reviewer"] == "ann"


def test_answer_of_another_about_a_gold_item_shows_in_no_count(queue):
    """Else it would be the one answer that makes no open item fewer."""
    gold = queue.add_gold(flagged(0), True, 5)
    before = queue.counts(seen_by="ben")
    decide(queue, gold, "ann")
    assert queue.counts(seen_by="ben") == before
    assert queue.counts(seen_by="ann").decisions["poisoned"] == 1


def test_answer_that_cannot_be_saved_tells_nothing_of_others(queue):
    """Whether an item is held, answered or open: a label that the model has not is refused alike."""
    ids = queue.enqueue([flagged(number) for number in range(3)]).ids
    decide(queue, ids[0], "ann")
    queue.claim_items("ann", [ids[1]])
    for item_id in ids:
        answer = Answer(item_id=item_id, is_poisoned=True, true_label=99)
        with pytest.raises(UnknownLabel, match=rf"classes of item {item_id}'s model, got 99"):
            queue.decide_many("ben", [answer], also_free=True)


def test_gold_item_is_not_asked_of_who_answered_its_original(queue):
    [item_id] = queue.enqueue([flagged(0)]).ids
    decide(queue, item_id, "ann")
    gold = queue.add_gold(queue.get(item_id).input, True, 5, copy_of=item_id)
    assert queue.claim("ann", 5) == []
    assert queue.claim_items("ann", [gold]) == []
    assert queue.counts(seen_by="ann").by_state[State.PENDING] == 0
    assert queue.counts(seen_by="ben").by_state[State.PENDING] == 1
    assert [item.id for item in queue.claim("ben", 5)] == [gold]


def test_gold_item_looks_as_if_it_came_just_now(queue):
    queue.enqueue([flagged(number, bundle_digest="ab" * 32) for number in range(4)])
    queue.clock.advance(minutes=3)
    queue.enqueue([flagged(9, bundle_digest="cd" * 32)])
    original = queue.get(1).input
    gold = queue.get(queue.add_gold(original, True, 5, copy_of=1)).input
    assert gold.request_id != original.request_id
    assert (gold.received_at, gold.bundle_digest) == (queue.clock.now, "cd" * 32)
    assert gold.inputs.tobytes() == original.inputs.tobytes()
    other = flagged(0, raw={"another": 1.0}, surprise={"another": 1.0})  # of a bundle with other detectors
    assert queue.get(queue.add_gold(other, True, 5)).input.bundle_digest == "ab" * 32


def test_gold_item_joins_its_look_alikes(queue):
    alike = flagged(0).activations
    queue.enqueue([flagged(number, activations=alike) for number in range(3)])
    gold = queue.add_gold(flagged(0), True, 5)
    assert refresh_groups(queue, "digits") == 1
    assert queue.get(gold).group == queue.get(1).group is not None
    queue.claim_items("ben", [gold])
    queue.decide("ben", gold, is_poisoned=True, true_label=5)
    [group] = queue.groups(seen_by="ben")
    assert (group.pending, gold in group.sample_ids) == (3, False)
    [group] = queue.groups(seen_by="ann")
    assert (group.pending, gold in group.sample_ids) == (4, True)


def test_gold_item_grows_no_older_than_others(queue):
    queue.enqueue([flagged(0)])
    gold = queue.add_gold(flagged(1), True, 5)
    queue.claim_items("ben", [gold])
    queue.decide("ben", gold, is_poisoned=True, true_label=5)
    queue.clock.advance(days=31)
    assert queue.sweep().expired == 2
    assert queue.gold_results("ben").right == 1
    queue.clock.advance(days=31)
    assert queue.sweep().purged == 1  # the row with the known answer stays


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        (
            "0b5e2c1a-7d1f-4f5e-9a3b-0123456789ab",
            r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
        ),
        ("request-12", r"request-\d\d"),
        ("00ff12", r"\d\d[a-f][a-f]\d\d"),
        ("my-request", "[a-z]{2}-[a-z]{7}"),
        ("", ""),
    ],
)
def test_other_request_id_has_the_same_form(text, pattern):
    assert re.fullmatch(pattern, other_request_id(text))
    assert len({other_request_id(text) for _ in range(20)}) > 1 or not text
