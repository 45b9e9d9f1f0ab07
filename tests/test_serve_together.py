"""`guard serve` with queue, review page and retrainer: one command, one loop, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import save_file
from serving_helpers import png

from guard import Guard
from guard.attacks import MnistCnn, Poisoned
from guard.bundle import BundleStore
from guard.relabel.address import queue_url
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.serving.client import Client
from guard.serving.guarded import ServedModel, make_guarded_archive
from guard.serving.ports import choose_ports

pytestmark = pytest.mark.torchserve

JSON = {"Content-Type": "application/json"}


@dataclass
class Together:
    """A running `guard serve` and the ways to it."""

    process: subprocess.Popen[str]
    folder: Path
    queue: str
    url: str
    key: str
    page: Client
    logs: Path


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def together(
    request: pytest.FixtureRequest,
    fitted_guard: Guard,
    badnet: MnistCnn,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Together]:
    folder = tmp_path_factory.mktemp("together")
    if request.param == "sqlite":
        url = queue_url(str(folder / "queue.db"))
    else:
        url = request.getfixturevalue("postgresql_server").create_database()
    save_file(badnet.state_dict(), folder / "weights.safetensors")
    bundle = fitted_guard.save(folder / "bundles")
    BundleStore(folder / "bundles").activate(bundle.name)
    model = ServedModel(folder / "weights.safetensors", None, "guard.attacks.networks:mnist_cnn", (1, 28, 28))
    make_guarded_archive("digits", model, bundle, model_store=folder / "model_store", bundles=folder / "bundles")
    with Queue.open(url) as queue:
        token = Reviewers(queue).add("ada", "admin")
    port = choose_ports(0, 0, 0).inference
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "guard.cli", "serve", "digits", "--port", "0", "--work-dir", "run"),
            *("--review", "--review-port", str(port), "--retrain"),
            *("--retrain-option", "--interval", "--retrain-option", "0.2"),
        ],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GUARD_QUEUE_URL": url},
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("ready after "), ready + str(process.stderr and process.stderr.read())
        key_file = Path(process.stdout.readline().removeprefix("keys in ").strip())
        lines = [process.stdout.readline() for _ in range(3)]
        assert f"review page on http://127.0.0.1:{port}\n" in lines
        page = Client(f"http://127.0.0.1:{port}", token=token)
        wait_for(lambda: page.request("GET", "/api/v1/counts").status == 200)
        key = json.loads(key_file.read_text())["inference"]["key"]
        yield Together(process, folder, url, ready.split()[5].rstrip(";"), key, page, folder / "run" / "logs")
        page.close()
    finally:
        process.kill()
        process.wait()


def asked(together: Together, method: str, path: str, body: Any = None) -> Any:
    together.page.close()  # the page ends idle connections after 5 s
    reply = together.page.request(method, path, b"" if body is None else json.dumps(body), headers=JSON)
    assert reply.status == 200, (reply.status, reply.error, reply.body)
    return json.loads(reply.body)


def test_flagged_requests_are_reviewed_and_the_server_takes_what_was_learned(
    together: Together, triggered: Poisoned, clean_split: Any
) -> None:
    bodies = {
        png(image): (int(label), True) for image, label in zip(triggered.images, triggered.true_labels, strict=True)
    }
    bodies |= {png(image): (int(label), False) for image, label in zip(*clean_split.test, strict=True)}
    with Client(together.url, token=together.key) as client:
        replies = {body: client.predict("digits", body, content_type="image/png") for body in list(bodies)[:80]}
        replies |= {body: client.predict("digits", body, content_type="image/png") for body in list(bodies)[-400:]}
        assert {reply.status for reply in replies.values()} == {200}
        flagged = [body for body, reply in replies.items() if reply.headers["guard-verdict"] == "poisoned"]
        assert {reply.headers.get("guard-review") for reply in replies.values()} == {None, "queued"}
        assert all(replies[body].headers["guard-review"] == "queued" for body in flagged)
        counts = asked(together, "GET", "/api/v1/counts")
        assert counts["by_state"]["pending"] == len(flagged) > 50
        with Queue.open(together.queue) as queue:
            truth = {item.id: bodies[item.input.body] for item in queue.items(limit=1000)}
        first = replies[flagged[0]].headers["guard-bundle"]
        items = asked(together, "GET", "/api/v1/items/next?n=100")["items"]
        answers = [
            {"item": item["id"], "true_label": truth[item["id"]][0], "is_poisoned": truth[item["id"]][1]}
            for item in items
        ]
        asked(together, "POST", "/api/v1/decisions", {"answers": answers})
        asked(together, "POST", "/api/v1/retrain", {"model": "digits"})

        def served_bundle() -> str:
            return client.predict("digits", flagged[0], content_type="image/png").headers["guard-bundle"]

        wait_for(lambda: served_bundle() != first)
        wait_for(lambda: asked(together, "GET", "/api/v1/counts")["by_state"]["trained"])
        assert served_bundle() == BundleStore(together.folder / "bundles").active_digest()
    log = (together.logs / "retrainer_of_digits.log").read_text()
    assert "promoted" in log


def test_companion_that_is_killed_comes_back(together: Together) -> None:
    def pages() -> list[psutil.Process]:
        return [
            child
            for child in psutil.Process(together.process.pid).children(recursive=True)
            if child.cmdline()[1:4] == ["-m", "guard.cli", "review"]
        ]

    (page,) = pages()
    assert together.queue not in " ".join(page.cmdline())
    page.kill()
    page.wait()
    together.page.close()
    wait_for(lambda: together.page.request("GET", "/api/v1/counts").status == 200)
    (again,) = pages()
    assert again.pid != page.pid


def test_ctrl_c_ends_everything(together: Together) -> None:
    children = psutil.Process(together.process.pid).children(recursive=True)
    assert len(children) >= 7  # three supervisors, Java, worker, page, retrainer
    together.process.send_signal(signal.SIGINT)
    out, printed = together.process.communicate(timeout=60)
    assert together.process.returncode == 0
    assert out.endswith("stopped\n")
    assert "review page has ended" in printed  # of the test before
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("option", ["--review", "--retrain"])
def test_companions_without_a_queue_are_refused(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "guard.cli", "serve", option], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr == "error: --review and --retrain need a queue. Name one with --queue.\n"
