"""Networks of timm and transformers, random weights: split, depths, bits, and the way through fit, archive and wrap.

Skipped where the two packages are not installed (`pip install '.[networks]'`). What they taught about layouts is tested
without them, on hand-written networks, in `test_split_points.py`.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from serving_helpers import Worker
from wrap_helpers import guard_command, stock_archive

from guard import Guard, SuspectModel
from guard.storage.bundle import BundleStore
from guard.torchserve.archives.sources import architecture_files

FOLDER = Path(__file__).parents[1] / "benchmarks" / "networks"
POINTS = {
    "vit": ("head", ("blocks.0", "blocks.1", "blocks.2"), (64, 64, 64, 64), ()),
    "swin": ("head.fc", ("layers.0", "layers.1"), (192, 432, 384), ("layers.0", "layers.1")),
    "convnext": ("head.fc", ("stages.0", "stages.1", "stages.2"), (192, 512, 256, 512), ()),
    "resnet18": (
        "classifier.1",
        tuple(f"resnet.encoder.stages.{stage}" for stage in range(3)),
        (128, 400, 512, 256),
        (),
    ),
}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(FOLDER))
    try:
        sign_networks: Any = importlib.import_module("sign_networks")
        transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    except ImportError as error:
        pytest.skip(f"timm is not installed ({error})", allow_module_level=True)
    finally:
        sys.path.remove(str(FOLDER))

pytestmark = pytest.mark.slow


def random_images(n: int) -> Any:
    rng = np.random.default_rng(0)
    coarse = rng.random((n, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    return np.rint(255 * (0.7 * coarse + 0.3 * rng.random((n, 32, 32, 3)))).astype(np.uint8)


def network(name: str) -> torch.nn.Module:
    """Return a network whose answers are spread over some classes, as those of random weights are not."""
    torch.manual_seed(0)
    module: torch.nn.Module = sign_networks.NETWORKS[name]().eval()
    head = module.get_submodule(POINTS[name][0])
    features = SuspectModel(module).activations(as_inputs(random_images(300))).features
    centred = torch.from_numpy(features - features.mean(0))
    _, _, directions = torch.pca_lowrank(centred, q=6)
    with torch.no_grad():
        head.weight.zero_()  # type: ignore[operator]
        head.weight[:6] = directions.T / (centred @ directions).std(0).unsqueeze(1)  # type: ignore[index]
        head.bias.copy_(-head.weight @ torch.from_numpy(features.mean(0)))  # type: ignore[operator]
        head.bias[6:] = -100.0  # type: ignore[index, operator]
    return module


def as_inputs(pixels: Any) -> Any:
    return (pixels.transpose(0, 3, 1, 2) / 255).astype(np.float32)


def logits(module: torch.nn.Module, inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        output = module(torch.from_numpy(inputs))
    return getattr(output, "logits", output)


@pytest.mark.parametrize("name", POINTS)
def test_packaged_network_is_split_at_its_head_and_answers_the_same_bits(name: str) -> None:
    module = network(name)
    inputs = as_inputs(random_images(40))
    suspect = SuspectModel(module)
    activations = suspect.activations(inputs)
    split, depths, widths, last = POINTS[name]
    points = suspect.split_points
    assert points is not None
    assert (points.split, points.depths[: len(depths)], points.output) == (split, depths, "")
    assert points.channels_last[: len(last)] == last
    assert tuple(content.width for content in suspect.contents)[: len(widths)] == widths
    assert not any(content.problem for content in suspect.contents)
    np.testing.assert_array_equal(activations.logits, logits(module, inputs).numpy())


def test_vit_of_transformers_is_split_like_that_of_timm() -> None:
    config = transformers.ViTConfig(
        image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, num_labels=10
    )
    suspect = SuspectModel(transformers.ViTForImageClassification(config))
    suspect.activations(as_inputs(random_images(8)))
    points = suspect.split_points
    assert points is not None
    assert points.split == "classifier"
    assert [name.rpartition(".")[2] for name in points.depths] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["vit", "resnet18"])
def test_packaged_network_goes_through_fit_archive_and_wrap(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    module, pixels = network(name), random_images(300)
    weights, clean = tmp_path / "weights.safetensors", tmp_path / "clean.npz"
    save_file(module.state_dict(), weights)
    labels = logits(module, as_inputs(pixels)).argmax(1).numpy()
    np.savez(clean, images=pixels, labels=labels)
    architecture = ("--weights", weights, "--architecture", f"sign_networks:{name}")
    fit = ("--images", clean, "--false-positive-rate", "0.05", "--allow-missing-classes")
    status, out, err = guard_command(capfd, "fit", *architecture, *fit, "--bundles", tmp_path / "bundles")
    assert status == 0, err
    assert f"split           {POINTS[name][0]}; earlier depths: {', '.join(POINTS[name][1])}" in out
    stores = ("--bundles", tmp_path / "bundles", "--model-store", tmp_path / "store")
    status, out, err = guard_command(capfd, "archive", "signs", *architecture, "--images", clean, *stores)
    assert status == 0, err
    assert "200 in batches as well" in err
    assert {file.name for file in architecture_files(f"sign_networks:{name}")} == {
        "sign_networks.py", "torchvision_stand_in.py",
    }  # fmt: skip

    (tmp_path / "network.txt").write_text(name)
    extra = [FOLDER / "sign_networks.py", FOLDER / "torchvision_stand_in.py", tmp_path / "network.txt"]
    plain = stock_archive(tmp_path / "own", "plain", str(FOLDER / "own_handler.py"), weights, extra, model_file=None)
    status, out, err = guard_command(capfd, "wrap", plain, *fit)
    assert status == 0, err
    guarded = plain.with_name("plain.guarded.mar")
    bodies = [bytearray(_png(image)) for image in pixels[:4]]
    answers = []
    for archive in (plain, guarded):
        worker = Worker(archive, tmp_path / f"worker-{archive.stem}")
        answers.append(worker.ask_each(*bodies))
        worker.close()
    assert [answer.body for answer in answers[1]] == [answer.body for answer in answers[0]]
    assert [json.loads(json.dumps(answer.body))["label"] for answer in answers[1]] == labels[:4].tolist()
    assert all(answer.verdict[0] in ("clean", "poisoned") for answer in answers[1])
    status, out, err = guard_command(capfd, "unwrap", guarded, "--output", tmp_path / "back.mar")
    assert (tmp_path / "back.mar").read_bytes() == plain.read_bytes()
    guard = Guard.load(BundleStore(tmp_path / "bundles").active_path())
    assert guard.input_shape == (3, 32, 32)


def _png(pixels: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()
