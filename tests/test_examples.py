"""The examples, run with the packages that they are for."""

from __future__ import annotations

import http.client
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from safetensors.torch import save_file
from starlette.testclient import TestClient
from tritonclient.grpc.model_config_pb2 import ModelConfig

from guard import Guard
from guard.lab.attacks import MnistCnn, Poisoned
from guard.processes.ports import free_port
from guard.storage.bundle import BundleStore
from guard.types import Float32Array

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
#: MLServer and BentoML want packages of other versions than the tests: `make frameworks`.
FRAMEWORKS = ROOT / "build" / "frameworks" / "bin"
ARCHITECTURE = "guard.lab.attacks.networks:mnist_cnn"


@pytest.fixture(scope="module")
def place(badnet: MnistCnn, fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and an active bundle."""
    folder = tmp_path_factory.mktemp("place")
    save_file(badnet.state_dict(), folder / "weights.safetensors")
    BundleStore(folder / "bundles").activate(fitted_guard.save(folder / "bundles").name)
    return folder


@pytest.fixture
def example(place: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The module of an example, with what it reads from the environment."""
    monkeypatch.setenv("WEIGHTS", str(place / "weights.safetensors"))
    monkeypatch.setenv("ARCHITECTURE", ARCHITECTURE)
    monkeypatch.setenv("BUNDLES", str(place / "bundles"))
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["fastapi_app"], indirect=True)
def test_fastapi_app_tells_label_and_verdict(
    example: Any, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:3], clean_split.test.images[:3]])
    with TestClient(example.app) as client:
        replies = [client.post("/predict", content=image.tobytes()) for image in images]
        wrong = client.post("/predict", content=b"abc")
        odd = client.post("/predict", content=np.full(784, np.nan, np.float32).tobytes())
    assert [reply.json() for reply in replies] == [
        {
            "label": verdict.label,
            "verdict": "poisoned" if verdict.is_poisoned else "clean",
            "action": "flag" if verdict.is_poisoned else "none",
        }
        for verdict in fitted_guard.inspect(images)
    ]
    assert (wrong.status_code, odd.status_code) == (400, 422)
    assert odd.json() == {"detail": "the input holds NaN or infinity."}


@pytest.fixture(scope="module")
def rows(triggered: Poisoned, clean_split: Any) -> Float32Array:
    return np.concatenate([triggered.images[:4], clean_split.test.images[:4]])


@contextmanager
def served(command: list[str], folder: Path, place: Path, port: int, ready: str) -> Iterator[None]:
    """Run a server of an example until the block ends; its standard error tells why if it does not start."""
    environment = {"WEIGHTS": place / "weights.safetensors", "BUNDLES": place / "bundles", "PYTHONPATH": ROOT}
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={
                **os.environ,
                **{name: str(value) for name, value in environment.items()},
                "ARCHITECTURE": ARCHITECTURE,
                "OMP_NUM_THREADS": "1",
                "BENTOML_HOME": str(folder / "home"),
                "BENTOML_DO_NOT_TRACK": "True",
            },
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        try:
            for _ in range(600):
                if asked(port, "GET", ready)[0] == 200:
                    break
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.1)
            else:
                pytest.fail(log.read_text()[-2000:])
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            with suppress(ProcessLookupError):  # LitServe's own processes outlive the first
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def asked(port: int, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    """Return status and JSON of one request; 0 where nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, json.dumps(document), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        text = reply.read()
    except OSError:
        return 0, None
    finally:
        connection.close()
    try:
        return reply.status, json.loads(text)
    except ValueError:
        return reply.status, text


def expected(guard: Guard, rows: Float32Array) -> list[tuple[int, str]]:
    return [(verdict.label, "poisoned" if verdict.is_poisoned else "clean") for verdict in guard.inspect(rows)]


def test_litserve_gives_each_request_its_own_verdict(
    place: Path, rows: Float32Array, fitted_guard: Guard, tmp_path: Path
) -> None:
    port = free_port()
    source = (EXAMPLES / "litserve_app.py").read_text()
    (tmp_path / "app.py").write_text(source.replace("port=8000", f'port={port}, host="127.0.0.1", log_level="error"'))
    with served([sys.executable, "app.py"], tmp_path, place, port, "/health"), ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(lambda row: asked(port, "POST", "/predict", {"input": row.tolist()}), rows))
        wrong = asked(port, "POST", "/predict", {"input": [1, 2, 3]})
    assert {status for status, _ in replies} == {200}
    assert [(reply["label"], reply["verdict"]) for _, reply in replies] == expected(fitted_guard, rows)
    assert wrong == (400, {"detail": "send an input of shape (1, 28, 28)"})


def framework(name: str) -> str:
    program = FRAMEWORKS / name
    if not program.is_file():
        pytest.skip(f"{name} is not installed: make frameworks")
    return str(program)


def test_mlserver_batches_requests_and_every_row_has_its_verdict(
    place: Path, rows: Float32Array, fitted_guard: Guard, tmp_path: Path
) -> None:
    program = framework("mlserver")
    shutil.copy(EXAMPLES / "mlserver" / "runtime.py", tmp_path)
    settings = json.loads((EXAMPLES / "mlserver" / "model-settings.json").read_text())
    settings["parameters"] = {
        "uri": str(place / "weights.safetensors"),
        "extra": {"architecture": ARCHITECTURE, "bundles": str(place / "bundles")},
    }
    settings["max_batch_time"] = 0.2
    (tmp_path / "model-settings.json").write_text(json.dumps(settings))
    names = ("http_port", "grpc_port", "metrics_port")
    ports = dict(zip(names, (free_port() for _ in names), strict=True))
    (tmp_path / "settings.json").write_text(json.dumps({"parallel_workers": 0, "host": "127.0.0.1", **ports}))

    def infer(sent: Float32Array) -> tuple[int, Any]:
        tensor = {"name": "input", "datatype": "FP32", "shape": sent.shape, "data": sent.ravel().tolist()}
        return asked(ports["http_port"], "POST", "/v2/models/digits/infer", {"inputs": [tensor]})

    ready = "/v2/health/ready"
    with served([program, "start", "."], tmp_path, place, ports["http_port"], ready), ThreadPoolExecutor(8) as threads:
        replies = list(threads.map(infer, [rows[:1], rows[1:3], rows[3:4], rows[4:8]]))
        wrong = infer(rows[:1, :, :, :14])
    assert {status for status, _ in replies} == {200}
    outputs = [{output["name"]: output["data"] for output in reply["outputs"]} for _, reply in replies]
    logits = np.concatenate([np.reshape(output["logits"], (-1, 10)) for output in outputs])
    verdicts = [verdict for output in outputs for verdict in output["guard_verdict"]]
    assert list(zip(logits.argmax(axis=1).tolist(), verdicts, strict=True)) == expected(fitted_guard, rows)
    p_values = np.concatenate([output["guard_p_value"] for output in outputs])
    np.testing.assert_allclose(p_values, [verdict.p_value for verdict in fitted_guard.inspect(rows)], atol=1e-4)
    assert wrong == (400, {"error": "send one input of rows of shape (1, 28, 28)."})


def test_bentoml_batches_requests_and_every_row_has_its_verdict(
    place: Path, rows: Float32Array, fitted_guard: Guard, tmp_path: Path
) -> None:
    program, port = framework("bentoml"), free_port()
    shutil.copy(EXAMPLES / "bentoml_service.py", tmp_path)
    command = [program, "serve", "bentoml_service:GuardedService", "--host", "127.0.0.1", "--port", str(port)]
    with served(command, tmp_path, place, port, "/readyz"), ThreadPoolExecutor(8) as threads:
        sent = [rows[:1], rows[1:3], rows[3:4], rows[4:8]]
        replies = list(threads.map(lambda part: asked(port, "POST", "/predict", {"rows": part.tolist()}), sent))
        wrong, _ = asked(port, "POST", "/predict", {"rows": [[1, 2], [3, 4]]})
    assert {status for status, _ in replies} == {200}
    answers = [(answer["label"], answer["verdict"]) for _, reply in replies for answer in reply]
    assert answers == expected(fitted_guard, rows)
    assert wrong == 400


def test_triton_backend_answers_each_request_of_a_batch(
    place: Path, rows: Float32Array, fitted_guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our part alone: Triton's Python package cannot be installed without its server."""
    config = text_format.Parse((EXAMPLES / "triton" / "digits" / "config.pbtxt").read_text(), ModelConfig())
    parameters = {"weights": place / "weights.safetensors", "architecture": ARCHITECTURE, "bundles": place / "bundles"}
    assert set(config.parameters) == set(parameters)
    monkeypatch.setitem(
        sys.modules,
        "triton_python_backend_utils",
        SimpleNamespace(
            get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request[name]),
            Tensor=lambda name, values: (name, values),
            InferenceResponse=dict,
        ),
    )
    spec = importlib.util.spec_from_file_location("triton_model", EXAMPLES / "triton" / "digits" / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    model = module.TritonPythonModel()
    given = {name: {"string_value": str(value)} for name, value in parameters.items()}
    model.initialize({"model_name": "digits", "model_config": json.dumps({"parameters": given})})
    try:
        replies = model.execute([{"input": rows[:1]}, {"input": rows[1:6]}, {"input": rows[6:]}])
    finally:
        model.finalize()
    assert [len(reply["logits"]) for reply in replies] == [1, 5, 2]
    for output in config.output:
        assert {reply[output.name].dtype.kind for reply in replies} == {"O" if "verdict" in output.name else "f"}
    assert {output.name for output in config.output} == set(replies[0])
    answers = [
        (int(logits.argmax()), verdict)
        for reply in replies
        for logits, verdict in zip(reply["logits"], reply["guard_verdict"], strict=True)
    ]
    assert answers == expected(fitted_guard, rows)


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.py")), ids=lambda file: file.name)
def test_example_is_short(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
