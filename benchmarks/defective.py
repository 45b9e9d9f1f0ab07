"""What a defective network owes to its dead neurons: accuracy against attacks that were made for another network.

    pip install 'backdoor-guard[bench]'
    python benchmarks/defective.py [mnist] [cifar10]

Trains a small residual network (three stages of one block, 16, 32 and 64 channels) as it is and with dead neurons: a
keep probability of 0.7, 0.5, 0.3 or 0.1 at the bottom (first convolution, first two stages), 0.5 and 0.3 at the top
(last stage), whole channels, and masks shared by all channels. Each is tested on clean images; on FGSM and PGD (40
steps) of a standard network, the zoo's benign one; on Gaussian noise; on shuffled patches; and some by the boundary
attack. As in the paper, a defence rate is the share of attacked images, right on the network under test before and
wrong on the source now, that keep their label. Attacks are foolbox's.

Writes `defective.csv` (data_set, network, measure, value, paper), a network's rows as soon as it is measured; networks
that are there are passed over. The paper's figures are of ResNet-18 on CIFAR-10, attacked from a DenseNet-121 (its
Table 5; its rows of channels and shared masks have lost their names in the text that we have, and were told apart by
what it says of them). Weights are kept in `--work-dir`.
"""

from __future__ import annotations

import argparse
import csv
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch
from torch import nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # foolbox names a module that SciPy has moved
    import foolbox

from guard.backups.backup_training import predict_logits
from guard.backups.defective import Variant, make_defective
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.network_training import TrainingSettings, train_classifier
from guard.lab.attacks.networks import ResNet
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import LabelledImages, load_split
from guard.types import Float32Array, IntArray

COLUMNS = ("data_set", "network", "measure", "value", "paper")
BOTTOM, TOP = ("conv1", "stages.0", "stages.1"), ("stages.2",)
#: Of 255: standard deviations of the noise.
NOISE = (4, 8, 12, 16, 20, 24, 28, 32)
#: Patches along a side.
PATCHES = (2, 4)
SOURCES = {"mnist": "mnist-benign-mnist_cnn-0", "cifar10": "cifar10-benign-resnet20-0"}
#: Largest change of a pixel, in [0, 1]; PGD takes 40 steps of a tenth of it.
EPSILON = {"mnist": 0.3, "cifar10": 8 / 255}
STEPS = 40


@dataclass(frozen=True)
class Network:
    """A network under test."""

    name: str
    blocks: tuple[str, ...] = ()
    keep_probability: float = 1.0
    variant: Variant = "neuron"
    #: Clean accuracy, and defence rates against FGSM and PGD.
    paper: tuple[float, float, float] | None = None
    boundary: bool = False


NETWORKS = (
    Network("standard", paper=(0.9533, 0.1491, 0.1414), boundary=True),
    Network("0.7 bottom", BOTTOM, 0.7, paper=(0.9403, 0.2329, 0.5129)),
    Network("0.5 bottom", BOTTOM, 0.5, paper=(0.9339, 0.3086, 0.7038), boundary=True),
    Network("0.3 bottom", BOTTOM, 0.3, paper=(0.9183, 0.4857, 0.8699)),
    Network("0.1 bottom", BOTTOM, 0.1, paper=(0.8768, 0.7993, 0.9670), boundary=True),
    Network("0.5 top", TOP, 0.5, paper=(0.9494, 0.1076, 0.1106)),
    Network("0.3 top", TOP, 0.3, paper=(0.9461, 0.1123, 0.1177)),
    Network("0.5 bottom, channels", BOTTOM, 0.5, "channel", paper=(0.9512, 0.1215, 0.1993)),
    Network("0.1 bottom, channels", BOTTOM, 0.1, "channel", paper=(0.9327, 0.1900, 0.5387)),
    Network("0.5 bottom, shared", BOTTOM, 0.5, "shared", paper=(0.9257, 0.4886, 0.8500)),
    Network("0.1 bottom, shared", BOTTOM, 0.1, "shared", paper=(0.7428, 0.3940, 0.8036)),
)


def trained(network: Network, data_set: str, train: LabelledImages, epochs: int, file: Path) -> nn.Module:
    """Return a network, trained or read from the file where an earlier run left it."""
    channels, height, width = train.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module: nn.Module = ResNet((16, 32, 64), 1, False, 10, channels)
    if network.blocks:
        module = make_defective(
            module,
            network.keep_probability,
            network.blocks,
            image_shape=(channels, height, width),
            variant=network.variant,
        )
    if file.exists():
        module.load_state_dict(torch.load(file, weights_only=True))
        return module.eval()
    settings = TrainingSettings(
        epochs=epochs, batch_size=128, optimizer="sgd", learning_rate=0.2, weight_decay=5e-4, precision="bfloat16"
    )
    move = CropAndFlip(padding=4, flip=True) if data_set == "cifar10" else CropAndFlip(padding=2, flip=False)
    train_classifier(
        module, train.images, train.labels, settings, seed=0, n_threads=1, redraw=lambda rng: move(train.images, rng)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), file)
    return module.eval()


@dataclass(frozen=True)
class Tests:
    """Test images, and what the attacks on the source made of them."""

    images: Float32Array
    labels: IntArray
    attacked: dict[str, Float32Array]
    fooled: dict[str, IntArray]  # rows that are wrong on the source now

    @classmethod
    def make(cls, data_set: str, n_test: int) -> Tests:
        """Attack the zoo's benign network."""
        test = load_split(data_set).test
        images, labels = test.images[:n_test], test.labels[:n_test]
        source = Zoo(default_zoo_dir()).load(SOURCES[data_set])
        epsilon = EPSILON[data_set]
        attacks = {
            "fgsm": foolbox.attacks.LinfFastGradientAttack(),
            "pgd": foolbox.attacks.LinfProjectedGradientDescentAttack(steps=STEPS, abs_stepsize=epsilon / 10),
        }
        torch.manual_seed(0)  # PGD starts at random
        attacked = {name: _attack(attack, source, images, labels, epsilon) for name, attack in attacks.items()}
        fooled = {
            name: np.flatnonzero(predict_logits(source, changed).argmax(axis=1) != labels)
            for name, changed in attacked.items()
        }
        return cls(images, labels, attacked, fooled)

    def measure(self, module: nn.Module, boundary: bool) -> dict[str, float]:
        """Return every measure of a network by name."""
        right = predict_logits(module, self.images).argmax(axis=1) == self.labels
        found = {"clean_accuracy": float(right.mean())}
        for name, changed in self.attacked.items():
            rows = self.fooled[name][right[self.fooled[name]]]
            kept = predict_logits(module, changed[rows]).argmax(axis=1) == self.labels[rows]
            found[f"{name}_defence"] = float(kept.mean())
        rng, known = np.random.default_rng(0), np.flatnonzero(right)

        def accuracy(images: Float32Array) -> float:
            return float((predict_logits(module, images).argmax(axis=1) == self.labels[known]).mean())

        clean = self.images[known]
        for level in NOISE:
            noise = np.clip(rng.normal(0, level / 255, clean.shape), -2 * level / 255, 2 * level / 255)
            found[f"noise_{level}"] = accuracy(np.clip(clean + noise, 0, 1).astype(np.float32))
        for patches in PATCHES:
            found[f"shuffled_{patches}x{patches}"] = accuracy(shuffled(clean, patches, rng))
        if boundary:
            found["boundary_distance"] = boundary_distance(module, clean[:20], self.labels[known[:20]], self.images)
        return found


def _attack(attack: Any, source: nn.Module, images: Float32Array, labels: IntArray, epsilon: float) -> Float32Array:
    model = foolbox.PyTorchModel(source.eval(), bounds=(0, 1), device="cpu")
    parts = []
    for start in range(0, len(images), 200):
        x, y = torch.tensor(images[start : start + 200]), torch.tensor(labels[start : start + 200])
        _, clipped, _ = attack(model, x, y, epsilons=epsilon)
        parts.append(clipped.detach().numpy())
    return np.concatenate(parts)


def shuffled(images: Float32Array, patches: int, rng: np.random.Generator) -> Float32Array:
    """Return images cut into patches x patches squares that changed places; what does not divide evenly is cut off."""
    n, channels, height, width = images.shape
    tall, wide = height // patches, width // patches
    cut = images[:, :, : tall * patches, : wide * patches].reshape(n, channels, patches, tall, patches, wide)
    squares = cut.transpose(0, 2, 4, 1, 3, 5).reshape(n, patches**2, channels, tall, wide)
    moved = np.stack([selected[rng.permutation(patches**2)] for selected in squares])
    whole = moved.reshape(n, patches, patches, channels, tall, wide).transpose(0, 3, 1, 4, 2, 5)
    result = images.copy()
    result[:, :, : tall * patches, : wide * patches] = whole.reshape(n, channels, tall * patches, wide * patches)
    return result


def boundary_distance(
    module: nn.Module, images: Float32Array, labels: IntArray, others: Float32Array, steps: int = 1000
) -> float:
    """Return the median squared distance per pixel of what the boundary attack finds, in images of [0, 1].

    It starts from the first of the others that gets another label; noise, as in the paper, does not always get one.
    """
    answers = predict_logits(module, others).argmax(axis=1)
    starts = [int(np.argmax(answers != label)) for label in labels]
    model = foolbox.PyTorchModel(module.eval(), bounds=(0, 1), device="cpu")
    torch.manual_seed(0)
    np.random.seed(0)
    _, found, _ = foolbox.attacks.BoundaryAttack(steps=steps)(
        model,
        torch.tensor(images),
        torch.tensor(labels),
        epsilons=None,
        starting_points=torch.tensor(others[starts]),
    )
    squares = ((found.numpy() - images) ** 2).reshape(len(images), -1).mean(axis=1)
    return float(np.median(squares))


def paper_value(network: Network, measure: str) -> float | str:
    """Return the paper's figure for a measure; empty where it has none."""
    if measure == "boundary_distance":
        return {"standard": 7.3e-6, "0.1 bottom": 3.5e-5}.get(network.name, "")
    names = ("clean_accuracy", "fgsm_defence", "pgd_defence")
    return network.paper[names.index(measure)] if network.paper is not None and measure in names else ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all networks on the data sets that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_sets", nargs="*", default=["mnist", "cifar10"])
    names = [network.name for network in NETWORKS]
    parser.add_argument("--networks", nargs="+", default=names, choices=names)
    parser.add_argument("--train", type=int, default=20_000, help="images to train on, at most")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--work-dir", type=Path, default=Path("build/defective"))
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    chosen = parser.parse_args(arguments)
    table = chosen.output_dir / "defective.csv"
    rows: list[dict[str, Any]] = []
    if table.exists():
        with table.open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    for data_set in chosen.data_sets:
        present = {row["network"] for row in rows if row["data_set"] == data_set}
        missing = [network for network in NETWORKS if network.name in set(chosen.networks) - present]
        if not missing:
            continue
        tests: Tests = Tests.make(data_set, chosen.test)
        whole = load_split(data_set).train
        order = np.random.default_rng(0).permutation(len(whole))[: chosen.train]
        train = LabelledImages(whole.images[order], whole.labels[order])
        for network in missing:
            file = chosen.work_dir / f"{data_set}-{network.name.replace(', ', '-').replace(' ', '-')}.pt"
            module = trained(network, data_set, train, chosen.epochs, file)
            for measure, value in tests.measure(module, network.boundary).items():
                paper = paper_value(network, measure) if data_set == "cifar10" else ""
                values = (data_set, network.name, measure, f"{value:.6g}", paper)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
                print("  ".join(str(entry) for entry in values), flush=True)
            _write(table, rows)


def _write(table: Path, rows: Sequence[dict[str, Any]]) -> None:
    unfinished = table.with_name(f".{table.name}.writing")
    with unfinished.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(table)


if __name__ == "__main__":
    main()
