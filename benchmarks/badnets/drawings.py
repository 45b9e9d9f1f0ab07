"""The two pictures: figure 4, a pair of matrices; figure 6, errors against the share of backdoored images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize

from guard.types import Float64Array

_CLEAN, _BACKDOOR = "#1f77b4", "#c4420f"


def draw_pairs(clean: Float64Array, backdoor: Float64Array, baseline: float, path: Path) -> None:
    """Draw both errors of every pair, fractions of shape (10, 10), and write the picture."""
    figure, axes = plt.subplots(1, 2, figsize=(12.6, 5.5), layout="constrained")
    panels = (
        (clean, f"Error on clean images (mean baseline {baseline:.2%})", "Blues"),
        (backdoor, "Error on backdoored images of digit i, against j", "Oranges"),
    )
    for axis, (values, title, colours) in zip(axes, panels, strict=True):
        percent = np.ma.masked_invalid(100 * values)
        low = 0.0 if values is backdoor else float(percent.min())
        scale = Normalize(low, max(float(percent.max()), low + 0.1))
        image = axis.imshow(percent, cmap=plt.get_cmap(colours).with_extremes(bad="#e8e8e8"), norm=scale)
        for row, column in np.argwhere(~np.ma.getmaskarray(percent)):
            value = percent[row, column]
            axis.text(
                column,
                row,
                f"{value:.2f}" if value < 10 else f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=8.5,
                color="white" if scale(value) > 0.6 else "#222222",
            )
        axis.set_xticks(range(10))
        axis.set_yticks(range(10))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.set_xlabel("target digit j")
        axis.set_ylabel("source digit i")
        axis.set_title(title, fontsize=11)
        bar = figure.colorbar(image, ax=axis, label="%", fraction=0.046, pad=0.03)
        bar.outline.set_visible(False)
    _save(figure, path)


def draw_shares(rows: Sequence[Mapping[str, float]], path: Path) -> None:
    """Draw both errors against the share of backdoored images, mean and range over seeds; share 0 is the baseline."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.6, 4.2), layout="constrained")
    _draw_line(left, rows, "clean_error", _CLEAN)
    baseline = [100 * row["clean_error"] for row in rows if row["share"] == 0]
    if baseline:
        left.axhline(np.mean(baseline), color="#555555", linestyle="--", linewidth=1, label="no backdoor (mean)")
    left.set_ylim(bottom=0)
    left.set_title("Error on clean images", fontsize=11)
    _draw_line(right, rows, "backdoor_error", _BACKDOOR)
    right.set_yscale("log")
    right.set_yticks([0.3, 1, 3, 10, 30, 100], ["0.3", "1", "3", "10", "30", "100"])
    right.minorticks_off()
    right.set_title("Error on backdoored images, against y + 1", fontsize=11)
    shares = sorted({row["share"] for row in rows if row["share"] > 0})
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(shares, [f"{100 * share:.2g}" for share in shares])
        axis.minorticks_off()
        axis.set_xlabel("backdoored images in the training set, %")
        axis.set_ylabel("%")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8.5)
    _save(figure, path)


def _draw_line(axis: Axes, rows: Sequence[Mapping[str, float]], quantity: str, colour: str) -> None:
    shares = sorted({row["share"] for row in rows if row["share"] > 0})
    values = [[100 * row[quantity] for row in rows if row["share"] == share] for share in shares]
    axis.fill_between(
        shares,
        [min(selected) for selected in values],
        [max(selected) for selected in values],
        color=colour,
        alpha=0.2,
        linewidth=0,
        label="lowest to highest of the seeds",
    )
    axis.plot(
        shares, [float(np.mean(selected)) for selected in values], "o-", color=colour, markersize=4.5, label="mean"
    )


def _save(figure: plt.Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
