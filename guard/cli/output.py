"""What the command line shows: progress on stderr, tables on stdout, every error in one line."""

from __future__ import annotations

import io
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from guard.errors import GuardError
from guard.users_code import users_place

#: Called with a line of text and the share done, in [0, 1].
Report = Callable[[str, float], None]

console = Console()
errors = Console(stderr=True)

#: Between two lines of progress where stderr is no terminal; what is done sooner prints none.
_SECONDS_BETWEEN_LINES = 5.0
_WIDEST = 10_000  # columns of a table in a pipe or a file: nothing is folded


class OutputFormat(StrEnum):
    """How `guard inspect` prints."""

    table = "table"
    csv = "csv"
    json = "json"


@contextmanager
def progress_bar(title: str, *, share_known: bool = True) -> Iterator[Report]:
    """Show a bar on stderr; where that is no terminal, a line every few seconds in which the text has changed."""
    if not errors.is_terminal:
        with _progress_lines(title) as report:
            yield report
        return
    left = (TextColumn("left:"), TimeRemainingColumn()) if share_known else ()
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn(), *left)
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=1.0 if share_known else None)
        yield lambda text, share: bar.update(task, description=text, completed=share)


@contextmanager
def _progress_lines(title: str) -> Iterator[Report]:
    latest, done = title, threading.Event()

    def report(text: str, share: float) -> None:
        nonlocal latest
        latest = f"{text} ({share:.0%})"

    def print_lines() -> None:
        printed = ""
        while not done.wait(_SECONDS_BETWEEN_LINES):
            if (line := latest) != printed:
                tell(line)
                printed = line

    printing = threading.Thread(target=print_lines, name="progress", daemon=True)
    printing.start()
    try:
        yield report
    finally:
        done.set()
        printing.join()


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
    if users_place(error):
        return f"{text} `guard --traceback ...` shows where it came from."
    if isinstance(error, GuardError | OSError | MemoryError):
        return text
    return f"backdoor-guard itself failed: {text} Report it, with what `guard --traceback ...` shows."


def what_failed(error: BaseException) -> str:
    """Return what is wrong in one line; where the user's own code failed, with its file and line."""
    text = " ".join(str(error).split())
    if isinstance(error, GuardError):
        return text
    text = re.sub(r" at 0x[0-9a-f]+", "", text)  # where an object lies in memory says nothing
    name = f"{type(error).__name__}{f': {text}' if text else ''}"
    if place := users_place(error):
        return f"your code failed with {name} ({place})."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}. Check the path, its rights and the disk."
    if isinstance(error, OSError) and error.strerror:
        return f"the system refused: {error.strerror}. Check the disk, the network and the rights."
    if isinstance(error, MemoryError):
        return "out of memory. Give fewer or smaller images."
    frames = traceback.extract_tb(error.__traceback__)
    return f"{name} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})." if frames else f"{name}."


def print_table(table: Table) -> None:
    """Print a table: folded to fit a terminal, in full width anywhere else."""
    if console.is_terminal:
        console.print(table)
    else:
        write(in_full_width(table))


def in_full_width(table: Table) -> str:
    """Return a table as text that no terminal has folded."""
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDEST).print(table)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


def plain_table(*headings: str) -> Table:
    """Return an empty table without a frame, so that a line can be copied."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for heading in headings:
        table.add_column(heading, overflow="fold", no_wrap=heading in ("verdict", "p-value"))
    return table


def write(text: str) -> None:
    """Write text to stdout untouched."""
    sys.stdout.write(text)
