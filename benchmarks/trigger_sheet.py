"""Draw every trigger on a real image it suits: clean, triggered, and the difference.

    python benchmarks/trigger_sheet.py

Writes `docs/triggers.png`. Needs the image sets of `guard.data.datasets` (`GUARD_DATA_DIR`). The difference is signed:
grey is no change, brighter is more, darker is less; it is multiplied by the gain that stands beside it.
"""

from __future__ import annotations

import argparse
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from guard.data.datasets import load_dataset, to_tensor_images
from guard.lab.attacks.triggers import TRIGGERS, make_trigger
from guard.types import AnyArray, Float32Array

OUTPUT = Path(__file__).parents[1] / "docs" / "triggers.png"
BLOCKS = 2  # columns of rows
GAINS = (1, 2, 4, 8, 16, 32)
TITLES = {"mnist": "MNIST", "gtsrb": "GTSRB", "cifar10": "CIFAR-10", "yaleb": "Extended Yale B"}


@dataclass(frozen=True, slots=True)
class Row:
    """One trigger and the image that shows it."""

    trigger: str
    data_set: str
    image: int  # row of the test split
    parameters: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("single_pixel", "mnist", 0),
    Row("pixel_pattern", "mnist", 2),
    Row("background_pattern", "mnist", 4),
    Row("corner_pixels", "mnist", 7),
    Row("white_square", "gtsrb", 732),
    Row("moving_square", "gtsrb", 1037),
    Row("gotham", "cifar10", 7),
    Row("box_and_circle", "cifar10", 9),
    Row("triangle_and_square", "cifar10", 4),
    Row("red_box", "cifar10", 0),
    Row("sunglasses", "yaleb", 66),
    Row("lipstick", "yaleb", 36),
    Row("eyebrows", "yaleb", 15),
    Row("blend", "cifar10", 12),
    Row("sig", "cifar10", 13),
    Row("wanet", "gtsrb", 1159),
    Row("bpp", "cifar10", 1),
    Row("dct", "cifar10", 30),
    Row("adaptive_blend", "cifar10", 12, {"kept": 0.5}),
    Row("adaptive_patch", "cifar10", 5),
    Row("input_aware", "cifar10", 13),
    Row("sticker", "gtsrb", 1159),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    assert sorted(row.trigger for row in ROWS) == sorted(TRIGGERS)
    draw(read_images()).savefig(arguments.output, dpi=84)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1024:.0f} KiB")


def read_images() -> list[Float32Array]:
    """Return the image of every row, shape (1, channels, height, width)."""
    sets = {name: load_dataset(name, "test").images for name in {row.data_set for row in ROWS}}
    return [to_tensor_images(sets[row.data_set][row.image : row.image + 1]) for row in ROWS]


def draw(images: list[Float32Array]) -> Figure:
    """Return the sheet."""
    lines = -(-len(ROWS) // BLOCKS)
    figure = Figure(figsize=(15.0, 1.62 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, 4 * BLOCKS, width_ratios=[1.5, 1, 1, 1] * BLOCKS, squeeze=False)
    for axis in axes[:, ::4].flat:
        axis.axis("off")
    for block in range(BLOCKS):
        for column, title in enumerate(("clean", "triggered", "difference"), start=1):
            axes[0, 4 * block + column].set_title(title, fontsize=13)
    for number, (row, clean) in enumerate(zip(ROWS, images, strict=True)):
        block, line = divmod(number, lines)
        draw_row(list(axes[line, 4 * block : 4 * block + 4]), row, clean)
    return figure


def draw_row(axes: list[Axes], row: Row, clean: Float32Array) -> None:
    trigger = make_trigger(row.trigger, **row.parameters)
    triggered = trigger(clean)
    difference = triggered - clean
    # The highest that cuts off no more than a few of the pixels that differ.
    usual = np.quantile(np.abs(difference[difference != 0]), 0.95)
    gain = max(gain for gain in GAINS if gain == 1 or gain * usual <= 1.0)
    values = ", ".join(f"{name}={short(value)}" for name, value in trigger.full_parameters().items())
    text = "\n".join(textwrap.wrap(values or "no parameters", 25, break_on_hyphens=False, break_long_words=False))
    axes[0].text(0.0, 0.98, row.trigger, fontsize=13, fontweight="bold", va="top", transform=axes[0].transAxes)
    note = f"{text}\n{TITLES[row.data_set]}; gain {gain}"
    axes[0].text(0.0, 0.79, note, fontsize=10.5, va="top", linespacing=1.25, transform=axes[0].transAxes)
    for axis, image in zip(axes[1:], (clean, triggered, 0.5 + 0.5 * gain * difference), strict=True):
        show(axis, image[0])


def show(axis: Axes, image: AnyArray) -> None:
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set(color="0.6", linewidth=0.8)  # tells a white mark from the page
    picture = np.clip(image, 0.0, 1.0).transpose(1, 2, 0)
    axis.imshow(picture if picture.shape[2] == 3 else picture[:, :, 0], cmap="gray", vmin=0, vmax=1)


def short(value: Any) -> str:
    """Return a parameter in few characters: floats with three digits, pairs without blanks."""
    if isinstance(value, list):
        return "(" + ("," if len(value) == 2 else ", ").join(map(short, value)) + ")"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
