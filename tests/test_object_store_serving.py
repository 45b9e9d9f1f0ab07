"""Replicas that follow a store on a real S3 server: within two seconds, without a failed request, whatever it does."""

from __future__ import annotations

import copy
import itertools
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_store_helpers import BUCKET, Proxy, holding, refused
from serving_helpers import Workshop

from guard import Guard
from guard.cli.review_sources import known_bundles, open_workspace
from guard.errors import BundleError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.local.archived_model import open_archived_model
from guard.relabel.queue import Queue
from guard.serving.guarded_model import GuardedModel
from guard.storage import objects, remote
from guard.storage.bundle import BundleStore
from guard.storage.remote import RemoteBundleStore
from guard.storage.stores import CACHE_VARIABLE, open_store
from guard.torchserve.archives.contents import followed_bundles, promise_of
from guard.types import Float32Array

WITHIN_S = 2.0
_numbers = itertools.count()


@pytest.fixture(scope="module")
def written(fitted_guard: Guard, second_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both guards as bundles."""
    folder = tmp_path_factory.mktemp("written")
    for guard in (fitted_guard, second_guard):
        guard.save(folder)
    return folder


@pytest.fixture
def digests(written: Path, fitted_guard: Guard) -> tuple[str, str]:
    """The first guard's digest, and the second's."""
    first, second = BundleStore(written).digests()
    is_first = BundleStore(written).document(first)["settings"]["false_positive_rate"] == 0.05
    return (first, second) if is_first else (second, first)


@pytest.fixture
def url(s3: Proxy) -> str:
    return f"s3://{BUCKET}/served-{next(_numbers)}"


@pytest.fixture
def store(url: str, written: Path, digests: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store as the operator's machine sees it: both bundles in it, the first active."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "operator"))
    store = open_store(url)
    assert isinstance(store, RemoteBundleStore)
    for digest in digests:
        shutil.copytree(written / digest, store.root / digest)
        store.publish(digest)
    store.activate(digests[0])
    return store


Replica = Callable[..., GuardedModel]


@pytest.fixture
def replica(
    url: str, store: RemoteBundleStore, badnet: MnistCnn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Replica]:
    """Start a replica as on a machine of a name, with copies of its own."""
    made: list[GuardedModel] = []

    def start(name: str = "replica", **settings: Any) -> GuardedModel:
        monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / name))
        made.append(GuardedModel(copy.deepcopy(badnet), bundles=url, verdict_detail="full", **settings))
        return made[-1]

    yield start
    for model in made:
        model.close()


@pytest.fixture(scope="module")
def images(triggered: Poisoned, clean_split: Any) -> Float32Array:
    return np.concatenate([triggered.images[:2], clean_split.test.images[:2]])


def follows(model: GuardedModel, digest: str) -> bool:
    """Return whether it takes the bundle; a busy machine may take longer over it than is promised."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if model.guard.digest == digest:
            return True
        time.sleep(0.01)
    return False


def refusals(model: GuardedModel) -> float:
    """How many new bundles were refused since the last call."""
    samples = model.runtime.metrics.drain()
    return sum(s.value for s in samples if s.name == "guard_bundle_swaps_total" and s.labels[1] == "refused")


def first_refusals(model: GuardedModel) -> float:
    """Wait until new bundles were refused, and return how many."""
    deadline = time.monotonic() + 30
    while not (found := refusals(model)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def polled(proxy: Proxy, times: int) -> None:
    """Wait until ACTIVE was asked for some more times."""

    def asked() -> int:
        return sum(method == "GET" and path.endswith("/ACTIVE") for method, path, _ in proxy.seen)

    goal, deadline = asked() + times, time.monotonic() + 10
    while asked() < goal:
        assert time.monotonic() < deadline, "nobody asks for ACTIVE"
        time.sleep(0.02)


def test_replicas_follow_within_two_seconds_no_request_fails_and_no_answer_mixes_bundles(
    replica: Replica,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    images: Float32Array,
    fitted_guard: Guard,
    second_guard: Guard,
) -> None:
    expected = {
        digest: [verdict.p_value for verdict in guard.inspect(images)]
        for digest, guard in zip(digests, (fitted_guard, second_guard), strict=True)
    }
    replicas, stop = [replica(name) for name in ("one", "two")], threading.Event()
    assert max(store.least_poll_seconds, fitted_guard.config.bundle_poll_seconds) <= WITHIN_S / 2  # the rest: to fetch
    answered: list[list[list[Any]]] = [[] for _ in replicas]

    def stream(model: GuardedModel, answers: list[list[Any]]) -> None:
        while not stop.is_set():
            answers.append(model.answer(images))
            time.sleep(0.03)

    threads = [threading.Thread(target=stream, args=pair) for pair in zip(replicas, answered, strict=True)]
    for thread in threads:
        thread.start()
    try:
        for digest in (digests[1], digests[0], digests[1]):
            store.activate(digest)
            assert all(follows(model, digest) for model in replicas)
            time.sleep(0.1)
        assert store.roll_back() == digests[0]
        assert all(follows(model, digests[0]) for model in replicas)
        time.sleep(0.1)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    for answers in answered:
        assert len(answers) > 20
        seen = [digest for digest, _ in itertools.groupby(answer.bundle for row in answers for answer in row)]
        assert seen == [digests[0], digests[1], digests[0], digests[1], digests[0]]
        for row in answers:
            assert {answer.verdict for answer in row} <= {"clean", "poisoned"}
            assert [answer.p_value for answer in row] == expected[row[0].bundle]
    assert [refusals(model) for model in replicas] == [0, 0]


def test_down_keeps_the_old_guard_is_told_once_and_what_is_switched_then_is_followed_after(
    s3: Proxy,
    replica: Replica,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    images: Float32Array,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = replica()
    refusals(model)
    s3.go_down()
    assert first_refusals(model) == 1
    assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
    time.sleep(1.2)  # it is asked again
    assert refusals(model) == 0
    again = s3.come_back()
    store.activate(digests[1])
    assert follows(model, digests[1])
    assert refusals(model) == 0
    again.go_down()
    assert first_refusals(model) == 1  # another time that it is away is told again
    again.come_back()


def test_no_request_waits_for_a_slow_store(
    s3: Proxy, replica: Replica, store: RemoteBundleStore, digests: tuple[str, str], images: Float32Array
) -> None:
    model = replica()
    asked = threading.Event()

    def late(method: str, path: str, *_: object) -> None:
        if path.endswith("arrays.safetensors"):
            asked.set()
            time.sleep(1.0)

    s3.before = late
    store.activate(digests[1])
    assert asked.wait(5)
    slowest = 0.0
    for _ in range(20):
        started = time.perf_counter()
        assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
        slowest = max(slowest, time.perf_counter() - started)
    assert slowest < 0.9
    assert follows(model, digests[1])


def test_a_lying_store_changes_nothing_and_the_error_names_the_digest(
    s3: Proxy,
    replica: Replica,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    written: Path,
    images: Float32Array,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "_PAUSE_S", 0.6)
    model = replica()
    refusals(model)
    lie = holding((written / digests[0] / "arrays.safetensors").read_bytes())
    s3.before = lambda method, path, _: (
        lie if method == "GET" and path.endswith(f"{digests[1]}/arrays.safetensors") else None
    )
    store.activate(digests[1])
    polled(s3, 3)
    assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
    assert refusals(model) == 1
    (event,) = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"bundle_refused"' in line]
    assert (event["bundle"], event["stays"]) == (digests[1], digests[0])
    assert digests[1][:12] in event["why"]
    s3.before = None
    assert follows(model, digests[1])


def test_a_pointer_that_is_seen_before_its_bundle_is_followed_when_that_comes(
    s3: Proxy, replica: Replica, store: RemoteBundleStore, digests: tuple[str, str], images: Float32Array
) -> None:
    model = replica()
    refusals(model)
    s3.before = lambda method, path, _: (
        refused(404, "NoSuchKey") if f"{digests[1]}/" in path and method == "GET" else None
    )
    store.activate(digests[1])
    polled(s3, 3)
    assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
    assert refusals(model) == 1
    s3.before = None
    assert follows(model, digests[1])


def test_a_pointer_with_garbage_changes_nothing(
    s3: Proxy, replica: Replica, store: RemoteBundleStore, digests: tuple[str, str], images: Float32Array
) -> None:
    model = replica()
    objects.obstore.put(store._objects._quick, "ACTIVE", b"../../../etc/passwd\n")
    polled(s3, 3)
    assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
    objects.obstore.delete(store._objects._quick, "ACTIVE")
    polled(s3, 3)
    assert {answer.bundle for answer in model.answer(images)} == {digests[0]}
    assert refusals(model) == 1


def test_a_start_without_the_store_serves_the_last_bundle_or_the_embedded_one_and_says_so(
    s3: Proxy,
    replica: Replica,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    written: Path,
    images: Float32Array,
    caplog: pytest.LogCaptureFixture,
) -> None:
    replica("known").close()
    s3.go_down()
    with caplog.at_level(logging.WARNING):
        model = replica("known", bundle=written / digests[1])
        assert model.guard.digest == digests[0]
        other = replica("new", bundle=written / digests[1])
        assert other.guard.digest == digests[1]
    last, embedded = [record.getMessage() for record in caplog.records]
    assert last.endswith(f"serving the bundle that served here last, {digests[0][:12]}.")
    assert embedded.endswith("serving the embedded bundle until it appears.")
    assert all("no connection" in text for text in (last, embedded))
    with pytest.raises(BundleError, match=r"there is no bundle to serve \(s3://.* no connection"):
        replica("bare")
    again = s3.come_back()
    assert follows(other, digests[0])  # it appeared
    again.go_down()


def test_a_start_with_a_slow_store_does_not_wait_for_ever(
    s3: Proxy,
    replica: Replica,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    written: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(remote, "_LONGEST_START_S", 0.3)
    data = (written / digests[0] / "arrays.safetensors").read_bytes()

    def drops() -> Iterator[bytes]:
        for start in range(0, len(data), 2048):
            yield data[start : start + 2048]
            time.sleep(0.05)

    slow = (200, {"Content-Length": str(len(data)), "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}, drops())
    s3.before = lambda _, path, __: slow if path.endswith(f"{digests[0]}/arrays.safetensors") else None
    model = replica("slow", bundle=written / digests[1])
    assert model.guard.digest == digests[1]
    s3.before = None
    assert follows(model, digests[0])


# --- whatever else works on bundles


def test_an_archive_follows_a_url_in_a_worker_of_torchserve_and_in_the_local_engine(
    url: str, store: RemoteBundleStore, digests: tuple[str, str], fitted_guard: Guard, badnet: MnistCnn, tmp_path: Path
) -> None:
    shop = Workshop(fitted_guard, badnet, tmp_path)
    store.activate(digests[1])
    worker = shop.guarded("stock", bundles=url, name="served")
    archive = tmp_path / "served.mar"
    try:
        assert worker.handler._runtime.current.digest == digests[1]
        assert followed_bundles(archive) == url
        promise = promise_of(archive)
        assert (promise.bundle, promise.false_positive_rate) == (store.root / digests[1], 0.1)
        store.roll_back()
        deadline = time.monotonic() + 5
        while worker.handler._runtime.current.digest != digests[0]:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        shop.close()
    with open_archived_model(archive, tmp_path / "unpacked", "served") as model:
        assert model.guard.digest == digests[0]


def test_the_review_page_knows_bundles_below_a_url_and_rolls_back(
    s3: Proxy,
    url: str,
    store: RemoteBundleStore,
    digests: tuple[str, str],
    sqlite_template: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store.activate(digests[1])
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "page"))
    with Queue.open(f"sqlite:///{shutil.copy(sqlite_template, tmp_path / 'queue.db')}") as queue:
        known = known_bundles([f"digits={url}"])
        assert known.active("digits").digest == digests[1]  # type: ignore[union-attr]
        assert known.find(digests[0]).false_positive_rate == 0.05  # type: ignore[union-attr]
        assert known.find("0" * 64) is None
        (listed,) = open_workspace(queue, known).bundle_lists
        assert [(bundle.digest, bundle.is_active) for bundle in listed.newest()] == [
            (digests[1], True),
            (digests[0], False),
        ]
        assert listed.way_back() == digests[0]
        store.begin_promotion("{}")
        with pytest.raises(BundleError, match="just switching"):
            listed.roll_back(digests[1], digests[0], "ada")
        store.end_promotion()
        listed.roll_back(digests[1], digests[0], "ada")
        assert store.active_digest() == digests[0]
        s3.go_down()
        assert (listed.active(), listed.newest(), listed.expected_rate() is None) == (digests[0], [], False)
