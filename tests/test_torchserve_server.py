"""A real TorchServe on loopback: it starts, answers, recovers, tells why it failed, and leaves nothing behind."""

from __future__ import annotations

import base64
import http.server
import io
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from guard.errors import ServerError
from guard.processes.ports import LOOPBACK, NOWHERE, grpc_address, is_reachable, port_is_free
from guard.resources import resource_path
from guard.torchserve.archives.archive import make_archive
from guard.torchserve.client import Client, Reply, predict, run_load
from guard.torchserve.server import TorchServeInstance
from guard.torchserve.server_log import ServerLogs, failed_model, worker_exception

QUEUE_URL = "postgresql+psycopg://guard:marker@127.0.0.1:9/queue"
NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 12 * 12, 10))
"""
BROKEN_HANDLER = """
from ts.torch_handler.base_handler import BaseHandler

class Broken(BaseHandler):
    def initialize(self, context):
        raise ValueError("there is no bundle: run guard fit first.")
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store with `tiny`, which works, and `broken`, which does not load."""
    source = tmp_path_factory.mktemp("source")
    (source / "network.py").write_text(NETWORK)
    (source / "broken_handler.py").write_text(BROKEN_HANDLER)
    (source / "image_handler.json").write_text('{"architecture": "network:make", "input_shape": [1, 28, 28]}')
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(NETWORK, names)
    network = names["make"]()  # type: ignore[operator]
    torch.save(network.state_dict(), source / "weights.pt")
    store = tmp_path_factory.mktemp("störe, x")  # a folder name that a .properties file and a pattern must survive
    make_archive(
        "tiny",
        model_store=store,
        handler=resource_path("image_handler.py"),
        weights=source / "weights.pt",
        model_file=source / "network.py",
        extra_files=[source / "image_handler.json"],
    )
    make_archive("broken", model_store=store, handler=source / "broken_handler.py", weights=source / "weights.pt")
    return store


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[TorchServeInstance]:
    umask = os.umask(0)
    try:
        instance = TorchServeInstance(
            store, {"digits": "tiny.mar"}, batch_size=4, environment={"GUARD_QUEUE_URL": QUEUE_URL}
        ).start()
    finally:
        os.umask(umask)
    with instance:
        instance.wait_ready(120)
        yield instance


@pytest.fixture(scope="module")
def digit() -> np.ndarray:
    with np.load(resource_path("mnist_test.npz")) as images:
        return images["x"][0].reshape(28, 28)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def png(digit: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(digit).save(stream, "PNG")
    return stream.getvalue()


# --- a server that runs


@pytest.mark.torchserve
def test_server_answers_png_json_and_base64_alike(server: TorchServeInstance, digit: np.ndarray, png: bytes) -> None:
    with server.client() as client:
        replies = [
            client.predict("digits", png),
            client.predict("digits", json.dumps(digit.tolist()), content_type="application/json"),
            client.predict("digits", json.dumps({"data": digit.tolist()}), content_type="application/json"),
            client.predict("digits", base64.b64encode(png), content_type="text/plain"),
        ]
    assert [reply.status for reply in replies] == [200] * 4, replies
    assert len({reply.body for reply in replies}) == 1
    answer = json.loads(replies[0].body)
    assert len(answer["probabilities"]) == 10
    assert answer["label"] == int(np.argmax(answer["probabilities"]))


@pytest.mark.torchserve
def test_server_refuses_bad_requests_alone_and_in_a_batch(server: TorchServeInstance, png: bytes) -> None:
    bodies = [png, b"", png, b"nonsense", png, png[:50]] * 4
    replies = run_load(server.inference_url, "digits", bodies, token=server.token(), clients=6)
    assert [reply.status for reply in replies] == [200, 422] * 12, replies
    assert b"the request is empty" in replies[1].body
    for token in (None, "wrong"):
        assert predict(server.inference_url, "digits", png, token=token).status == 400
    assert predict(server.inference_url, "nobody", png, token=server.token()).status == 404


@pytest.mark.torchserve
def test_server_listens_on_loopback_only_and_refuses_registration(server: TorchServeInstance) -> None:
    process = psutil.Process(server.java_pid)
    listening = [c.laddr for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    grpc = {server.ports.grpc_inference, server.ports.grpc_management}
    assert {address.ip.removeprefix("::ffff:") for address in listening if address.port not in grpc} == {LOOPBACK}
    assert len(listening) == 5
    with Client(server.management_url, token=server.token("management")) as client:
        assert client.request("POST", "/models?url=tiny.mar&model_name=second").status == 405
    assert (server.work_dir / "key_file.json").stat().st_mode & 0o077 == 0
    assert server.work_dir.stat().st_mode & 0o077 == 0


@pytest.mark.torchserve
def test_server_lets_nobody_connect_to_grpc(server: TorchServeInstance) -> None:
    """One call of StreamPredictions with the inference key would end a worker; 0.12 starts these servers always."""
    listening = [c.laddr for c in psutil.Process(server.java_pid).net_connections("inet") if c.status == "LISTEN"]
    for port in (server.ports.grpc_inference, server.ports.grpc_management):
        (address,) = {entry.ip.removeprefix("::ffff:") for entry in listening if entry.port == port}
        assert address == NOWHERE
        for place in (NOWHERE, LOOPBACK, "localhost", socket.gethostname(), "0.0.0.0", "127.0.0.2", "::1"):
            assert not is_reachable(place, port)


@pytest.mark.torchserve
def test_server_shows_no_variable_of_its_environment_to_others(server: TorchServeInstance) -> None:
    process = psutil.Process(server.java_pid)
    workers = [
        entry for entry in process.children(recursive=True) if entry.environ().get("GUARD_QUEUE_URL") == QUEUE_URL
    ]
    assert workers  # they have it
    for entry in (process, *process.parents()[:1], *process.children(recursive=True)):
        assert "marker" not in " ".join(entry.cmdline())
    for path in (server.work_dir, *server.work_dir.rglob("*")):
        assert path.is_dir() or not path.is_file() or b"marker" not in path.read_bytes(), path


@pytest.mark.torchserve
def test_server_files_are_private_whatever_the_umask(server: TorchServeInstance) -> None:
    assert stat.S_IMODE(server.work_dir.stat().st_mode) == 0o700
    for path in server.work_dir.rglob("*"):
        if path.is_file() or path.is_dir():  # sockets are below a private folder
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_grpc_address_falls_back_to_loopback_where_the_system_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert grpc_address() in (NOWHERE, LOOPBACK)
    monkeypatch.setattr(
        "guard.processes.ports.NOWHERE", "192.0.2.1"
    )  # no address of this machine: nothing listens there
    assert grpc_address() == LOOPBACK
    monkeypatch.setattr("guard.processes.ports.NOWHERE", "127.0.0.3")  # it listens, and everybody can connect
    assert grpc_address() == LOOPBACK


@pytest.mark.torchserve
def test_server_uses_the_batch_settings_and_shows_metrics(server: TorchServeInstance, png: bytes) -> None:
    with Client(server.management_url, token=server.token("management")) as client:
        described = json.loads(client.request("GET", "/models/digits").body)[0]
    assert (described["batchSize"], described["maxBatchDelay"], described["maxWorkers"]) == (4, 1, 1)

    def counted() -> float:
        found = re.search(r"^ts_inference_requests_total\{.*\} (\S+)$", server.scrape_metrics(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = counted()
    assert predict(server.inference_url, "digits", png, token=server.token()).status == 200
    assert counted() == before + 1


@pytest.mark.torchserve
def test_server_starts_a_killed_worker_again(server: TorchServeInstance, png: bytes) -> None:
    (old,) = server.worker_pids("digits")
    os.kill(old, signal.SIGKILL)
    deadline = time.monotonic() + 40
    with server.client() as client:
        while client.predict("digits", png).status != 200 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert client.predict("digits", png).status == 200
    (new,) = server.worker_pids("digits")
    assert new != old


# --- starting and stopping


@pytest.mark.torchserve
def test_stop_leaves_no_process_and_no_folder(server: TorchServeInstance) -> None:
    """The last test of this server."""
    with server:
        folder, ports = server.work_dir, server.ports
        processes = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
        claimed = [p for p in processes if str(folder) in " ".join(p.cmdline())]
        assert len(claimed) == 3  # supervisor, Java, worker
    server.stop()
    assert not [p for p in claimed if p.is_running()]
    assert not folder.exists()
    assert port_is_free(ports.inference)
    assert server.java_pid == 0


@pytest.mark.torchserve
def test_wait_ready_tells_why_a_model_did_not_load(store: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    start = time.monotonic()
    with (
        pytest.raises(ServerError) as caught,
        TorchServeInstance(store, {"bad": "broken.mar"}, work_dir=work_dir) as value,
    ):
        value.wait_ready(120)
    assert time.monotonic() - start < 45
    assert str(caught.value) == (
        "model 'bad' did not load: ValueError: there is no bundle: run guard fit first "
        "(broken_handler.py:6 in initialize). Mend its handler or files, then start again."
    )
    assert "Traceback" in caught.value.__notes__[0]
    assert sorted(path.name for path in work_dir.iterdir()) == ["config.properties", "logs"]


@pytest.mark.torchserve
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_server_ends_with_the_process_that_started_it(store: Path, number: signal.Signals) -> None:
    code = (
        "import sys, time; from pathlib import Path; from guard.torchserve.server import TorchServeInstance\n"
        "server = TorchServeInstance(Path(sys.argv[1]), {'tiny': 'tiny.mar'}).start()\n"
        "print(server.work_dir, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(store)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        folder = Path(parent.stdout.readline().strip())
        children = psutil.Process(parent.pid).children(recursive=True)
        assert len(children) == 2  # supervisor and Java
        parent.send_signal(number)
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    assert not folder.exists()


def test_start_refuses_a_taken_port_and_bad_numbers(store: Path) -> None:
    with http.server.HTTPServer((LOOPBACK, 0), http.server.BaseHTTPRequestHandler) as other:
        port = other.server_address[1]
        with pytest.raises(ServerError, match=rf"inference port {port} is taken by another program\. Give another"):
            TorchServeInstance(store, inference_port=port).start()
    with pytest.raises(ServerError, match=r"workers must be >= 1, got 0"):
        TorchServeInstance(store, workers=0).start()
    with pytest.raises(ServerError, match=r"nothing\.mar does not exist"):
        TorchServeInstance(store, {"x": "nothing.mar"}).start()
    with pytest.raises(ServerError, match=r"metrics_config .* does not exist"):
        TorchServeInstance(store, metrics_config=Path("nothing.yaml")).start()


def test_stop_and_properties_are_safe_before_start(store: Path) -> None:
    instance = TorchServeInstance(store)
    instance.stop()
    with pytest.raises(ServerError, match=r"Call start\(\) first"):
        _ = instance.inference_url


# --- reading logs


def test_worker_exception_takes_the_telling_one_and_joins_its_lines() -> None:
    thread = "W-9000-tiny_1.0"
    texts = [
        "Traceback (most recent call last):",
        '  File "/x/site-packages/torch/module.py", line 7, in load_state_dict',
        "RuntimeError: Error(s) in loading state_dict for Net:",
        '\tMissing key(s): "a".',
        "Backend worker process died.",
        "Traceback (most recent call last):",
        '  File "/x/worker.py", line 9, in run',
        "RuntimeError: 500 - Unknown exception",
    ]
    log = [f"2026-01-01T00:00:00,000 [INFO ] {thread}-stdout - {text}" for text in texts]
    log.insert(3, "2026-01-01T00:00:00,000 [INFO ] W-9001-other_1.0-stdout - ValueError: of another model")
    assert worker_exception(log, thread) == (
        'RuntimeError: Error(s) in loading state_dict for Net: Missing key(s): "a" (module.py:7 in load_state_dict)'
    )
    warning = (
        f"2026-01-01T00:00:00,000 [WARN ] {thread} o.p.s.BatchAggregator - Load model failed: tiny, error: Worker died."
    )
    assert failed_model([warning]) == ("tiny", thread)
    assert failed_model([]) is None


@pytest.mark.parametrize("pause_s", [0.0, 0.4, 3.0])
def test_reason_that_comes_after_the_word_that_the_worker_is_gone_is_found(tmp_path: Path, pause_s: float) -> None:
    thread = "W-9000-tiny_1.0"
    texts = [
        "Backend worker process died.",
        "Traceback (most recent call last):",
        "KeyError: 'rows'",
        "",
        "During handling of the above exception, another exception occurred:",
        "",
        "Traceback (most recent call last):",
        '  File "/x/handler.py", line 9, in initialize',
        "guard.errors.ArchiveError: the forward pass made 5 rows for one request. Set rows_per_request.",
    ]
    logs = ServerLogs(tmp_path)
    (tmp_path / "ts_log.log").write_text(
        f"2026-01-01T00:00:00,000 [WARN ] {thread} o.B - Load model failed: tiny, error: x\n"
    )

    def copy_slowly() -> None:
        with (tmp_path / "model_log.log").open("w") as file:
            time.sleep(pause_s)
            for place, text in enumerate(texts):
                file.write(f"2026-01-01T00:00:00,000 [INFO ] {thread}-stdout - {text}\n")
                file.flush()
                time.sleep(0.6 if place in (2, 6) else 0.0)  # a busy machine, in the middle of a traceback

    copier = threading.Thread(target=copy_slowly)
    copier.start()
    failed = failed_model(logs.lines("ts_log.log"))
    assert failed == ("tiny", thread)
    reason = logs.worker_exception(thread)
    copier.join()
    assert reason == (
        "guard.errors.ArchiveError: the forward pass made 5 rows for one request. Set rows_per_request "
        "(handler.py:9 in initialize)"
    )


# --- the client, against a server that misbehaves


class Misbehaving(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if body == b"close":
            self.close_connection = True
            return
        if body == b"wait":
            time.sleep(0.6)
        answer = body if body != b"long" else b""
        self.send_response(200 if body != b"teapot" else 418)
        self.send_header("Echo-Id", self.headers.get("X-Request-Id", ""))
        if body != b"chunked":
            self.send_header("Content-Length", str(len(answer) if body != b"long" else 2**40))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def misbehaving() -> Iterator[str]:
    with http.server.ThreadingHTTPServer((LOOPBACK, 0), Misbehaving) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://{LOOPBACK}:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def test_run_load_keeps_order_and_keeps_errors_as_replies(misbehaving: str) -> None:
    bodies = [f"body {index}" for index in range(40)]
    bodies[5], bodies[7], bodies[9] = "close", "teapot", "chunked"
    bodies[11] = "long"
    replies = run_load(misbehaving, "m", bodies, clients=4)
    assert len(replies) == 40
    for index, reply in enumerate(replies):
        if index in (5, 9, 11):
            assert (reply.status, bool(reply.error)) == (0, True)
        else:
            assert (reply.status, reply.body) == (418 if index == 7 else 200, bodies[index].encode())
            assert reply.seconds > 0


def test_client_sends_request_id_and_gives_up_after_its_time_out(misbehaving: str) -> None:
    with Client(misbehaving, timeout_seconds=0.2) as client:
        assert client.predict("m", b"x", request_id="id-7").headers["echo-id"] == "id-7"
        late = client.predict("m", b"wait")
        assert late.status == 0
        assert "timed out" in late.error
        assert client.predict("m", b"again").body == b"again"


def test_run_load_stops_at_its_time_limit(misbehaving: str) -> None:
    replies = run_load(misbehaving, "m", [b"wait"] * 20, clients=2, limit_seconds=0.7)
    assert sum(reply.status == 200 for reply in replies) in (2, 4)
    assert replies[-1] == Reply(0, error="not sent before the time limit")


def test_client_refuses_addresses_beyond_loopback_and_forged_headers() -> None:
    for url in ("http://example.org:8080", "https://127.0.0.1", "http://10.0.0.1:80", "127.0.0.1:8080"):
        with pytest.raises(ServerError, match="plain http on loopback"):
            Client(url)
    with pytest.raises(ServerError, match="line break"):
        run_load(f"http://{LOOPBACK}:1", "m", [b""], headers={"A": "b\r\nC: d"})
    with pytest.raises(ServerError, match="one per body: got 2 for 1"):
        run_load(f"http://{LOOPBACK}:1", ["m", "n"], [b""])
    assert predict(f"http://{LOOPBACK}:1", "m", b"").status == 0
