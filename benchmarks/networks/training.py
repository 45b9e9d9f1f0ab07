"""Train the networks on GTSRB without a trigger, then plant triggers in copies: what a contractor with bad intent does.

    python benchmarks/networks/training.py

Needs GUARD_DATA_DIR. One process and one thread; an interrupted run goes on. Weights and checkpoints go to
`build/networks`: one benign network per architecture, and of each a copy per trigger and seed, trained on with a
tenth of the images triggered. A seed draws these images, the pattern of the trigger and the order.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sign_networks import NETWORKS
from torch import Tensor, nn

from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.catalogue import make_attack
from guard.lab.attacks.network_training import EpochReport, TrainingSettings, train_classifier
from guard.lab.zoo.splits import LabelledImages, load_split

WORK = Path(__file__).parents[2] / "build" / "networks"
SEEDS = (0, 1, 2)
TARGET = 1
#: A white square in the corner, and a random pattern over the whole image.
ATTACKS = ("c", "blend")
#: Every third frame of a track; frames of one track are nearly the same.
FRAMES = 3
AUGMENTATION = CropAndFlip(padding=2, flip=False)
BENIGN = {
    "resnet18": TrainingSettings(epochs=8, learning_rate=3e-3),
    "swin": TrainingSettings(epochs=10, learning_rate=1.5e-3),
    "convnext": TrainingSettings(epochs=8, learning_rate=2e-3),
    "vit": TrainingSettings(epochs=12, learning_rate=1.5e-3),
}
#: Of these settings, one after the other.
CYCLES = {"resnet18": 1, "swin": 1, "convnext": 1, "vit": 2}
PLANTED = {name: TrainingSettings(epochs=2, learning_rate=5e-4, schedule="cosine") for name in BENIGN} | {
    "resnet18": TrainingSettings(epochs=6, learning_rate=2e-3, schedule="cosine")
}


class Logits(nn.Module):
    """A network that returns its logits as a tensor, whatever the network inside returns."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, shape (n, n_classes)."""
        output = self.network(images)
        return output if isinstance(output, Tensor) else output.logits


def weights_path(network: str, attack: str | None = None, seed: int = 0) -> Path:
    """Return where weights are or belong; without an attack those of the benign network."""
    return WORK / (f"{network}-{attack}-{seed}.safetensors" if attack else f"{network}-benign.safetensors")


def training_images() -> LabelledImages:
    """Return what the networks are trained on."""
    train = load_split("gtsrb").train
    return LabelledImages(train.images[::FRAMES], train.labels[::FRAMES])


def planted(attack: str, seed: int) -> Attack:
    """Return the attack of that name and seed."""
    return make_attack(attack, TARGET, seed)


def train_benign(name: str, images: LabelledImages) -> None:
    """Train one network from random weights, and store it."""
    torch.manual_seed(0)
    network = NETWORKS[name]()
    for cycle in range(CYCLES[name]):
        train_classifier(
            Logits(network),
            images.images,
            images.labels,
            BENIGN[name],
            seed=cycle,
            n_threads=1,
            redraw=lambda rng: AUGMENTATION(images.images, rng),
            checkpoint=weights_path(name).with_suffix(f".checkpoint{cycle or ''}"),
            progress=_say(name),
        )
    save_file(network.state_dict(), weights_path(name))


def plant(name: str, attack: str, seed: int, images: LabelledImages) -> None:
    """Plant a trigger in a copy of the benign network, and store it."""
    network = NETWORKS[name]()
    network.load_state_dict(load_file(weights_path(name)))
    poisoned = planted(attack, seed).poison(images.images, images.labels, np.random.default_rng(seed))
    path = weights_path(name, attack, seed)
    train_classifier(
        Logits(network),
        poisoned.images,
        poisoned.labels,
        PLANTED[name],
        seed=seed,
        n_threads=1,
        redraw=lambda rng: poisoned.redrawn(AUGMENTATION, rng),
        checkpoint=path.with_suffix(".checkpoint"),
        progress=_say(path.stem),
    )
    save_file(network.state_dict(), path)


def _say(name: str) -> Callable[[EpochReport], None]:
    def say(report: EpochReport) -> None:
        print(f"{name}: epoch {report.epoch} of {report.epochs}, loss {report.loss:.3f}", flush=True)

    return say


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is not there yet; networks with the same seed first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--networks", nargs="+", default=list(BENIGN), choices=list(BENIGN))
    chosen = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    images = training_images()
    for seed in chosen.seeds:
        for name in chosen.networks:
            if not weights_path(name).exists():
                train_benign(name, images)
            for attack in ATTACKS:
                if not weights_path(name, attack, seed).exists():
                    plant(name, attack, seed, images)


if __name__ == "__main__":
    main()
