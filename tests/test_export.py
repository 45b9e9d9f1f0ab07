"""`guard export`: what is written answers as the network does, and says whose it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import Exported
from torch import Tensor, nn

from guard import Guard, SuspectModel
from guard.cli import run
from guard.errors import ExportError
from guard.export.exporting import new_record, write_models
from guard.export.record import ExportRecord
from guard.export.server_files import mlserver_settings
from guard.types import Activations

FEATURES = [f"guard_features_{place}" for place in range(4)]


class Small(nn.Module):
    """Works in place behind every layer, and takes (n, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 8, 3)
        self.hidden, self.last = nn.Linear(128, 16), nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Any:
        maps = self.second(self.first(images).relu_()).mul_(2.0)
        return self.last(self.hidden(maps.reshape(len(images), -1)).relu_())


class Branching(Small):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) if images.sum() > 0 else self.last(images.reshape(-1, 64)[:, :16])


def activations_of(outputs: list[Any], record: ExportRecord) -> Activations:
    return record.activations([np.asarray(array) for array in outputs])


def small_record(module: nn.Module) -> tuple[ExportRecord, SuspectModel]:
    """A record as of a guard that watches this network."""
    suspect = SuspectModel(module)
    found = suspect.activations(np.random.default_rng(0).random((4, 1, 8, 8), np.float32))
    points = suspect.split_points
    assert points is not None
    widths = tuple(array.shape[1] for _, array in found.items())
    return ExportRecord("m", "b" * 64, suspect.digest, points, (1, 8, 8), ((0.0, 1.0),), widths), suspect


def test_onnx_file_answers_with_the_features_of_the_hooks_and_says_whose_they_are(
    exported: Exported, fitted_guard: Guard, clean_activations: Activations, clean_split: Any
) -> None:
    file = exported.folder / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["logits", *FEATURES]
    assert session.get_inputs()[0].shape == ["batch", 1, 28, 28]
    images = clean_split.test.images
    for rows in (slice(0, 1), slice(0, 100)):
        arrays = session.run(None, {"input": images[rows]})
        for array, (_, expected) in zip(arrays, clean_activations[rows].items(), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-4)
    told = session.get_modelmeta().custom_metadata_map
    record = ExportRecord.read(exported.folder)
    assert (told["guard.bundle"], told["guard.suspect"]) == (record.bundle, record.suspect)
    assert fitted_guard.suspect is not None
    assert record.suspect == fitted_guard.suspect.digest
    assert onnx.load(str(file)).opset_import[0].version >= 18


def test_triton_gets_a_configuration_with_every_output(exported: Exported) -> None:
    text = (exported.folder / "config.pbtxt").read_text()
    assert 'name: "digits"' in text
    assert '{ name: "input" data_type: TYPE_FP32 dims: [1, 28, 28] }' in text
    for name, n in ExportRecord.read(exported.folder).outputs.items():
        assert f'{{ name: "{name}" data_type: TYPE_FP32 dims: [{n}] }}' in text


def test_mlserver_gets_settings_with_every_output(exported: Exported) -> None:
    record = ExportRecord.read(exported.folder)
    settings = json.loads(mlserver_settings(record, "./1/model.onnx", "mlserver_onnx.OnnxModel"))
    assert {entry["name"]: entry["shape"] for entry in settings["outputs"]} == {
        name: [-1, n] for name, n in record.outputs.items()
    }
    assert settings["parameters"]["extra"]["guard_bundle"] == record.bundle


def test_network_that_works_in_place_and_asks_for_the_length_of_its_batch_is_exported(tmp_path: Path) -> None:
    record, suspect = small_record(Small())
    images = np.random.default_rng(1).random((300, 1, 8, 8), np.float32)
    found = write_models(record, suspect, {"torch-export": tmp_path / "m.pt2"}, images=images)
    assert found["torch-export"][1] < 1e-5
    module = torch.export.load(tmp_path / "m.pt2").module()
    for rows in (images[:1], images[:7]):
        arrays = [tensor.detach().numpy() for tensor in module(torch.from_numpy(rows))]
        for array, (_, expected) in zip(arrays, suspect.activations(rows).items(), strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]
    hooks = [*suspect.module._forward_hooks, *suspect.module.first._forward_hooks]  # type: ignore[union-attr, misc]
    assert hooks == []
    told = r"^the exported model \(torch-export\) answers otherwise .* differs by \d\S* of its greatest value"
    with pytest.raises(ExportError, match=told):
        write_models(record, suspect, {"torch-export": tmp_path / "n.pt2"}, tolerance=-1.0)
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt2"]


def test_network_that_branches_on_its_input_is_refused_in_one_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record, suspect = small_record(Branching())
    with pytest.raises(ExportError, match=r"^the suspect model cannot be exported: .* cannot be a graph\.$") as caught:
        write_models(record, suspect, {"torch-export": tmp_path / "m.pt2"})
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.iterdir()]
    assert capfd.readouterr() == ("", "")


def test_bundle_that_does_not_know_its_inputs_is_refused(fitted_guard: Guard, suspect: SuspectModel) -> None:
    with pytest.raises(ExportError, match=r"does not know what the model takes\. Fit again\."):
        new_record(replace(fitted_guard, input_shape=None), suspect, "m")
    with pytest.raises(ExportError, match="puts requests together"):
        new_record(replace(fitted_guard, batch_dependence="it depends"), suspect, "m")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--format", "onnx"], "exists already. Name another, or replace it with --force."),
        (["--opset", "11"], "--opset must be 18 or higher, got 11"),
        (["--tolerance", "0"], "--tolerance must be above 0"),
        (["--format", "torch-export"], "--server triton runs the ONNX file"),
    ],
)
def test_command_says_what_does_not_go_together(
    exported: Exported, more: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    given = ["--weights", str(exported.weights), "--architecture", "guard.lab.attacks.networks:mnist_cnn"]
    places = ["--bundles", str(exported.bundles), "--to", str(exported.folder.parent)]
    assert run(["export", "digits", *given, *places, *more]) in (1, 2)
    assert message in capfd.readouterr().err
    assert run(["export", "../digits", *given, *places]) == 2
