"""Draw the scores of the networks that the guard tells worst: where triggered inputs lie among clean ones, and why.

    python benchmarks/score_plots.py [MODEL ...]

Needs the zoo's images (`GUARD_DATA_DIR`). A guard in its default mode is fitted on the clean validation images of each
model and asked about up to 2,000 clean and 1,000 triggered test images. A row of the picture is one model: first the
combined score, then the mean surprise over the depths of each kind of detector. Clean images that the network gets
wrong, and triggered ones that miss the target, have lines of their own; the dotted line is the threshold that 1 % of
these clean images pass. Writes `docs/images/hard_cases.png`. About a minute per model on one core.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch
sys.path.insert(0, str(Path(__file__).resolve().parent / "leaderboard"))

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure
from measuring import CLEAN, TRIGGERED, load_subject

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.types import BoolArray, Float64Array

mpl.use("Agg")
PROJECT = Path(__file__).resolve().parent.parent
PICTURE = PROJECT / "docs" / "images" / "hard_cases.png"
#: Named in the issue of the detector, or worst in `benchmarks/results/ablation.csv`.
MODELS = (
    *("gtsrb-wanet-gtsrb_cnn-0", "gtsrb-adap-blend-gtsrb_cnn-0", "gtsrb-e-gtsrb_cnn_unpadded-0", "yaleb-i-deepid-0"),
    *("yaleb-k-deepid-0", "gtsrb-blend-vit_tiny-0", "cifar100_30-blend-resnet20-0", "cifar10-wanet-resnet20-0"),
)
RATE, BINS = 0.01, 60
COLOURS = {
    "clean, right": "#4477aa",
    "clean, wrong": "#66ccee",
    "triggered, hits": "#ee6677",
    "triggered, misses": "#aa3377",
}


def scores_of(zoo: Zoo, name: str) -> tuple[dict[str, Float64Array], dict[str, BoolArray]]:
    """Return columns of scores by title, and which rows each line of a panel is drawn from."""
    subject = load_subject(zoo, name, CLEAN, TRIGGERED)
    guard = Guard.fit(subject.suspect, subject.fit_images, subject.fit_labels, GuardConfig(false_positive_rate=RATE))
    found = [subject.suspect.activations(images) for images in (subject.clean, subject.triggered)]
    scores = [guard.scores(activations) for activations in found]
    n_clean = len(subject.clean)
    is_clean = np.arange(n_clean + len(subject.triggered)) < n_clean
    agrees = np.concatenate(
        [found[0].predicted_labels == subject.clean_labels, found[1].predicted_labels == subject.attacker_labels]
    )
    surprise = np.concatenate([part.surprise for part in scores])
    kinds = [name.partition(":")[0] for name in guard.ensemble.names]
    columns = {"combined": np.concatenate([part.combined for part in scores])}
    for kind in dict.fromkeys(kinds):
        columns[kind] = np.log1p(surprise[:, [each == kind for each in kinds]].mean(axis=1))
    rows = (is_clean & agrees, is_clean & ~agrees, ~is_clean & agrees, ~is_clean & ~agrees)
    return columns, dict(zip(COLOURS, rows, strict=True))


def draw(models: list[str], path: Path) -> None:
    """Draw one row per model."""
    zoo = Zoo(default_zoo_dir())
    figure = Figure(figsize=(15, 2.1 * len(models)), layout="constrained")
    axes = figure.subplots(len(models), 5, squeeze=False)
    for row, name in enumerate(models):
        print(f"{name}, seed 0", flush=True)
        columns, groups = scores_of(zoo, name)
        is_clean = groups["clean, right"] | groups["clean, wrong"]
        for panel, (title, values) in zip(axes[row], columns.items(), strict=True):
            threshold = np.quantile(values[is_clean], 1 - RATE, method="higher")
            caught = float((values[~is_clean] > threshold).mean())
            edges = np.linspace(values.min(), np.quantile(values, 0.999), BINS)
            for label, rows in groups.items():
                if rows.any():
                    weights = np.full(int(rows.sum()), 1 / rows.sum())
                    panel.hist(values[rows], edges, weights=weights, histtype="step", color=COLOURS[label], label=label)
            panel.axvline(threshold, color="black", linestyle=":", linewidth=1)
            panel.set_yscale("log")
            shown = title if title == "combined" else f"{title}, log(1 + surprise)"
            panel.set_title(f"{shown}: {100 * caught:.1f} % caught", fontsize=8)
            panel.tick_params(labelsize=7)
        axes[row][0].set_ylabel(name.removesuffix("-0"), fontsize=7)
    axes[0][0].legend(fontsize=6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), help="models of the zoo")
    parser.add_argument("--output", type=Path, default=PICTURE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw(options.models, options.output)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
