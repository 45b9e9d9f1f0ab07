"""One picture per table: the printed value and ours, side by side, for every case."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from common import CASES, PER_TRIGGER, Panel, Row, Table
from matplotlib.axes import Axes
from studies import USUAL_RATE

#: What is drawn for a mode: words, marker, colour, and how far from the middle.
STYLES: dict[str, tuple[str, str, str, float]] = {
    "printed": ("printed in the paper", "o", "#222222", -0.24),
    "unguarded": ("ours, without a guard", "s", "#1f77b4", 0.02),
    "rtll": ("ours, last layer retrained", "s", "#1f77b4", 0.02),
    "paper": ("ours, published rule", "s", "#1f77b4", 0.02),
    "calibrated": ("ours, calibrated, same clean loss", "D", "#e06c00", 0.22),
    "calibrated_usual": (f"ours, calibrated at {100 * USUAL_RATE:g} %", "^", "#b0308f", 0.36),
}


def draw(table: Table, rows: Sequence[Row], path: Path) -> None:
    """Draw all panels of a table and write the picture."""
    height, width = len(table.panels), max(len(line) for line in table.panels)
    places = max(len(_places(table, panel)) for line in table.panels for panel in line)
    size = (max(4.6, 0.9 + places * 0.36) * width, 2.7 * height + 0.9)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    used: dict[str, object] = {}
    for line, drawn in zip(table.panels, axes, strict=True):
        for panel, axis in zip(line, drawn, strict=False):
            used |= _draw_panel(axis, table, panel, rows)
        for axis in drawn[len(line) :]:
            axis.set_visible(False)
    known = [words for words, *_ in STYLES.values()]
    words = sorted(used, key=known.index)
    figure.suptitle(table.title, fontsize=11)
    figure.legend([used[word] for word in words], words, loc="outside lower center", ncols=len(words), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _places(table: Table, panel: Panel) -> list[tuple[str, str, str]]:
    """Return what stands along the axis: label, case, end of the quantity."""
    places = []
    for name in table.cases:
        triggers = CASES[name].triggers if panel.quantity.endswith(PER_TRIGGER) else ()
        places += [(f"{name} {trigger}", name, f"_{trigger}") for trigger in triggers] or [(name, name, "")]
    return places


def _draw_panel(axis: Axes, table: Table, panel: Panel, rows: Sequence[Row]) -> dict[str, object]:
    by_key = {(row.case, row.mode, row.quantity): row for row in rows}
    modes = [
        mode for mode in STYLES if any(row.mode == mode and row.quantity.startswith(panel.quantity) for row in rows)
    ]
    used: dict[str, object] = {}
    lowest = 100.0
    places = _places(table, panel)
    for place, (_, case, ending) in enumerate(places):
        printed = None
        for mode in modes:
            row = by_key.get((case, mode, panel.quantity + ending))
            if row is None:
                continue
            printed = row.paper if printed is None else printed
            if row.ours is not None:
                words, marker, colour, shift = STYLES[mode]
                used[words] = axis.plot(place + shift, row.ours, marker, color=colour, markersize=5.5, clip_on=False)[0]
                lowest = min(lowest, row.ours)
                worst = by_key.get((case, mode, f"{panel.quantity}{ending}_worst_seed"))
                if worst is not None and worst.ours is not None:
                    axis.plot([place + shift] * 2, [row.ours, worst.ours], color=colour, linewidth=1.2)
                    lowest = min(lowest, worst.ours)
        if printed is not None:
            words, marker, colour, shift = STYLES["printed"]
            used[words] = axis.plot(
                place + shift, printed, marker, color=colour, markerfacecolor="white", markersize=6, clip_on=False
            )[0]
            lowest = min(lowest, printed)
    bottom = 0.0 if lowest < 50 else 10.0 * (lowest // 10)
    axis.set_ylim(bottom, 100)
    axis.set_xlim(-0.6, len(places) - 0.4)
    turned = any(len(label) > 2 for label, _, _ in places) and len(places) > 3
    axis.set_xticks(
        range(len(places)),
        [label for label, _, _ in places],
        rotation=60 if turned else 0,
        ha="right" if turned else "center",
    )
    if turned:
        for tick in axis.get_xticklabels():
            tick.set_rotation_mode("anchor")
    axis.set_title(panel.title, fontsize=10)
    axis.set_ylabel("%")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return used
