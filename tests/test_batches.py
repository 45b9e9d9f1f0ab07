"""Whose verdict is whose: every way in which the rows of a batch and its requests can part, and service envelopes."""

from __future__ import annotations

import io
import itertools
import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving_helpers import Answered, Worker, Workshop, png, served_model
from ts.model_loader import TsModelLoader
from ts.torch_handler.request_envelope.body import BodyEnvelope
from ts.torch_handler.request_envelope.json import JSONEnvelope
from ts.torch_handler.request_envelope.kserve import KServeEnvelope
from ts.torch_handler.request_envelope.kservev2 import KServev2Envelope
from wrap_helpers import guard_command

from guard import Guard
from guard.lab.attacks import MnistCnn, Poisoned
from guard.serving.outcomes import Record
from guard.storage.bundle import BundleStore
from guard.torchserve.row_fidelity import declares_one_row
from guard.types import Float32Array

#: Handler -> why its batches are answered one by one, as the log has it; "" = they are answered together.
WHY = {
    "image": "",
    "stock": "",
    "text": "",
    "dropping": "",
    "in_place": "",
    "skipping": "",
    "urgent": "",
    "album": "",
    "raw": "an image of noise that is twice the size, and cut off makes 3 rows",
    "list": "in a batch with a body with two inputs beside one with none",
    "tiling": "an image that is twice as wide makes 2 rows",
    "sorting": "in a batch of 2 a request's row of the network's input is another than alone",
    "swapping": "in a batch of 2 an answer is not that of its own row",
    "ranking": "in a batch of 2 an answer is not that of its own row",
    "deduplicating": "a batch of 2 requests makes 1 rows in 1 forward passes",
    "reversing": "a batch of 2 requests makes 2 rows in 2 forward passes",
    "replacing": "in a batch with an image that is cut off a request's row",
    "misshapen": "it answers 2 good requests by themselves, and fails on them together",
    "counting": "the same request gets another answer the second time",
    "noisy": "the same request does not reach the network as it did the first time",
    "caching": "the same request does not reach the network a second time",
    "padding": "one example makes 4 rows in 1 forward passes",
    "crops": "one example makes 5 rows in 1 forward passes",
    "unseen": "the handler answers an example without calling its network as a whole",
    "base_handler": "the handler takes none of the example images",
}
#: Handlers whose every answer is an error here: the guard cannot score them, alone or in a batch.
NEVER_SCORED = ("padding", "crops", "unseen", "base_handler")


@pytest.fixture(scope="module")
def workshop(fitted_guard: Guard, badnet: MnistCnn, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    path, modules, pixels = list(sys.path), set(sys.modules), Image.MAX_IMAGE_PIXELS
    shop = Workshop(fitted_guard, badnet, tmp_path_factory.mktemp("batches"))
    yield shop
    shop.close()
    sys.path[:] = path
    Image.MAX_IMAGE_PIXELS = pixels
    for name in set(sys.modules) - modules:
        if name.endswith(("_handler", "mnist_network")) or "_of_" in name:
            del sys.modules[name]


@pytest.fixture(scope="module")
def sure(fitted_guard: Guard, clean_split: Any, triggered: Poisoned) -> tuple[Float32Array, Float32Array]:
    """Four triggered and four clean images about which there is no doubt, with different answers among the clean."""
    flagged = [image for image in triggered.images[:40] if fitted_guard.inspect(image[None])[0].p_value < 0.005]
    clean: dict[int, Any] = {}
    for image, verdict in zip(
        clean_split.test.images[:100], fitted_guard.inspect(clean_split.test.images[:100]), strict=True
    ):
        if verdict.p_value > 0.4 and verdict.label != 7:  # the attacker's
            clean.setdefault(verdict.label, image)
    return np.stack(flagged[:4]), np.stack([*clean.values()][:4])


def start(workshop: Workshop, handler: str, **settings: Any) -> Worker:
    """Return a guarded worker whose batches are never checked: what is seen is what the probe found out."""
    worker: Worker = workshop.guarded(handler, **settings)
    worker.handler._batches.drawn = lambda n_requests: None
    return worker


def grey(pixels: Float32Array) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.rint(pixels * 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def troublemakers(handler: str, bad: Float32Array, good: Float32Array) -> list[Any]:
    """Return bodies that together make as many rows as they are requests, and apart do not."""
    if handler == "list":
        return [{"body": {"instances": [bad.tolist(), good.tolist()]}}, {"body": {"instances": []}}]
    if handler == "tiling":
        return [grey(np.concatenate([bad[0], good[0]], 1)), grey(good[0][:, :14])]
    if handler in ("replacing", "skipping", "dropping", "stock"):
        return [png(good)[:150]]
    if handler == "deduplicating":
        return [png(good), png(good)]
    if handler == "album":
        return [also_a_zip(png(good), png(bad), png(good)), also_a_zip(png(good))]
    return []


def also_a_zip(cover: bytes, *images: bytes) -> bytes:
    """Return a PNG with a zip of images in its text, which any reader of zips finds."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for number, image in enumerate(images):
            packed.writestr(f"{number}.png", image)
    text = stream.getvalue()[:-2] + (4 + len(cover) - 33).to_bytes(2, "little")  # its comment is the rest of the PNG
    chunk = b"tEXt" + text
    return cover[:33] + len(text).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big") + cover[33:]


def label(answer: Answered) -> int:
    """Return the label that an answer tells, in any of the handlers' ways."""
    body = answer.body
    message = body.get("labels", [body.get("label")])[0] if isinstance(body, dict) else body.split()[1]
    return int(message)


@pytest.mark.parametrize("handler", WHY)
def test_every_request_of_a_batch_gets_its_own_verdict_in_every_order(
    workshop: Workshop,
    fitted_guard: Guard,
    sure: tuple[Float32Array, Float32Array],
    handler: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    worker = start(workshop, handler, action="block")
    check_what_it_says_at_its_start(worker, handler, capfd.readouterr().err)
    flagged, clean = sure
    labels = {png(image): fitted_guard.inspect(image[None])[0].label for image in clean[:2]}
    selected = {png(image): "triggered" for image in flagged[:2]} | dict.fromkeys(labels, "clean")
    extra = troublemakers(handler, flagged[2], clean[2])
    batches: list[tuple[Any, ...]] = [(*selected,), (*selected,)[::-1], (*selected,)[:3]]
    batches += itertools.permutations([*extra, *list(selected)[1 : 4 - len(extra)]])
    batches += itertools.permutations(extra)
    for batch in batches if handler in NEVER_SCORED else [*batches, *itertools.pairwise(selected)]:
        for body, answer in zip(batch, worker.ask(*batch), strict=True):
            kind = selected.get(body) if isinstance(body, bytes) else None
            if kind == "triggered":
                assert answer.status >= 400, (handler, answer)
                assert answer.verdict[0] != "clean"
                if handler not in (*NEVER_SCORED, "caching"):
                    assert (answer.status, answer.verdict[0]) == (422, "poisoned")
            elif kind == "clean":
                assert answer.verdict[0] != "poisoned", (handler, answer)
                if handler not in (*NEVER_SCORED, "caching"):
                    assert (answer.verdict[0], label(answer)) == ("clean", labels[body])
                    assert answer.status < 300
            elif body is extra[0] and handler in ("list", "tiling", "album"):  # two inputs, one of them triggered
                assert answer.status >= 400
                assert answer.verdict[0] != "clean"
            elif handler == "deduplicating":
                assert (answer.status, answer.verdict[0]) == (200, "clean")
            else:  # without an input of its own it has no verdict
                assert answer.verdict[0] is None, (handler, answer)


def check_what_it_says_at_its_start(worker: Worker, handler: str, log: str) -> None:
    (line,) = [answer for answer in map(json.loads, log.splitlines()) if answer.get("event") == "batching"]
    assert line["requests"] == ("one by one" if WHY[handler] else "together")
    assert line.get("why", "").startswith(WHY[handler])
    counted = worker.counts()
    model = worker.context.model_name
    assert counted[f"guard_batching{{{model}}}"] == (0 if WHY[handler] else 1)
    assert sum(value for key, value in counted.items() if "verdicts_total" in key) == 0  # a probe is no traffic
    assert counted[f"guard_stage_duration_seconds_count{{{model},guard}}"] == 0


def calls_of(worker: Worker) -> list[int]:
    """Note the size of every batch that the user's own handler gets from now on."""
    calls: list[int] = []
    handle = worker.handler._inner.handle
    worker.handler._inner.handle = lambda data, context: calls.append(len(data)) or handle(data, context)
    return calls


def test_bodies_that_may_hold_several_inputs_run_alone_beside_images_that_run_together(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array]
) -> None:
    worker, (flagged, clean) = start(workshop, "stock", action="block"), sure
    calls = calls_of(worker)
    batch = [png(flagged[0]), clean[0].tolist(), png(clean[1]), {"data": png(clean[2]), "body": png(flagged[2])}, b"x"]
    answers = worker.ask(*batch)
    assert calls == [2, 1, 1, 1]
    assert [answer.status for answer in answers] == [422, 200, 200, 200, 400]
    assert [answer.verdict[0] for answer in answers] == ["poisoned", "clean", "clean", "clean", None]
    assert len({label(answer) for answer in answers[1:4]}) == 3


def test_handler_that_declares_one_row_per_request_shares_a_batch_whatever_its_bodies(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array]
) -> None:
    worker = start(workshop, "image", action="block")
    calls = calls_of(worker)
    batch = [png(sure[0][0]), (sure[1][0] * 255).tolist(), {"data": png(sure[1][1])}]
    assert [answer.status for answer in worker.ask(*batch)] == [422, 200, 200]
    assert calls == [3]
    assert declares_one_row(worker.handler._inner)
    assert not declares_one_row(type("Child", (type(worker.handler._inner),), {})())  # it may do otherwise


@pytest.mark.parametrize(
    ("settings", "calls"),
    [({"batching": "never"}, [1, 1, 1]), ({"batching": "declared"}, [3]), ({"rows_per_request": "any"}, [1, 1, 1])],
)
def test_setting_batching_decides_instead_of_the_probe(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], settings: dict[str, Any], calls: list[int]
) -> None:
    worker = start(workshop, "stock", **settings)
    seen = calls_of(worker)
    answers = worker.ask(png(sure[1][0]), sure[1][1].tolist(), png(sure[0][0]))
    assert [answer.verdict[0] for answer in answers] == ["clean", "clean", "poisoned"]
    assert seen == calls


def test_examples_of_the_archive_are_what_the_probe_uses(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], tmp_path: Path
) -> None:
    files = []
    for row in range(3):
        files.append(tmp_path / f"{row}.png")
        files[-1].write_bytes(png(sure[1][row]))
    seen: list[bytes] = []
    archive = workshop.guarded("stock", start=False, examples=files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "guard.torchserve.batches.why_one_by_one", lambda ask, module, examples, *_: seen.extend(examples) or "told"
        )
        worker = Worker(archive, workshop.folder / "with-examples")
    workshop.workers.append(worker)
    assert seen == [file.read_bytes() for file in files]
    calls = calls_of(worker)
    worker.ask(*seen)
    assert calls == [1, 1, 1]


@pytest.mark.usefixtures("quick_checks")
def test_archive_tries_the_handler_with_its_examples_and_says_how_batches_are_answered(
    workshop: Workshop,
    sure: tuple[Float32Array, Float32Array],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    BundleStore(tmp_path / "bundles").activate(workshop.guard.save(tmp_path / "bundles").name)
    examples: list[object] = []
    for row, image in enumerate(sure[1]):
        (tmp_path / f"{row}.png").write_bytes(png(image))
        examples += ["--example", tmp_path / f"{row}.png"]
    for handler in ("image", "stock", "tiling"):
        model = served_model(handler, workshop.module, tmp_path)
        selected = ["--handler", model.handler, "--model-file", model.model_file] if model.handler is not None else []
        selected += ["--architecture", model.architecture] if model.handler is None else []
        selected += [part for file in model.extra_files for part in ("--extra-file", file)]
        stores = ("--bundles", tmp_path / "bundles", "--model-store", tmp_path)
        status, out, err = guard_command(
            capfd, "archive", handler, "--weights", model.weights, *selected, *stores, *examples
        )
        assert (status, out) == (0, f"{tmp_path / handler}.mar\n"), err
        assert f"batches: {TOLD[handler]}" in " ".join(err.split())
    with zipfile.ZipFile(tmp_path / "tiling.mar") as packed:
        about = json.loads(packed.read("guard_archive.json"))
        assert [packed.read(name) for name in about["examples"]] == [png(image) for image in sure[1]]
    assert about["example"] == about["examples"][0]


TOLD = {
    "image": "answered together: the image handler makes one row per request",
    "stock": "images are answered together: the handler keeps them apart; other bodies one after the other",
    "tiling": "one request after the other: an image that is twice as wide makes 2 rows of the network's input.",
}


def test_handler_that_takes_its_requests_apart_leaves_the_neighbours_of_a_bad_one_whole(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array]
) -> None:
    worker, (flagged, clean) = start(workshop, "stock", action="block"), sure
    inner = worker.handler._inner
    inner.preprocess = lambda data: torch.stack([inner.decode(item.pop("body")) for item in data])
    bad = png(clean[2])
    bad = bad[:60] + bytes(byte ^ 0x55 for byte in bad[60:120]) + bad[120:]
    data = [{"body": body} for body in (png(flagged[0]), bad, png(clean[1]))]
    assert [answer.status for answer in worker.ask(*data)] == [422, 400, 200]
    assert [list(item) for item in data] == [["body"]] * 3  # evidence for the reviewers is taken from them later


@pytest.mark.parametrize("rows_per_request", [1, "any"])
def test_forward_pass_that_ends_too_late_says_nothing_about_the_next_request(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], rows_per_request: Any
) -> None:
    worker, (flagged, clean) = start(workshop, "late", action="block", rows_per_request=rows_per_request), sure
    inner = worker.handler._inner
    inner.slow, inner.limit = True, 0.05
    assert worker.ask(png(flagged[0]))[0].status == 504
    late, preprocess = inner.latest, inner.preprocess
    inner.slow, inner.limit = False, 60.0

    def after_the_late_one(data: Any) -> Any:
        inner.go.set()
        late.result()
        return preprocess(data)

    inner.preprocess = after_the_late_one
    (answer,) = worker.ask(png(clean[0]))
    assert (answer.status, answer.verdict[0]) == (200, "clean")


# --- the check while serving


def test_check_while_serving_withdraws_trust_before_the_answers_of_that_batch_leave(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], capfd: pytest.CaptureFixture[str]
) -> None:
    worker, (flagged, clean) = workshop.guarded("urgent", action="block"), sure
    batch, headers = [png(flagged[0]), png(clean[0]), png(clean[1])], [{}, {"X-Urgent": "yes"}, {}]
    worker.handler._batches.drawn = lambda n_requests: 0
    calls = calls_of(worker)
    answers = worker.ask(*batch, headers=headers)
    assert [answer.status for answer in answers] == [422, 200, 200]
    assert [answer.verdict[0] for answer in answers] == ["poisoned", "clean", "clean"]
    worker.ask(*batch)
    assert calls == [3, 1, 1, 1, 1, 1, 1, 1]  # the batch, the check, and from then on one by one
    counted, model = worker.counts(), worker.context.model_name
    assert counted[f"guard_batch_checks_total{{{model},mismatch}}"] == 1
    assert counted[f"guard_batching{{{model}}}"] == 0
    message = [json.loads(line) for line in capfd.readouterr().err.splitlines() if '"batching"' in line][-1]
    assert message["why"] == "a check while serving found a request's row or answer at another's place"


@pytest.mark.parametrize(
    ("handler", "action"), [("image", "relabel"), ("stock", "block"), ("text", "relabel"), ("in_place", "relabel")]
)
def test_check_while_serving_holds_for_handlers_that_keep_requests_apart(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], handler: str, action: str
) -> None:
    worker = workshop.guarded(handler, action=action)
    calls, places = calls_of(worker), itertools.cycle(range(8))
    worker.handler._batches.drawn = lambda n_requests: next(places) % n_requests
    bodies = [png(image) for pair in zip(*sure, strict=True) for image in pair]
    for _ in range(8):
        worker.ask(*bodies)
    assert calls == [8, 1] * 8
    counted, model = worker.counts(), worker.context.model_name
    assert counted[f"guard_batch_checks_total{{{model},match}}"] == 8
    assert counted[f"guard_batch_checks_total{{{model},mismatch}}"] == 0
    assert counted[f"guard_verdicts_total{{{model},poisoned,{action}}}"] == 32  # a check is no request


def test_answers_that_part_from_their_rows_later_are_found_by_the_check(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array]
) -> None:
    worker = workshop.guarded("stock", action="block")
    worker.handler._batches.drawn = lambda n_requests: 0
    postprocess = worker.handler._inner.postprocess
    worker.handler._inner.postprocess = lambda data: postprocess(data)[::-1]  # after the probe
    batch = [png(sure[1][0]), png(sure[1][1])]
    assert [label(answer) for answer in worker.ask(*batch)] == [label(answer) for answer in worker.ask_each(*batch)]
    assert worker.counts()[f"guard_batch_checks_total{{{worker.context.model_name},mismatch}}"] == 1


def test_checks_are_rare_and_every_place_of_a_batch_is_drawn(workshop: Workshop) -> None:
    batches = workshop.guarded("image").handler._batches
    drawn = [place for place in (batches.drawn(4) for _ in range(60_000)) if place is not None]
    assert set(drawn) == {0, 1, 2, 3}
    assert 120 < len(drawn) < 360  # one in 256; seven standard deviations


def test_adapter_of_an_older_archive_cannot_tell_a_batch_apart_by_its_count_of_rows(workshop: Workshop) -> None:
    import_module("guard.pipeline")  # as every adapter of an older archive does, and nothing else
    runtime = workshop.guarded("stock").handler._runtime
    with torch.no_grad(), runtime.watching(runtime.current) as record:
        workshop.workers[-1].handler._inner.model(torch.zeros(2, 1, 28, 28))
    assert (len(record.rows), record.forward_passes, record.passes) == (2, 1, 0)
    assert Record().passes != 1


# --- service envelopes


def v2(*images: Any) -> dict[str, Any]:
    shape = [1, 28, 28]
    return {
        "inputs": [
            {"name": f"in-{row}", "shape": shape, "datatype": "FP32", "data": np.ravel(image).tolist()}
            for row, image in enumerate(images)
        ]
    }


ENVELOPES = {
    "json": (JSONEnvelope, lambda *images: {"instances": [image.tolist() for image in images]}),
    "kserve": (KServeEnvelope, lambda *images: {"instances": [image.tolist() for image in images]}),
    "kservev2": (KServev2Envelope, v2),
}


@pytest.mark.parametrize("envelope", ENVELOPES)
def test_envelope_with_another_count_than_one_is_refused_alone_in_every_order(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], envelope: str
) -> None:
    flagged, clean = sure
    archive = workshop.guarded("base_handler" if envelope != "kservev2" else "stock", start=False, action="block")
    started = Worker(archive, workshop.folder / f"served-{envelope}")
    workshop.workers.append(started)
    kind, body_of = ENVELOPES[envelope]
    decode = getattr(started.handler._inner, "decode", None)
    if envelope == "kservev2":  # its items are mappings with the data beside their description
        started.handler._inner.preprocess = lambda data: torch.stack([decode(item["data"]) for item in data])
    started.handler.handle = kind(started.handler.handle).handle
    kinds = {"poisoned": body_of(flagged[0]), "clean": body_of(clean[0]), "two": body_of(flagged[1], clean[1])}
    kinds |= {"none": body_of(), "nonsense": {"something": "else"}}
    kinds = {name: {"body": body} for name, body in kinds.items()}
    for order in itertools.permutations(kinds, 3):
        answers = dict(zip(order, started.ask(*[kinds[name] for name in order]), strict=True))
        for name, answer in answers.items():
            assert answer.status == {"clean": 200, "poisoned": 422}.get(name, 400), (order, name, answer)
            assert answer.verdict[0] == (name if name in ("clean", "poisoned") else None)
            if answer.status == 400:
                assert answer.body["type"] == "InputRejected"
            assert json.dumps(answer.body)
    assert "this one holds 2 inputs. Send each by itself." in started.ask(kinds["two"])[0].body["message"]
    model = started.context.model_name
    assert started.counts()[f"guard_verdicts_total{{{model},rejected,none}}"] == 60 * 3 * 3 / 5 + 1


def test_body_envelope_joins_nothing_and_its_batches_stay_whole(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array]
) -> None:
    worker = start(workshop, "stock", action="block")
    worker.handler._inner.preprocess = lambda data: torch.stack([worker.handler._inner.decode(body) for body in data])
    calls = calls_of(worker)
    worker.handler.handle = BodyEnvelope(worker.handler.handle).handle
    answers = worker.ask(png(sure[0][0]), png(sure[1][0]), png(sure[1][1]))
    assert [answer.status for answer in answers] == [422, 200, 200]
    assert calls == [3]


def test_torchserves_own_loader_puts_the_envelope_around_the_guard(
    workshop: Workshop, sure: tuple[Float32Array, Float32Array], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = workshop.guarded("base_handler", start=False, action="block")
    worker = Worker(archive, workshop.folder / "loaded")
    workshop.workers.append(worker)
    monkeypatch.setitem(sys.modules, "guard_handler", sys.modules[type(worker.handler).__module__])
    service = TsModelLoader().load(
        "m", str(workshop.folder / "loaded"), "guard_handler.py", None, 4, "kserve", True, worker.context.metrics
    )
    workshop.workers.append(
        type("Loaded", (), {"close": service._entry_point.__self__._handle_fn.__self__._runtime.close})
    )
    service.cl_socket = None
    bodies = [{"instances": [image.tolist() for image in images]} for images in (sure[0][:1], sure[0][:2], sure[1][:1])]
    packed = service.predict(
        [
            {
                "requestId": bytearray(b"id-%d" % row),
                "parameters": [{"name": "body", "contentType": "application/json", "value": body}],
            }
            for row, body in enumerate(bodies)
        ]
    )
    assert int.from_bytes(packed[:4]) == 200  # the batch as a whole
    assert [service.context.get_response_status(row)[0] for row in range(3)] == [422, 400, 200]
