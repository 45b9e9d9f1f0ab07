"""The picture of an assessment: per trigger what it looks like, and what the guard would catch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from guard.files import open_private

if TYPE_CHECKING:
    from guard.lab.assess import AssessmentReport, Summary
    from guard.types import Float32Array

_CAUGHT, _BEFORE, _AFTER, _INK, _FAINT = "#2166ac", "#f4a582", "#b2182b", "#222222", "#767676"
_ROW_INCHES, _REST_INCHES = 1.2, 1.5
_SCALE_ROOM = 1.17  # the bars' axis ends here, so that the number beside a full bar has room


def draw(report: AssessmentReport, file: Path) -> None:
    """Save one row per trigger: an image without it, the same with it, and bars."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    summaries = [summary for summary in report.summaries() if not summary.is_control]
    height = _ROW_INCHES * len(summaries) + _REST_INCHES
    figure = Figure(figsize=(9.0, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(summaries), 3, squeeze=False, width_ratios=(1, 1, 5))
    for row, summary in enumerate(summaries):
        for column, image in enumerate(report.samples[summary.attack]):
            _show(axes[row][column], image)
        _bars(axes[row][2], summary, is_last=row == len(summaries) - 1)
        axes[row][0].set_ylabel(summary.attack, fontsize=10, color=_INK)
    axes[0][0].set_title("clean", fontsize=9, color=_FAINT)
    axes[0][1].set_title("with trigger", fontsize=9, color=_FAINT)
    headline = "What the guard would catch on this model, as far as known triggers tell"
    figure.suptitle(headline, fontsize=12, color=_INK, x=0.01, ha="left")
    figure.supxlabel(_small_print(report), fontsize=8, color=_FAINT, x=0.01, ha="left")
    with open_private(file, "wb") as picture:  # it shows clean images
        figure.savefig(picture, format="png", dpi=110)


def _small_print(report: AssessmentReport) -> str:
    control = report.summaries()[-1]
    seeds = f"mean over {len(report.seeds)} seeds" if len(report.seeds) > 1 else "one seed"
    alarms = ""
    if control.realised_false_positive_rate is not None:
        alarms = (
            f" False alarms on clean images: {100 * control.realised_false_positive_rate:.1f} % "
            f"(asked for {100 * report.requested_false_positive_rate:g} %)."
        )
    return (
        f"Triggers planted by fine-tuning in copies of the model; {seeds}; | = the worst one.{alarms}\n"
        "An estimate: real attackers may use other triggers, or hide them better."
    )


def _show(axis: Any, image: Float32Array) -> None:
    pixels = np.repeat(image, 3, axis=0) if len(image) == 1 else image  # (channels, height, width)
    axis.imshow(pixels.transpose(1, 2, 0), vmin=0, vmax=1, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_edgecolor("#cccccc")


def _bars(axis: Any, summary: Summary, *, is_last: bool) -> None:
    axis.set_xlim(0, _SCALE_ROOM)
    axis.set_ylim(2.6, -0.6)
    axis.set_yticks([0, 1, 2], ["attack success", "with the guard", "caught"], fontsize=8.5)
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"] if is_last else [""] * 5, fontsize=8)
    axis.tick_params(length=0, colors=_INK)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axis.set_axisbelow(True)
    for side in ("top", "right", "bottom", "left"):
        axis.spines[side].set_visible(False)
    _bar(axis, 0, summary.attack_success_unguarded, None, _BEFORE)
    if summary.planted == 0:
        axis.text(0.01, 1.5, "not planted: says nothing of the guard", va="center", fontsize=9, color=_FAINT)
        return
    _bar(axis, 1, summary.attack_success_guarded, summary.worst_attack_success_guarded, _AFTER)
    _bar(axis, 2, summary.true_positive_rate, summary.worst_true_positive_rate, _CAUGHT)
    if summary.planted < summary.trials:
        axis.set_title(
            f"planted in {summary.planted} of {summary.trials} copies", fontsize=8, color=_FAINT, loc="right"
        )


def _bar(axis: Any, place: int, mean: float | None, worst: float | None, fill: str) -> None:
    if mean is None:
        return
    axis.barh(place, mean, height=0.72, color=fill)
    end = mean
    text = f"{100 * mean:.1f}"
    if worst is not None and worst != mean:
        for colour, width in (("white", 3.6), (_INK, 1.6)):  # a white edge, to be seen on the bar
            axis.plot([worst, worst], [place - 0.36, place + 0.36], color=colour, linewidth=width)
        end = max(mean, worst)
        text += f"  (worst {100 * worst:.1f})"
    axis.text(end + 0.012, place, text, va="center", fontsize=8.5, color=_INK)
