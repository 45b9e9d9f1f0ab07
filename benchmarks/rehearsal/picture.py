"""The timeline of a rehearsal as a picture: what was sent, what the guard said, which alerts fired."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rules import Firing
from traffic import Span

from guard.observing.client_log import read_client_log
from guard.observing.scrape import Prometheus

_COLOURS = {
    "clean": "#4d8fd1",
    "poisoned": "#c0392b",
    "bypassed": "#e08214",
    "failed": "#7b3294",
    "rejected": "#b39ddb",
}
_SHADES = {
    "attack": "#f6d5d0",
    "bypass": "#fbe3c6",
    "failures": "#e6d8ef",
    "page killed": "#dddddd",
    "drift": "#d8ecd8",
}


def draw(
    prometheus: Prometheus,
    spans: Sequence[Span],
    found: Sequence[Firing],
    start: float,
    end: float,
    log: Path,
    file: Path,
) -> None:
    """Draw what clients noted and Prometheus has seen between two moments (seconds since 1970)."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    verdicts, shares, drift, alerts = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 2, 3])
    sent = [entry for entry in read_client_log(log) if start <= entry.time.timestamp() < end]
    seconds = np.arange(0, np.ceil(end - start) + 1)
    order = [name for name in _COLOURS if any(entry.kind == name for entry in sent)]
    counts = [
        np.histogram([entry.time.timestamp() - start for entry in sent if entry.kind == name], seconds)[0]
        for name in order
    ]
    verdicts.stackplot(seconds[:-1] + 0.5, counts, labels=order, colors=[_COLOURS[name] for name in order], linewidth=0)
    verdicts.set_ylabel("requests per second\nby verdict")
    verdicts.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    for axis, expression, label in (
        (shares, "100 * guard:flagged:ratio_rate5m", "flagged, %"),
        (drift, "guard_clean_drift", "clean drift\n(1 = as calibrated)"),
    ):
        for points in prometheus.over(expression, start, end, 0.5).values():
            axis.plot([time - start for time, _ in points], [value for _, value in points], color="#333333", lw=1.3)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
    drift.axhline(1.5, color="#c0392b", lw=0.8, ls=":")
    names = list(dict.fromkeys(entry.alert for entry in found))
    for entry in found:
        alerts.barh(
            names.index(entry.alert), entry.end - entry.start, left=entry.start - start, color="#c0392b", height=0.6
        )
    alerts.set_yticks(range(len(names)), [name.removeprefix("Guard") for name in names])
    alerts.invert_yaxis()
    alerts.set_ylabel("alerts firing")
    alerts.set_xlabel("seconds; windows of the shipped rules are divided by 60")
    for axis in (verdicts, shares, drift, alerts):
        axis.spines[["top", "right"]].set_visible(False)
        for span in spans:
            if span.phase.name in _SHADES:
                axis.axvspan(span.start - start, span.end - start, color=_SHADES[span.phase.name], zorder=0, lw=0)
    for span in spans:
        if span.phase.name in _SHADES:
            middle = (span.start + span.end) / 2 - start
            verdicts.annotate(
                span.phase.name, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9
            )
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)
