"""The REST interface of the open inference protocol, asked in one process as a client asks it."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from guard import Guard
from guard.lab.attacks import MnistCnn, Poisoned
from guard.serving.guarded_model import GuardedModel
from guard.v2.models import ServedModel
from guard.v2.rest import create_app

Make = Callable[..., TestClient]
INFER = "/v2/models/m/infer"


@pytest.fixture(scope="module")
def bundle(fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted_guard.save(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def served() -> list[ServedModel]:
    return []


@pytest.fixture
def make(bundle: Path, badnet: MnistCnn, served: list[ServedModel]) -> Iterator[Make]:
    def build(*, key: str | None = None, max_body_bytes: int = 1 << 20, **settings: Any) -> TestClient:
        settings = {"verdict_detail": "full", **settings}
        served.append(ServedModel(GuardedModel(copy.deepcopy(badnet), bundle=bundle, name="m", **settings)))
        return TestClient(create_app({"m": served[-1]}, key=key, max_body_bytes=max_body_bytes))

    yield build
    for model in served:
        model.close()


def request_of(images: Any, **more: Any) -> dict[str, Any]:
    data = np.asarray(images, np.float64).ravel().tolist()
    entry = {"name": "input", "datatype": "FP32", "shape": list(np.shape(images)), "data": data}
    return {"inputs": [entry], **more}


def outputs_of(reply: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in reply.json()["outputs"]}


def counted(model: ServedModel) -> dict[str, float]:
    samples = [s for s in model.model.runtime.metrics.drain() if s.name == "guard_verdicts_total" and s.value]
    return {sample.labels[1]: sample.value for sample in samples}


def test_health_and_metadata(make: Make) -> None:
    client = make()
    assert client.get("/v2/health/live").json() == {"live": True}
    assert client.get("/v2/health/ready").json() == {"ready": True}
    assert client.get("/v2").json()["name"] == "backdoor-guard"
    for version in ("", "/versions/1"):
        assert client.get(f"/v2/models/m{version}/ready").json() == {"name": "m", "ready": True}
        about = client.get(f"/v2/models/m{version}").json()
        assert (about["name"], about["versions"]) == ("m", ["1"])
        assert about["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28]}]
        assert about["outputs"] == [
            {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
            {"name": "guard_verdict", "datatype": "BYTES", "shape": [-1]},
            {"name": "guard_p_value", "datatype": "FP64", "shape": [-1]},
        ]


def test_infer_tells_every_row_its_verdict(
    make: Make, served: list[ServedModel], triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:2], clean_split.test.images[:5]])
    verdicts = fitted_guard.inspect(images)
    reply = make().post(INFER, json=request_of(images, id="seven"))
    assert (reply.status_code, reply.json()["id"], reply.json()["model_name"]) == (200, "seven", "m")
    outputs = outputs_of(reply)
    assert outputs["guard_verdict"] == ["poisoned" if verdict.is_poisoned else "clean" for verdict in verdicts]
    assert outputs["guard_p_value"] == [verdict.p_value for verdict in verdicts]
    labels = np.reshape(outputs["logits"], (7, 10)).argmax(axis=1)
    assert labels.tolist() == [verdict.label for verdict in verdicts]
    parameters = reply.json()["parameters"]
    assert parameters["guard_verdict"] == "poisoned"
    assert parameters["guard_poisoned_rows"] == sum(verdict.is_poisoned for verdict in verdicts)
    assert parameters["guard_p_value"] == min(verdict.p_value for verdict in verdicts)
    assert "guard-verdict" not in reply.headers  # of several rows no header could tell
    assert sum(counted(served[0]).values()) == 7


def test_rows_of_one_request_are_judged_by_one_guard_though_it_is_swapped_between_forward_passes(
    make: Make, served: list[ServedModel], clean_split: Any, second_guard: Guard, tmp_path: Path
) -> None:
    make()
    runtime = served[0].model.runtime
    first, other = runtime.current, runtime._load(second_guard.save(tmp_path))

    def swap(*_: Any) -> None:
        runtime.current = other

    runtime.module.register_forward_hook(swap)
    rows = clean_split.test.images[:20]  # three forward passes
    answers = served[0]._batcher.submit(rows, "r", {}).result(30)
    assert {answer.bundle for answer in answers} == {first.digest}
    assert {answer.bundle for answer in served[0]._batcher.submit(rows, "r", {}).result(30)} == {other.digest}


def test_infer_of_one_row_has_the_headers_of_torchserve(make: Make, triggered: Poisoned) -> None:
    reply = make().post("/v2/models/m/versions/1/infer", json=request_of(triggered.images[:1]))
    assert reply.headers["guard-verdict"] == reply.json()["parameters"]["guard_verdict"] == "poisoned"
    assert reply.headers["guard-action"] == "flag"
    assert len(reply.headers["guard-bundle"]) == 64
    assert float(reply.headers["guard-p-value"]) == pytest.approx(reply.json()["parameters"]["guard_p_value"], rel=1e-4)


def test_infer_gives_only_the_outputs_that_are_asked_for(make: Make, clean_split: Any) -> None:
    client, images = make(), clean_split.test.images[:2]
    reply = client.post(INFER, json=request_of(images, outputs=[{"name": "guard_verdict"}]))
    assert [*outputs_of(reply)] == ["guard_verdict"]
    reply = client.post(INFER, json=request_of(images, outputs=[{"name": "probabilities"}]))
    assert (reply.status_code, "known are logits, guard_verdict, guard_p_value" in reply.json()["error"]) == (400, True)


def test_infer_in_binary_gives_what_json_gives(make: Make, clean_split: Any) -> None:
    client, images = make(), clean_split.test.images[:3]
    plain = outputs_of(client.post(INFER, json=request_of(images)))
    entry = {"name": "input", "datatype": "FP32", "shape": [3, 1, 28, 28], "parameters": {"binary_data_size": 9408}}
    text = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    reply = client.post(INFER, content=text + images.astype("<f4").tobytes(), headers=headers)
    assert reply.headers["content-type"] == "application/octet-stream"
    length = int(reply.headers["inference-header-content-length"])
    sizes = [output["parameters"]["binary_data_size"] for output in json.loads(reply.content[:length])["outputs"]]
    logits, _, p_values = np.split(np.frombuffer(reply.content[length:], np.uint8), np.cumsum(sizes)[:-1])
    np.testing.assert_allclose(logits.view("<f4"), plain["logits"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(p_values.view("<f8"), plain["guard_p_value"], atol=1e-3)


def test_blocked_rows_are_null_beside_others_and_an_error_alone(
    make: Make, triggered: Poisoned, clean_split: Any
) -> None:
    client = make(action="block")
    images = np.concatenate([triggered.images[:1], clean_split.test.images[:1]])
    reply = client.post(INFER, json=request_of(images))
    outputs = outputs_of(reply)
    assert outputs["logits"][:10] == [None] * 10
    assert None not in outputs["logits"][10:]
    assert outputs["guard_verdict"] == ["poisoned", "clean"]
    alone = client.post(INFER, json=request_of(triggered.images[:1]))
    assert (alone.status_code, alone.headers["guard-verdict"]) == (422, "poisoned")
    assert alone.json()["error"].startswith("the input was judged poisoned and blocked")


def test_sender_that_may_not_know_is_not_told_p_values(make: Make, triggered: Poisoned) -> None:
    client = make(verdict_detail="flag")
    assert [output["name"] for output in client.get("/v2/models/m").json()["outputs"]] == ["logits", "guard_verdict"]
    reply = client.post(INFER, json=request_of(triggered.images[:1]))
    assert [*outputs_of(reply)] == ["logits", "guard_verdict"]
    assert "p_value" not in reply.text.lower()
    assert not [name for name in reply.headers if "p-value" in name]
    assert client.post(INFER, json=request_of(triggered.images[:1], outputs=[{"name": "guard_p_value"}])).is_error


@pytest.mark.parametrize(
    ("change", "status", "message"),
    [
        ({"inputs": []}, 400, "the model takes one input, 'input', got none."),
        ({"name": "image"}, 400, "the model takes one input, 'input', got image."),
        ({"datatype": "FP64"}, 400, "input 'input' must have datatype FP32, got FP64."),
        ({"shape": [1, 28, 28]}, 400, "input 'input' must have shape [-1, 1, 28, 28], got [1, 28, 28]."),
        (
            {"shape": [0, 1, 28, 28], "data": []},
            400,
            "input 'input' must have shape [-1, 1, 28, 28], got [0, 1, 28, 28].",
        ),
        ({"data": [float("nan")] * 784}, 422, "the input holds NaN or infinity."),
        ({"data": [1e39] * 784}, 422, "the input holds NaN or infinity."),
    ],
)
def test_input_that_is_none_of_the_models_is_refused_and_counted(
    make: Make, served: list[ServedModel], change: dict[str, Any], status: int, message: str
) -> None:
    request = request_of(np.zeros((1, 1, 28, 28)))
    (request if "inputs" in change else request["inputs"][0]).update(change)
    reply = make().post(INFER, content=json.dumps(request))
    assert (reply.status_code, reply.json()["error"]) == (status, message)
    assert counted(served[0]) == {"rejected": 1}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v2/models/other", 404),
        ("POST", "/v2/models/other/infer", 404),
        ("GET", "/v2/models/m/versions/2", 404),
        ("GET", "/v2/models/m/infer", 405),
        ("GET", "/v3", 404),
        ("GET", "/docs", 404),
        ("GET", "/v2/models/..%2f..%2fetc", 404),
    ],
)
def test_what_is_not_there_is_an_error_in_the_protocols_form(make: Make, method: str, path: str, status: int) -> None:
    reply = make().request(method, path)
    assert (reply.status_code, [*reply.json()]) == (status, ["error"])


def test_bodies_that_are_too_large_or_packed_are_refused(make: Make, served: list[ServedModel]) -> None:
    client = make(max_body_bytes=1000)
    assert client.post(INFER, content=b"x" * 1001).status_code == 413
    chunks = (b"x" * 100 for _ in range(11))
    assert client.post(INFER, content=chunks).status_code == 413  # no length was announced
    assert client.post(INFER, content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415
    for length in ("-1", "1e3", "٣", "9" * 12, "2"):
        reply = client.post(INFER, content=b"x", headers={"Inference-Header-Content-Length": length.encode()})
        assert reply.status_code == 400
    assert counted(served[0]) == {"rejected": 8}


def test_bodies_together_are_bounded_and_their_place_is_given_back(
    bundle: Path, make: Make, served: list[ServedModel], clean_split: Any
) -> None:
    make()
    app = create_app({"m": served[0]}, max_held_bytes=20_000)
    body = json.dumps(request_of(clean_split.test.images[:1])).encode()
    assert 10_000 > len(body) > 1000
    for _ in range(30):
        assert TestClient(app).post(INFER, content=body).status_code == 200
    reply = TestClient(app).post(INFER, content=b" " * 20_001)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert TestClient(app).post(INFER, content=body).status_code == 200


def test_body_that_does_not_come_in_time_is_refused_and_its_place_is_given_back(
    make: Make, served: list[ServedModel]
) -> None:
    make()
    app = create_app({"m": served[0]}, body_timeout_s=0.1)

    async def ask(*messages: dict[str, Any]) -> int:
        """Return the status of a request whose body comes as these messages, and then no more."""
        waiting, sent = iter(messages), []

        async def receive() -> dict[str, Any]:
            for message in waiting:
                return message
            await asyncio.sleep(60)
            raise AssertionError

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": INFER, "raw_path": INFER.encode()}
        await app({**scope, "query_string": b"", "headers": [], "scheme": "http"}, receive, send)
        return int(sent[0]["status"])

    half = {"type": "http.request", "body": b"x" * 100, "more_body": True}
    with ThreadPoolExecutor(1) as other_thread:  # a browser's tests leave a loop running in this one
        for _ in range(3):
            for messages, status in (((half,), 408), ((half, {"type": "http.disconnect"}), 400)):
                assert other_thread.submit(lambda messages=messages: asyncio.run(ask(*messages))).result() == status
    assert counted(served[0]) == {"rejected": 6}


def test_json_is_held_shorter_than_binary_data_and_an_announced_length_is_believed(
    make: Make, served: list[ServedModel]
) -> None:
    make()
    client = TestClient(create_app({"m": served[0]}, max_json_bytes=1000, max_body_bytes=5000))
    reply = client.post(INFER, content=b" " * 1001)
    assert reply.status_code == 413
    assert reply.json()["error"] == "JSON must have at most 1000 bytes, got 1001. Send binary data."
    assert (
        client.post(INFER, content=b" " * 1001, headers={"Inference-Header-Content-Length": "900"}).status_code == 400
    )
    assert client.post(INFER, content=b"", headers={"Content-Length": "9" * 20}).status_code == 413


def test_request_of_too_many_rows_is_refused_before_it_waits(make: Make) -> None:
    client = make(max_body_bytes=8 << 20)
    entry = {
        "name": "input",
        "datatype": "FP32",
        "shape": [1025, 1, 28, 28],
        "parameters": {"binary_data_size": 3214400},
    }
    text = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(text))}
    reply = client.post(INFER, content=text + bytes(3214400), headers=headers)
    assert (reply.status_code, reply.json()["error"]) == (413, "a request must have at most 1024 rows, got 1025.")


@pytest.mark.parametrize("name", ["\\ud800", "\\u0000", "\\u202e", "é"])
def test_texts_that_are_no_utf8_come_back_escaped(make: Make, name: str) -> None:
    entry = f'{{"inputs": [{{"name": "{name}", "datatype": "FP32", "shape": [0], "data": []}}], "id": "{name}"}}'
    reply = make().post(INFER, content=entry.encode())
    assert reply.status_code == 400
    assert reply.text.isascii()


def test_key_is_asked_for_everywhere_but_health(make: Make) -> None:
    client = make(key="k" * 20)
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    for path in ("/v2", "/v2/models/m", "/openapi.json", "/nowhere"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer ö".encode()}):
            reply = client.get(path, headers=headers)
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
    for scheme in ("Bearer", "bearer"):
        assert client.get("/v2/models/m", headers={"Authorization": f"{scheme} {'k' * 20}"}).status_code == 200


def test_overload_is_told_with_a_time_to_come_again(
    make: Make, served: list[ServedModel], clean_split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make()
    monkeypatch.setattr(served[0]._batcher, "max_waiting_rows", 3)
    monkeypatch.setattr(served[0]._batcher, "_waiting_rows", 3)
    reply = client.post(INFER, json=request_of(clean_split.test.images[:1]))
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"] == "3 rows wait already. Try again later."
