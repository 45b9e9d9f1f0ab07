"""`guard serve` with queue, review page and retrainer: one command, one loop, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from queue_helpers import postgresql_folder
from safetensors.torch import save_file
from serving_helpers import png

from guard import Guard, GuardConfig, SuspectModel
from guard.cli import run
from guard.cli.review import review_app
from guard.cli.serving import _passed_on
from guard.lab.attacks import MnistCnn, Poisoned
from guard.observing.audit import AuditReport, audit
from guard.observing.collectors import DETECTION_METRICS
from guard.processes.ports import choose_ports
from guard.processes.prometheus import PrometheusInstance
from guard.relabel.address import queue_url
from guard.relabel.queue import Queue
from guard.relabel.request_body import pictures_of
from guard.relabel.reviewers import Reviewers
from guard.storage.bundle import BundleStore
from guard.telemetry import label_value
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.torchserve.client import Client, Reply

pytestmark = pytest.mark.torchserve

ROOT = Path(__file__).resolve().parent.parent
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
    metrics: str
    prometheus: PrometheusInstance | None


def wait_for(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.25)
    return found


def query(prometheus: PrometheusInstance, expression: str) -> list[dict[str, Any]]:
    """Return the series that an expression gives now, each with a value that is a number."""
    asked_for = urllib.parse.urlencode({"query": expression})
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/query?{asked_for}", timeout=30) as reply:
        found: list[dict[str, Any]] = json.load(reply)["data"]["result"]
    return [series for series in found if series["value"][1] != "NaN"]


@pytest.fixture(scope="module")
def small_guard(suspect: SuspectModel, clean_split: Any) -> Guard:
    """Fitted, and fitted again in a round, in a few seconds."""
    images, labels = (part[:500] for part in clean_split.validation)
    return Guard.fit(suspect, images, labels, GuardConfig(false_positive_rate=0.05, folds=5))


@pytest.fixture(scope="module")
def together(
    request: pytest.FixtureRequest,
    small_guard: Guard,
    badnet: MnistCnn,
    clean_split: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Together]:
    """One stack on PostgreSQL, whose URL has a password to hide; on SQLite, as the demo has it, where there is none."""
    folder = tmp_path_factory.mktemp("together")
    if postgresql_folder() is None:
        url = queue_url(str(folder / "queue.db"))
    else:
        url = request.getfixturevalue("postgresql_server").create_database()
    save_file(badnet.state_dict(), folder / "weights.safetensors")
    images, labels = (part[:500] for part in clean_split.validation)
    np.savez(folder / "clean.npz", images=images, labels=labels)
    bundle = replace(small_guard, images_from=str(folder / "clean.npz")).save(folder / "bundles")
    BundleStore(folder / "bundles").activate(bundle.name)
    model = ServedModel(folder / "weights.safetensors", None, "guard.lab.attacks.networks:mnist_cnn", (1, 28, 28))
    make_guarded_archive(
        "digits",
        model,
        bundle,
        model_store=folder / "model_store",
        bundles=folder / "bundles",
        settings={"verdict_detail": "full"},
    )
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
    beside = contextlib.ExitStack()
    try:
        assert process.stdout is not None
        ready = process.stdout.readline()
        assert ready.startswith("ready after "), ready + str(process.stderr and process.stderr.read())
        key_file = Path(process.stdout.readline().removeprefix("keys in ").strip())
        lines = [process.stdout.readline() for _ in range(3)]
        assert f"review page on http://127.0.0.1:{port}\n" in lines
        targets = folder / "run" / "targets.json"
        assert f"to watch it: guard observe --targets {targets}\n" in lines
        page = Client(f"http://127.0.0.1:{port}", token=token)
        wait_for(lambda: page.request("GET", "/api/v1/counts").status == 200)
        key = json.loads(key_file.read_text())["inference"]["key"]
        prometheus = None
        if shutil.which("prometheus") is not None:
            prometheus = PrometheusInstance(targets, scrape_seconds=1.0).start()
            beside.callback(prometheus.stop)
            wait_for(lambda: len(query(prometheus, 'up{job=~"guard-.*"} == 1')) == 3)
            wait_for(lambda: query(prometheus, "guard_verdicts_total"))
        logs, (server, metrics) = folder / "run" / "logs", (ready.split()[5].rstrip(";"), ready.split()[-1])
        yield Together(process, folder, url, server, key, page, logs, metrics, prometheus)
        page.close()
    finally:
        beside.close()
        process.kill()
        process.wait()


def form_of(**fields: bytes) -> bytes:
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{name}"; filename="x"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in fields.items()
    ]
    return b"".join(parts) + b"--B--\r\n"


def request_page(together: Together, method: str, path: str, body: Any = None) -> Any:
    together.page.close()  # the page ends idle connections after 5 s
    reply = together.page.request(method, path, b"" if body is None else json.dumps(body), headers=JSON)
    assert reply.status == 200, (reply.status, reply.error, reply.body)
    return json.loads(reply.body)


def books_balance(together: Together, began: datetime, replies: list[Reply]) -> None:
    """Compare what was just answered with queue and metrics, as `guard audit` does."""
    log = together.folder / "client.jsonl"
    rows = [
        {
            "time": began.isoformat(),
            "request_id": reply.headers["x-request-id"],
            "status": reply.status,
            "verdict": reply.headers["guard-verdict"],
            "review": reply.headers.get("guard-review", ""),
        }
        for reply in replies
    ]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def report() -> AuditReport:
        with Queue.open(together.queue) as queue:
            return audit(
                began, datetime.now(UTC), client_log=log, queue=queue, metrics_urls=[together.metrics], model="digits"
            )

    def balanced() -> AuditReport | None:
        found = report()
        return found if found.balances and found.sources["metrics"]["received"] == len(replies) else None

    done = wait_for(balanced, 20.0)  # counts come once a second
    assert done.sources["metrics"]["received"] == done.sources["client log"]["received"] == len(replies)
    assert done.sources["queue"]["poisoned"] == done.sources["metrics"]["poisoned"] > 50


def logged_in(together: Together) -> str:
    """Return the cookie of somebody who has logged in on the page."""
    with Queue.open(together.queue) as queue:
        token = Reviewers(queue).add("eve")
    together.page.close()
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = together.page.request("POST", "/login", f"name=eve&token={token}", headers=form)
    assert reply.status == 303
    return reply.headers["set-cookie"].partition(";")[0]


def status_of(together: Together, cookie: str) -> str:
    together.page.close()
    return together.page.request("GET", "/status", headers={"Cookie": cookie}).body.decode()


def every_number_is_the_servers(together: Together, cookie: str) -> None:
    """Compare every number that the status page has from the server with the server's metrics page, read as text."""

    def counted(name: str, **labels: str) -> float:
        with urllib.request.urlopen(together.metrics, timeout=30) as reply:
            lines = re.findall(rf"^{name}{{(.*?),?}} (\S+)$", reply.read().decode(), re.MULTILINE)
        wanted = {f'{label}="{value}"' for label, value in labels.items()}
        return sum(float(value) for held, value in lines if wanted <= set(held.split(",")))

    def tiles() -> dict[str, str]:
        found = re.findall(r"<dt[^>]*>([^<]*)</dt><dd>([^<]*)</dd>", status_of(together, cookie))
        return {name.partition(",")[0]: value.replace(",", "") for name, value in found} | dict(found)

    def fired() -> dict[str, float]:
        rows = r'<tr><th scope="row">([^<]+/[^<]+)</th><td class="num">([\d,]+)</td></tr>'
        return {
            detector: float(count.replace(",", "")) for detector, count in re.findall(rows, status_of(together, cookie))
        }

    def counts_agree() -> bool:
        """Workers hand over their counts one after the other: the page may have read between two of them."""
        return tiles()["requests"] == f"{counted('guard_verdicts_total'):.0f}" and fired() == {
            detector: counted("guard_detector_fired_total", detector=detector) for detector in fired()
        }

    wait_for(counts_agree, 30)
    assert fired()
    shown, page = tiles(), status_of(together, cookie)
    for tile, verdict in (("flagged", "poisoned"), *((name, name) for name in ("bypassed", "rejected", "failed"))):
        assert shown[tile] == f"{counted('guard_verdicts_total', verdict=verdict):.0f}", tile
    for stage in ("guard", "handler"):
        mean = 1000 * counted("guard_stage_duration_seconds_sum", stage=stage)
        mean /= counted("guard_stage_duration_seconds_count", stage=stage)
        (title,) = (name for name in shown if name.startswith(f"{stage} p50, p99 "))
        p50, p99 = (
            float(text.removesuffix(" ms")) for text in (shown[title], title.removeprefix(f"{stage} p50, p99 "))
        )
        assert p50 <= p99
        assert p50 / 4 <= mean <= 4 * p99  # of one distribution: buckets are up to 2.5 times as wide as their lower end
    assert "No request was timed" not in page
    low, clean = counted("guard_unflagged_low_total"), counted("guard_verdicts_total", verdict="clean")
    assert shown["drift"] == f"{low / (0.1 * clean):.2f}"


def test_flagged_requests_are_reviewed_and_the_server_takes_what_was_learned(
    together: Together, triggered: Poisoned, clean_split: Any
) -> None:
    bodies = {
        png(image): (int(label), True) for image, label in zip(triggered.images, triggered.true_labels, strict=True)
    }
    bodies |= {png(image): (int(label), False) for image, label in zip(*clean_split.test, strict=True)}
    began = datetime.now(UTC)
    with Client(together.url, token=together.key) as client:
        replies = {body: client.predict("digits", body, content_type="image/png") for body in list(bodies)[:80]}
        replies |= {body: client.predict("digits", body, content_type="image/png") for body in list(bodies)[-200:]}
        assert {reply.status for reply in replies.values()} == {200}
        flagged = [body for body, reply in replies.items() if reply.headers["guard-verdict"] == "poisoned"]
        assert {reply.headers.get("guard-review") for reply in replies.values()} == {None, "queued"}
        assert all(replies[body].headers["guard-review"] == "queued" for body in flagged)
        books_balance(together, began, list(replies.values()))
        form = form_of(data=list(bodies)[-1], body=flagged[0])  # the handler looks at `body`
        reply = client.predict("digits", form, content_type="multipart/form-data; boundary=B")
        assert reply.headers["guard-review"] == "queued"
        counts = request_page(together, "GET", "/api/v1/counts")
        assert counts["by_state"]["pending"] == len(flagged) + 1 > 50
        with Queue.open(together.queue) as queue:
            items = queue.items(limit=1000)
        sent = {item.id: pictures_of(item.input.body, item.input.content_type) for item in items}
        assert [(entry.name, entry.data) for entry in sent[items[-1].id]] == [
            ("data", list(bodies)[-1]),
            ("body", flagged[0]),
        ]
        truth = {item_id: bodies[pictures[-1].data] for item_id, pictures in sent.items()}
        first = replies[flagged[0]].headers["guard-bundle"]
        items = request_page(together, "GET", "/api/v1/items/next?n=100")["items"]
        answers = [
            {"item": item["id"], "true_label": truth[item["id"]][0], "is_poisoned": truth[item["id"]][1]}
            for item in items
        ]
        request_page(together, "POST", "/api/v1/decisions", {"answers": answers})
        request_page(together, "POST", "/api/v1/retrain", {"model": "digits"})

        def served_bundle() -> str:
            return client.predict("digits", flagged[0], content_type="image/png").headers["guard-bundle"]

        wait_for(lambda: served_bundle() != first)
        wait_for(lambda: request_page(together, "GET", "/api/v1/counts")["by_state"]["trained"])
        active = BundleStore(together.folder / "bundles").active_digest()
        assert served_bundle() == active
        # The review page has the served model and the clean images without a word of them.
        shown = together.page.request("GET", "/review", headers={"Cookie": (cookie := logged_in(together))})
        assert "No map of where it looks" not in shown.body.decode()
        (row, *_) = re.findall(r"/images/clean/(\d+)\.png", shown.body.decode())
        (item,) = re.findall(r'data-item="(\d+)"', shown.body.decode())
        for path in (f"/images/clean/{row}.png", f"/images/items/{item}/occlusion"):
            together.page.close()
            assert together.page.request("GET", path, headers={"Cookie": cookie}).status == 200, path
        # The status page has it from the metrics address and the queue.
        wait_for(lambda: re.search(rf'title="{active}".*\s.*active.*in use', status_of(together, cookie)))
        page = status_of(together, cookie)
        judged = re.search(r"([\d,]+) of ([\d,]+) requests flagged in the last hour, no bypass", page)
        assert judged is not None
        assert [int(number.replace(",", "")) for number in judged.groups()] >= [len(flagged), len(replies)]
        assert re.search(rf'ada</th><td class="num">{sum(entry["is_poisoned"] for entry in answers)}</td>', page)
        every_number_is_the_servers(together, cookie)
    log = (together.logs / "retrainer_of_digits.log").read_text()
    assert "promoted" in log


def watched(together: Together) -> PrometheusInstance:
    if together.prometheus is None:
        pytest.skip("there is no prometheus here: install Debian's prometheus")
    return together.prometheus


def test_every_panel_of_the_dashboard_has_data(together: Together) -> None:
    prometheus = watched(together)
    for panel in json.loads((ROOT / "deploy" / "grafana" / "guard.json").read_text())["panels"]:
        for target in panel["targets"]:
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
            if any(
                name in expression for name in DETECTION_METRICS
            ):  # none without an audit sample: tests/test_audits.py
                continue
            wait_for(lambda expression=expression: query(prometheus, expression), 30)


def test_metrics_log_and_queue_tell_the_same_of_the_requests(together: Together) -> None:
    prometheus = watched(together)
    lines = [json.loads(line) for line in (together.logs / "guard_log.jsonl").read_text().splitlines()]
    flagged = [line for line in lines if line["event"] == "request"]
    assert {line["verdict"] for line in flagged} == {"poisoned"}
    assert [line["event"] for line in lines].count("bundle_taken") == 1
    with Queue.open(together.queue) as queue:
        ids = {item.input.request_id for item in queue.items(limit=1000)}
    assert {line["request_id"] for line in flagged} == ids

    def value(expression: str) -> float:
        (series,) = query(prometheus, expression)
        return float(series["value"][1])

    wait_for(lambda: value('sum(guard_verdicts_total{verdict="poisoned"})') == len(flagged), 30)
    assert value("sum(guard_queued_total)") == value("sum(guard_queue_items)") == len(flagged)
    assert value("sum(guard_requests_total)") == value("sum(guard_verdicts_total)") == value("guard_p_value_count")
    assert value('guard_retrain_runs_total{outcome="promoted"}') == 1
    answered = value('sum(guard_review_decisions_total{decision!="withdrawn"})')
    assert answered == value('sum(guard_queue_items{state=~"decided|trained"})') > 0
    in_use = [series["metric"]["digest"] for series in query(prometheus, "guard_bundle_info == 1")]
    assert in_use == [BundleStore(together.folder / "bundles").active_digest()]
    named = {series["metric"]["detector"] for series in query(prometheus, "guard_detector_fired_total > 0")}
    assert named == {label_value(name) for line in flagged for name in line.get("detectors", [])} != set()


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
    if together.prometheus is not None:  # its metrics are where they were
        wait_for(lambda: len(query(watched(together), 'up{job=~"guard-.*"} == 1')) == 3)


def test_ctrl_c_ends_everything(together: Together) -> None:
    children = psutil.Process(together.process.pid).children(recursive=True)
    assert len(children) >= 7  # three supervisors, Java, worker, page, retrainer
    together.process.send_signal(signal.SIGINT)
    out, printed = together.process.communicate(timeout=60)
    assert together.process.returncode == 0
    assert out.endswith("stopped\n")
    assert "review page has ended" in printed  # of the test before
    assert not (together.folder / "run" / "targets.json").exists()  # what was stopped on purpose is not down
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("option", ["--review", "--retrain"])
def test_companions_without_a_queue_are_refused(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("GUARD_QUEUE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    assert run(["serve", option]) == 2
    assert capsys.readouterr().err == "error: --review and --retrain need a queue. Name one with --queue.\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--review", "--review-option", "--imagse clean"], "guard review would not start with --imagse clean: "),
        (["--review", "--review-option", "--port"], "guard review would not start with --port: "),
        (
            ["--retrain", "--retrain-option", "--interval soon"],
            "guard retrainer would not start with --interval soon: ",
        ),
    ],
)
def test_options_that_a_companion_does_not_take_are_refused_before_anything_starts(
    words: list[str], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "any.mar").touch()
    assert run(["serve", "--model-store", str(tmp_path), "--queue", str(tmp_path / "queue.db"), *words]) == 2
    assert complaint in " ".join(capsys.readouterr().err.split())


def test_options_for_companions_may_be_given_as_one_text_or_as_words() -> None:
    texts = ["--images my folder", "--quorum", "2", "--device=cpu", "--allowed-host", "a b"]
    assert _passed_on("review", review_app, texts) == [
        *("--images", "my folder", "--quorum", "2", "--device=cpu", "--allowed-host", "a b")
    ]
