"""The local engine as people start it: a process of its own, asked by the clients that others publish."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton
from serving_helpers import served_model

from guard import Guard
from guard.errors import ServerError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.local.server import LocalServer
from guard.observing.scrape import read_endpoint
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore
from guard.torchserve.archives.guarded import make_guarded_archive, make_plain_archive
from guard.torchserve.keys import kept_keys


class Site:
    """One engine with a model that follows a folder of bundles, and one that does not, beside a queue."""

    def __init__(self, server: LocalServer, store: BundleStore, url: str, told: list[str]) -> None:
        self.server, self.store, self.url, self.told = server, store, url, told
        self.client = triton.InferenceServerClient(server.inference_url.removeprefix("http://"))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.server.token()}"}  # anew: the client writes into it

    def infer(self, images: Any, model: str = "digits", *, binary: bool = True, **more: Any) -> Any:
        tensor = triton.InferInput("input", list(images.shape), "FP32")
        tensor.set_data_from_numpy(images, binary_data=binary)
        return self.client.infer(model, [tensor], headers=self.headers, **more)


@pytest.fixture(scope="module")
def site(
    badnet: MnistCnn, fitted_guard: Guard, second_guard: Guard, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("local")
    (folder / "store").mkdir()
    bundle = fitted_guard.save(folder / "bundles")
    second_guard.save(folder / "bundles")
    store = BundleStore(folder / "bundles")
    store.activate(bundle.name)
    model = served_model("image", badnet, folder)
    settings = {"verdict_detail": "full"}
    for name, bundles in (("digits", store.root), ("pinned", None)):
        make_guarded_archive(name, model, bundle, model_store=folder / "store", bundles=bundles, settings=settings)
    url, told = f"sqlite:///{folder / 'queue.db'}", list[str]()
    server = LocalServer(
        folder / "store", work_dir=folder / "work", grpc_port=0, environment={"GUARD_QUEUE_URL": url}, tell=told.append
    )
    with server:
        server.wait_ready()
        yield Site(server, store, url, told)
    assert [*(folder / "work").glob("engine-*")] == []  # with the key, and the models unpacked


def test_clients_of_the_protocol_find_both_models(site: Site) -> None:
    client = site.client
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.get_server_metadata(headers=site.headers)["extensions"] == ["binary_tensor_data"]
    for name in ("digits", "pinned"):
        assert client.is_model_ready(name, headers=site.headers)
        assert client.get_model_metadata(name, headers=site.headers)["inputs"][0]["shape"] == [-1, 1, 28, 28]
    with pytest.raises(triton.InferenceServerException, match="a key is needed"):
        client.get_model_metadata("digits")


@pytest.mark.parametrize("binary", [True, False])
def test_verdicts_are_those_of_the_library(
    site: Site, binary: bool, fitted_guard: Guard, triggered: Poisoned, clean_split: Any
) -> None:
    images = np.concatenate([triggered.images[:20], clean_split.test.images[:20]])
    verdicts = fitted_guard.inspect(images)
    wanted = ("logits", "guard_verdict", "guard_p_value")
    reply = site.infer(
        images, "pinned", binary=binary, outputs=[triton.InferRequestedOutput(n, binary_data=binary) for n in wanted]
    )
    told = [text.decode() if isinstance(text, bytes) else text for text in reply.as_numpy("guard_verdict")]
    assert told == ["poisoned" if verdict.is_poisoned else "clean" for verdict in verdicts]
    np.testing.assert_allclose(reply.as_numpy("guard_p_value"), [verdict.p_value for verdict in verdicts], atol=1e-3)
    assert reply.as_numpy("logits").argmax(axis=1).tolist() == [verdict.label for verdict in verdicts]


def test_grpc_and_rest_give_the_same_answers(site: Site, triggered: Poisoned, clean_split: Any) -> None:
    images = np.concatenate([triggered.images[:3], clean_split.test.images[:3]])
    client = triton_grpc.InferenceServerClient(f"127.0.0.1:{site.server.ports.grpc}")
    headers = {"authorization": f"Bearer {site.server.token()}"}
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("pinned", headers=headers)
    assert client.get_server_metadata(headers=headers).name == "backdoor-guard"
    about = client.get_model_metadata("pinned", headers=headers)
    assert [(entry.name, entry.datatype) for entry in about.outputs] == [
        ("logits", "FP32"),
        ("guard_verdict", "BYTES"),
        ("guard_p_value", "FP64"),
    ]
    tensor = triton_grpc.InferInput("input", list(images.shape), "FP32")
    tensor.set_data_from_numpy(images)
    ours, other = client.infer("pinned", [tensor], headers=headers, request_id="g"), site.infer(images, "pinned")
    for name in ("logits", "guard_verdict", "guard_p_value"):
        np.testing.assert_array_equal(ours.as_numpy(name), other.as_numpy(name))
    assert ours.get_response().id == "g"
    assert ours.get_response().parameters["guard_poisoned_rows"].int64_param == 3
    for wrong, code in (({}, "UNAUTHENTICATED"), (headers, "NOT_FOUND")):
        with pytest.raises(triton_grpc.InferenceServerException, match=code):
            client.infer("nowhere", [tensor], headers=wrong)


def test_flagged_requests_are_queued_and_counted(site: Site, triggered: Poisoned) -> None:
    reply = site.infer(triggered.images[:1], request_id="found-again")
    assert reply.get_response()["parameters"]["guard_verdict"] == "poisoned"
    with Queue.open(site.url) as queue:
        (item,) = [item for item in queue.items(limit=1000) if item.input.request_id == "found-again"]
    assert item.input.model == "digits"
    np.testing.assert_array_equal(item.input.inputs, triggered.images[0])
    flagged = [
        value
        for series, value in read_endpoint(site.server.metrics_url).items()
        if (series.name, series.label("model"), series.label("verdict"))
        == ("guard_verdicts_total", "digits", "poisoned")
    ]
    assert sum(flagged) >= 1


def test_new_bundle_is_taken_while_serving(site: Site, clean_split: Any) -> None:
    first = site.infer(clean_split.test.images[:1]).get_response()["parameters"]["guard_bundle"]
    other = next(digest for digest in site.store.digests() if digest != first)
    site.store.activate(other)
    deadline = time.monotonic() + 20
    while site.infer(clean_split.test.images[:1]).get_response()["parameters"]["guard_bundle"] != other:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert site.infer(clean_split.test.images[:1], "pinned").get_response()["parameters"]["guard_bundle"] == first
    site.store.activate(first)


def test_engine_that_is_killed_is_started_again(site: Site, clean_split: Any) -> None:
    os.kill(site.server.pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while True:
        assert site.server.is_alive()
        try:
            if site.client.is_server_ready():
                break
        except (OSError, http.client.HTTPException):
            pass
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert [line for line in site.told if "has ended with status" in line]
    assert site.infer(clean_split.test.images[:1]).as_numpy("logits").shape == (1, 10)


def test_engine_that_is_told_to_stop_closes_what_it_opened(site: Site, tmp_path: Path) -> None:
    with LocalServer(site.server.model_store, work_dir=site.server.work_dir, token_authorization=False) as other:
        other.wait_ready()  # beside the first, in the same folder
        folders = {*site.server.work_dir.glob("engine-*")}
        process = psutil.Process(other.pid)
        process.terminate()
        process.wait(20)
        log = (site.server.work_dir / "logs" / "engine.log").read_text()
        assert "has ended with status 0;" in _next_word(other)
    assert {*site.server.work_dir.glob("engine-*")} < folders
    assert "Traceback" not in log
    assert site.server.is_alive()
    assert site.client.is_server_ready()


def _next_word(server: LocalServer) -> str:
    """What a server tells of its process, that has just ended."""
    told: list[str] = []
    server._tell = told.append
    deadline = time.monotonic() + 20
    while not told and time.monotonic() < deadline:
        server.is_alive()
        time.sleep(0.05)
    return "".join(told)


def test_engine_says_why_it_does_not_start(site: Site, badnet: MnistCnn, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    make_plain_archive("bare", served_model("image", badnet, tmp_path), model_store=tmp_path / "store")
    with LocalServer(tmp_path / "store", token_authorization=False) as server:
        assert server.token() is None
        work_dir = server.work_dir
        with pytest.raises(ServerError, match=r"^the local engine did not start: model bare: bare\.mar has no guard\."):
            server.wait_ready()
    assert not work_dir.exists()
    with pytest.raises(ServerError, match=r"port \d+ is taken by another program"):
        LocalServer(site.server.model_store, inference_port=site.server.ports.inference).start()
    with pytest.raises(ServerError, match=r"^batch_size must be >= 1, got 0\.$"):
        LocalServer(site.server.model_store, batch_size=0).start()


def test_key_is_kept_where_it_was_asked_for(site: Site, tmp_path: Path) -> None:
    keys = [kept_keys(tmp_path / "keys.json")["inference"]]  # as a first start makes them
    for rotate in (False, True):
        server = LocalServer(site.server.model_store, key_file=tmp_path / "keys.json", rotate_keys=rotate)
        with server:  # not waited for
            keys.append(server.token())
            handed_over = json.loads((server.work_dir / "key_file.json").read_text())
            assert handed_over == {"inference": {"key": keys[-1]}}
            assert (server.work_dir / "key_file.json").stat().st_mode & 0o077 == 0
    assert keys[0] == keys[1] != keys[2]
