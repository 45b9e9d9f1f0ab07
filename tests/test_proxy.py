"""The proxy before an upstream of this process: what it judges, what it lets through, and what nobody gets past it."""

from __future__ import annotations

import asyncio
import copy
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from conftest import Exported
from proxy_helpers import INFER, MODEL, FakeUpstream, counted, in_thread, proxied, reply, request_of

from guard import Guard, SuspectModel
from guard.errors import BundleError, ConfigError, ExportError, ServerError
from guard.export.record import ExportRecord
from guard.lab.attacks import MnistCnn, Poisoned
from guard.proxy.exported_guard import ExportedGuard
from guard.proxy.messages import read_answer
from guard.proxy.model import ProxiedModel
from guard.proxy.routes import Routes
from guard.proxy.upstream import Upstream
from guard.serving.guarded_model import GuardedModel
from guard.storage.bundle import BundleStore

Site = tuple[httpx.Client, ProxiedModel]
Make = Callable[..., Site]


@pytest.fixture(scope="session")
def record(exported: Exported) -> ExportRecord:
    return ExportRecord.read(exported.folder)


@pytest.fixture
def upstream(record: ExportRecord, suspect: SuspectModel, fitted_guard: Guard) -> FakeUpstream:
    return FakeUpstream(suspect, record)


@pytest.fixture
def make(upstream: FakeUpstream, exported: Exported) -> Iterator[Make]:
    with ExitStack() as opened:

        def build(serving: dict[str, Any] | None = None, **settings: Any) -> Site:
            behind = opened.enter_context(in_thread(upstream, lifespan="off"))
            port, model = opened.enter_context(proxied(behind, upstream.record, exported.bundles, serving, **settings))
            client = opened.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, verify=False))
            upstream.seen.clear()
            upstream.peers.clear()
            return client, model

        yield build


@pytest.fixture(scope="module")
def mixed(triggered: Poisoned, clean_split: Any, fitted_guard: Guard) -> Any:
    """One triggered image between two clean ones that the guard passes."""
    passed = [v.is_poisoned for v in fitted_guard.inspect(clean_split.test.images[:20])]
    clean = clean_split.test.images[:20][~np.array(passed)]
    return np.stack([clean[0], triggered.images[0], clean[1]])


def outputs_of(reply: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in reply.json()["outputs"]}


def binary_request(images: Any, **more: Any) -> tuple[bytes, dict[str, str]]:
    """Return body and headers of a request with a binary tensor."""
    entry = {"name": "input", "datatype": "FP32", "shape": list(images.shape)}
    entry["parameters"] = {"binary_data_size": images.nbytes}
    text = json.dumps({"inputs": [entry], **more}).encode()
    return text + images.astype("<f4").tobytes(), {"Inference-Header-Content-Length": str(len(text))}


# -- inference ----------------------------------------------------------------------------------------------------


def test_rows_are_judged_as_in_this_process(
    make: Make, upstream: FakeUpstream, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:3], clean_split.test.images[:5]])
    verdicts = fitted_guard.inspect(images)
    upstream.parameters = {"cached": True, "guard_verdict": "clean"}
    client, model = make()
    answer = client.post(INFER, json=request_of(images, id="seven", parameters={"priority": 3, "content_type": "pd"}))
    assert (answer.status_code, answer.json()["id"], answer.json()["model_version"]) == (200, "seven", "7")
    outputs = outputs_of(answer)
    assert [*outputs] == ["logits", "guard_verdict", "guard_p_value"]
    assert outputs["guard_verdict"] == ["poisoned" if verdict.is_poisoned else "clean" for verdict in verdicts]
    np.testing.assert_allclose(outputs["guard_p_value"], [verdict.p_value for verdict in verdicts], atol=1e-4)
    sent = json.loads(upstream.seen[-1][3])
    assert (sent["id"], sent["parameters"]) == ("seven", {"priority": 3})
    assert [entry["name"] for entry in sent["outputs"]] == [*upstream.record.outputs]
    assert (answer.json()["parameters"]["cached"], answer.json()["parameters"]["guard_verdict"]) == (True, "poisoned")
    assert answer.headers["x-upstream"] == "yes"
    assert "guard-verdict" not in answer.headers  # of several rows, and the upstream's own is none
    assert sum(counted(model).values()) == 8


def test_one_row_has_the_headers_of_the_local_engine(make: Make, triggered: Poisoned) -> None:
    client, _ = make()
    answer = client.post(f"{MODEL}/versions/7/infer", json=request_of(triggered.images[:1]))
    assert [value for name, value in answer.headers.multi_items() if name == "guard-verdict"] == ["poisoned"]
    assert (answer.headers["guard-action"], len(answer.headers["guard-bundle"])) == ("flag", 64)
    assert client.post(f"{MODEL}/versions/8/infer", json=request_of(triggered.images[:1])).status_code == 404


@pytest.mark.parametrize("extensions", [[], ["binary_tensor_data"]])
def test_client_gets_what_it_asked_for_in_the_form_it_asked_for(
    make: Make, upstream: FakeUpstream, mixed: Any, extensions: list[str]
) -> None:
    upstream.extensions = extensions
    client, _ = make()
    plain = outputs_of(client.post(INFER, json=request_of(mixed)))
    assert [*outputs_of(client.post(INFER, json=request_of(mixed, outputs=[{"name": "logits"}])))] == ["logits"]
    assert (b"inference-header-content-length" in dict(upstream.seen[-1][2])) == bool(extensions)
    wanted = [{"name": "guard_p_value"}, {"name": "logits", "parameters": {"binary_data": True}}]
    body, headers = binary_request(mixed, outputs=wanted)
    answer = client.post(INFER, content=body, headers=headers)
    length = int(answer.headers["inference-header-content-length"])
    logits, p_values = json.loads(answer.content[:length])["outputs"]
    np.testing.assert_allclose(np.frombuffer(answer.content[length:], "<f4"), plain["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(p_values["data"], plain["guard_p_value"], atol=1e-3)
    assert "data" not in logits


def test_large_request_goes_to_the_upstream_in_parts_and_every_row_is_judged(
    make: Make, upstream: FakeUpstream, clean_split: Any, fitted_guard: Guard
) -> None:
    upstream.extensions = ["binary_tensor_data"]
    client, model = make()
    images = clean_split.test.images[:500]
    body, headers = binary_request(images, outputs=[{"name": "guard_p_value"}])
    p_values = outputs_of(client.post(INFER, content=body, headers=headers))["guard_p_value"]
    np.testing.assert_allclose(p_values, [verdict.p_value for verdict in fitted_guard.inspect(images)], atol=1e-4)
    assert sum(counted(model).values()) == 500


def test_features_are_told_to_nobody(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, _ = make()
    assert "guard_features" not in client.get(MODEL).text
    assert [entry["name"] for entry in client.get(MODEL).json()["outputs"]] == [
        "logits",
        "guard_verdict",
        "guard_p_value",
    ]
    answer = client.post(INFER, json=request_of(mixed, outputs=[{"name": "guard_features_0"}]))
    assert (answer.status_code, "there is no output 'guard_features_0'" in answer.json()["error"]) == (400, True)
    for parameters in ({"classification": 2}, {"shared_memory_region": "r", "shared_memory_byte_size": 40}):
        asked = request_of(mixed, outputs=[{"name": "logits", "parameters": parameters}])
        assert client.post(INFER, json=asked).status_code == 400
    assert [target for _, target, _, _ in upstream.seen if target.endswith(b"infer")] == []


def test_blocked_rows_leave_in_no_output(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    upstream.more = {"probabilities": lambda n: np.full((n, 2), 0.5, np.float32)}
    client, model = make({"action": "block"})
    outputs = outputs_of(client.post(INFER, json=request_of(mixed)))
    assert outputs["guard_verdict"] == ["clean", "poisoned", "clean"]
    assert outputs["probabilities"] == [0.5, 0.5, None, None, 0.5, 0.5]
    assert outputs["logits"][10:20] == [None] * 10
    assert None not in outputs["logits"][:10] + outputs["logits"][20:]
    alone = client.post(INFER, json=request_of(mixed[1:2]))
    assert (alone.status_code, alone.headers["guard-verdict"], "logits" in alone.text) == (422, "poisoned", False)
    assert counted(model) == {"clean": 2, "poisoned": 2}


def test_relabelled_rows_have_the_second_opinion_that_a_network_here_would_give(
    make: Make, upstream: FakeUpstream, mixed: Any, badnet: MnistCnn, exported: Exported
) -> None:
    upstream.more = {"probabilities": lambda n: np.full((n, 1), 0.5, np.float32)}
    client, _ = make({"action": "relabel"})
    outputs = outputs_of(client.post(INFER, json=request_of(mixed)))
    with GuardedModel(copy.deepcopy(badnet), bundles=exported.bundles, action="relabel") as here:
        answers = here.answer(mixed)
    assert [answer.action for answer in answers] == ["none", "relabel", "none"]
    expected = np.concatenate([answer.logits for answer in answers if answer.logits is not None])
    np.testing.assert_allclose(outputs["logits"], expected, rtol=1e-4, atol=1e-4)
    assert outputs["probabilities"] == [0.5, None, 0.5]  # they are those of the answer that was replaced


@pytest.mark.parametrize("failure_mode", ["closed", "open"])
def test_input_that_is_not_finite_is_rejected_and_spoils_no_other(
    make: Make, upstream: FakeUpstream, mixed: Any, failure_mode: str
) -> None:
    images = mixed.copy()
    images[0, 0, 3, 3], images[2, 0, 4, 4] = np.nan, np.inf
    client, model = make({"failure_mode": failure_mode})
    body, headers = binary_request(images)
    answer = client.post(INFER, content=body, headers=headers)
    outputs = outputs_of(answer)
    assert outputs["guard_verdict"] == ["rejected", "poisoned", "rejected"]
    assert [outputs["logits"][row * 10] is None for row in range(3)] == [True, False, True]
    assert counted(model) == {"rejected": 2, "poisoned": 1}
    body, headers = binary_request(images[:1])
    alone = client.post(INFER, content=body, headers=headers)
    assert (alone.status_code, alone.json()["error"]) == (422, "the input holds NaN or infinity.")


def test_request_that_is_none_is_refused_before_the_upstream_hears_of_it(
    make: Make, upstream: FakeUpstream, mixed: Any
) -> None:
    client, model = make(max_body_bytes=40_000)
    for change in ({"name": "image"}, {"datatype": "FP64"}, {"shape": [3, 784]}, {"shape": [1, 1, 28, 28]}):
        asked = request_of(mixed)
        asked["inputs"][0].update(change)
        assert client.post(INFER, json=asked).status_code == 400
    assert client.post(INFER, content=b"x" * 40_001).status_code == 413
    assert client.post(INFER, content=(b"x" * 1000 for _ in range(41))).status_code == 413
    assert client.post(INFER, content=b"{}", headers={"Content-Encoding": "gzip"}).status_code == 415
    assert client.get(INFER).status_code == 405
    assert counted(model) == {"rejected": 7}
    assert upstream.seen == []


# -- upstreams that fail or lie -------------------------------------------------------------------------------------

LIES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "a feature is missing": lambda outputs: {name: a for name, a in outputs.items() if name != "guard_features_2"},
    "features are NaN": lambda outputs: {**outputs, "guard_features_0": outputs["guard_features_0"] * np.nan},
    "features are infinite": lambda outputs: {**outputs, "guard_features_1": outputs["guard_features_1"] + np.inf},
    "features are narrower": lambda outputs: {**outputs, "guard_features_0": outputs["guard_features_0"][:, 1:]},
    "features have another type": lambda outputs: {
        **outputs,
        "guard_features_0": outputs["guard_features_0"].astype(np.float64),
    },
    "features have fewer rows": lambda outputs: {**outputs, "guard_features_3": outputs["guard_features_3"][1:]},
    "features have more rows": lambda outputs: {
        **outputs,
        "guard_features_3": np.repeat(outputs["guard_features_3"], 2, axis=0),
    },
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("failure_mode", ["closed", "open"])
def test_answer_that_cannot_be_judged_is_never_clean(
    make: Make, upstream: FakeUpstream, mixed: Any, lie: str, failure_mode: str
) -> None:
    upstream.lie = LIES[lie]
    client, model = make_probed_before(make, upstream, {"failure_mode": failure_mode})
    answer = client.post(INFER, json=request_of(mixed))
    if failure_mode == "closed":
        assert answer.status_code in (500, 502)
        assert "logits" not in answer.text
        assert counted(model) == {"failed": 3}
    else:
        assert outputs_of(answer)["guard_verdict"] == ["bypassed"] * 3
        assert answer.json()["parameters"]["guard_verdict"] == "bypassed"
        assert counted(model) == {"bypassed": 3}


def make_probed_before(make: Make, upstream: FakeUpstream, *arguments: Any, **settings: Any) -> Site:
    """Return a proxy that has started before an upstream which told the truth then."""
    lie, instead = upstream.lie, upstream.instead
    upstream.lie = upstream.instead = None
    site = make(*arguments, **settings)
    upstream.lie, upstream.instead = lie, instead
    return site


@pytest.mark.parametrize(
    ("lie", "status"),
    [
        (lambda outputs: {name: array for name, array in outputs.items() if name != "logits"}, 502),
        (lambda outputs: {name: array[1:] for name, array in outputs.items()}, 502),
        (lambda outputs: {**outputs, "logits": outputs["logits"][:, :3]}, 502),
        (lambda outputs: {**outputs, "logits": np.array([["a"] * 10] * 3)}, 502),
    ],
)
def test_logits_that_are_none_leave_under_no_setting(
    make: Make, upstream: FakeUpstream, mixed: Any, lie: Any, status: int
) -> None:
    upstream.lie = lie
    client, model = make_probed_before(make, upstream, {"failure_mode": "open"})
    answer = client.post(INFER, json=request_of(mixed))
    assert (answer.status_code, [*answer.json()]) == (status, ["error"])
    assert counted(model) == {"failed": 3}


def answering(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> Any:
    async def instead(_scope: Any, _receive: Any, send: Any) -> None:
        await reply(send, status, body, headers)

    return instead


@pytest.mark.parametrize(
    ("instead", "status", "verdict"),
    [
        (answering(429, b'{"error": "slow down"}', (b"retry-after", b"9")), 429, "rejected"),
        (answering(500, b"<html>oh</html>", (b"content-type", b"text/html")), 500, "failed"),
        (answering(503, b""), 503, "failed"),
        (answering(201, b'{"outputs": [{"name": "logits"}]}'), 502, "failed"),
        (answering(302, b"", (b"location", b"http://127.0.0.1:1/v2/models/digits/infer")), 502, "failed"),
        (answering(200, b""), 502, "failed"),
        (answering(200, b"[" * 5000), 502, "failed"),
        (answering(200, b'{"outputs": {"logits": 1}}'), 502, "failed"),
        (answering(200, b'{"outputs": [1]}'), 502, "failed"),
        (answering(200, b"{}", (b"inference-header-content-length", b"-1")), 502, "failed"),
        (answering(200, b"{}", (b"content-encoding", b"gzip")), 502, "failed"),
        (answering(200, b" " * 200_000), 502, "failed"),
    ],
)
def test_errors_of_the_upstream_go_through_and_what_is_no_answer_is_one(
    make: Make, upstream: FakeUpstream, mixed: Any, instead: Any, status: int, verdict: str
) -> None:
    upstream.instead = instead
    client, model = make_probed_before(make, upstream, max_body_bytes=150_000)
    answer = client.post(INFER, json=request_of(mixed))
    assert (answer.status_code, counted(model)) == (status, {verdict: 3})
    assert "location" not in answer.headers
    if status == 429:
        assert (answer.content, answer.headers["retry-after"]) == (b'{"error": "slow down"}', "9")
    if status == 500:
        assert (answer.content, answer.headers["content-type"]) == (b"<html>oh</html>", "text/html")


def test_upstream_that_is_slow_or_breaks_off_is_given_up(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, model = make(timeout_s=0.4)

    async def slow(_scope: Any, _receive: Any, send: Any) -> None:
        await asyncio.sleep(3)

    async def trickling(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(20):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)

    async def breaking(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"{", "more_body": True})

    for instead, status in ((slow, 504), (trickling, 504), (breaking, 502)):
        upstream.instead = instead
        started = time.monotonic()
        answer = client.post(INFER, json=request_of(mixed[:1]))
        assert (answer.status_code, [*answer.json()]) == (status, ["error"])
        assert time.monotonic() - started < 2
    assert counted(model) == {"failed": 3}


def test_failure_of_the_guard_itself_lets_nothing_out(make: Make, mixed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    client, model = make({"failure_mode": "open"})
    monkeypatch.setattr("guard.proxy.model.relabelled", lambda *_: 1 / 0)
    answer = client.post(INFER, json=request_of(mixed))
    assert (answer.status_code, answer.json()) == (500, {"error": "the guard failed on this input."})
    assert counted(model) == {"failed": 3}


def test_client_that_leaves_takes_its_request_with_it(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, model = make()
    begun, gone = threading.Event(), threading.Event()

    async def waiting(_scope: Any, receive: Any, _send: Any) -> None:
        begun.set()
        if (await receive())["type"] == "http.disconnect":
            gone.set()

    upstream.instead = waiting
    body = json.dumps(request_of(mixed[:1])).encode()
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as connection:
        connection.sendall(
            b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (INFER.encode(), len(body)) + body
        )
        assert begun.wait(10)
    assert gone.wait(10)
    until = time.monotonic() + 10
    while not (found := counted(model)) and time.monotonic() < until:
        time.sleep(0.01)
    assert found == {"rejected": 1}


def test_requests_beyond_the_limit_are_told_to_come_again(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, model = make(max_requests=2)
    release = threading.Event()

    async def held(scope: Any, receive: Any, send: Any) -> None:
        while not release.is_set():
            await asyncio.sleep(0.01)
        await reply(send, 503, b"{}")

    upstream.instead = held
    asking = [threading.Thread(target=client.post, args=(INFER,), kwargs={"json": request_of(mixed)}) for _ in range(2)]
    for thread in asking:
        thread.start()
    until = time.monotonic() + 10
    while len(upstream.seen) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    for path in (INFER, "/echo"):
        answer = client.post(path, json=request_of(mixed))
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert client.get("/v2/health/ready").status_code == 404  # the upstream's own word
    release.set()
    for thread in asking:
        thread.join()
    assert client.post("/echo", content=b"x").status_code == 200
    assert counted(model) == {"failed": 6}


# -- what goes through ----------------------------------------------------------------------------------------------


def test_other_routes_go_through_byte_for_byte(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make(max_body_bytes=1000)
    body = bytes(range(256)) * 20_000  # larger than any inference request may be
    headers = {"X-Own": "ü", "Accept-Encoding": "br", "Cookie": "a=b", "Authorization": "Basic eA==", "TE": "trailers"}
    sent = {**{name: value.encode() for name, value in headers.items()}, "Connection": b"X-Hop", "X-Hop": b"1"}
    connection = http.client.HTTPConnection("127.0.0.1", client.base_url.port)
    connection.request("PATCH", "/echo/a%2Fb%20c//d/../e?x=%41&y", body, sent)
    assert connection.getresponse().read() == body
    connection.close()
    method, target, seen, got = upstream.seen[-1]
    assert (method, target, got) == ("PATCH", b"/echo/a%2Fb%20c//d/../e?x=%41&y", body)
    known = dict(seen)
    assert {name: known[name.lower().encode()].decode() for name in headers if name != "TE"} == {
        name: value for name, value in headers.items() if name != "TE"
    }
    assert not {b"te", b"x-hop"} & known.keys()
    assert known[b"host"].startswith(b"127.0.0.1:")
    assert known[b"content-length"] == str(len(body)).encode()
    with client.stream("POST", "/echo", content=(b"%d" % number for number in range(1000))) as streamed:
        assert b"".join(streamed.iter_raw()) == b"".join(b"%d" % number for number in range(1000))
        assert streamed.headers.get_list("x-twice") == ["1", "2"]
        assert streamed.headers["content-encoding"] == "gzip"  # passed on as it is, unpacked by nobody
    assert b"content-length" not in dict(upstream.seen[-1][2])


def test_messages_without_a_body_and_headers_of_every_kind(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make()
    port = client.base_url.port or 0
    upstream.plain = (304, b"", [(b"etag", b'"1"'), (b"x-latin", b"\xe9")])
    answer = client.get("/plain", headers={"If-None-Match": '"1"'})
    assert (answer.status_code, answer.headers["etag"], answer.content) == (304, '"1"', b"")
    assert (b"x-latin", b"\xe9") in [(name.lower(), value) for name, value in answer.headers.raw]
    assert client.head("/echo").headers["content-encoding"] == "gzip"
    seen = len(upstream.seen)
    assert raw(port, b"GET /plain HTTP/1.1\r\nHost: x\r\nX: \xe9\r\n\r\n")[0].split()[1] == b"400"
    assert raw(port, b"GET /pl\xc3\xa9 HTTP/1.1\r\nHost: x\r\n\r\n")[0].split()[1] == b"400"
    assert len(upstream.seen) == seen
    assert raw(port, b"GET /plain HTTP/1.0\r\n\r\n")[0].split()[1] == b"304"


def test_client_that_does_not_read_or_write_on_is_given_up(make: Make, upstream: FakeUpstream) -> None:
    client, model = make(timeout_s=0.5)
    upstream.plain = (200, bytes(64 << 20), [])
    port = client.base_url.port or 0
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /plain HTTP/1.1\r\nHost: x\r\n\r\n")
        until = time.monotonic() + 10
        while not upstream.is_broken_off and time.monotonic() < until:
            time.sleep(0.01)
    assert upstream.is_broken_off
    assert raw(port, b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx", 3)[0].split()[1] == b"408"
    half = b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx" % INFER.encode()
    assert raw(port, half, 3)[0].split()[1] == b"408"
    assert raw(port, half, 0.1) == []  # gone before its time is over
    rejected, until = 0.0, time.monotonic() + 10
    while rejected < 2 and time.monotonic() < until:
        rejected += counted(model).get("rejected", 0.0)
        time.sleep(0.01)
    assert rejected == 2


def test_stream_comes_as_it_is_sent_and_ends_when_its_client_leaves(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make()
    with client.stream("GET", "/stream") as streamed:
        parts = streamed.iter_raw()
        assert (streamed.status_code, next(parts)[:2]) == (203, b"0;")
    until = time.monotonic() + 10
    while not upstream.is_broken_off and time.monotonic() < until:
        time.sleep(0.01)
    assert upstream.is_broken_off


def test_connections_are_kept_on_both_sides(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, _ = make()
    for _ in range(5):
        client.post(INFER, json=request_of(mixed))
        client.post("/echo", content=b"x")
    assert len(client._transport._pool.connections) == 1  # type: ignore[attr-defined]
    assert len(upstream.peers) == 1


def test_nothing_else_goes_through_where_only_the_model_shall(make: Make) -> None:
    client, _ = make(only=True)
    assert [
        client.get(path).status_code for path in ("/v2", MODEL, "/v2/health/ready", "/echo", "/v2/models/other")
    ] == [
        200,
        200,
        404,
        403,
        403,
    ]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/v2/models/digits/infer", "infer"),
        ("/v2/models/digits/versions/1/infer", "infer"),
        ("/v2/models/digits", "metadata"),
        ("/v2/models/digits/ready", "about"),
        ("/v2/models/digits2/infer", "plain"),
        ("/v2/models/other/infer", "plain"),
        ("/v2/models/digits/infer/", "unguarded"),
        ("/v2/models/digits//infer", "unguarded"),
        ("/v2/models/digits/./infer", "unguarded"),
        ("/v2/models/x/../digits/infer", "unguarded"),
        ("//v2/models/digits/infer", "unguarded"),
        ("/V2/Models/Digits/infer", "unguarded"),
        ("/v2/models/%64igits/infer", "unguarded"),
        ("/v2/models/%2564igits/infer", "unguarded"),
        ("/v2%2Fmodels%2Fdigits%2Finfer", "unguarded"),
        ("/v2/models/digits;x/infer", "unguarded"),
        ("/v2/models\\digits\\infer", "unguarded"),
        ("/v2/models/digits%00/infer", "unguarded"),
        ("/v2/models/digits%20/infer", "unguarded"),
        ("/v2/models/digits/generate", "unguarded"),
        ("/v2/models/digits/infer_stream", "unguarded"),
        ("/v2/models/digits/versions/1%2F../infer", "unguarded"),
        ("/v2/repository/models/digits/load", "unguarded"),
        ("/v2/repository/models/other/load", "unguarded"),
        ("/v2/Repository%2Fmodels/other/load", "unguarded"),
        ("/v2/repository/index", "plain"),
        ("/v2/trace/setting", "unguarded"),
        ("/v2/models/other/trace/setting", "unguarded"),
        ("/v2/logging", "unguarded"),
        ("/v2/systemsharedmemory/region/x/register", "unguarded"),
        ("/v1/models/digits:predict", "unguarded"),
        ("/v1/models/digits%3Apredict", "unguarded"),
        ("/predictions/digits", "unguarded"),
        ("/%25" * 3 + "%2541", "plain"),
        ("/%" + "25" * 20 + "41", "unguarded"),
    ],
)
def test_way_to_the_model_is_guarded_or_closed_however_it_is_written(path: str, kind: str) -> None:
    assert Routes("digits").of(path.encode()).kind == kind


def raw(port: int, request: bytes, patience: float = 0.5) -> list[bytes]:
    """Send bytes as they are, and return the status lines of what comes until the other side closes or is silent."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.settimeout(patience)
        connection.sendall(request)
        got = b""
        try:
            while part := connection.recv(65536):
                got += part
        except TimeoutError:
            pass
    return [line for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


def test_request_in_two_readings_is_refused_or_read_in_one(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make()
    port = client.base_url.port or 0
    hidden = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}"
    ambiguous = [
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
        b"Content-Length: 0\r\nContent-Length: %d\r\n\r\n" % len(hidden),
        b"Content-Length: 0, %d\r\n\r\n" % len(hidden),
        b"Content-Length: +0\r\n\r\n",
        b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
        b"Content-Length : 0\r\n\r\n",
        b"X: y\r\n Content-Length: 3\r\n\r\n",
    ]
    for head in ambiguous:
        upstream.seen.clear()
        statuses = raw(port, b"POST /echo HTTP/1.1\r\nHost: x\r\n" + head + hidden)
        assert statuses[0].split()[1] == b"400", (head, statuses)
        assert [target for _, target, _, _ in upstream.seen] == [], head
    for target, status in ((b"http://elsewhere/echo", b"200"), (b"*", b"400"), (b"@elsewhere/", b"400")):
        assert raw(port, b"GET %s HTTP/1.1\r\nHost: x\r\n\r\n" % target)[0].split()[1] == status
    # a hop-by-hop length does not become another one
    statuses = raw(
        port, b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: content-length\r\nContent-Length: 3\r\n\r\nabc"
    )
    assert (statuses[0].split()[1], upstream.seen[-1][3]) == (b"200", b"abc")
    assert raw(port, b"GET /echo HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
    assert not {b"upgrade", b"connection"} & {name for name, value in upstream.seen[-1][2] if value != b"keep-alive"}


def test_head_without_end_is_refused_before_it_is_held(make: Make) -> None:
    client, _ = make()
    assert client.post("/nowhere", content=b"x" * 1_000_000).status_code == 404  # a body is no head
    with socket.create_connection(("127.0.0.1", client.base_url.port or 0)) as connection:
        connection.sendall(b"GET /echo HTTP/1.1\r\nHost: x\r\nX: ")
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            connection.sendall(b"a" * (64 << 20))
    assert client.get("/nowhere").status_code == 404


def test_trailers_are_no_headers(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make()
    head = b"POST /echo HTTP/1.1\r\nHost: x\r\nX-Own: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert raw(client.base_url.port or 0, head + b"2\r\nhi\r\n0\r\nX-User: admin\r\n\r\n") == [b"HTTP/1.1 200 OK"]
    ((_, _, headers, body),) = upstream.seen
    assert body == b"hi"
    assert {b"x-own", b"x-user"} & {name.lower() for name, _ in headers} == {b"x-own"}


def test_health_is_asked_for_without_a_key_and_without_a_body(make: Make, upstream: FakeUpstream) -> None:
    client, _ = make(key="k" * 20)
    assert client.get("/v2/health/live").status_code == 404  # of this upstream, which has no such route
    for answer in (client.post("/v2/health/live"), client.request("GET", "/v2/health/live", content=b"x")):
        assert answer.status_code == 405
    assert client.get("/v2/health%2Flive").status_code == 401
    assert [target for _, target, _, _ in upstream.seen] == [b"/v2/health/live"]


def test_upstream_that_does_not_take_a_large_request_is_given_up(make: Make, mixed: Any) -> None:
    client, model = make(timeout_s=0.3)
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # connections are taken by the kernel, and nothing is read
        model._upstream._origin = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        large = np.repeat(mixed[:1], 1024, axis=0)
        body, headers = binary_request(large)
        started = time.monotonic()
        answer = client.post(INFER, content=body, headers=headers)
        streamed = client.post("/echo", content=bytes(32 << 20))
        assert (answer.status_code, streamed.status_code) == (504, 504)
        assert time.monotonic() - started < 30
    assert counted(model) == {"failed": 1024}


def test_parameter_that_json_has_no_word_for_is_left_out() -> None:
    answer = read_answer(b'{"outputs": [], "parameters": {"score": NaN, "most": Infinity, "speed": 7}}', None)
    assert answer.parameters == {"speed": 7}


def test_output_that_is_no_longer_numbers_row_by_row_does_not_leave(
    make: Make, upstream: FakeUpstream, mixed: Any
) -> None:
    upstream.more = {"scores": lambda n: np.arange(n, dtype=np.float32)}
    client, model = make({"failure_mode": "open"})
    answer = client.post(INFER, json=request_of(mixed))
    assert outputs_of(answer)["scores"] == [0.0, 1.0, 2.0]
    upstream.lie = lambda outputs: {**outputs, "scores": np.arange(3, dtype=np.int64)}
    answer = client.post(INFER, json=request_of(mixed))
    assert outputs_of(answer)["guard_verdict"] == ["bypassed"] * 3
    assert "scores" not in outputs_of(answer)
    assert counted(model) == {"clean": 2, "poisoned": 1, "bypassed": 3}


def test_key_is_asked_for_and_kept(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, _ = make(key="k" * 20)
    assert client.post("/echo").status_code == client.post(INFER, json=request_of(mixed)).status_code == 401
    client.headers["Authorization"] = "Bearer " + "k" * 20
    assert client.post("/echo").status_code == client.post(INFER, json=request_of(mixed)).status_code == 200
    assert [dict(headers).get(b"authorization") for _, _, headers, _ in upstream.seen] == [None, None]


# -- start, swap, and a model that is replaced ------------------------------------------------------------------------


def test_new_bundle_is_taken_and_one_that_does_not_fit_is_not(
    make: Make, exported: Exported, second_guard: Guard, fitted_guard: Guard, mixed: Any, suspect: SuspectModel
) -> None:
    client, model = make()
    store = BundleStore(exported.bundles)
    first = store.active_digest()
    assert first is not None
    try:
        digest = second_guard.save(exported.bundles).name
        store.activate(digest)
        model.active.refresh()
        told = client.post(INFER, json=request_of(mixed)).json()["parameters"]["guard_bundle"]
        assert told == digest
        depths = suspect.split_points
        assert depths is not None
        other = replace(
            fitted_guard, suspect=None, weights_digest=suspect.digest, split_points=replace(depths, depths=("conv1",))
        )
        for refused in (other, replace(fitted_guard, suspect=None, weights_digest="0" * 64, split_points=depths)):
            store.activate(refused.save(exported.bundles).name)
            model.active.refresh()
            assert model.active.current.digest == digest
    finally:
        store.activate(first)


def test_bundle_that_needs_the_network_is_refused_at_the_start(
    exported: Exported, record: ExportRecord, fitted_guard: Guard, tmp_path: Path
) -> None:
    with pytest.raises(BundleError, match="wants one request at a time"):
        ExportedGuard(record, {"batching": "never"}, bundles=exported.bundles, model_name="digits")
    elsewhere = replace(record, suspect="0" * 64)
    with pytest.raises(BundleError, match="Export the model again"):
        ExportedGuard(elsewhere, {}, bundles=exported.bundles, model_name="digits")


def test_upstream_without_the_exported_model_is_refused_at_the_start(
    make: Make, upstream: FakeUpstream, record: ExportRecord, exported: Exported
) -> None:
    upstream.record = replace(record, widths=record.widths[:-1])
    with in_thread(upstream, lifespan="off") as port:
        with pytest.raises(
            ServerError, match=r"has no output guard_features_3\. Let it serve what `guard export` wrote"
        ):
            proxied(port, record, exported.bundles).__enter__()
        upstream.record = record
        upstream.lie = lambda outputs: {**outputs, "guard_features_1": outputs["guard_features_1"] * 1.01}
        with pytest.raises(
            ServerError, match=r"answers otherwise than the one that was exported: relu1 differs by 0\.01"
        ):
            proxied(port, record, exported.bundles).__enter__()
        upstream.lie, upstream.more = None, {"label": lambda n: np.zeros(n, np.int64)}
        with pytest.raises(
            ServerError, match="output 'label' of the upstream is INT64, of which no row can be withheld"
        ):
            proxied(port, record, exported.bundles).__enter__()
        with pytest.raises(
            ServerError, match=r"has no model 'other' after 0\.1 s: GET /v2/models/other got status 404"
        ):
            proxied(port, record, exported.bundles, model="other", ready_timeout_s=0.1).__enter__()
    with pytest.raises(ServerError, match="cannot be reached"):
        proxied(port, record, exported.bundles, ready_timeout_s=0.1).__enter__()


def test_model_that_is_replaced_behind_the_proxy_is_noticed(make: Make, upstream: FakeUpstream, mixed: Any) -> None:
    client, _ = make(probe_s=0.05)

    def told_within(status: int) -> Any:
        until = time.monotonic() + 10
        while (answer := client.post(INFER, json=request_of(mixed))).status_code != status:
            assert time.monotonic() < until
            time.sleep(0.02)
        return answer

    told_within(200)
    upstream.lie = lambda outputs: {**outputs, "guard_features_0": outputs["guard_features_0"][:, ::-1].copy()}
    assert "answers otherwise than the one that was exported" in told_within(502).json()["error"]
    upstream.lie = None
    assert outputs_of(told_within(200))["guard_verdict"] == ["clean", "poisoned", "clean"]


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://x", "http://", "http://u:p@x", "http://x?q", "http://x#f", "http://x:99999"]
)
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--upstream must be"):
        Upstream(url)


def test_record_that_is_none_is_refused(tmp_path: Path, exported: Exported) -> None:
    text = (exported.folder / "guard_export.json").read_text()
    document = json.loads(text)
    with pytest.raises(ExportError, match="No such file"):
        ExportRecord.read(tmp_path)
    changes: list[dict[str, Any]] = [
        {"format": 2},
        {"widths": [10]},
        {"widths": [0] * 5},
        {"probe": document["probe"][:-1]},
        {"probe": [[["a"]]] * 5},
        {"input_range": [[0, 1]] * 3},
        {"split_points": {}},
        {"input_shape": [-1]},
    ]
    for change in changes:
        (tmp_path / "guard_export.json").write_text(json.dumps({**document, **change}))
        with pytest.raises(ExportError, match="is no record of an exported model"):
            ExportRecord.read(tmp_path)
    (tmp_path / "guard_export.json").write_text("[" * 100_000)
    with pytest.raises(ExportError):
        ExportRecord.read(tmp_path)
