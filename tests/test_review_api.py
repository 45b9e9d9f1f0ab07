"""The JSON interface beside the review page: what programs may do with a reviewer's token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from review_helpers import N_CLASSES, client_of, log_in, picture, workspace_of
from starlette.testclient import TestClient

from guard.errors import QueueUnavailable
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.review.workspace import Workspace


@pytest.fixture
def queue(sqlite_template: Path, tmp_path: Path) -> Iterator[Queue]:
    shutil.copy(sqlite_template, tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as opened:
        opened.enqueue([picture(number) for number in range(4)])
        yield opened


@pytest.fixture
def workspace(queue: Queue) -> Workspace:
    return workspace_of(queue)


@pytest.fixture
def robot(workspace: Workspace) -> TestClient:
    return program(workspace, "robot")


def program(workspace: Workspace, name: str, role: str = "reviewer") -> TestClient:
    client = client_of(workspace)
    client.headers["Authorization"] = f"Bearer {workspace.reviewers.add(name, role)}"
    return client


def test_program_claims_looks_decides_and_undoes(workspace, robot):
    items = robot.get("/api/v1/items/next", params={"n": 2}).json()["items"]
    assert [item["id"] for item in items] == [1, 2]
    first = items[0]
    assert (first["request_id"], first["suspect_label"], first["backup_label"]) == ("request-0", 3, 5)
    assert first["class_names"] == [str(label) for label in range(N_CLASSES)]
    assert robot.get(first["image"]).headers["content-type"] == "image/png"
    saved = robot.post("/api/v1/items/1/decision", json={"is_poisoned": True, "true_label": 4}).json()
    assert (saved["item"], saved["is_poisoned"], saved["true_label"], saved["reviewer"]) == (1, True, 4, "robot")
    assert robot.get("/api/v1/items/1").json()["state"] == "decided"
    assert robot.get("/api/v1/counts").json()["by_state"]["decided"] == 1
    assert robot.post("/api/v1/undo").json() == {"item": 1, "state": "claimed"}
    assert robot.post("/api/v1/items/2/skip").json() == {"skipped": 2}
    assert workspace.queue.get(2).state is State.PENDING


def test_several_answers_are_saved_together_or_not_at_all(workspace, robot):
    robot.get("/api/v1/items/next", params={"n": 2})
    answers = [{"item": item, "is_poisoned": False, "true_label": 3} for item in (1, 2)]
    wrong = [*answers, {"item": 3, "is_poisoned": False, "true_label": 3}]
    workspace.queue.claim_items("bob", [3])
    response = robot.post("/api/v1/decisions", json={"answers": wrong})
    assert response.status_code == 409
    assert "bob has it" in response.json()["error"]
    assert workspace.queue.decisions() == []
    assert len(robot.post("/api/v1/decisions", json={"answers": answers}).json()["decisions"]) == 2


def test_no_more_items_is_an_empty_list(robot):
    assert len(robot.get("/api/v1/items/next", params={"n": 200}).json()["items"]) == 4
    assert robot.get("/api/v1/items/next").json() == {"items": []}


@pytest.mark.parametrize(
    ("path", "body", "status", "answer"),
    [
        ("/api/v1/items/1/decision", {"is_poisoned": True, "true_label": N_CLASSES}, 422, "true_label must be in"),
        ("/api/v1/items/99/decision", {"is_poisoned": True}, 410, "no item 99"),
        ("/api/v1/items/1/decision", {"is_poisoned": "maybe"}, 422, "body.is_poisoned"),
        ("/api/v1/items/1/decision", {"is_poisoned": True, "label": 1}, 422, "body.label"),
        ("/api/v1/retrain", {"model": "digits"}, 403, "only an admin"),
    ],
)
def test_bad_request_is_one_line_of_json(robot, path, body, status, answer):
    robot.get("/api/v1/items/next", params={"n": 1})
    response = robot.post(path, json=body)
    assert response.status_code == status
    assert answer in response.json()["error"]


@pytest.mark.parametrize("n", [0, 201, "many"])
def test_number_of_items_has_limits(robot, n):
    assert robot.get("/api/v1/items/next", params={"n": n}).status_code == 422


def test_admin_program_asks_for_a_retraining_of_a_known_model(workspace):
    root = program(workspace, "root", "admin")
    assert root.post("/api/v1/retrain", json={"model": "letters"}).status_code == 422
    assert root.post("/api/v1/retrain", json={"model": "digits"}).json() == {"requested": "digits"}
    assert workspace.rounds.take_request("digits") == "root"


def test_session_cookie_does_not_open_the_interface(workspace):
    """So that no other site can use it through somebody's browser."""
    ada = log_in(workspace)
    response = ada.get("/api/v1/counts")
    assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")


def test_wrong_tokens_are_limited(workspace):
    client = client_of(workspace)
    client.headers["Authorization"] = "Bearer wrong"
    assert [client.get("/api/v1/counts").status_code for _ in range(6)] == [401] * 5 + [429]
    del client.headers["Authorization"]
    assert client.get("/api/v1/counts").status_code == 401


def test_page_says_that_it_is_healthy_and_what_is_wrong_if_not(workspace, monkeypatch):
    anybody = client_of(workspace)
    reply = anybody.get("/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok"})

    def away(_: object) -> None:
        raise QueueUnavailable("the queue does not answer.")

    monkeypatch.setattr(type(workspace.rounds), "models", away)
    reply = anybody.get("/healthz")
    assert (reply.status_code, reply.json()) == (503, {"error": "the queue does not answer."})
    assert reply.headers["retry-after"] == "5"


def test_interface_is_described_as_it_is(robot, workspace):
    described = client_of(workspace).get("/api/v1/openapi.json").json()
    assert described["openapi"].startswith("3.")
    docs = (Path(__file__).resolve().parent.parent / "docs" / "review.md").read_text()
    for path, calls in described["paths"].items():
        for method, call in calls.items():
            assert f"{method.upper()} {path.replace('item_id', 'id')}" in docs, path
            assert call["summary"]
            assert {"401", "409", "410", "422", "503"} <= call["responses"].keys()
    assert described["security"] == [{"token": []}]
    assert robot.get("/api/v1/items/99").json().keys() == {"error"}  # as every error is described
    assert described["paths"]["/api/v1/decisions"]["post"]["requestBody"]["required"]


def test_pages_for_people_are_described_to_nobody(robot):
    assert {robot.get(path).status_code for path in ("/docs", "/redoc", "/openapi.json")} == {404}
