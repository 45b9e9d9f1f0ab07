"""The plain image handler, driven with TorchServe's own Context, without Java."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from image_helpers import png_that_says
from PIL import Image

from guard.data.image_files import SERVED_FORMATS, read_picture
from guard.errors import UnsafeWeightsError
from guard.resources import resource_path
from guard.torchserve.answers import excuse
from guard.torchserve.launch import torchserve_home

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # ts leaves its version file open
    from ts.context import Context, RequestProcessor
    from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
    from ts.utils.util import list_classes_from_module

NETWORK = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear({inputs}, 4))
"""


def load_handler_module() -> Any:
    spec = importlib.util.spec_from_file_location("image_handler_under_test", resource_path("image_handler.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_context(folder: Path) -> Context:
    declared = torchserve_home() / "ts" / "configs" / "metrics.yaml"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # ts leaves the file open
        metrics = MetricsCacheYamlImpl(str(declared))
        metrics.initialize_cache()
    manifest = {"model": {"serializedFile": "weights.pt"}}
    return Context("tiny", str(folder), manifest, 8, None, "0.12.0", metrics=metrics, model_yaml_config={})


def set_requests(context: Context, count: int) -> None:
    context.request_ids = {index: f"id-{index}" for index in range(count)}
    context.request_processor = [RequestProcessor({}) for _ in range(count)]
    context.metrics.request_ids = context.request_ids


class Served:
    """A handler with its context; `ask` sends bodies as one batch and returns (status, answer) per body."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        shape = settings.setdefault("input_shape", [1, 6, 5])
        module = f"network_{folder.name}"
        folder.mkdir(exist_ok=True)
        (folder / f"{module}.py").write_text(NETWORK.format(inputs=int(np.prod(shape))))
        torch.manual_seed(0)
        linear = torch.nn.Linear(int(np.prod(shape)), 4)
        state = {"1.weight": linear.weight.detach(), "1.bias": linear.bias.detach()}
        key = settings.get("state_key")
        torch.save(
            {key: state, "last": {name: -w for name, w in state.items()}} if key else state, folder / "weights.pt"
        )
        (folder / "image_handler.json").write_text(json.dumps({"architecture": f"{module}:make", **settings}))
        self.handler = load_handler_module().ImageHandler()
        self.context = make_context(folder)
        self.handler.initialize(self.context)

    def ask(self, *bodies: Any) -> list[tuple[int, dict[str, Any]]]:
        set_requests(self.context, len(bodies))
        answers = self.handler.handle([{"body": body} for body in bodies], self.context)
        assert len(answers) == len(bodies)
        return [(self.context.get_response_status(i)[0], answer) for i, answer in enumerate(answers)]

    def pixels(self, body: Any) -> np.ndarray[Any, Any]:
        result: np.ndarray[Any, Any] = self.handler.preprocess([{"body": body}])[0].numpy()
        return result


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Served:
    monkeypatch.setattr(sys, "path", list(sys.path))
    return Served(tmp_path / f"served_{abs(hash(tmp_path))}")


def grey() -> np.ndarray[Any, Any]:
    return np.arange(30, dtype=np.uint8).reshape(6, 5) * 8


def encode(array: np.ndarray[Any, Any], kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def test_handler_module_defines_exactly_one_class() -> None:
    classes = list_classes_from_module(load_handler_module())
    assert [item.__name__ for item in classes] == ["ImageHandler"]


def test_handler_reads_png_json_and_base64_alike(served: Served) -> None:
    png, nested = encode(grey()), grey().tolist()
    bodies = [
        png,
        bytearray(png),
        base64.b64encode(png),
        base64.b64encode(png).decode(),
        nested,
        [nested],
        json.dumps(nested),
        json.dumps({"data": nested}).encode(),
        {"data": nested},
        {"data": base64.b64encode(png).decode()},
    ]
    for body in bodies:
        np.testing.assert_array_equal(served.pixels(body), grey()[None].astype(np.float32) / np.float32(255))
    # One by one: a network's float32 product may round otherwise in another row of the same batch.
    answers = [served.ask(body)[0] for body in bodies]
    assert answers == [(200, answers[0][1])] * len(bodies)
    assert [(status, answer["label"]) for status, answer in served.ask(*bodies)] == [
        (200, answers[0][1]["label"])
    ] * len(bodies)


def test_handler_reads_base64_in_every_usual_spelling(served: Served) -> None:
    photo = np.random.default_rng(3).integers(0, 256, (6, 5), dtype=np.uint8)
    png = encode(photo)
    text = base64.b64encode(png).decode()
    assert "+" in text or "/" in text  # or URL-safe would be the same
    lines = base64.encodebytes(png).decode()
    safe = base64.urlsafe_b64encode(png).decode()
    bodies: list[Any] = [
        lines,
        lines.replace("\n", "\r\n").encode(),
        safe,
        safe.rstrip("=").encode(),
        f"data:image/png;base64,{text}",
        f"DATA:image/png;base64,{lines}",
        f"data:image/png;base64,{text.replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}".encode(),
        f'"{text}"',
        json.dumps(lines),
        json.dumps({"data": f"data:;base64,{lines}"}).encode(),
        "\ufeff" + json.dumps({"data": safe}),
        {"data": lines},
    ]
    for body in bodies:
        np.testing.assert_array_equal(served.pixels(body) * np.float32(255), photo[None].astype(np.float32))


@pytest.mark.parametrize("kind", SERVED_FORMATS)
def test_handler_reads_what_labelled_folders_read(served: Served, tmp_path: Path, kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    stream = io.BytesIO()
    Image.fromarray(grey()).save(stream, kind, **options)
    file = tmp_path / "a.picture"
    file.write_bytes(stream.getvalue())
    expected = read_picture(file, 1)
    bodies = [file.read_bytes(), base64.b64encode(file.read_bytes()), {"data": file.read_bytes()}]
    for body in bodies:
        np.testing.assert_allclose(served.pixels(body), expected, rtol=1e-6)


def test_handler_answers_with_the_first_of_several_pictures(served: Served) -> None:
    for kind in ("GIF", "WEBP", "PNG"):
        stream, options = io.BytesIO(), {"lossless": True} if kind == "WEBP" else {}
        frames = [Image.fromarray(array) for array in (grey(), 255 - grey())]
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_allclose(served.pixels(stream.getvalue()), grey()[None] / 255.0, atol=1e-6)


def test_handler_reads_form_data_field(served: Served) -> None:
    assert served.handler.preprocess([{"data": bytearray(encode(grey()))}]).shape == (1, 1, 6, 5)


def test_answer_is_rounded_softmax_of_the_network(served: Served) -> None:
    ((_, answer),) = served.ask(encode(grey()))
    image = torch.from_numpy(grey()[None, None].astype(np.float32) / np.float32(255))
    with torch.inference_mode():
        expected = served.handler.model(image).softmax(1)[0]
    assert answer["label"] == int(expected.argmax())
    assert answer["class_name"] is None
    assert answer["probabilities"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_handler_applies_scale_mean_std_and_class_names(tmp_path: Path) -> None:
    names = ["a", "b", "c", "d"]
    served = Served(
        tmp_path / "scaled", input_shape=[3, 2, 2], scale=100, mean=[0, 1, 2], std=[1, 2, 4], class_names=names
    )
    pixels = served.pixels(np.full((3, 2, 2), 200).tolist())
    assert pixels[:, 0, 0].tolist() == [2.0, 0.5, 0.0]
    ((_, answer),) = served.ask(encode(np.full((2, 2, 3), 9, np.uint8)))
    assert answer["class_name"] == names[answer["label"]]


def test_handler_converts_colour_to_grey_and_grey_to_colour(served: Served, tmp_path: Path) -> None:
    colour = np.repeat(grey()[..., None], 3, axis=2)
    np.testing.assert_allclose(served.pixels(encode(colour)), grey()[None] / 255.0, rtol=1e-6)
    three = Served(tmp_path / "three", input_shape=[3, 6, 5])
    np.testing.assert_allclose(three.pixels(encode(grey())), np.repeat(grey()[None], 3, axis=0) / 255.0, rtol=1e-6)


def test_handler_resizes_only_when_told(served: Served, tmp_path: Path) -> None:
    wide = encode(np.zeros((6, 9), np.uint8))
    with pytest.raises(ValueError, match=r"image must be 5 x 6 pixels, got 9 x 6\."):
        served.pixels(wide)
    assert Served(tmp_path / "resizing", resize=True).pixels(wide).shape == (1, 6, 5)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "the request is empty"),
        (None, "must hold an image"),
        (7, "must hold an image"),
        ({}, "must hold an image"),
        (b"hello there", "no PNG, JPEG"),
        (b"[1, 2", "no PNG, JPEG"),
        (b"[" * 100_000, "no PNG, JPEG"),
        (base64.b64encode(b"GIF89a not an image"), "cannot be read"),
        (b"BMW is a maker of cars", "cannot be read"),
        (b"P5 is no map of grey", "cannot be read"),
        (encode(grey(), "TIFF"), "no PNG, JPEG"),
        (base64.b64encode(encode(grey(), "TIFF")), "cannot be read"),
        (encode(grey(), "JPEG2000"), "no PNG, JPEG"),
        (b"data:image/png;base64", "the image cannot be read"),
        (b"data:text/plain,hello%20there!", "no PNG, JPEG"),
        (b'"abc', "no PNG, JPEG"),
        (b'"' + b"\\u0022" * 5 + b'"', "no PNG, JPEG"),
        (encode(grey())[:40], "cannot be read"),
        (encode(grey().astype(np.uint16)), "does not fit"),
        ([[1, 2], [3]], "unequal length"),
        ([1, 2, 3], r"shape \[1, 6, 5\], got \[3\]"),
        (np.full((6, 5), np.nan).tolist(), "finite"),
        (np.full((6, 5), np.inf).tolist(), "finite"),
        (np.full((6, 5), 1e39).tolist(), "finite"),
        ([[10**400] * 5] * 6, "finite"),
        ([["1"] * 5] * 6, "finite numbers"),
        ([[True] * 5] * 6, "finite numbers"),
    ],
    ids=range(27),  # bodies make unreadable names
)
def test_handler_refuses_what_it_cannot_read_with_422(served: Served, body: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        served.pixels(body)
    (status, answer), (neighbour, _) = served.ask(body, encode(grey()))
    assert status == 422
    assert set(answer) == {"code", "type", "message", "error"}
    assert neighbour == 200


def table_of_errors() -> list[tuple[str, str, str]]:
    text = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text()
    return re.findall(r"^\| (\d{3}) \| `(\w+)` \| (.*) \|$", text.partition("## Errors")[2], re.MULTILINE)


def test_every_answer_is_as_the_table_of_the_documentation_says(served: Served) -> None:
    rows = table_of_errors()
    (unreadable,) = [(int(code), kind) for code, kind, when in rows if "image handler cannot read" in when]
    bodies = [b"a text file", b"", encode(grey())[:40], encode(grey().T), encode(grey())]
    answers = served.ask(*bodies)
    for index, (status, answer) in enumerate(answers):
        assert served.context.get_response_headers(index) == {"content-type": "application/json"}
        if index < len(bodies) - 1:
            assert (status, answer["type"]) == (answer["code"], answer["type"]) == unreadable
            assert answer["message"] == answer["error"]
    assert answers[-1][0] == 200
    table = {(int(code), kind) for code, kind, _ in rows}
    errors = (
        (ValueError(), False),
        (MemoryError(), False),
        (ValueError(), True),
        (Image.DecompressionBombError(), False),
    )
    for error, model_ran in errors:
        outcome = excuse(error, model_ran)
        kind = "InputRejected" if outcome.kind == "rejected" else "GuardFailed"
        assert (outcome.status, kind) in table
        table.remove((outcome.status, kind))
    assert table == {unreadable, (422, "InputBlocked")}


@pytest.mark.parametrize("side", [5657, 9500, 13_400, 40_000, 2**31 - 1])
@pytest.mark.parametrize("is_guarded", [True, False])
@pytest.mark.parametrize("resize", [True, False])
def test_picture_that_is_too_large_gets_the_status_of_the_table_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, is_guarded: bool, resize: bool
) -> None:
    served = Served(tmp_path / f"large_{abs(hash(tmp_path))}", resize=resize)
    (large,) = [(int(code), kind) for code, kind, when in table_of_errors() if "pixels" in when]
    with warnings.catch_warnings():
        if is_guarded:  # as the adapter does
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000_000)
        else:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        bodies = [png_that_says(side, side), base64.b64encode(png_that_says(side, side)), encode(grey())]
        (status, answer), (again, _), (neighbour, _) = served.ask(*bodies)
    assert (status, answer["type"]) == (again, answer["type"]) == large
    assert answer["message"].startswith("image must have at most ")
    assert neighbour == 200


def test_handler_error_text_never_repeats_the_request(served: Served) -> None:
    ((_, answer),) = served.ask(b"[METRICS]forged.Count:1|#Level:Host")
    assert "METRICS" not in answer["error"]


def test_handler_ignores_the_describe_header(served: Served) -> None:
    set_requests(served.context, 1)
    served.context.request_processor = [RequestProcessor({"describe": "True", "explain": "True"})]
    (answer,) = served.handler.handle([{"body": encode(grey())}], served.context)
    assert "label" in answer


def test_handler_refuses_unknown_and_missing_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown or missing keys \['sise'\]"):
        Served(tmp_path / "unknown", sise=3)
    folder = tmp_path / "missing"
    folder.mkdir()
    (folder / "image_handler.json").write_text('{"architecture": "m:f"}')
    with pytest.raises(ValueError, match=r"unknown or missing keys \['input_shape'\]"):
        load_handler_module().ImageHandler().initialize(make_context(folder))


def test_handler_refuses_weights_that_could_run_code(tmp_path: Path) -> None:
    served = Served(tmp_path / "unsafe")
    torch.save(torch.nn.Linear(2, 2), tmp_path / "unsafe" / "weights.pt")
    with pytest.raises(UnsafeWeightsError):
        load_handler_module().ImageHandler().initialize(served.context)


def test_handler_answers_with_the_logits_wherever_the_network_returns_them(served: Served, tmp_path: Path) -> None:
    other = Served(tmp_path / f"named_{abs(hash(tmp_path))}", output="out.0:one-logit", state_key="ema")
    with torch.no_grad():
        number = other.handler.model(other.handler.preprocess([{"body": encode(grey())}]))[:, :1]
    other.handler.model = lambda _: {"features": None, "out": [number]}

    (_, answer), *_ = other.ask(encode(grey()))

    wanted = float(number.sigmoid())
    assert answer["label"] == (wanted > 0.5)
    assert answer["probabilities"] == pytest.approx([1 - wanted, wanted], abs=1e-6)
