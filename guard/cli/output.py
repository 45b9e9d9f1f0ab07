"""What the command line shows: progress on stderr, tables on stdout, every error in one line."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from guard.errors import GuardError

if TYPE_CHECKING:
    from guard.cli.images import Judged

#: Called with a line of text and the share done, in [0, 1].
Report = Callable[[str, float], None]

console = Console()
errors = Console(stderr=True)

_CELLS = ("label", "final_label", "is_poisoned", "p_value", "score", "action", "reason")
_WIDEST = 10_000  # columns of a table in a pipe or a file: nothing is folded


class OutputFormat(StrEnum):
    """How `guard inspect` prints."""

    table = "table"
    csv = "csv"
    json = "json"


@contextmanager
def progress_bar(title: str, *, share_known: bool = True) -> Iterator[Report]:
    """Show a bar on stderr, if that is a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bar:
        task = bar.add_task(title, total=1.0 if share_known else None)
        yield lambda text, share: bar.update(task, description=text, completed=share)


def say(text: str) -> None:
    """Print one line to stdout as it is: not wrapped, not coloured."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


def tell(text: str) -> None:
    """Print one line to stderr, beside the results."""
    errors.print(text, soft_wrap=True, highlight=False, markup=False)


def print_warning(text: str) -> None:
    """Print one line to stderr that a person should read."""
    errors.print(Text.assemble(("warning: ", "bold yellow"), text), soft_wrap=True)


def print_error(text: str) -> None:
    """Print an error to stderr, in one line."""
    errors.print(Text.assemble(("error: ", "bold red"), " ".join(text.split())), soft_wrap=True)


def one_line(error: BaseException) -> str:
    """Return what is wrong and what to do in one line."""
    text = what_failed(error)
    return (
        text if isinstance(error, GuardError | OSError) else f"{text} `guard --traceback ...` shows where it came from."
    )


def what_failed(error: BaseException) -> str:
    """Return what is wrong in one line; where the user's own code failed, with its file and line."""
    text = " ".join(str(error).split())
    if isinstance(error, GuardError):
        return text
    said = f"{type(error).__name__}{f': {text}' if text else ''}"
    if place := users_place(error):
        return f"your code failed with {said} ({place})."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Check the path, its rights and the disk."
    if isinstance(error, MemoryError):
        return "out of memory. Give fewer or smaller images."
    frames = traceback.extract_tb(error.__traceback__)
    return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})." if frames else f"{said}."


def users_place(error: BaseException) -> str:
    """Return file, line and function of the user's own code that an error came through last; empty if none."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}, in {own[-1].name}" if own else ""


def _is_users(filename: str) -> bool:
    path = Path(filename)
    places = (Path(__file__).parent, *map(Path, {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}))
    is_ours = any(path.is_relative_to(place) for place in places) or {"site-packages", "dist-packages"} & {*path.parts}
    return not is_ours and not filename.startswith("<") and path.name != "guard"


def print_table(table: Table) -> None:
    """Print a table: folded to fit a terminal, in full width anywhere else."""
    if console.is_terminal:
        console.print(table)
    else:
        write(_in_full_width(table))


def _in_full_width(table: Table) -> str:
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDEST).print(table)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


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
    return _in_full_width(verdict_table(judged, class_names))


def _row(item: Judged) -> dict[str, Any]:
    verdict = item.verdict
    if verdict is None:
        empty = dict.fromkeys(_CELLS, None) | {"reason": item.error}
        return {"image": item.name, "verdict": "failed", **empty, "detector_scores": {}}
    cells = {key: _finite(getattr(verdict, key)) for key in _CELLS}
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


def plain_table(*headings: str) -> Table:
    """Return an empty table without a frame, so that a line can be copied."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("verdict", "p-value"))
    return table


def write(text: str) -> None:
    """Write text to stdout untouched."""
    sys.stdout.write(text)
