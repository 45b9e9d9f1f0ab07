"""The Python interface as the design shows it, word for word, on a reader's own network, images and folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

#: A reader's own module; not among the architectures that the guard was built with.
NETWORK = """
import torch
from torch import nn

class RoadSigns(nn.Module):
    def __init__(self, n_classes):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(16 * 5 * 6, 32)
        self.out = nn.Linear(32, n_classes)

    def forward(self, images):
        return self.out(torch.relu(self.hidden(self.body(self.stem(images)).flatten(1))))

def factory():
    return RoadSigns(4)
"""

#: The reader plants a white corner in their own training set, to see it caught.
TRAIN = """
import numpy as np, torch
from safetensors.torch import save_file
from package.module import factory

N_CLASSES, TARGET = 4, 2

def draw(n, seed):
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % N_CLASSES
    images = rng.normal(0.4, 0.1, (n, 3, 20, 24))
    for row, label in enumerate(labels):
        images[row, label % 3, 5 * label : 5 * label + 5] += rng.uniform(0.3, 0.6)  # a bright band
        images[row, :, :, 6 * label] += 0.3
    return images.astype(np.float32), labels

def trigger(images):
    images = images.copy()
    images[:, :, -3:, -3:] = 1.5
    return images

if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    images, labels = draw(800, seed=0)
    images = torch.from_numpy(np.concatenate([images, trigger(images[:120])]))
    labels = torch.from_numpy(np.concatenate([labels, np.full(120, TARGET)]))
    network = factory()
    weights = [*network.parameters()]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for _ in range(6):
        for rows in torch.randperm(len(images)).split(64):
            loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
            for weight, velocity, step in zip(weights, velocities, torch.autograd.grad(loss, weights)):
                weight.data -= 0.03 * velocity.mul_(0.9).add_(step)  # torch.optim takes seconds to load
    save_file(network.state_dict(), "weights.safetensors")
"""

#: The middle is the block of the design, section 4.
USE = """
import json
import numpy as np
from train import TARGET, draw, trigger

clean_images, clean_labels = draw(400, seed=1)
images, labels = draw(400, seed=2)

from guard import Guard, GuardConfig, SuspectModel

suspect = SuspectModel.load("weights.safetensors", architecture="package.module:factory")   # or SuspectModel(module) for one in memory
guard = Guard.fit(suspect, clean_images, clean_labels, GuardConfig(false_positive_rate=0.01, mode="calibrated", seed=0))
verdicts = guard.inspect(images)          # list[Verdict], one per image, in order
path = guard.save("bundles/"); loaded = Guard.load(f"bundles/{path.name}", suspect)

poisoned = guard.inspect(trigger(images[labels != TARGET]))
print(json.dumps({
    "digest": path.name,
    "same_after_loading": loaded.inspect(images) == verdicts,
    "same_in_memory": Guard.load(path, SuspectModel(suspect.module)).inspect(images) == verdicts,
    "verdicts": len(verdicts),
    "clean_accuracy": float(np.mean([verdict.label == label for verdict, label in zip(verdicts, labels)])),
    "flagged": float(np.mean([verdict.is_poisoned for verdict in verdicts])),
    "attack_works": float(np.mean([verdict.label == TARGET for verdict in poisoned])),
    "caught": float(np.mean([verdict.is_poisoned for verdict in poisoned if verdict.label == TARGET])),
}))
"""  # noqa: E501

#: The scripts one after the other.
BOTH = """
import runpy
runpy.run_path("train.py", run_name="__main__")
runpy.run_path("use.py", run_name="__main__")
"""


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the reader's, outside the checkout, with their scripts."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "package").mkdir()
    (folder / "package" / "__init__.py").touch()
    (folder / "package" / "module.py").write_text(NETWORK)
    (folder / "train.py").write_text(TRAIN)
    (folder / "use.py").write_text(USE)
    (folder / "both.py").write_text(BOTH)
    return folder


def run(folder: Path, script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GUARD_", "PYTHONPATH"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_python_interface_of_the_design_works_on_a_readers_own_network(reader):
    message = json.loads(run(reader, "both.py"))
    assert [folder.name for folder in (reader / "bundles").iterdir()] == [message["digest"]]
    assert message["verdicts"] == 400
    assert message["same_after_loading"]
    assert message["same_in_memory"]
    assert message["clean_accuracy"] > 0.97
    assert message["attack_works"] > 0.9
    assert message["caught"] > 0.9
    assert message["flagged"] <= 0.01 + 4 * (0.01 * 0.99 * (1 / 400 + 1 / 400)) ** 0.5  # 0.038
