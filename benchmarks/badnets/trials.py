"""What the BadNets benchmarks share: MNIST, one way to train, error rates, and CSV files that grow row by row."""

from __future__ import annotations

import argparse
import csv
import io
import os
from collections.abc import Hashable, Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

from torch import nn

from guard.data.datasets import load_dataset, to_tensor_images
from guard.lab.attacks.network_training import TrainingSettings, accuracy, train_classifier
from guard.lab.attacks.networks import mnist_cnn
from guard.lab.zoo.splits import LabelledImages
from guard.types import Float32Array, IntArray

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent


class GrowingCsv:
    """A tidy CSV file that gets a row whenever a training is done, and that an interrupted run goes on with.

    Parameters
    ----------
    path : path
    key : sequence of str
        Columns that say which training a row is of.
    values : sequence of str
        The other columns.
    fresh : bool
        Forget what an earlier run wrote.

    Raises
    ------
    ValueError
        If the file has other columns.
    """

    def __init__(self, path: Path, key: Sequence[str], values: Sequence[str], *, fresh: bool = False) -> None:
        self.path, self.key, self.columns = path, tuple(key), (*key, *values)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "" if fresh or not path.exists() else path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # a killed run may have left half a row
        reader = csv.DictReader(io.StringIO(whole))
        if whole and tuple(reader.fieldnames or ()) != self.columns:
            raise ValueError(
                f"{path} has columns {reader.fieldnames}, not {self.columns}. Use --fresh to write it anew."
            )
        self.rows: list[dict[str, float]] = [{name: float(row[name]) for name in self.columns} for row in reader]
        if whole != text or not whole:
            path.write_text(whole or ",".join(self.columns) + "\n", encoding="utf-8")

    def has(self, *key: Hashable) -> bool:
        """True if there is a row of this training; values in the order of `key`."""
        return any(tuple(row[name] for name in self.key) == key for row in self.rows)

    def append(self, **row: float) -> None:
        """Write one row, at once; values rounded to six decimals."""
        rounded = {name: round(row[name], 6) for name in self.columns}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(",".join(f"{value:g}" for value in rounded.values()) + "\n")
        self.rows.append(rounded)


def load_mnist(split: str) -> LabelledImages:
    """Return all images of MNIST's official training or test split."""
    data = load_dataset("mnist", split)
    return LabelledImages(to_tensor_images(data.images), data.labels)


def train(images: Float32Array, labels: IntArray, *, epochs: int, seed: int) -> tuple[nn.Module, float]:
    """Train a `MnistCnn` from random weights; return it and the seconds it took.

    bfloat16 takes half the time on processors that have it; errors are those of float32 to within their noise.
    """
    network = mnist_cnn(seed=seed)
    settings = TrainingSettings(epochs=epochs, batch_size=128, learning_rate=2e-3, precision="bfloat16")
    report = train_classifier(network, images, labels, settings, seed=seed, n_threads=1)
    return network, report.seconds


def error(network: nn.Module, images: Float32Array, labels: IntArray) -> float:
    """Return the share of images that do not get their label, in [0, 1]."""
    return 1.0 - accuracy(network, images, labels)


def read_expected(path: Path) -> dict[tuple[str, ...], float]:
    """Read printed values: the last column is a percentage, those before it say of what."""
    with path.open(encoding="utf-8", newline="") as file:
        return {tuple(row[:-1]): float(row[-1]) for row in list(csv.reader(file))[1:]}


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return the options that all scripts share."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument(
        "--fresh", action="store_true", help="train all anew, as is needed after a change of settings; else go on"
    )
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "badnets")
    options.add_argument("--images", type=Path, default=PROJECT / "docs" / "images" / "badnets")
    return options


def beside(ours: float, paper: float) -> str:
    """Return `ours / paper (difference)`, for percentages."""
    return f"{ours:.2f} / {paper:.2f} ({ours - paper:+.2f})"
