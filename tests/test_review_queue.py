"""Flagged inputs on their way from the server to the queue: what arrives there, and what happens when it cannot."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from review_helpers import workspace_of
from serving_helpers import Worker, Workshop, png

from guard import Guard
from guard.errors import ConfigError, DataError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.relabel.address import queue_url
from guard.relabel.items import QueueItem, State
from guard.relabel.queue import Queue
from guard.relabel.request_body import fields_of, pictures_of
from guard.serving import review_queue

Serve = Callable[..., Worker]


@pytest.fixture(scope="module")
def workshop(fitted_guard: Guard, badnet: MnistCnn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    path, modules, pixels = list(sys.path), set(sys.modules), Image.MAX_IMAGE_PIXELS
    shop = Workshop(fitted_guard, badnet, tmp_path_factory.mktemp("workshop"))
    yield shop
    shop.close()
    sys.path[:] = path
    Image.MAX_IMAGE_PIXELS = pixels
    for name in set(sys.modules) - modules:
        if name.endswith(("_handler", "mnist_network")) or "_of_" in name:
            del sys.modules[name]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return queue_url(str(tmp_path / "queue" / "queue.db"))


@pytest.fixture
def serve(workshop: Workshop, url: str, tmp_path: Path) -> Iterator[Serve]:
    """Start a guarded worker whose flagged inputs go to the queue at `url`."""
    started: list[Worker] = []

    def start(handler: str = "image", *, folder: bool = True, **settings: Any) -> Worker:
        if folder:
            (tmp_path / "queue").mkdir(exist_ok=True)
        started.append(workshop.guarded(handler, queue_url=url, **settings))
        return started[-1]

    yield start
    for worker in started:
        worker.close()


@pytest.fixture(scope="module")
def flagged(fitted_guard: Guard, triggered: Poisoned) -> np.ndarray[Any, Any]:
    """Four triggered images that the guard calls poisoned."""
    verdicts = fitted_guard.inspect(triggered.images[:40])
    return triggered.images[:40][[verdict.is_poisoned for verdict in verdicts]][:4]


@pytest.fixture(scope="module")
def unflagged(fitted_guard: Guard, clean_split: Any) -> np.ndarray[Any, Any]:
    verdicts = fitted_guard.inspect(clean_split.test.images[:40])
    return clean_split.test.images[:40][[not verdict.is_poisoned for verdict in verdicts]][:4]


def queued(url: str) -> list[QueueItem]:
    with Queue.open(url) as queue:
        return queue.items()


@pytest.mark.parametrize("kind", ["deep", "in itself", "keys", "half a character"])
def test_body_that_cannot_be_written_anew_costs_no_answer(kind: str):
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    circle: list[Any] = []
    circle.append(circle)
    body = {"deep": deep, "in itself": circle, "keys": {("a",): 1}, "half a character": "\ud800"}[kind]

    class Requests:
        def headers(self, index: int) -> dict[str, str]:
            return {}

        def request_id(self, index: int) -> str:
            return "id"

    outcome = SimpleNamespace(verdict=object(), evidence=SimpleNamespace(verdict=object()))
    kept = review_queue.flagged_request(Requests(), 0, outcome, {"body": body})
    begins = {"deep": b"[[[[", "in itself": b'"[[', "keys": b'"{(', "half a character": b"\xed\xa0\x80"}
    assert kept.body.startswith(begins[kind])
    while deep:  # taken apart here, as a chain of that length is not to be freed at once
        [deep] = deep


def test_flagged_requests_of_a_batch_are_queued_and_clean_ones_are_not(
    serve: Serve, url: str, fitted_guard: Guard, flagged: Any, unflagged: Any
) -> None:
    worker = serve()
    bodies = [png(unflagged[0]), png(flagged[0]), png(unflagged[1]), png(flagged[1])]
    headers = [{}, {"content-type": "image/png"}, {}, {"Content-Type": "image/x-other"}]
    before = datetime.now(UTC)
    answers = worker.ask(*bodies, headers=headers)
    items = queued(url)
    assert [answer.headers.get("Guard-Review") for answer in answers] == [None, "queued", None, "queued"]
    assert [item.input.request_id for item in items] == ["id-1", "id-3"]
    assert [item.input.content_type for item in items] == ["image/png", "image/x-other"]
    for item, body, image in zip(items, (bodies[1], bodies[3]), flagged[:2], strict=True):
        verdict = fitted_guard.inspect(np.rint(image[None] * 255).astype(np.float32) / 255)[0]
        entry = item.input
        assert item.state is State.PENDING
        assert entry.body == body
        assert entry.model == worker.context.model_name
        assert entry.bundle_digest == worker.handler._runtime.current.digest
        assert entry.suspect_label == verdict.label
        assert entry.p_value == verdict.p_value
        assert entry.reason == verdict.reason
        assert dict(entry.raw) == pytest.approx(verdict.detector_scores, rel=1e-4)
        assert entry.surprise.keys() == verdict.detector_scores.keys()
        assert entry.surprise == pytest.approx(verdict.surprise, rel=1e-4)
        assert entry.combined == pytest.approx(verdict.score, rel=1e-4)
        assert 0 < entry.backup_confidence <= 1
        assert timedelta(0) <= entry.received_at - before < timedelta(minutes=1)
        np.testing.assert_allclose(entry.inputs, image, atol=0.5 / 255 + 1e-6)
    counted, model = worker.counts(), worker.context.model_name
    assert counted[f"guard_queued_total{{{model}}}"] == 2
    assert counted[f"guard_shed_total{{{model},full}}"] == counted[f"guard_shed_total{{{model},unavailable}}"] == 0


def test_queued_activations_give_the_verdict_again_without_the_model(
    serve: Serve, url: str, fitted_guard: Guard, flagged: Any
) -> None:
    worker = serve()
    worker.ask(*map(png, flagged))
    for item in queued(url):
        scores = fitted_guard.scores(item.input.activations)
        assert scores.p_values[0] == item.input.p_value
        assert scores.combined[0] == pytest.approx(item.input.combined, rel=1e-4)
        second = fitted_guard.ensemble.replacement_logits(item.input.activations)
        assert item.input.backup_label == second.argmax()


def test_json_body_is_queued_as_json(serve: Serve, url: str, flagged: Any) -> None:
    worker = serve()
    text = base64.b64encode(png(flagged[0])).decode()
    worker.ask({"body": {"data": text}}, headers=[{"Content-Type": "application/json"}])
    (item,) = queued(url)
    assert json.loads(item.input.body) == {"data": text}


@pytest.mark.parametrize("decoy", ["clean picture", "\ud800", [[["x"]]], b"", {"data": None}], ids=range(5))
def test_field_that_was_not_looked_at_does_not_hide_the_one_that_was(
    serve: Serve, url: str, flagged: Any, unflagged: Any, decoy: Any
) -> None:
    worker = serve()
    body, clean = png(flagged[0]), png(unflagged[0])
    decoy = clean if decoy == "clean picture" else decoy
    other, answer = worker.ask(clean, {"data": decoy, "body": body})  # the handler looks at `body`
    (item,) = queued(url)
    assert (other.headers["Guard-Verdict"], answer.headers["Guard-Review"]) == ("clean", "queued")
    kept = {field.name: field.data for field in fields_of(item.input.body, item.input.content_type)}
    assert kept["body"] == body
    assert "data" in kept
    assert body in [field.data for field in pictures_of(item.input.body, item.input.content_type)]
    np.testing.assert_allclose(item.input.inputs, flagged[0], atol=0.5 / 255 + 1e-6)


def test_request_that_no_queue_can_take_costs_its_neighbours_nothing(
    serve: Serve, url: str, flagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = serve()
    as_input = review_queue.ReviewQueue._input

    def strange(queue: Any, answer: Any, *rest: Any) -> Any:
        if answer.request_id == "id-0":
            raise DataError("combined must be finite, got inf.")
        return as_input(queue, answer, *rest)

    monkeypatch.setattr(review_queue.ReviewQueue, "_input", strange)
    answers = worker.ask(*map(png, flagged[:2])) + worker.ask(b"x" * 8, png(flagged[2]))
    assert [answer.headers.get("Guard-Review") for answer in answers] == ["unavailable", "queued", None, "queued"]
    assert len(queued(url)) == 2


def test_id_and_content_type_are_kept_as_a_database_takes_them(serve: Serve, url: str, flagged: Any) -> None:
    worker = serve()
    hostile = "a\x00b\ud800" + "x" * 100_000
    worker.context.get_request_id = lambda index=0: hostile
    (answer,) = worker.ask(png(flagged[0]), headers=[{"Content-Type": hostile}])
    del worker.context.get_request_id
    (item,) = queued(url)
    assert answer.headers["Guard-Review"] == "queued"
    assert item.input.request_id == item.input.content_type == "a?b?" + "x" * 1020


def test_request_with_several_rows_is_queued_once_by_its_most_suspicious_row(
    serve: Serve, url: str, flagged: Any
) -> None:
    worker = serve("crops", rows_per_request="any")
    (answer,) = worker.ask(png(flagged[0]))
    (item,) = queued(url)
    assert answer.headers["Guard-Review"] == "queued"
    assert f"{item.input.p_value:.6g}" == answer.headers["Guard-P-Value"]


def test_blocked_request_is_queued_as_well(serve: Serve, url: str, flagged: Any) -> None:
    (answer,) = serve(action="block").ask(png(flagged[0]))
    assert (answer.status, answer.headers["Guard-Review"]) == (422, "queued")
    assert len(queued(url)) == 1


def test_without_a_queue_no_answer_speaks_of_one(workshop: Workshop, flagged: Any) -> None:
    worker = workshop.guarded()
    (answer,) = worker.ask(png(flagged[0]))
    assert answer.headers["Guard-Verdict"] == "poisoned"
    assert "Guard-Review" not in answer.headers
    handed_over = ("guard_queued_total", "guard_shed_total")
    queued = {name: value for name, value in worker.counts().items() if name.startswith(handed_over)}
    assert (len(queued), set(queued.values())) == (3, {0})


def test_queue_that_is_gone_costs_no_answer_and_one_wait(
    serve: Serve, flagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = serve()
    tries: list[int] = []

    def gone(_queue: Queue, inputs: Any) -> None:
        tries.append(len(inputs))
        raise OSError("disk is gone")

    monkeypatch.setattr(Queue, "enqueue", gone)
    monkeypatch.setattr(review_queue, "PAUSE_SECONDS", 3600.0)
    for _ in range(3):
        answers = worker.ask(*map(png, flagged[:2]))
        assert [answer.status for answer in answers] == [200, 200]
        assert [answer.headers["Guard-Verdict"] for answer in answers] == ["poisoned"] * 2
        assert [answer.headers["Guard-Review"] for answer in answers] == ["unavailable"] * 2
    assert tries == [2]
    counted, model = worker.counts(), worker.context.model_name
    assert counted[f"guard_shed_total{{{model},unavailable}}"] == 6
    assert counted[f"guard_queued_total{{{model}}}"] == 0


def test_queue_that_comes_back_is_used_again(
    serve: Serve, url: str, flagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_queue, "PAUSE_SECONDS", 0.0)
    worker = serve()
    with monkeypatch.context() as broken:
        broken.setattr(Queue, "enqueue", lambda *_: 1 / 0)
        assert worker.ask(png(flagged[0]))[0].headers["Guard-Review"] == "unavailable"
    assert worker.ask(png(flagged[1]))[0].headers["Guard-Review"] == "queued"
    assert len(queued(url)) == 1


def test_queue_that_cannot_be_opened_at_first_is_opened_later(
    serve: Serve, flagged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(review_queue, "PAUSE_SECONDS", 0.05)
    place = tmp_path / "queue"
    place.write_text("a file where the queue's folder should be")
    worker = serve(folder=False)
    assert worker.ask(png(flagged[0]))[0].headers["Guard-Review"] == "unavailable"
    place.unlink()
    place.mkdir()
    deadline = time.monotonic() + 30
    while worker.ask(png(flagged[0]))[0].headers["Guard-Review"] != "queued":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_detectors_fire_on_the_page_as_in_the_log_at_the_rate_that_is_served(
    serve: Serve, url: str, flagged: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    worker = serve(false_positive_rate=0.2)
    bundle = worker.handler._runtime.current
    assert bundle.config.false_positive_rate == 0.2
    capfd.readouterr()
    worker.ask(*(png(image) for image in flagged[:8]))
    logged = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"request"' in line]
    assert len(logged) == len(flagged)
    with Queue.open(url) as queue:
        workspace = workspace_of(queue)
        for line in logged:
            [item] = workspace.queue.claim("ada", 1, order="age")
            shown = workspace.view(item).signs
            assert sum(is_fired for sign in shown for _, _, is_fired in sign.places) == len(line["detectors"]) > 0


def test_body_that_is_too_large_for_the_queue_is_left_out(
    serve: Serve, url: str, flagged: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = serve()
    with Queue.open(url) as queue:
        queue.change_settings(max_body_bytes=10)  # a server that runs keeps to it
    (answer,) = worker.ask(png(flagged[0]))
    (item,) = queued(url)
    assert answer.headers["Guard-Review"] == "queued"
    assert item.input.body == b""
    assert item.input.inputs.shape == (1, 28, 28)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sqlite:////var/queue.db", "sqlite:////var/queue.db"),
        ("/var/queue.db", "sqlite:////var/queue.db"),
        ("postgresql+psycopg://u@h/n", "postgresql+psycopg://u@h/n"),
    ],
)
def test_queue_url_knows_files_and_databases(text: str, expected: str) -> None:
    assert queue_url(text) == expected


def test_queue_url_of_a_relative_file_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert queue_url("q.db") == queue_url("sqlite:///q.db") == f"sqlite:///{tmp_path}/q.db"


@pytest.mark.parametrize("text", ["", "sqlite:///"])
def test_queue_url_without_a_place_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^the queue's URL is empty\. "):
        queue_url(text)


def test_queue_url_of_another_database_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^a queue lives in SQLite or PostgreSQL, got 'mysql'\. "):
        queue_url("mysql://h/n")
