"""Images that were judged, and how that is told: as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from guard.cli.images import NamedImages
from guard.cli.output import OutputFormat, Report, in_full_width, plain_table, what_failed
from guard.cli.reading import Convert, converted, each, parts

if TYPE_CHECKING:
    from guard.detection.pipeline import Guard
    from guard.types import Verdict

_CELLS = ("label", "final_label", "is_poisoned", "p_value", "score", "action", "reason")


@dataclass(frozen=True, slots=True)
class Judged:
    """One image's verdict, or why there is none."""

    name: str
    verdict: Verdict | None
    error: str = ""


def judge(guard: Guard, images: NamedImages, convert: Convert, report: Report) -> list[Judged]:
    """Judge every image; one that cannot be read or scored is told as such, and spoils no other."""
    judged: list[Judged] = []
    for part in parts(len(images.names)):
        verdicts = each(lambda some: guard.inspect(converted(images, convert, some)), part)
        for index, verdict in zip(part, verdicts, strict=True):
            failed = isinstance(verdict, Exception)
            name = images.names[index]
            judged.append(Judged(name, None, what_failed(verdict)) if failed else Judged(name, verdict))  # type: ignore[arg-type]
        report(f"inspecting: {len(judged)} of {len(images.names)} images", len(judged) / len(images.names))
    return judged


def formatted(judged: Sequence[Judged], output_format: OutputFormat, class_names: Sequence[str] | None = None) -> str:
    """Return the verdicts as text, one entry per image in order; an image without a verdict says why."""
    rows = [_row(item) for item in judged]
    if output_format is OutputFormat.json:
        return json.dumps(rows, indent=2, allow_nan=False) + "\n"
    if output_format is OutputFormat.csv:
        columns = list(dict.fromkeys(key for row in rows for key in row if key != "detector_scores"))
        detectors = next((list(row["detector_scores"]) for row in rows if row["detector_scores"]), [])
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow([*columns, *(f"score:{name}" for name in detectors)])
        for row in rows:
            scores = [row["detector_scores"].get(name) for name in detectors]
            writer.writerow([*(row[column] for column in columns), *scores])
        return buffer.getvalue()
    return in_full_width(verdict_table(judged, class_names))


def _row(item: Judged) -> dict[str, Any]:
    verdict = item.verdict
    if verdict is None:
        empty = dict.fromkeys(_CELLS, None) | {"reason": item.error}
        return {"image": item.name, "verdict": "failed", **empty, "detector_scores": {}}
    cells = {key: _finite(getattr(verdict, key)) for key in _CELLS}
    if not verdict.is_poisoned:
        cells["action"] = "none"  # as the header Guard-Action says
    scores = {name: _finite(score) for name, score in verdict.detector_scores.items()}
    return {"image": item.name, "verdict": _word(item), **cells, "detector_scores": scores}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def _word(item: Judged) -> str:
    if item.verdict is None:
        return "failed"
    return "poisoned" if item.verdict.is_poisoned else "clean"


def verdict_table(judged: Sequence[Judged], class_names: Sequence[str] | None = None) -> Table:
    """Return one line per image for people; the reason only where there is one to read."""
    styles = {"poisoned": "bold red", "failed": "bold yellow", "clean": ""}
    table = plain_table("image", "label", "verdict", "p-value", "reason")
    for item in judged:
        word, verdict = _word(item), item.verdict
        if verdict is None:
            label = p_value = ""
        else:
            label = f"{verdict.label} {class_names[verdict.label]}" if class_names else str(verdict.label)
            p_value = f"{verdict.p_value:.4f}"
        reason = item.error if verdict is None else verdict.reason if verdict.is_poisoned else ""
        table.add_row(Text(item.name), Text(label), Text(word, styles[word]), p_value, Text(reason))
    return table
