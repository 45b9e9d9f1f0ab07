"""The Ray engine on a real cluster of two raylets: deployed by its config file, asked, swapped, killed under load."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from serving_helpers import served_model

from guard import Guard
from guard.lab.attacks import MnistCnn, Poisoned
from guard.processes.ports import LOOPBACK, free_port
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore
from guard.telemetry import OUTCOMES
from guard.torchserve.archives.guarded import make_guarded_archive

if find_spec("ray") is None:  # not imported here, where every process of a run comes by
    pytest.skip("Ray is not installed: pip install 'backdoor-guard[ray]'", allow_module_level=True)

from guard.ray.server import RayServer

KEY = "a-key-of-this-test"
#: Every test of this file runs with these: nobody is told, nobody else may use the cluster, loopback alone.
VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": "f" * 64,
    "BACKDOOR_GUARD_KEY": KEY,
    "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
}


@dataclass(frozen=True)
class Answered:
    """One request of a test: when it was sent, and what came back; status 0: nothing."""

    sent: float
    status: int
    headers: dict[str, str]
    body: Any


@dataclass
class Site:
    """A running cluster, the application on it, and what it serves."""

    port: int
    raylets: list[int]
    store: BundleStore
    queue_url: str
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def ask(self, images: Any, model: str = "digits", headers: Any = None) -> Answered:
        path, sent = f"/v2/models/{model}/infer", {"Authorization": f"Bearer {KEY}", **(headers or {})}
        return self.send("POST", path, json.dumps(request_of(images)).encode(), sent)

    def send(self, method: str, path: str, body: Any = None, headers: Any = None) -> Answered:
        started = time.monotonic()
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            reply = connection.getresponse()
            text = reply.read()
            told = {name.lower(): value for name, value in reply.getheaders()}
            return Answered(started, reply.status, told, json.loads(text) if text[:1] in (b"{", b"[") else text)
        except (OSError, http.client.HTTPException):
            return Answered(started, 0, {}, None)
        finally:
            connection.close()

    def counts(self) -> dict[str, float]:
        """Return the sums over all replicas, by series; empty while they cannot be had."""
        reply = self.send("GET", "/metrics", headers={"Authorization": f"Bearer {KEY}"})
        if reply.status != 200:
            return {}
        lines = reply.body.decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def verdicts(self, **labels: str) -> float:
        return sum_of(self.counts(), "guard_verdicts_total", **labels)

    def replicas(self) -> list[psutil.Process]:
        """Return the processes that answer, by the raylet that started each."""
        found = []
        for raylet in self.raylets:
            with_raylet = psutil.Process(raylet).children() if psutil.pid_exists(raylet) else []
            found += [process for process in with_raylet if "guard:Guarded" in " ".join(process.cmdline())]
        return found


def is_running(process: psutil.Process) -> bool:
    return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)


def sum_of(counts: dict[str, float], name: str, **labels: str) -> float:
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    return sum(
        value for series, value in counts.items() if series.startswith(f"{name}{{") and all(w in series for w in wanted)
    )


def request_of(images: Any) -> dict[str, Any]:
    data = np.asarray(images, np.float64).ravel().tolist()
    return {"inputs": [{"name": "input", "datatype": "FP32", "shape": list(np.shape(images)), "data": data}]}


def wait_until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        time.sleep(0.1)


def outputs(answered: Answered) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in answered.body["outputs"]}


@pytest.fixture(scope="module")
def bundles(fitted_guard: Guard, second_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> BundleStore:
    folder = tmp_path_factory.mktemp("ray-bundles")
    first = fitted_guard.save(folder)
    second_guard.save(folder)
    store = BundleStore(folder)
    store.activate(first.name)
    return store


@pytest.fixture(scope="module")
def model_store(badnet: MnistCnn, bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ray")
    model, bundle = served_model("image", badnet, folder), bundles.active_path()
    for name, followed in (("digits", bundles.root), ("pinned", None), ("third", None)):
        settings = {"verdict_detail": "full"}
        make_guarded_archive(name, model, bundle, model_store=folder / "store", bundles=followed, settings=settings)
    return folder / "store"


@pytest.fixture(scope="module")
def site(model_store: Path, bundles: BundleStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two raylets; `serve run` of the config file that the engine writes, with two replicas, one on each."""
    folder = tmp_path_factory.mktemp("ray-site")
    short = Path(tempfile.mkdtemp(prefix="gr-", dir="/tmp"))
    url, port = f"sqlite:///{folder / 'queue.db'}", free_port()
    server = RayServer(model_store, replicas=2, max_open_models=2, inference_port=port)
    text = server.config_text()
    assert KEY not in text
    config = folder / "serve.yaml"  # as users edit it: both raylets are on one machine, and there is one port
    config.write_text(text.replace("EveryNode", "HeadOnly").replace("ask_key", f"scratch: {short}/models\n    ask_key"))
    environment = {**os.environ, **VARIABLES, "GUARD_QUEUE_URL": url}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "cluster.log").open("w") as log:
        cluster = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("ray_cluster.py")), str(short)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        about = json.loads(next(line for line in cluster.stdout if line.startswith("{")))
        serve_program = Path(sys.executable).with_name("serve")
        done = subprocess.run(
            [str(serve_program), "run", str(config), "--address", about["address"], "--non-blocking"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found = Site(port, about["raylets"], bundles, url, [cluster])
        wait_until(lambda: is_ready(found), 180)
        yield found
    finally:
        cluster.stdin.close()
        cluster.wait(60)
        cluster.stdout.close()
        shutil.rmtree(short, ignore_errors=True)
    assert not [pid for pid in about["raylets"] if psutil.pid_exists(pid)]


def is_ready(site: Site) -> bool:
    answered = site.send("GET", "/v2/health/ready")
    assert b"failed to deploy" not in (answered.body or b""), "see the logs of Serve's controller"
    return answered.status == 200


class Load:
    """Clients that keep asking until the block ends, and note every answer."""

    def __init__(self, site: Site, images: Sequence[Any], clients: int = 4) -> None:
        self.answers: list[Answered] = []
        self._site, self._images, self._stop = site, images, threading.Event()
        self._clients = [threading.Thread(target=self._ask, args=(number,)) for number in range(clients)]

    def __enter__(self) -> Load:
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _ask(self, number: int) -> None:
        for turn in itertools.count(number):
            if self._stop.is_set():
                return
            self.answers.append(self._site.ask(self._images[turn % len(self._images)]))
            if self.answers[-1].status != 200:
                time.sleep(0.2)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(answer.status for answer in self.answers)


def is_guarded(answer: Answered) -> bool:
    """Whether an answer tells a verdict, of a bundle, for every row that has logits."""
    told = answer.body["parameters"]
    verdicts = outputs(answer)["guard_verdict"]
    return bool(told["guard_bundle"]) and len(verdicts) > 0 and set(verdicts) <= set(OUTCOMES[:2])


def test_verdicts_are_those_of_the_library_and_go_with_headers_counts_and_queue(
    site: Site, fitted_guard: Guard, triggered: Poisoned, clean_split: Any
) -> None:
    images = np.concatenate([triggered.images[:10], clean_split.test.images[:10]])
    expected = fitted_guard.inspect(images)
    wait_until(lambda: bool(site.counts()))
    before = site.counts()
    many = site.ask(images)  # more rows than a forward pass takes
    assert many.status == 200
    told = outputs(many)
    assert told["guard_verdict"] == ["poisoned" if verdict.is_poisoned else "clean" for verdict in expected]
    np.testing.assert_allclose(told["guard_p_value"], [verdict.p_value for verdict in expected], atol=1e-3)
    assert np.reshape(told["logits"], (20, 10)).argmax(axis=1).tolist() == [verdict.label for verdict in expected]
    one = site.ask(images[:1])
    assert (one.headers["guard-verdict"], one.headers["guard-review"]) == ("poisoned", "queued")
    assert one.headers["guard-bundle"] == many.body["parameters"]["guard_bundle"]

    n_poisoned = sum(verdict.is_poisoned for verdict in expected) + 1
    wait_until(lambda: site.verdicts(model="digits") - sum_of(before, "guard_verdicts_total", model="digits") == 21)
    now = site.counts()
    change = {name: now[name] - before.get(name, 0.0) for name in now}
    assert sum_of(change, "guard_verdicts_total", model="digits", verdict="poisoned") == n_poisoned
    assert sum_of(change, "guard_queued_total", model="digits") == n_poisoned
    assert sum_of(change, "guard_requests_total", model="digits") == 21
    with Queue.open(site.queue_url) as queue:
        assert len([item for item in queue.items(limit=1000) if item.input.model == "digits"]) == n_poisoned


def test_requests_that_come_together_share_forward_passes(site: Site, clean_split: Any) -> None:
    batches = 'guard_stage_duration_seconds_count{model="digits",stage="handler"}'
    before = site.counts()
    with Load(site, [clean_split.test.images[n : n + 1] for n in range(20)], clients=12) as load:
        wait_until(lambda: len(load.answers) >= 150)
    assert set(load.statuses) == {200}
    rows = len(load.answers) + sum_of(before, "guard_verdicts_total", model="digits")
    wait_until(lambda: site.verdicts(model="digits") == rows)
    assert site.counts()[batches] - before[batches] < 0.8 * len(load.answers)


def test_more_models_than_fit_are_opened_when_they_are_asked_for_and_their_counts_stay(
    site: Site, clean_split: Any
) -> None:
    image = clean_split.test.images[:1]
    before = site.counts()
    for model in ("third", "pinned", "digits") * 2:
        answered = site.ask(image, model, {"serve_multiplexed_model_id": model})
        assert (answered.status, answered.body["model_name"]) == (200, model)
    wait_until(
        lambda: (
            [site.verdicts(model=m) - sum_of(before, "guard_verdicts_total", model=m) for m in ("third", "pinned")]
            == [2, 2]
        )
    )
    other = site.ask(image, "pinned", {"serve_multiplexed_model_id": "digits"})
    assert other.body["model_name"] == "pinned"  # the path says whose guard judges, a header only where


def test_new_bundle_is_taken_by_every_replica_within_two_seconds_and_no_answer_mixes_bundles(
    site: Site, fitted_guard: Guard, second_guard: Guard, triggered: Poisoned, clean_split: Any
) -> None:
    rows = np.concatenate([triggered.images[:6], clean_split.test.images[:6]])
    guards = dict(
        zip(
            (g.save(site.store.root).name for g in (fitted_guard, second_guard)),
            (fitted_guard, second_guard),
            strict=True,
        )
    )
    p_values = {digest: [verdict.p_value for verdict in guard.inspect(rows)] for digest, guard in guards.items()}
    first, other = guards
    with Load(site, [rows], clients=3) as load:
        time.sleep(0.7)
        swapped = time.monotonic()
        site.store.activate(other)
        wait_until(lambda: sum(answer.sent - swapped > 2 for answer in load.answers) > 5)
    assert set(load.statuses) == {200}
    for answer in load.answers:
        bundle = answer.body["parameters"]["guard_bundle"]
        np.testing.assert_allclose(outputs(answer)["guard_p_value"], p_values[bundle], atol=1e-3)
    told = [(answer.sent - swapped, answer.body["parameters"]["guard_bundle"]) for answer in load.answers]
    assert {bundle for at, bundle in told if at < 0} == {first}
    late = [bundle for at, bundle in told if at > 2]
    assert len(late) > 5
    assert set(late) == {other}
    site.store.activate(first)


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        ("/v2/models/digits/infer", {}, 401),
        ("/v2/models/digits/infer", {"Authorization": "Bearer wrong"}, 401),
        ("/metrics", {}, 401),
        ("/v2/models/nope/infer", {"Authorization": f"Bearer {KEY}"}, 404),
        ("/v2/models/..%2F..%2Fetc%2Fpasswd/infer", {"Authorization": f"Bearer {KEY}"}, 404),
        ("/v2/models/digits/../nope/infer", {"Authorization": f"Bearer {KEY}"}, 404),
        ("/v2/models/digits/infer", {"Authorization": f"Bearer {KEY}", "serve_multiplexed_model_id": "nope"}, 400),
        ("/v2/models/digits/infer", {"Authorization": f"Bearer {KEY}", "Content-Length": "99999999999"}, 413),
    ],
)
def test_hostile_requests_are_refused(site: Site, path: str, headers: dict[str, str], status: int) -> None:
    answered = site.send(
        "POST" if "infer" in path else "GET", path, b"{}" if "Length" not in str(headers) else None, headers
    )
    assert answered.status == status
    assert "error" in answered.body


def settled(site: Site) -> float:
    """Return how many verdicts there were, once that has not moved for longer than replicas take to report."""
    last, since = site.verdicts(), time.monotonic()
    while time.monotonic() - since < 2.5:
        time.sleep(0.2)
        if (now := site.verdicts()) != last:
            last, since = now, time.monotonic()
    return last


def test_raylet_and_the_last_replica_are_killed_under_load_and_nothing_is_answered_unguarded(
    site: Site, clean_split: Any, triggered: Poisoned
) -> None:
    images = [*(clean_split.test.images[n : n + 1] for n in range(10)), triggered.images[:1]]
    wait_until(lambda: len(site.replicas()) == 2)
    with_head, beside = site.replicas()
    sums = [settled(site)]
    with Load(site, images) as load:
        time.sleep(0.5)
        os.kill(site.raylets[1], signal.SIGKILL)
        wait_until(lambda: sums.append(site.verdicts()) or not is_running(beside))
        time.sleep(1.5)
        after_raylet = load.statuses
        with_head.kill()
        killed = time.monotonic()
        wait_until(lambda: any(answer.status == 200 and answer.sent > killed + 1 for answer in load.answers[-20:]))
        time.sleep(1.5)  # until the counts of the new replica are there
        sums += [site.verdicts()]
        replaced = [replica.pid for replica in site.replicas()]
        wait_until(lambda: load.statuses[200] > 100)
    assert len(replaced) == 1
    assert with_head.pid not in replaced
    print(f"answers with the raylet killed: {after_raylet}, with the last replica killed, too: {load.statuses}")
    assert set(load.statuses) <= {0, 200, 500, 503}
    assert all(is_guarded(answer) for answer in load.answers if answer.status == 200)
    sums = [value for value in sums if value]
    assert sums == sorted(sums)
    assert sums[-1] <= sums[0] + len(load.answers)
    counts = site.counts()
    assert sum_of(counts, "guard_verdicts_total") == sum_of(counts, "guard_requests_total")
    assert site.ask(images[0]).status == 200


@contextmanager
def guard_serve(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "guard.cli", "serve", *arguments],
        env={**os.environ, "PYTHONPATH": VARIABLES["PYTHONPATH"]},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(60)
        assert process.stdout is not None
        process.stdout.close()


def test_guard_serve_starts_a_cluster_of_its_own_and_leaves_nothing(model_store: Path, tmp_path: Path) -> None:
    work_dir = tmp_path / "work"
    with guard_serve("pinned", *("--model-store", str(model_store), "--engine", "ray", "--port", "0"),
                     *("--work-dir", str(work_dir), "--ready-timeout", "90")) as process:  # fmt: skip
        said = ""
        assert process.stdout is not None
        for line in process.stdout:
            said += line
            if line.startswith("Ctrl-C"):
                break
        curl = re.search(r'^curl -H "Authorization: Bearer (\S+)" (http://\S+?:(\d+))/v2/models/pinned$', said, re.M)
        assert curl is not None, said
        site = Site(int(curl[3]), [], BundleStore(tmp_path), "")
        assert site.send("GET", "/v2/models/pinned", headers={"Authorization": f"Bearer {curl[1]}"}).status == 200
        assert site.send("GET", "/v2/models/pinned").status == 401
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in started)
        for child in started:  # nobody outside this machine reaches the cluster; replicas ask for the cluster's token
            for connection in child.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN and "ServeReplica" not in " ".join(child.cmdline()):
                    assert connection.laddr.ip in (LOOPBACK, f"::ffff:{LOOPBACK}"), (child, connection)
        (targets,) = json.loads((work_dir / "targets.json").read_text())
        assert targets["labels"]["job"] == "guard-server"
        metrics = Site(int(targets["targets"][0].rpartition(":")[2]), [], BundleStore(tmp_path), "")
        assert sum_of(metrics.counts(), "guard_bundle_info", model="pinned") == 1
    assert process.returncode == 0
    gone, alive = psutil.wait_procs(started, 10)
    assert not alive
    assert len(gone) >= 8
    assert [*work_dir.glob("engine-*")] == []
