"""`guard proxy` before KServe's own Python server, which runs the exported file with ONNX Runtime; over HTTP, whole.

The server has an environment of its own, as its packages want other versions than these: `make test` makes it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import httpx2 as httpx
import numpy as np
import pytest
import tritonclient.http as triton
from conftest import Exported
from proxy_helpers import INFER, MODEL, request_of

from guard import Guard
from guard.lab.attacks import Poisoned
from guard.observing.scrape import read_endpoint
from guard.processes.ports import free_port
from guard.relabel.queue import Queue

UPSTREAM = Path(__file__).parent / "upstreams" / "kserve_onnx.py"


def kserve_python() -> str:
    """Return an interpreter that has kserve and onnxruntime, or skip."""
    own = Path(__file__).parent.parent / "build" / "kserve" / "bin" / "python"
    if named := os.environ.get("KSERVE_PYTHON"):
        return named
    if own.exists():
        return str(own)
    if find_spec("kserve") is None:
        pytest.skip("there is no kserve here: `make test` installs it, or name an interpreter in KSERVE_PYTHON")
    return sys.executable


@dataclass
class KServe:
    """The server as a process, which can be killed and started again on its port."""

    python: str
    file: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        command = [self.python, str(UPSTREAM), str(self.file), "digits", str(self.port)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        until = time.monotonic() + 60
        with httpx.Client(verify=False) as client:  # to read whom it may trust takes longer than to ask
            while time.monotonic() < until:
                try:
                    if client.get(f"http://127.0.0.1:{self.port}{MODEL}").status_code == 200:
                        return self
                except httpx.HTTPError:
                    assert self.process.poll() is None, self.log.read_text()[-2000:]
                time.sleep(0.1)
        pytest.fail(self.log.read_text()[-2000:])

    def end(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)


@dataclass
class Site:
    """KServe, a proxy before it, and how to ask both."""

    kserve: KServe
    proxy: subprocess.Popen[str]
    url: str
    metrics: str
    key: str
    queue: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def client(self, timeout: float = 20) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers=self.headers, timeout=timeout, verify=False)


@pytest.fixture(scope="module")
def kserve(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KServe]:
    log = tmp_path_factory.mktemp("kserve") / "log"
    server = KServe(kserve_python(), exported.folder / "1" / "model.onnx", free_port(), log)
    try:
        yield server.start()
    finally:
        server.end()


@pytest.fixture(scope="module")
def site(kserve: KServe, exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("proxy")
    (folder / "guard.toml").write_text('verdict_detail = "full"\n')
    url = f"sqlite:///{folder / 'queue.db'}"
    Queue.open(url).close()
    places = ["--upstream", f"http://127.0.0.1:{kserve.port}", "--exported", str(exported.folder), "--model", "digits"]
    more = [
        "--bundles",
        str(exported.bundles),
        "--port",
        "0",
        "--key-file",
        str(folder / "keys.json"),
        "--timeout",
        "5",
    ]
    with ExitStack() as opened:
        log = opened.enter_context((folder / "log").open("w"))
        command = [sys.executable, "-m", "guard.cli", "proxy", *places, *more]
        environment = {**os.environ, "GUARD_QUEUE_URL": url}
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        assert process.stdout is not None
        opened.callback(process.stdout.close)
        opened.callback(process.wait, 20)
        opened.callback(process.terminate)
        first = process.stdout.readline()
        found = re.fullmatch(r"ready on (\S+); metrics on (\S+)\n", first)
        assert found is not None, (first, (folder / "log").read_text())
        key = json.loads((folder / "keys.json").read_text())["inference"]["key"]
        yield Site(kserve, process, found[1], found[2], key, url)


def verdicts_through(site: Site, images: Any, **binary: bool) -> tuple[list[str], Any, Any]:
    """Return verdicts, p-values and logits that Triton's client gets for images, asked in requests of 1 to 16 rows."""
    told: list[str] = []
    p_values, logits = [], []
    with triton.InferenceServerClient(site.url.removeprefix("http://")) as client:
        sizes = [1, 3, 16]
        while len(images):
            part, images = images[: sizes[0]], images[sizes[0] :]
            sizes = [*sizes[1:], sizes[0]]
            tensor = triton.InferInput("input", list(part.shape), "FP32")
            tensor.set_data_from_numpy(part, **binary)
            reply = client.infer("digits", [tensor], headers=site.headers)
            assert {output["name"] for output in reply.get_response()["outputs"]} == {
                "logits",
                "guard_verdict",
                "guard_p_value",
            }
            told += [text.decode() for text in reply.as_numpy("guard_verdict")]
            p_values.append(reply.as_numpy("guard_p_value"))
            logits.append(reply.as_numpy("logits"))
    return told, np.concatenate(p_values), np.concatenate(logits)


def test_verdicts_are_those_of_the_guard_in_this_process(
    site: Site, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([clean_split.test.images[:110], triggered.images[:100]])
    expected = fitted_guard.inspect(images)
    told, p_values, logits = verdicts_through(site, images)
    np.testing.assert_allclose(p_values, [verdict.p_value for verdict in expected], rtol=0, atol=1e-4)
    assert told == ["poisoned" if verdict.is_poisoned else "clean" for verdict in expected]
    assert logits.argmax(axis=1).tolist() == [verdict.label for verdict in expected]
    assert told[110:].count("poisoned") > 80  # the two kinds are both there
    assert told[:110].count("clean") > 90
    in_json = verdicts_through(site, images[100:120], binary_data=False)
    np.testing.assert_allclose(in_json[1], p_values[100:120], rtol=0, atol=1e-12)


def counts(site: Site) -> dict[str, float]:
    """Rows by verdict since the proxy began."""
    found: dict[str, float] = {}
    for series, value in read_endpoint(site.metrics).items():
        if series.name == "guard_verdicts_total":
            verdict = str(series.label("verdict"))
            found[verdict] = found.get(verdict, 0.0) + value
    return found


def test_flagged_rows_are_queued_and_all_are_counted(site: Site, triggered: Poisoned, clean_split: Any) -> None:
    before = counts(site)
    with site.client() as client:
        reply = client.post(INFER, json=request_of(triggered.images[:1], id="found-again"))
        client.post(INFER, content=b"{")
    assert reply.headers["guard-verdict"] == reply.json()["parameters"]["guard_verdict"] == "poisoned"
    with Queue.open(site.queue) as queue:
        (item,) = [item for item in queue.items(limit=1000) if item.input.request_id == "found-again"]
    assert item.input.model == "digits"
    np.testing.assert_array_equal(item.input.inputs, triggered.images[0])
    after = counts(site)
    assert {kind: after[kind] - before[kind] for kind in after if after[kind] != before[kind]} == {
        "poisoned": 1,
        "rejected": 1,
    }


def test_other_routes_of_kserve_go_through_and_other_ways_to_the_model_do_not(site: Site) -> None:
    direct = httpx.Client(base_url=f"http://127.0.0.1:{site.kserve.port}", verify=False)
    with direct, site.client() as client:
        for path in ("/v2", "/v2/health/ready", "/v2/models", "/docs", "/openapi.json", "/nowhere?x=%2F"):
            ours, theirs = client.get(path), direct.get(path)
            assert (ours.status_code, ours.content) == (theirs.status_code, theirs.content)
            assert ours.headers["content-type"] == theirs.headers["content-type"]
        row = {"instances": np.zeros((1, 1, 28, 28)).tolist()}
        for path in ("/v1/models/digits:predict", "/v2/models/%64igits/infer", "/v2//models/digits/infer"):
            assert client.post(path, json=row).status_code == 403
        assert "predictions" in direct.post("/v1/models/digits:predict", json=row).json()  # were it not closed
        told = [output["name"] for output in client.get(MODEL).json()["outputs"]]
        assert told == ["logits", "guard_verdict", "guard_p_value"]
        assert client.get("/v2/health/live", headers={"Authorization": ""}).status_code == 200
        assert client.get("/v2", headers={"Authorization": ""}).status_code == 401


def test_upstream_that_is_killed_under_load_leaves_no_answer_without_a_verdict(
    site: Site, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:10], clean_split.test.images[:10]])
    expected = ["poisoned" if verdict.is_poisoned else "clean" for verdict in fitted_guard.inspect(images)]
    before, statuses, wrong = counts(site), [], []
    is_over = threading.Event()

    def ask(worker: int) -> None:
        with site.client() as client:
            row = worker
            while not is_over.is_set():
                row = (row + 1) % len(images)
                reply = client.post(INFER, json=request_of(images[row : row + 1]))
                statuses.append(reply.status_code)
                if reply.status_code == 200 and reply.headers.get("guard-verdict") != expected[row]:
                    wrong.append(reply.text)
                if reply.status_code != 200 and "logits" in reply.text:
                    wrong.append(reply.text)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, worker) for worker in range(4)]
        until = time.monotonic() + 30
        while statuses.count(200) < 40 and time.monotonic() < until:
            time.sleep(0.05)
        site.kserve.end()
        while statuses.count(502) < 20 and time.monotonic() < until:
            time.sleep(0.05)
        site.kserve.start()
        n_before = statuses.count(200)
        while statuses.count(200) < n_before + 20 and time.monotonic() < until:
            time.sleep(0.05)
        is_over.set()
    for done in asking:
        done.result()
    assert not wrong
    assert set(statuses) == {200, 502}
    assert statuses.count(200) >= n_before + 20
    after = counts(site)
    assert sum(after.values()) - sum(before.values()) == len(statuses)
    assert after["failed"] - before["failed"] == statuses.count(502)
    assert after["bypassed"] == 0


def test_proxy_that_is_told_to_stop_answers_what_it_has_begun(site: Site, clean_split: Any) -> None:
    connection = http.client.HTTPConnection(site.url.removeprefix("http://"))
    body = json.dumps(request_of(clean_split.test.images[:1])).encode()
    assert site.kserve.process is not None
    site.kserve.process.send_signal(signal.SIGSTOP)  # the request is on its way when the signal comes
    try:
        connection.request("POST", INFER, body, site.headers)
        time.sleep(0.3)
        site.proxy.terminate()
        time.sleep(0.3)
    finally:
        site.kserve.process.send_signal(signal.SIGCONT)
    reply = connection.getresponse()
    assert (reply.status, reply.headers["guard-verdict"]) == (200, "clean")
    connection.close()
    assert site.proxy.wait(20) == 0
