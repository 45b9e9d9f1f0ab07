"""The TorchServe handler, with real archives, real user handlers and TorchServe's own Context, without Java."""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving_helpers import HANDLERS, ONE_ROW_HANDLERS, Worker, Workshop, list_classes_from_module, png
from ts.torch_handler.request_envelope.json import JSONEnvelope

from guard import Guard
from guard.errors import ArchiveError, BundleError, ConfigError, SuspectModelError, UnsafeWeightsError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.resources import resource_path
from guard.storage.bundle import BundleStore
from guard.telemetry import OUTCOMES
from guard.torchserve.worker import handler_class


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


@pytest.fixture(scope="module")
def workers(workshop: Workshop) -> dict[str, Worker]:
    """One guarded worker per handler that makes one row per request, with default settings."""
    return {name: workshop.guarded(name) for name in ONE_ROW_HANDLERS}


@pytest.fixture(scope="module")
def images(clean_split: Any, triggered: Poisoned) -> np.ndarray[Any, Any]:
    """Eight clean and eight triggered images, taking turns."""
    pairs = zip(clean_split.test.images[:8], triggered.images[:8], strict=True)
    return np.stack([image for pair in pairs for image in pair])


@pytest.fixture(scope="module")
def bodies(images: np.ndarray[Any, Any]) -> list[bytes]:
    return [png(image) for image in images]


@pytest.fixture(scope="module")
def offline(fitted_guard: Guard, images: np.ndarray[Any, Any]) -> list[tuple[str, float]]:
    """What the library says of the same images: verdict and p-value."""
    verdicts = [fitted_guard.inspect(image[None])[0] for image in images]
    return [("poisoned" if verdict.is_poisoned else "clean", verdict.p_value) for verdict in verdicts]


def bomb() -> bytes:
    """A PNG whose header promises 50 megapixels."""
    header = b"IHDR" + (10_000).to_bytes(4, "big") + (5_000).to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    chunk = (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    data = b"IDAT" + zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk + (len(data) - 4).to_bytes(4, "big") + data + zlib.crc32(data).to_bytes(4, "big")
    )


def encode(array: np.ndarray[Any, Any]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def damaged(image: bytes) -> bytes:
    middle = len(image) // 2
    return image[:middle] + bytes(byte ^ 0x55 for byte in image[middle : middle + 8]) + image[middle + 8 :]


BAD_BODIES: dict[str, Any] = {
    "wrong size": encode(np.zeros((20, 28), np.uint8)),
    "wrong channel count": np.zeros((3, 28, 28)).tolist(),
    "not an image": b"GIF89a, or so",
    "half an image": encode(np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8))[:440],
    "NaN": np.full((1, 28, 28), np.nan).tolist(),
    "infinity": np.full((1, 28, 28), np.inf).tolist(),
    "one infinite pixel": [[[-np.inf] + [0.0] * 27] + [[0.0] * 28] * 27],
    "empty body": b"",
    "no body": {},
    "bomb": bomb(),
    "number": 7,
    "text": "hello",
    "ragged lists": [[[1.0, 2.0], [3.0]]],
}


def test_handler_module_has_one_class_and_less_than_150_lines() -> None:
    text = resource_path("guard_handler.py").read_text()
    assert len(text.splitlines()) < 150
    assert text.count("\nclass ") == 1


@pytest.mark.parametrize("name", ONE_ROW_HANDLERS)
@pytest.mark.parametrize("action", ["observe", "flag"])
def test_bodies_statuses_and_headers_are_those_of_the_unguarded_handler(
    workshop: Workshop, bodies: list[bytes], name: str, action: str
) -> None:
    plain, guarded = workshop.plain(name), workshop.guarded(name, action=action)
    for body in bodies:
        (bare,), (answer,) = plain.ask(body), guarded.ask(body)
        assert json.dumps(answer.body) == json.dumps(bare.body)
        assert answer.status == bare.status
        assert bare.headers.items() <= answer.headers.items()
        added = answer.headers.keys() - bare.headers.keys()
        assert added == {"Guard-Verdict", "Guard-P-Value", "Guard-Action", "Guard-Bundle"}
        expected = action if answer.headers["Guard-Verdict"] == "poisoned" else "none"
        assert answer.headers["Guard-Action"] == expected
        assert answer.headers["Guard-Bundle"] == workshop.bundle.name


@pytest.mark.parametrize("name", ONE_ROW_HANDLERS)
def test_verdicts_are_the_offline_guards_alone_and_in_a_batch(
    workers: dict[str, Worker], bodies: list[bytes], offline: list[tuple[str, float]], name: str
) -> None:
    assert {kind for kind, _ in offline} == {"clean", "poisoned"}
    alone = workers[name].ask_each(*bodies)
    batched = [answer for start in range(0, 16, 8) for answer in workers[name].ask(*bodies[start : start + 8])]
    for (kind, p_value), entry, many in zip(offline, alone, batched, strict=True):
        assert entry.verdict == (kind, f"{p_value:.6g}")
        assert many.verdict[0] == kind
        assert float(many.headers["Guard-P-Value"]) == pytest.approx(p_value, abs=3e-3)  # batches round otherwise
    labels = [answer.body["label"] if isinstance(answer.body, dict) else answer.body for answer in alone]
    assert labels == [answer.body["label"] if isinstance(answer.body, dict) else answer.body for answer in batched]


def test_batch_runs_the_users_handler_once(workshop: Workshop, bodies: list[bytes]) -> None:
    worker = workshop.guarded("stock")
    calls: list[int] = []
    handle = worker.handler._inner.handle
    worker.handler._inner.handle = lambda data, context: calls.append(len(data)) or handle(data, context)
    worker.handler._batches.drawn = lambda n_requests: None
    worker.ask(*bodies[:8])
    assert calls == [8]
    worker.ask(*bodies[:3], damaged(bodies[3]))  # begins and ends as an image does
    worker.ask(*bodies[:3], b"nonsense")
    assert calls == [8, 4, 1, 1, 1, 1, 3, 1]


def test_every_kind_of_body_gets_the_same_verdict(workers: dict[str, Worker], images: Any, bodies: list[bytes]) -> None:
    pixels = np.rint(images[1] * 255).tolist()
    text = base64.b64encode(bodies[1]).decode()
    kinds = [bodies[1], bytearray(bodies[1]), text, pixels, {"data": bodies[1]}, {"body": {"data": text}}]
    assert len({answer.verdict for answer in workers["image"].ask_each(*kinds)}) == 1


# --- actions


@pytest.mark.parametrize("name", ["image", "stock", "text", "dropping"])
def test_relabel_replaces_the_logits_of_flagged_rows_before_postprocess(
    workshop: Workshop, bodies: list[bytes], images: Any, offline: list[tuple[str, float]], name: str
) -> None:
    plain, worker = workshop.plain(name), workshop.guarded(name, action="relabel")
    verdicts = workshop.guard.with_config(action="relabel").inspect(images)
    changed = 0
    for batch in (worker.ask(*bodies), worker.ask_each(*bodies)):
        for bare, answer, verdict in zip(plain.ask_each(*bodies), batch, verdicts, strict=True):
            label = answer.body["label"] if isinstance(answer.body, dict) else int(answer.body.split()[1])
            bare_label = bare.body["label"] if isinstance(bare.body, dict) else int(bare.body.split()[1])
            assert label == verdict.final_label
            assert bare_label == verdict.label
            assert answer.headers["Guard-Action"] == ("relabel" if verdict.is_poisoned else "none")
            if name == "text":
                assert answer.headers["X-Label"] == str(label)
            changed += label != bare_label
    assert changed > 0


def test_relabel_leaves_the_neighbours_of_a_flagged_row_as_they_are(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]]
) -> None:
    flagging, relabelling = workshop.guarded("stock"), workshop.guarded("stock", action="relabel")
    for (kind, _), bare, answer in zip(offline, flagging.ask(*bodies), relabelling.ask(*bodies), strict=True):
        assert (bare.body == answer.body) == (kind == "clean")


@pytest.mark.parametrize("name", ["image", "text"])
def test_block_answers_that_one_item_with_422_and_a_reason(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]], name: str
) -> None:
    worker, plain = workshop.guarded(name, action="block"), workshop.plain(name)
    for answer, bare, (kind, p_value) in zip(worker.ask(*bodies), plain.ask(*bodies), offline, strict=True):
        if kind == "clean":
            assert (answer.status, answer.body) == (bare.status, bare.body)
            continue
        assert answer.status == 422
        assert answer.body["type"] == "InputBlocked"
        assert "judged poisoned and blocked" in answer.body["message"]
        assert answer.body["p_value"] == pytest.approx(p_value, abs=3e-3)
        assert answer.headers["content-type"] == "application/json"
        assert answer.verdict[0] == "poisoned"
        assert answer.headers["Guard-Action"] == "block"
        assert "X-Label" not in answer.headers  # the attacker's label does not slip out beside the body


def test_verdict_in_body_adds_a_guard_object_to_json_alone(workshop: Workshop, bodies: list[bytes]) -> None:
    worker, plain = workshop.guarded("stock", verdict_in_body=True), workshop.plain("stock")
    for body in bodies[:4]:
        (answer,), (bare,) = worker.ask(body), plain.ask(body)
        message = answer.body.pop("guard")
        assert answer.body == bare.body
        assert message["verdict"] == answer.headers["Guard-Verdict"]
        assert message["bundle"] == workshop.bundle.name
        assert f"{message['p_value']:.6g}" == answer.headers["Guard-P-Value"]
        assert message["action"] == answer.headers["Guard-Action"]
    text, bare_text = workshop.guarded("text", verdict_in_body=True), workshop.plain("text")
    assert text.ask(bodies[0])[0].body == bare_text.ask(bodies[0])[0].body


def test_streaming_handler_sends_nothing_before_the_verdict(workshop: Workshop, bodies: list[bytes]) -> None:
    sent: list[bytes] = []
    for body in bodies[:2]:
        worker = workshop.guarded("streaming", action="block")
        worker.context.cl_socket = SimpleNamespace(sendall=sent.append)  # as TorchServe sets it before every batch
        (answer,) = worker.ask(body)
        assert (answer.status, answer.verdict[0]) == (500, None)
    assert not sent


@pytest.mark.parametrize("action", ["flag", "block"])
def test_headers_in_the_guards_name_are_the_guards_whatever_the_handler_says(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]], action: str
) -> None:
    worker = workshop.guarded("text", action=action)
    inner = worker.handler._inner
    handle = inner.handle

    def forge(data: Any, context: Any) -> Any:
        for index in range(len(data)):
            context.set_response_header(index, "guard-verdict", "clean")
            context.set_response_header(index, "GUARD-P-VALUE", "1")
            context.set_response_header(index, "Guard-Review", "queued")
        return handle(data, context)

    inner.handle = forge
    for answer, (kind, _) in zip(worker.ask(*bodies[:4]), offline[:4], strict=True):
        message = {name: value for name, value in answer.headers.items() if name.lower().startswith("guard-")}
        assert set(message) == {"Guard-Verdict", "Guard-P-Value", "Guard-Action", "Guard-Bundle"}
        assert message["Guard-Verdict"] == kind
        assert answer.status == (422 if (action, kind) == ("block", "poisoned") else 203)


@pytest.mark.parametrize("name", ["image", "text"])
def test_default_answers_tell_no_more_than_the_flag(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]], name: str
) -> None:
    worker = workshop.guarded(name, verdict_detail="flag", action="block", verdict_in_body=True)
    answers = worker.ask(*bodies)
    for answer, (kind, _) in zip(answers, offline, strict=True):
        message = {key: value for key, value in answer.headers.items() if key.startswith("Guard-")}
        action = "block" if kind == "poisoned" else "none"
        assert message == {"Guard-Verdict": kind, "Guard-Action": action, "Guard-Bundle": workshop.bundle.name}
        assert "p_value" not in json.dumps(answer.body)
    blocked = [json.dumps(entry.body) for entry, (kind, _) in zip(answers, offline, strict=True) if kind == "poisoned"]
    assert len(blocked) > 2
    assert len(set(blocked)) == 1


# --- bad items


@pytest.mark.parametrize("name", ONE_ROW_HANDLERS)
@pytest.mark.parametrize("bad", BAD_BODIES)
def test_bad_item_gets_its_own_4xx_and_its_neighbours_their_answers(
    workers: dict[str, Worker], bodies: list[bytes], offline: list[tuple[str, float]], name: str, bad: str
) -> None:
    worker = workers[name]
    before = worker.counts()
    expected = worker.ask_each(bodies[0], bodies[1])
    for position in range(3):
        batch = [bodies[0], bodies[1]]
        batch.insert(position, BAD_BODIES[bad])
        answers = worker.ask(*batch)
        refused = answers.pop(position)
        assert 400 <= refused.status < 500
        assert refused.body  # says why, in the handler's words or ours
        json.dumps(refused.body)
        assert not any(key.startswith("Guard-") for key in refused.headers)
        for answer, alone in zip(answers, expected, strict=True):
            assert (answer.status, answer.verdict) == (alone.status, alone.verdict)
    (alone,) = worker.ask(BAD_BODIES[bad])
    assert 400 <= alone.status < 500
    counted = {key: value - before.get(key, 0) for key, value in worker.counts().items()}
    model = worker.context.model_name
    assert counted[f"guard_verdicts_total{{{model},rejected,none}}"] == 4
    assert sum(value for key, value in counted.items() if key.startswith("guard_verdicts_total")) == 2 + 3 * 3 + 1


@pytest.mark.parametrize(("bad", "status"), [("bomb", 413), ("empty body", 400), ("no body", 400), ("NaN", 422)])
def test_guards_own_refusals_say_what_is_wrong(workers: dict[str, Worker], bad: str, status: int) -> None:
    (answer,) = workers["stock"].ask(BAD_BODIES[bad])
    assert answer.status == answer.body["code"] == status
    assert answer.body["type"] == "InputRejected"
    assert answer.headers == {"content-type": "application/json"}
    words = {"bomb": "too large", "empty body": "no body", "no body": "no body", "NaN": "NaN or infinity"}
    assert words[bad] in answer.body["message"]


def test_wrong_shape_is_refused_before_the_network_sees_it(workers: dict[str, Worker]) -> None:
    seen: list[Any] = []
    handle = workers["stock"].handler._inner.model.conv1.register_forward_pre_hook(lambda *_: seen.append(1))
    (answer,) = workers["stock"].ask(BAD_BODIES["wrong size"])
    handle.remove()
    assert answer.body["message"] == ("the model's input has shape (1, 20, 28), the guard was fitted on (1, 28, 28).")
    assert not seen


def test_users_own_refusal_keeps_its_words_status_and_headers(workers: dict[str, Worker], bodies: list[bytes]) -> None:
    refused, answer = workers["dropping"].ask(b"nonsense", bodies[0])
    assert (refused.status, refused.body) == (415, {"sorry": "UnidentifiedImageError"})
    assert refused.headers == {"X-Refused": "yes"}
    assert answer.status == 200


def test_batch_with_only_bad_items_answers_each(workers: dict[str, Worker]) -> None:
    for worker in workers.values():
        assert {answer.status // 100 for answer in worker.ask(*BAD_BODIES.values())} == {4}


def way(number: int) -> bytes:
    pixels = np.zeros((28, 28), np.uint8)
    pixels[0, 0] = number
    return encode(pixels)


def test_users_failures_become_their_own_statuses(workshop: Workshop, bodies: list[bytes]) -> None:
    worker = workshop.guarded("failing")
    answers = worker.ask_each(*[way(number) for number in range(7)])
    assert [answer.status for answer in answers] == [200, 429, 507, 500, 500, 500, 400]
    assert "come back later" in answers[1].body["message"]
    assert "one answer per request" in answers[3].body["message"]
    assert all("Guard-Verdict" not in answer.headers for answer in answers[1:])
    assert worker.ask(bodies[0])[0].status == 200  # it goes on


def test_nothing_of_a_request_reaches_stdout_or_the_log(
    workshop: Workshop, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    forged = "\n[METRICS]guard_verdicts_total.Count:99|#model:x,verdict:clean,action:none|#type:COUNTER\n"
    caplog.set_level(logging.DEBUG)
    for name in ("failing", "stock", "image"):
        worker = workshop.guarded(name)
        caplog.clear()
        worker.ask(way(6), forged.encode(), forged, {"body": forged, "data": forged}, [forged])
        worker.ask(forged, headers=[{"describe": forged, "explain": forged, "X-Request-Id": forged}])
        out, err = capfd.readouterr()
        assert "METRICS" not in out + err
        assert all(
            "forged" not in record.getMessage() and "clean" not in record.getMessage() for record in caplog.records
        )


# --- describe and explain


@pytest.mark.parametrize("switch", ["describe", "explain"])
@pytest.mark.parametrize("name", ONE_ROW_HANDLERS)
def test_describe_and_explain_headers_neither_skip_the_guard_nor_hurt_a_neighbour(
    workers: dict[str, Worker], bodies: list[bytes], offline: list[tuple[str, float]], name: str, switch: str
) -> None:
    for value in ("True", "False", {"content-type": "text/plain"}):
        (alone,) = workers[name].ask(bodies[1], headers=[{switch: value}])
        batch = workers[name].ask(*bodies[:4], headers=[{switch: value}, {}, {switch.title(): value}, {}])
        verdicts = [(alone, offline[1]), *zip(batch, offline[:4], strict=True)]
        for place, (answer, (kind, p_value)) in enumerate(verdicts):
            if answer.status == 500:  # TorchServe's own explanation fails here, with the guard and without it
                assert (switch, value) == ("explain", "True")
                assert place in (0, 1)
                assert name in ("stock", "text", "dropping", "in_place")
            else:
                assert answer.verdict == (kind, f"{p_value:.6g}")


def test_explanation_is_the_handlers_own_and_goes_with_the_verdict_of_its_input(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]]
) -> None:
    worker = workshop.guarded("stock")
    inner = worker.handler._inner
    inner.explain_handle = lambda inputs, raw: [{"weights": inputs.sum().item(), "bytes": len(raw[0]["body"])}]
    plain = worker.ask(*bodies[:4])
    answers = worker.ask(*bodies[:4], headers=[{}, {"explain": "True"}, {"explain": "True"}, {"explain": "False"}])
    assert [answer.verdict for answer in answers] == [answer.verdict for answer in plain]
    assert [answer.body for answer in answers[::3]] == [answer.body for answer in plain[::3]]
    assert [answer.body["bytes"] for answer in answers[1:3]] == [len(body) for body in bodies[1:3]]
    counts = worker.counts()
    assert sum(value for key, value in counts.items() if key.startswith("guard_verdicts_total")) == 8
    blocking = workshop.guarded("stock", action="block", false_positive_rate=0.5)
    blocking.handler._inner.explain_handle = inner.explain_handle
    explained = blocking.ask(*bodies, headers=[{"explain": "True"}] * len(bodies))
    assert {answer.status for answer in explained} == {200, 422}
    assert all(("weights" in answer.body) == (answer.verdict[0] == "clean") for answer in explained)
    (broken,) = worker.ask(b"no image", headers=[{"explain": "True"}])
    assert broken.status >= 400


def test_describe_without_a_body_is_answered_by_the_users_handler_and_counts_as_no_input(workshop: Workshop) -> None:
    worker = workshop.guarded("stock")
    worker.handler._inner.describe_handle = lambda: {"about": "digits"}
    (answer,) = worker.ask({}, headers=[{"describe": "True"}])
    assert (answer.status, answer.body, answer.headers) == (200, {"about": "digits"}, {})
    assert sum(value for key, value in worker.counts().items() if key.startswith("guard_verdicts_total")) == 0
    (refused,) = workshop.guarded("image").ask(
        b"", headers=[{"describe": "True"}]
    )  # by a handler that knows no such thing
    assert refused.status == 422
    answers = worker.ask({}, way(9), headers=[{"describe": "True"}, {}])
    assert [answer.status for answer in answers] == [400, 200]


def test_describe_without_a_body_does_not_get_a_prediction_past_the_guard(workshop: Workshop) -> None:
    worker = workshop.guarded("stock")
    worker.handler._inner.decode = lambda body: torch.zeros(1, 28, 28)
    for headers in ({"describe": "Yes"}, {"explain": "False"}):  # TorchServe says the latter in every request
        (requested,) = worker.ask({"body": bytearray()}, headers=[headers])
        assert (requested.status, requested.body["message"]) == (400, "the request has no body.")
    (posted,) = worker.ask({"hello": b""})
    assert (posted.status, "curl -T" in posted.body["message"]) == (400, True)
    (explained,) = worker.ask({}, headers=[{"explain": "True"}])
    assert explained.status >= 400
    assert "Guard-Verdict" not in requested.headers.keys() | explained.headers.keys()


def test_empty_item_is_refused_even_if_the_users_handler_makes_an_image_of_it(
    workshop: Workshop, bodies: list[bytes]
) -> None:
    worker = workshop.guarded("stock")
    decode = worker.handler._inner.decode
    worker.handler._inner.decode = lambda body: decode(body) if body else torch.zeros(1, 28, 28)
    assert [answer.status for answer in worker.ask(bodies[0], b"", bodies[1])] == [200, 400, 200]


# --- what cannot be scored


@pytest.mark.parametrize("name", ["caching", "unseen", "swallowing"])
def test_answer_without_a_seen_forward_pass_is_an_error_under_closed(
    workshop: Workshop, bodies: list[bytes], name: str
) -> None:
    worker = workshop.guarded(name)
    body = bodies[0] if name != "swallowing" else b"nonsense"
    if name == "caching":
        assert worker.ask(body)[0].status == 200
    (answer,) = worker.ask(body)
    assert answer.status == 500
    assert answer.body["message"] == "the model's forward pass was not seen for this request."
    assert "Guard-Verdict" not in answer.headers


@pytest.mark.parametrize("name", ["caching", "unseen", "swallowing"])
def test_answer_without_a_seen_forward_pass_is_bypassed_under_open(
    workshop: Workshop, bodies: list[bytes], name: str
) -> None:
    worker = workshop.guarded(name, failure_mode="open")
    body = bodies[0] if name != "swallowing" else b"nonsense"
    worker.ask(body)
    (answer,) = worker.ask(body)
    assert (answer.status, answer.headers["Guard-Verdict"], answer.headers["Guard-Action"]) == (200, "bypassed", "none")
    assert "Guard-P-Value" not in answer.headers
    assert worker.counts()[f"guard_bypassed_total{{{worker.context.model_name},not_observed}}"] >= 1


def test_cached_neighbour_never_gets_the_verdict_of_another(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]]
) -> None:
    worker = workshop.guarded("caching")
    worker.ask(bodies[1])
    cached, fresh = worker.ask(bodies[1], bodies[2])
    assert cached.status == 500
    # The batch put it into the cache as well: an answer whose forward pass belonged to a failed run has no verdict.
    assert "Guard-Verdict" not in fresh.headers or fresh.verdict[0] == offline[2][0]


def test_rows_out_of_order_are_told_apart(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]]
) -> None:
    answers = workshop.guarded("reversing").ask(*bodies[:8])
    assert [answer.verdict for answer in answers] == [(kind, f"{p:.6g}") for kind, p in offline[:8]]


@pytest.mark.parametrize("bad", ["NaN", "infinity", "one infinite pixel"])
def test_open_mode_marks_what_cannot_be_scored_as_bypassed(workshop: Workshop, bodies: list[bytes], bad: str) -> None:
    worker = workshop.guarded("stock", failure_mode="open")
    answers = worker.ask(bodies[0], BAD_BODIES[bad], bodies[2])
    assert [answer.verdict[0] for answer in answers] == ["clean", "bypassed", "clean"]
    assert answers[1].status == 200
    assert worker.counts()[f"guard_bypassed_total{{{worker.context.model_name},not_finite}}"] == 1


def test_open_mode_tells_a_sender_whose_shape_the_network_cannot_take_that_it_is_his(workshop: Workshop) -> None:
    worker = workshop.guarded("stock", failure_mode="open")
    (answer,) = worker.ask(BAD_BODIES["wrong size"])
    assert answer.status == 400
    assert answer.body["type"] == "InputRejected"


def test_open_mode_answers_a_forward_pass_that_the_hooks_cannot_read(workshop: Workshop, bodies: list[bytes]) -> None:
    for failure_mode, status, verdict in (("open", 200, "bypassed"), ("closed", 500, None)):
        worker = workshop.guarded("stock", failure_mode=failure_mode)
        network = worker.handler._inner.model
        network.forward = lambda images, whole=network.forward: torch.zeros(len(images), 10)  # no layer runs
        answers = worker.ask(*bodies[:2])
        assert {(answer.status, answer.headers.get("Guard-Verdict")) for answer in answers} == {(status, verdict)}
        del network.forward
        assert worker.ask(bodies[0])[0].verdict[0] == "clean"  # it watches again


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("how", ["autocast", "converted"])
def test_half_precision_gives_the_same_verdicts_and_its_overflow_is_never_clean(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]], dtype: torch.dtype, how: str
) -> None:
    worker = workshop.guarded("stock")
    inner = worker.handler._inner
    infer, finish = inner.inference, inner.postprocess
    if how == "converted":
        inner.model.to(dtype)

    def in_half(data: Any, *args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", dtype=dtype):
            return infer(data.to(dtype), *args, **options)

    inner.inference, inner.postprocess = in_half, lambda data: finish(data.float())
    for answer, (kind, p_value) in zip(worker.ask(*bodies), offline, strict=True):
        assert answer.status == 200
        assert answer.verdict[0] == kind or abs(p_value - 0.05) < 0.01
    for value in (60_000.0, 1e30, -1e38, float("nan")):
        (huge,) = worker.ask(np.full((1, 28, 28), value).tolist())
        assert huge.verdict[0] != "clean"


# --- several rows per request


def test_crops_under_any_are_poisoned_if_one_row_is(workshop: Workshop, bodies: list[bytes], images: Any) -> None:
    worker, plain = workshop.guarded("crops", rows_per_request="any"), workshop.plain("crops")
    moves = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    batched = worker.ask(*bodies[:6])
    for index, (answer, alone) in enumerate(zip(batched, worker.ask_each(*bodies[:6]), strict=True)):
        rows = np.stack([np.roll(images[index], move, (1, 2)) for move in moves])
        p_values = [verdict.p_value for verdict in workshop.guard.inspect(rows)]
        assert answer.verdict == alone.verdict  # one by one even in a batch
        assert answer.verdict[0] == ("poisoned" if min(p_values) <= 0.05 else "clean")
        assert float(answer.headers["Guard-P-Value"]) == pytest.approx(min(p_values), abs=3e-3)
        assert answer.body == plain.ask(bodies[index])[0].body


def test_crops_under_one_row_per_request_fail_with_what_to_set(workshop: Workshop, bodies: list[bytes]) -> None:
    worker = workshop.guarded("crops")
    for answer in (*worker.ask(*bodies[:2]), *worker.ask(bodies[0])):
        assert answer.status == 500
        assert answer.body["message"] == (
            "the forward pass made 5 rows for this request. Set rows_per_request to 'any'."
        )


def test_crops_under_relabel_replace_every_row_of_a_poisoned_request(workshop: Workshop, bodies: list[bytes]) -> None:
    worker = workshop.guarded("crops", rows_per_request="any", action="relabel")
    inner, seen = worker.handler._inner, []
    postprocess = inner.postprocess
    inner.postprocess = lambda data: seen.append(data.clone()) or postprocess(data)
    plain = workshop.plain("crops")
    plain_seen: list[Any] = []
    plain_post = plain.handler.postprocess
    plain.handler.postprocess = lambda data: plain_seen.append(data.clone()) or plain_post(data)
    (answer,), _ = worker.ask(bodies[1]), plain.ask(bodies[1])
    assert answer.headers["Guard-Action"] == "relabel"
    assert (seen[0] != plain_seen[0]).any(1).all()


def test_example_refuses_a_handler_with_several_rows_at_start(workshop: Workshop, bodies: list[bytes]) -> None:
    example = workshop.folder / "example.png"
    example.write_bytes(bodies[0])
    with pytest.raises(ArchiveError, match=r"example request got no verdict: .* 5 rows .* rows_per_request to 'any'"):
        workshop.guarded("crops", example=example)
    with pytest.raises(ArchiveError, match="forward pass was not seen"):
        workshop.guarded("unseen", example=example, failure_mode="open")
    for name, rows in (("stock", 1), ("image", 1), ("crops", "any")):
        worker = workshop.guarded(name, example=example, rows_per_request=rows)
        assert sum(value for key, value in worker.counts().items() if "verdicts_total" in key) == 0  # no request
        assert worker.ask(bodies[0])[0].status == 200


def test_example_that_the_handler_cannot_read_is_refused_at_start(workshop: Workshop) -> None:
    example = workshop.folder / "broken.png"
    example.write_bytes(b"nonsense")
    for name, words in (("stock", "UnidentifiedImageError"), ("dropping", "sorry"), ("image", "cannot be read")):
        with pytest.raises(ArchiveError, match=words):
            workshop.guarded(name, example=example)
    example.write_bytes(b"")
    with pytest.raises(ArchiveError, match="no body"):
        workshop.guarded("stock", example=example)


# --- TorchServe's own handlers, and starting


def test_base_handler_by_name_refuses_bare_requests_and_works_behind_the_json_envelope(
    workshop: Workshop, images: Any, offline: list[tuple[str, float]]
) -> None:
    worker = workshop.guarded("base_handler")
    (answer,) = worker.ask(images[0].tolist())  # torch.as_tensor of a dict: so does the unguarded one
    assert answer.status == 400
    worker.handler.handle = JSONEnvelope(worker.handler.handle).handle
    answers = worker.ask(*[{"body": {"instances": [image.tolist()]}} for image in images[:2]])
    assert [answer.verdict[0] for answer in answers] == [kind for kind, _ in offline[:2]]
    assert np.shape(json.loads(answers[0].body)["predictions"]) == (1, 10)
    (refused,) = worker.ask({"body": {"instances": images[:2].tolist()}})
    assert (refused.status, refused.body["type"]) == (400, "InputRejected")


def test_start_refuses_weights_that_could_run_code_before_the_users_handler_sees_them(
    workshop: Workshop, tmp_path: Path
) -> None:
    archive = workshop.guarded("stock", start=False)
    import zipfile

    folder = tmp_path / "unpacked"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    torch.save(workshop.module, folder / "weights.pt")
    changed = tmp_path / "changed.mar"
    with zipfile.ZipFile(changed, "w") as packed:
        for file in folder.rglob("*"):
            packed.write(file, file.relative_to(folder))
    with pytest.raises(UnsafeWeightsError):
        Worker(changed, tmp_path / "again")


def test_start_refuses_a_bundle_of_other_weights_and_a_handler_without_a_network(
    workshop: Workshop, tmp_path: Path
) -> None:
    other = Workshop(workshop.guard, MnistCnn(), tmp_path)
    with pytest.raises(BundleError, match="was fitted for weights"):
        other.guarded("stock")
    with pytest.raises(SuspectModelError, match="Set model_attribute"):
        workshop.guarded("stock", model_attribute="net")
    with pytest.raises(ConfigError, match="rows_per_request"):
        workshop.guarded("stock", rows_per_request=2)


def test_start_refuses_a_handler_file_with_two_classes(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = workshop.guarded("stock")
    module = sys.modules[type(worker.handler).__module__]
    (tmp_path / "twins.py").write_text("class A:\n    handle = 1\n\nclass B:\n    handle = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ArchiveError, match="exactly one class, with a handle method; it defines 2"):
        handler_class("twins.py", "handle")
    assert len(list_classes_from_module(module)) == 1
    assert {file.name for file in HANDLERS.glob("*.py")} >= {"stock_handler.py", "mnist_network.py"}


# --- bundles and counts


def test_bundle_that_changes_during_a_batch_waits_for_the_next_one(
    workshop: Workshop, second_guard: Guard, clean_split: Any, bodies: list[bytes], tmp_path: Path
) -> None:
    bundles = tmp_path / "bundles"
    store = BundleStore(bundles)
    first, second = workshop.guard.save(bundles), second_guard.save(bundles)
    store.activate(first.name)
    worker = workshop.guarded("stock", bundles=bundles, bundle_poll_seconds=2)
    runtime, inner = worker.handler._runtime, worker.handler._inner
    preprocess = inner.preprocess

    def change_meanwhile(data: Any) -> Any:
        store.activate(second.name)
        runtime.refresh()
        return preprocess(data)

    inner.preprocess = change_meanwhile
    assert {answer.headers["Guard-Bundle"] for answer in worker.ask(*bodies[:4])} == {first.name}
    inner.preprocess = preprocess
    answers = worker.ask(*bodies[:4])
    assert {answer.headers["Guard-Bundle"] for answer in answers} == {second.name}
    images = clean_split.test.images[:1]
    assert worker.ask(png(images[0]))[0].verdict[1] == f"{second_guard.inspect(images)[0].p_value:.6g}"


def test_settings_of_a_new_bundle_come_with_it(workshop: Workshop, bodies: list[bytes], tmp_path: Path) -> None:
    bundles = tmp_path / "bundles"
    store = BundleStore(bundles)
    paths = {action: workshop.guard.with_config(action=action).save(bundles) for action in ("flag", "relabel", "block")}
    plain = workshop.plain("stock").ask(bodies[1])[0]
    store.activate(paths["flag"].name)
    worker = workshop.guarded("stock", bundles=bundles, bundle_poll_seconds=2)
    for action in ("flag", "relabel", "block", "relabel", "flag"):
        store.activate(paths[action].name)
        worker.handler._runtime.refresh()
        (answer,) = worker.ask(bodies[1])
        assert answer.headers["Guard-Action"] == action
        assert answer.status == (422 if action == "block" else 200)
        assert (answer.body == plain.body) == (action == "flag")
    counted = worker.counts()
    name = worker.context.model_name
    assert [counted[f"guard_verdicts_total{{{name},poisoned,{action}}}"] for action in paths] == [2, 2, 1]


def test_counts_add_up_and_know_every_series_from_the_start(
    workshop: Workshop, bodies: list[bytes], offline: list[tuple[str, float]]
) -> None:
    worker = workshop.guarded("stock")
    name = worker.context.model_name
    start = worker.counts()
    for kind in OUTCOMES:
        assert start[f"guard_verdicts_total{{{name},{kind},{'flag' if kind == 'poisoned' else 'none'}}}"] == 0
    assert start[f"guard_bundle_info{{{name},{workshop.bundle.name}}}"] == 1
    assert start[f"guard_requests_total{{{name},200}}"] == start[f"guard_p_value_count{{{name}}}"] == 0
    worker.handler._batches.drawn = lambda n_requests: None
    worker.ask(*bodies, b"nonsense")
    counted = worker.counts()
    poisoned = sum(kind == "poisoned" for kind, _ in offline)
    assert counted[f"guard_verdicts_total{{{name},poisoned,flag}}"] == poisoned
    assert counted[f"guard_verdicts_total{{{name},clean,none}}"] == 16 - poisoned
    assert counted[f"guard_verdicts_total{{{name},rejected,none}}"] == 1
    assert counted[f"guard_requests_total{{{name},200}}"] == 16
    assert counted[f"guard_requests_total{{{name},400}}"] == 1
    assert counted[f"guard_p_value_count{{{name}}}"] == 16
    assert counted[f"guard_p_value_sum{{{name}}}"] == pytest.approx(sum(p for _, p in offline), rel=1e-3)
    assert (
        counted[f"guard_stage_duration_seconds_count{{{name},guard}}"] == 1
    )  # the images together; nonsense never got so far


def test_counts_reach_torchserve_within_two_seconds_and_not_per_request(
    workshop: Workshop, bodies: list[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "ts.metrics.caching_metric"):
        worker = workshop.guarded("stock", flush=True)
        for _ in range(3):
            worker.ask_each(*bodies)
        deadline = time.monotonic() + 3
        wanted = "[METRICS]guard_verdicts_total.Count:"
        total = 0.0
        while total < 48 and time.monotonic() < deadline:
            time.sleep(0.05)
            lines = [record.getMessage() for record in caplog.records]
            claimed = [
                line for line in lines if line.startswith(wanted) and f"model:{worker.context.model_name}," in line
            ]
            total = sum(float(line.split(":")[1].split("|")[0]) for line in claimed)
    assert total == 48
    assert len(claimed) < 30
