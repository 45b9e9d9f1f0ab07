"""The user's own handler outside a server: it answers raw bytes, and what reaches its network is taken from there."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from guard.errors import ArchiveError, DataError, GuardError, SuspectModelError, UnsafeWeightsError
from guard.torchserve.user_handler import open_user_handler

HANDLER = """
import os
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler
from helper import SCALE

class Mine(BaseHandler):
    def initialize(self, context):
        super().initialize(context)
        assert os.path.isfile(context.system_properties["model_dir"] + "/folder/inside.txt")
        assert context.system_properties["gpu_id"] is None
        context.metrics.add_counter("Loaded", 1)

    def preprocess(self, data):
        assert self.context.get_request_id(0) == "0"
        assert all(isinstance(item["body"], bytearray) for item in data)
        rows = [torch.tensor(list(item["body"]), dtype=torch.float32) * SCALE for item in data]
        if any(len(row) == 2 for row in rows):
            self.context.set_response_status(code=422, phrase="", idx=0)
            rows = [row[:1] for row in rows]
        return {RESULT}
"""
NETWORK = """
from torch import nn

class Net(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

    def forward(self, images):
        return super().forward(images.flatten(1))
"""
ROWS = "torch.stack(rows).reshape(len(rows), 1, 2, 2)"


def write(folder: Path, result: str = ROWS, handler: str = HANDLER) -> None:
    (folder / "mine.py").write_text(handler.replace("{RESULT}", result))
    (folder / "network.py").write_text(NETWORK)
    (folder / "helper.py").write_text("SCALE = 2.0\n")
    (folder / "folder").mkdir(exist_ok=True)
    (folder / "folder" / "inside.txt").write_text("x")
    torch.save(torch.nn.Linear(4, 3).state_dict(), folder / "weights.pt")


def open_mine(folder: Path, **more: object):  # type: ignore[no-untyped-def]
    options: dict[str, object] = {
        "model_file": folder / "network.py",
        "extra_files": (folder / "helper.py", folder / "folder"),
    }
    return open_user_handler(folder / "mine.py", folder / "weights.pt", **(options | more))  # type: ignore[arg-type]


def test_user_handler_preprocesses_raw_bytes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    write(tmp_path)
    before, modules = list(sys.path), set(sys.modules)
    with open_mine(tmp_path) as user:
        inputs = user.model_inputs([bytes([1, 2, 3, 4]), bytes([5, 6, 7, 8])])
        assert isinstance(user.module, torch.nn.Linear)
        scratch = Path(sys.modules["mine"].__file__ or "").parent
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs[1, 0], [[10, 12], [14, 16]])
    assert sys.path == before
    assert {"mine", "helper", "network"}.isdisjoint(set(sys.modules) - modules)
    assert not scratch.exists()


def methods(**bodies: str) -> str:
    """Return the handler with further methods, `name="(arguments): body"`."""
    return HANDLER + "".join(f"\n    def {name}{body}\n" for name, body in bodies.items())


@pytest.mark.parametrize(
    "more",
    [
        {"inference": "(self, data): return self.model(data / 4 - 1)"},
        {"inference": "(self, data): return torch.cat([self.model(row[None] / 4 - 1) for row in data])"},
        {"inference": "(self, data): return self.model(images=data / 4 - 1)"},
        {"preprocess": "(self, data): return [item['body'] for item in data]"}
        | {
            "inference": "(self, data): return self.model("
            "torch.tensor([list(body) for body in data]).reshape(-1, 1, 2, 2) * 2 / 4 - 1)"
        },
        {
            "handle": "(self, data, context): return [int(self.model("
            "torch.tensor(list(item['body'])).reshape(1, 1, 2, 2) * 2 / 4 - 1).argmax()) for item in data]"
        },
    ],
    ids=["inference scales", "row by row", "by keyword", "inference decodes", "handle alone"],
)
def test_user_handler_gives_the_very_rows_that_reach_the_network(tmp_path: Path, more: dict[str, str]) -> None:
    write(tmp_path, handler=methods(**more))
    with open_mine(tmp_path) as user:
        inputs = user.model_inputs([bytes([1, 2, 3, 4]), bytes([5, 6, 7, 8]), bytes([0, 0, 0, 9])])
        assert user.rows_seen(bytes([1, 2, 3, 4])) == 1
        assert user.batch_dependence == ""
    assert inputs.dtype == np.float32
    np.testing.assert_array_equal(inputs[:, 0, 1], [[0.5, 1], [2.5, 3], [-1, 3.5]])


@pytest.mark.parametrize(
    "more",
    [
        {"inference": "(self, data): return self.model(data - data.mean())"},
        {"inference": "(self, data): return self.model(data.flip(0)).flip(0) if len(data) > 2 else self.model(data)"},
        {"inference": "(self, data): return self.model(data if len(data) == 1 else torch.cat([data, data[:1] * 0]))"},
        {"inference": "(self, data):\n        assert len(data) == 1\n        return self.model(data)"},
    ],
    ids=["normalised over the batch", "turned around", "padded", "takes no batches"],
)
def test_user_handler_that_treats_a_batch_otherwise_is_asked_one_by_one(tmp_path: Path, more: dict[str, str]) -> None:
    write(tmp_path, handler=methods(**more))
    bodies = [bytes([number, 2, 3, 4 * number]) for number in range(7)]
    with open_mine(tmp_path) as user:
        together = user.model_inputs(bodies)
        alone = [user.model_inputs([body])[0] for body in bodies]
        assert user.batch_dependence.startswith("the handler gives its network another row")
    np.testing.assert_array_equal(together, np.stack(alone))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"preprocess": "(self, data): return torch.zeros(len(data), 4)"}, r"got torch.float32 \(4,\)"),
        ({"inference": "(self, data): return self.model.double()(data.double())"}, r"got torch.float64 \(1, 2, 2\)"),
        ({"inference": "(self, data): return self.model(torch.cat([data] * 5))"}, "5 rows reach the network for one"),
        ({"inference": "(self, data): return self.model(data) + self.model(data + 1)"}, "2 rows reach the network for"),
        ({"inference": "(self, data): return data"}, "without calling its network as a whole"),
    ],
)
def test_user_handler_refuses_what_is_no_image_per_request(tmp_path: Path, more: dict[str, str], message: str) -> None:
    write(tmp_path, handler=methods(**more))
    with open_mine(tmp_path) as user, pytest.raises(DataError, match=message):
        user.model_inputs([b"1234", b"5678"])


def test_user_handler_that_refuses_an_input_is_believed(tmp_path: Path) -> None:
    write(tmp_path, "torch.zeros(len(rows), 1, 2, 2)")
    with open_mine(tmp_path) as user, pytest.raises(DataError, match="refused the input with status 422"):
        user.model_inputs([b"12"])


def test_user_handler_weights_are_looked_into_before_the_handler_runs(tmp_path: Path) -> None:
    write(tmp_path, handler="raise SystemExit('the handler ran')")
    torch.save(torch.nn.Linear(4, 3), tmp_path / "weights.pt")
    with pytest.raises(UnsafeWeightsError, match="whole module"), open_mine(tmp_path):
        pass


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"extra_files": ()}, ArchiveError, "mine.py cannot be imported: ModuleNotFoundError.*helper"),
        ({"model_file": None}, SuspectModelError, "mine.py failed in initialize: .*--model-file"),
        ({"model_attribute": "net"}, SuspectModelError, "its attribute 'net' must be a torch.nn.Module, got NoneType"),
        ({"model_file": Path("no_such_file.py")}, ArchiveError, "no_such_file.py does not exist"),
    ],
)
def test_user_handler_that_does_not_start_says_what_it_needs(
    tmp_path: Path, options: dict[str, object], kind: type[GuardError], message: str
) -> None:
    write(tmp_path)
    with pytest.raises(kind, match=message), open_mine(tmp_path, **options):
        pass
    assert "mine" not in sys.modules


@pytest.mark.parametrize(
    "text", ["x = 1\n", "class A:\n    pass\n", "class A:\n    handle = None\nclass B:\n    pass\n"]
)
def test_user_handler_must_be_one_class_with_handle(tmp_path: Path, text: str) -> None:
    write(tmp_path, handler=text)
    with (
        pytest.raises(ArchiveError, match="must define exactly one class, with a handle method"),
        open_mine(tmp_path),
    ):
        pass


def test_user_handler_by_the_name_of_a_shipped_one(tmp_path: Path) -> None:
    write(tmp_path)
    files = {"model_file": tmp_path / "network.py"}
    with open_user_handler("base_handler", tmp_path / "weights.pt", **files) as user:  # type: ignore[arg-type]
        assert user.module.out_features == 3
    with pytest.raises(ArchiveError, match="handler no_such cannot be imported"):
        open_user_handler("no_such", tmp_path / "weights.pt").__enter__()


def test_user_handler_of_other_bodies_than_images_says_why_its_batches_are_not_tried(tmp_path: Path) -> None:
    write(tmp_path, handler=methods(preprocess="(self, data): return torch.tensor([item['body'] for item in data])"))
    with open_mine(tmp_path) as user:
        assert user.model_inputs([[[[1.0, 2.0], [3.0, 4.0]]]]).shape == (1, 1, 2, 2)
        why = user.why_one_by_one([], (1, 2, 2))
        assert why.startswith("the handler takes none of the example images, which are noise as PNG, for no example ")
        assert "Bodies of other kinds, such as JSON, are not tried together." in why
        assert why.endswith('If it makes one row of every request, in order, set batching = "declared" in guard.toml')
        unknown = user.why_one_by_one([b"[1, 2, 3, 4]"], (7, 2, 2))
        assert unknown.startswith("no example request is one image, and no image can be made in its place. If it makes")
        stream = io.BytesIO()
        Image.new("L", (2, 2)).save(stream, "PNG")
        assert user.why_one_by_one([stream.getvalue()], (1, 2, 2)) == "the handler takes none of the example images"


def test_user_handler_that_refuses_by_an_exception_is_believed(tmp_path: Path) -> None:
    imported = "from ts.utils.util import PredictionException"
    raises = f"(self, data):\n        {imported}\n        raise PredictionException('no PNG.', 415)"
    write(tmp_path, handler=methods(preprocess=raises))
    with open_mine(tmp_path) as user, pytest.raises(DataError, match=r"refused the input with status 415: no PNG\.$"):
        user.model_inputs([b"1234"])


def test_user_handler_that_takes_form_fields_alone_says_so(tmp_path: Path) -> None:
    write(tmp_path, handler=methods(preprocess="(self, data): return [item['data'] for item in data]"))
    with open_mine(tmp_path) as user, pytest.raises(DataError, match=r"item\.get\('data'\) or item\.get\('body'\)\.$"):
        user.model_inputs([b"1234"])
    write(tmp_path, handler=methods(preprocess="(self, data): return {}['colour']"))
    with open_mine(tmp_path) as user, pytest.raises(KeyError, match="colour"):
        user.model_inputs([b"1234"])


def test_user_handler_whose_network_has_another_name_says_which(tmp_path: Path) -> None:
    for more, expected in (
        ("self.net = self.model", 'setting model_attribute = "net" in guard.toml.'),
        ("self.net = self.head = self.model", "(networks are in net, head)."),
    ):
        write(
            tmp_path,
            handler=methods(initialize=f"(self, context): super().initialize(context); {more}; del self.model"),
        )
        with pytest.raises(SuspectModelError) as caught, open_mine(tmp_path):
            pass
        assert str(caught.value).endswith(expected)


def test_user_handler_module_has_what_adapters_of_archives_made_before_take_from_it() -> None:
    from guard.torchserve import user_handler, worker

    assert user_handler.handler_class is worker.handler_class  # type: ignore[attr-defined]
    assert user_handler.probe_context is worker.probe_context  # type: ignore[attr-defined]
