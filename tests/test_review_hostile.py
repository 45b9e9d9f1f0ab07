"""Every route of the review page with values that no honest client sends: an answer below 500, never a crash."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from review_helpers import client_of, in_one_loop, log_in, picture, workspace_of
from starlette.testclient import TestClient

from guard.errors import QueueError
from guard.relabel.queue import Queue
from guard.review.workspace import Workspace

#: Beyond 64 bits, digits that `int` does not read, half characters, NUL, and what is no number at all.
NUMBERS = (
    "0",
    "-1",
    str(2**63),
    str(-(2**63) - 1),
    "9" * 25,
    "9" * 5000,
    "²",
    "٣",
    "1e9",
    "NaN",
    "Infinity",
    "0x1",
    "1_0",
)
TEXTS = ("", "\0", "a\0b", "\ufffe", "²", "'\"><script>", "x" * 5000, "../../etc/passwd")
DEEP = '{"a":' * 100_000
BODIES = (
    DEEP,
    "[" * 100_000,
    "[" * 900 + "]" * 900,
    '{"is_poisoned": true, "true_label": ' + "9" * 5000 + "}",
    f'{{"is_poisoned": true, "true_label": {2**70}}}',
    '{"is_poisoned": true, "true_label": NaN}',
    '{"is_poisoned": true, "true_label": 1e400}',
    '{"is_poisoned": true, "true_label": "\\u00b2"}',
    '{"is_poisoned": true, "note": "\\ud800"}',
    '{"is_poisoned": true, "note": "\\u0000"}',
    '{"is_poisoned": true, "\\ud800": 1}',
    f'{{"answers": [{{"item": {2**70}, "is_poisoned": true}}]}}',
    '{"answers": [{"item": 1, "is_poisoned": true, "note": "\\ud800"}]}',
    '{"answers": [{"item": -9223372036854775808, "is_poisoned": true}]}',
    '{"model": "\\ud800"}',
    '{"model": "\\u0000"}',
    "null",
    "",
)


@pytest.fixture
def workspace(queue_url: str) -> Iterator[Workspace]:
    with Queue.open(queue_url) as queue:
        queue.enqueue([picture(number) for number in range(3)])
        yield workspace_of(queue)


@pytest.fixture
def root(workspace: Workspace) -> TestClient:
    return unbroken(log_in(workspace, "root", "admin"))


def unbroken(client: TestClient) -> TestClient:
    """Return a client that gets a 500 as a browser would, and not the exception itself."""
    plain = in_one_loop(
        TestClient(client.app, base_url=str(client.base_url), follow_redirects=False, raise_server_exceptions=False)
    )
    plain.cookies.update(client.cookies)
    plain.headers.update(client.headers)
    return plain


def routes(client: TestClient) -> list[tuple[str, APIRoute]]:
    """Return every route of the application, also of the routers that it holds."""
    found: list[APIRoute] = []
    to_look_at: list[Any] = list(client.app.routes)
    while to_look_at:
        entry = to_look_at.pop()
        if isinstance(entry, APIRoute):
            found.append(entry)
        else:
            to_look_at += getattr(getattr(entry, "original_router", None), "routes", [])
    assert len(found) > 35
    return [(method, entry) for entry in found for method in sorted(entry.methods)]


def send(client: TestClient, method: str, path: str, **more: Any) -> None:
    response = client.request(method, path, **more)
    assert response.status_code < 500, (method, path[:80], str(more)[:200], response.status_code)
    if response.status_code >= 400 and path.startswith("/api/") and "json" in response.headers["content-type"]:
        assert "\n" not in response.json()["error"]


def filled(route: APIRoute, value: str) -> str:
    path = route.path
    for name in route.param_convertors:
        path = path.replace(f"{{{name}}}", value)
    return path


def authorised(workspace: Workspace, client: TestClient) -> TestClient:
    client.headers["Authorization"] = f"Bearer {workspace.reviewers.add('chief', 'admin')}"
    return client


def test_every_route_answers_hostile_paths_and_queries(workspace, root):
    authorised(workspace, root)
    seen = 0
    for method, route in routes(root):
        if route.path == "/logout":
            continue
        for value in (*NUMBERS[1:4], *NUMBERS[5:8]) if route.param_convertors else ("",):
            send(root, method, filled(route, value))
            seen += 1
        for name in {"order", "group", "page", "n", "view", "span", "model", "what", "file_format"}:
            for value in (*NUMBERS[2:3], *NUMBERS[5:7], TEXTS[1]):
                if method == "GET" and any(name == query_param.name for query_param in route.dependant.query_params):
                    send(root, method, filled(route, "1"), params={name: value})
                    seen += 1
    assert seen > 150


def test_every_form_answers_hostile_fields(workspace, root):
    fields = ("item", "group", "include", "verdict", "true_label", "rule", "group_label", "order", "model", "name")
    fields += ("role", "reviewer", "active", "target", "advance", "label_1", "verdict_1", "csrf", "token")
    good = {"verdict": "poisoned", "true_label": "4", "include": "1", "rule": "one", "group_label": "4", "name": "eve"}
    read = {"/groups/{group}/decisions": "include", "/admin/gold": "item", "/next": "group"}
    read |= {"/items/{item_id}/decision": "true_label", "/answers/{decision_id}/change": "true_label"}
    for method, route in routes(root):
        if method != "POST" or route.path.startswith("/api/") or route.path in ("/logout", "/login"):
            continue
        for value in ("²", "\0", str(2**63)):
            send(root, method, filled(route, "1"), data=dict.fromkeys(fields, value))
        for value in NUMBERS if route.path in read else ():
            send(root, method, filled(route, "1"), data=good | {read[route.path]: value})
    plain = unbroken(client_of(workspace))
    for value in TEXTS:
        send(plain, "POST", "/login", data={"name": value, "token": value})


@pytest.mark.parametrize(
    "kind",
    [
        "multipart/form-data; boundary=x; charset=undefined",
        "multipart/form-data; boundary=x; charset=unicode_escape",
        "multipart/form-data; boundary=x; charset=idna",
        "multipart/form-data; boundary=x; charset=utf-16",
        "multipart/form-data; boundary=x; charset=a\0b",
        "multipart/form-data",
        "multipart/form-data; boundary=" + "x" * 5000,
        "application/json",
        "text/plain; charset=undefined",
    ],
)
def test_form_in_a_hostile_encoding_is_refused(workspace, root, kind):
    body = b'--x\r\nContent-Disposition: form-data; name="true_label"\r\n\r\n\\ud800\xff\r\n--x--\r\n'
    for path in ("/items/1/decision", "/login", "/admin/import", "/groups/1/decisions"):
        send(root, "POST", path, content=body, headers={"Content-Type": kind})
    assert workspace.queue.decisions() == []


def test_every_json_route_answers_hostile_bodies(workspace, root):
    authorised(workspace, root)
    root.get("/api/v1/items/next")
    for method, route in routes(root):
        if method == "POST" and route.path.startswith("/api/"):
            for body in BODIES:
                send(root, method, filled(route, "1"), content=body, headers={"Content-Type": "application/json"})
    assert all("\0" not in decision.note for decision in workspace.queue.decisions())


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://["},
        {"Origin": "http://[::1"},
        {"Content-Length": "9" * 5000},
        {"Content-Length": "²".encode("latin-1")},
        {"Cookie": b"guard_session=\xff\xfe; guard_order=\xff"},
        {"Cookie": 'guard_session="\\377\\000"'},
        {"Authorization": b"Bearer \xff\xfe"},
        {"X-CSRF-Token": b"\xff\xfe"},
    ],
)
def test_hostile_headers_are_refused(workspace, root, headers):
    for method, path in (("POST", "/login"), ("POST", "/undo"), ("GET", "/review"), ("GET", "/api/v1/counts")):
        send(root, method, path, headers=headers)


def test_hostile_files_are_refused_with_one_line(workspace, root):
    files = (b"[" * 100_000, b"\xff\xfe\x00", b"item,verdict,true_label\n\xc2\xb2,poisoned,4\n", b"", b"\0" * 1000)
    for data in files:
        response = root.post(
            "/admin/import", data={"reviewer": "root"}, files={"file": ("'\"><script>alert(1)</script>", data)}
        )
        assert response.status_code in (200, 422)
        assert "<script>alert" not in response.text


def test_queue_refuses_what_its_database_cannot_hold(workspace):
    for item_id in (2**63, 2**70, -(2**70)):
        with pytest.raises(QueueError):
            workspace.queue.decide("ana", item_id, is_poisoned=True, true_label=1)
    workspace.queue.claim_items("ana", [1])
    for note in ("\ud800", *(() if workspace.queue.database.is_sqlite else ("\0",))):
        with pytest.raises(QueueError):
            workspace.queue.decide("ana", 1, is_poisoned=True, true_label=1, note=note)


def test_flagged_input_with_hostile_names_is_kept(workspace):
    """What a client names itself must not cost the evidence of its whole batch."""
    evil = "a\0b\ud800"
    done = workspace.queue.enqueue([picture(8), picture(9, request_id=evil, content_type=evil, reason=evil)])
    assert None not in done.ids
    assert workspace.queue.get(done.ids[1]).input.request_id == "a\\x00b\\ud800"


def test_page_remembers_no_model_that_a_browser_made_up(queue_url, root, workspace):
    requested: list[str | None] = []

    class Source:
        def history(self, span: Any, model: str | None, now: float) -> Any:
            from guard.review.status.history import History

            requested.append(model)
            return History(span=span, edges=span.edges(now), models=("digits",))

        def start(self) -> None: ...

        def stop(self) -> None: ...

    client = log_in(workspace_of(workspace.queue, metrics=Source()), "ada")
    for model in ("digits", "x" * 100, "'}", ""):
        assert client.get("/status", params={"model": model}).status_code == 200
    assert set(requested) == {None, "digits"}
