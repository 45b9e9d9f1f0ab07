"""The picture of a purified twin: what it cost, class by class, and where the cut was made."""

from __future__ import annotations

from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from guard.backups.purified_twin import PurifyReport

_BEFORE, _AFTER, _INK, _FAINT = "#9ecae1", "#08519c", "#222222", "#767676"
_ROW_INCHES, _REST_INCHES, _MOST_INCHES = 0.26, 2.2, 30.0


def draw(report: PurifyReport, class_names: list[str] | None, file: IO[bytes]) -> None:
    """Save one pair of bars per class, before and after, and the curve of the method where it has one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_classes = len(report.per_class_before)
    height = min(_ROW_INCHES * n_classes + _REST_INCHES, _MOST_INCHES)
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    columns = 2 if report.curve else 1
    axes = figure.subplots(1, columns, squeeze=False)[0]
    _bars(axes[0], report, class_names or [str(label) for label in range(n_classes)])
    if report.curve:
        _curve(axes[1], report)
    figure.suptitle(
        f"Purified by {report.method}: clean accuracy {100 * report.clean_accuracy_before:.1f} % before, "
        f"{100 * report.clean_accuracy_after:.1f} % after",
        fontsize=12,
        color=_INK,
        x=0.01,
        ha="left",
    )
    figure.supxlabel(
        f"{report.pruned} of {report.units} units pruned; learned from {report.images} clean images, measured on "
        f"{report.held_out} others.\nWhether a backdoor is gone only triggered images could tell.",
        fontsize=8,
        color=_FAINT,
        x=0.01,
        ha="left",
    )
    figure.savefig(file, dpi=110)


def _bars(axis: Any, report: PurifyReport, names: list[str]) -> None:
    places = np.arange(len(names))
    axis.barh(places - 0.2, report.per_class_before, height=0.38, color=_BEFORE, label="before")
    axis.barh(places + 0.2, report.per_class_after, height=0.38, color=_AFTER, label="after")
    axis.set_yticks(places, names, fontsize=8)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_xlim(0, 1)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"], fontsize=8)
    axis.set_title("right answers to clean images, by class", fontsize=9, color=_FAINT, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2)
    _plain(axis)


def _curve(axis: Any, report: PurifyReport) -> None:
    at = [point.at for point in report.curve]
    for number, name in enumerate(report.curve[0].measured):
        values = [point.measured[name] for point in report.curve]
        axis.plot(at, values, color=_AFTER if name == "clean_accuracy" else f"C{number}", label=name.replace("_", " "))
    axis.set_ylim(0, 1.02)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"], fontsize=8)
    x_label = "threshold of the masks" if report.method == "anp" else "share of units pruned, before fine-tuning"
    axis.set_title(f"against the {x_label}", fontsize=9, color=_FAINT, loc="left")
    axis.legend(fontsize=8, frameon=False, loc="lower left")
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.tick_params(length=0, colors=_INK, labelsize=8)
    axis.grid(color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
