"""The examples, run with the packages that they are for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file
from starlette.testclient import TestClient

from guard import Guard
from guard.lab.attacks import MnistCnn, Poisoned
from guard.storage.bundle import BundleStore

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def place(badnet: MnistCnn, fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights and an active bundle."""
    folder = tmp_path_factory.mktemp("place")
    save_file(badnet.state_dict(), folder / "weights.safetensors")
    BundleStore(folder / "bundles").activate(fitted_guard.save(folder / "bundles").name)
    return folder


@pytest.fixture
def example(place: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> ModuleType:
    """The module of an example, with what it reads from the environment."""
    monkeypatch.setenv("WEIGHTS", str(place / "weights.safetensors"))
    monkeypatch.setenv("ARCHITECTURE", "guard.lab.attacks.networks:mnist_cnn")
    monkeypatch.setenv("BUNDLES", str(place / "bundles"))
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, request.param, module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("example", ["fastapi_app"], indirect=True)
def test_fastapi_app_tells_label_and_verdict(
    example: Any, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:3], clean_split.test.images[:3]])
    with TestClient(example.app) as client:
        replies = [client.post("/predict", content=image.tobytes()) for image in images]
        wrong = client.post("/predict", content=b"abc")
        odd = client.post("/predict", content=np.full(784, np.nan, np.float32).tobytes())
    assert [reply.json() for reply in replies] == [
        {
            "label": verdict.label,
            "verdict": "poisoned" if verdict.is_poisoned else "clean",
            "action": "flag" if verdict.is_poisoned else "none",
        }
        for verdict in fitted_guard.inspect(images)
    ]
    assert (wrong.status_code, odd.status_code) == (400, 422)
    assert odd.json() == {"detail": "the input holds NaN or infinity."}


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda file: file.name)
def test_example_is_short(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if line.strip()]
    assert len(lines) <= 40
