"""`guard purify`: what it writes, and that what is wrong is one line and leaves nothing behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from guard.cli import run
from guard.suspect.model import SuspectModel

NETWORK = """
from torch import nn


def make():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(),
        nn.Linear(8, 3),
    )
"""
MODEL = ["--weights", "weights.safetensors", "--architecture", "purify_network:make"]
QUICK = ["purify", *MODEL, "--images", "clean.npz", "--iterations", "2", "--output", "twin"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("purify")
    (folder / "purify_network.py").write_text(NETWORK)
    names: dict[str, object] = {}
    exec(NETWORK, names)
    torch.manual_seed(0)
    save_file(names["make"]().state_dict(), folder / "weights.safetensors")  # type: ignore[operator]
    labels = np.arange(60) % 3
    images = np.random.default_rng(0).random((60, 1, 8, 8), dtype=np.float32)
    np.savez(folder / "clean.npz", images=images, labels=labels)
    np.savez(folder / "few.npz", images=images[:12], labels=labels[:12])
    np.savez(folder / "bare.npz", images=images)
    (folder / "file").write_text("")
    return folder


@pytest.fixture
def guard(work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))

    def command(*arguments: str) -> tuple[int, str, str]:
        status = run(list(arguments))
        printed = capfd.readouterr()
        return status, printed.out, printed.err

    return command


def test_purify_writes_twin_card_and_picture(guard: Run, work: Path) -> None:
    status, shown, problem = guard(*QUICK, "--class-names", "left,middle,right", "--epsilon", "0.2")
    assert status == 0, problem
    assert "clean accuracy" in shown
    assert sorted(file.name for file in (work / "twin").iterdir()) == ["twin.json", "twin.png", "twin.safetensors"]
    card = json.loads((work / "twin" / "twin.json").read_text())
    assert (card["method"], card["class_names"]) == ("anp", ["left", "middle", "right"])
    assert len(card["per_class_after"]) == 3
    assert (card["settings"]["iterations"], card["settings"]["epsilon"]) == (2, 0.2)
    twin = SuspectModel.load(work / "twin" / "twin.safetensors", "purify_network:make")
    assert twin.digest == card["twin_digest"]
    assert SuspectModel.load(work / "weights.safetensors", "purify_network:make").digest == card["suspect_digest"]
    assert (work / "twin" / "twin.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["norm-pruning", "fine-pruning", "rtll"])
def test_purify_runs_every_method(guard: Run, work: Path, method: str) -> None:
    options = {"norm-pruning": ["--norm", "l2", "--share", "0.2"], "fine-pruning": [], "rtll": ["--epochs", "2"]}
    status, _, problem = guard(
        "purify", *MODEL, "--images", "clean.npz", "--method", method, *options[method], "--output", f"by-{method}"
    )
    assert status == 0, problem
    assert json.loads((work / f"by-{method}" / "twin.json").read_text())["method"] == method


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        (["--method", "magic"], 2, "--method must be one of anp, norm-pruning, fine-pruning, rtll, got 'magic'."),
        (["--share", "0.5"], 2, "--share goes with --method norm-pruning, got 'anp'. Leave it out."),
        (["--epsilon", "0"], 2, "--method anp: epsilon and learning_rate must be > 0, got 0.0 and 0.2."),
        (["--threshold", "2"], 2, "--method anp: threshold must be in [0, 1], got 2.0."),
        (["--threshold", "0.1", "--allowed-accuracy-loss", "0.1"], 2, "Give one of them."),
        (["--seed", "-1"], 2, "--seed must be >= 0, got -1."),
        (["--output", "file/twin"], 2, "is no folder. Name another."),
        (["--images", "few.npz"], 1, "every one of the 3 classes needs at least 5 clean images, class 0 has 4."),
        (["--images", "bare.npz"], 1, "has no labels"),
    ],
)
def test_purify_that_cannot_work_is_one_line_and_writes_nothing(
    guard: Run, work: Path, changes: list[str], status: int, message: str
) -> None:
    before = sorted(path for path in work.rglob("*") if "__pycache__" not in path.parts)
    got, _, problem = guard(*QUICK, "--output", "nothing", *changes)
    assert got == status
    assert problem.splitlines()[-1].startswith("error: ")
    assert message in problem
    assert sorted(path for path in work.rglob("*") if "__pycache__" not in path.parts) == before


def test_purify_help_names_every_option_in_full_at_80_columns(guard: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    status, shown, _ = guard("purify", "--help")
    assert status == 0
    assert "…" not in shown
    assert all(len(line) <= 80 for line in shown.splitlines())
