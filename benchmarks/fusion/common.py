"""What all tables share: cases, printed values, rows, and the way from records to a table, a CSV file and a picture."""

from __future__ import annotations

import argparse
import csv
import functools
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

from studies import Record, Records, Request

from guard.lab.zoo.collection import default_zoo_dir

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent.parent

#: Rates that are lists, one value per trigger.
PER_TRIGGER = ("false_negative", "attack_success", "false_acceptance")
#: Rates of which a low value is good; "worst seed" is the highest then.
LOW_IS_GOOD = (*PER_TRIGGER, "false_positive")


@dataclass(frozen=True, slots=True)
class Case:
    """A case of the paper, and the zoo models that stand for it.

    Attributes
    ----------
    name : str
    models : tuple of str
        One per seed; a table gives their mean, and the worst.
    triggers : tuple of str
        Names in the order of the paper; empty if there is one trigger only.
    """

    name: str
    models: tuple[str, ...]
    triggers: tuple[str, ...] = ()


_FACE_TRIGGERS = ("lipstick", "eyebrows", "sunglasses")
CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case("a", tuple(f"mnist-a-mnist_cnn-{seed}" for seed in range(3))),
        Case("b", tuple(f"mnist-b-mnist_small-{seed}" for seed in range(3))),
        Case("c", ("gtsrb-c-gtsrb_cnn-0",)),
        Case("d", ("gtsrb-d-gtsrb_cnn_unpadded-0",)),
        Case("e", ("gtsrb-e-gtsrb_cnn_unpadded-0",)),
        Case("f", ("cifar10-f-resnet20-0",)),
        Case("g", ("cifar10-g-resnet20-0",)),
        Case("h", ("yaleb-h-deepid-0",)),
        Case("i", ("yaleb-i-deepid-0",)),
        Case("j", ("yaleb-j-deepid-0",), _FACE_TRIGGERS),
        Case("k", ("yaleb-k-deepid-0",), _FACE_TRIGGERS),
        Case("imperceptible", ("cifar10-imperceptible-resnet20-0",)),
        Case("red-box", ("cifar100-red-box-resnet20-0",)),
    )
}
LETTERED = tuple("abcdefghijk")


#: Modes of a guard, as tables print them.
MODES = {"paper": "published rule", "calibrated": "calibrated"}


class Row(NamedTuple):
    """One line of a tidy table; `ours` and `paper` in percent (counts where the quantity is one), None if unknown."""

    case: str
    mode: str
    quantity: str
    ours: float | None
    paper: float | None

    @property
    def difference(self) -> float | None:
        """Ours less theirs, in percentage points."""
        return None if self.ours is None or self.paper is None else round(self.ours - self.paper, 2)


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table.

    Attributes
    ----------
    quantity : str
        `<condition>_<measure>`, as in the file of printed values.
    mode : str
        Who decides: `paper`, `calibrated`, `unguarded`, `rtll`, or another work of which we have printed values only.
    title : str
        For people.
    request : Request or None
        Which record holds our value; None if we have none.
    source : tuple of str
        Group and rate in the record.
    backup : str
        Kind of backup in `benchmarks/results/backups.csv` whose rate `source[1]` is our value instead; "" = none.
    """

    quantity: str
    mode: str
    title: str
    request: Request | None = None
    source: tuple[str, str] = ("", "")
    backup: str = ""

    @property
    def is_per_trigger(self) -> bool:
        """True if there is one value per trigger."""
        return self.quantity.endswith(PER_TRIGGER)

    @property
    def is_count(self) -> bool:
        """True if the value is a number of things, no rate."""
        return self.quantity.endswith(("inputs", "rounds"))


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of a picture: a quantity, drawn for every case."""

    title: str
    quantity: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the paper, ready to be measured.

    Attributes
    ----------
    name : str
        Of the files, such as `table_2`.
    title : str
    cases : tuple of str
        Keys of `CASES`.
    columns : tuple of Column
    panels : tuple of tuple of Panel
        Rows of the picture.
    notes : tuple of str
        Printed below the table.
    """

    name: str
    title: str
    cases: tuple[str, ...]
    columns: tuple[Column, ...]
    panels: tuple[tuple[Panel, ...], ...]
    notes: tuple[str, ...] = ()

    def wanted(self) -> dict[str, list[Request]]:
        """Return which records are needed, by model."""
        requests = list(dict.fromkeys(column.request for column in self.columns if column.request is not None))
        return {model: requests for case in self.cases for model in CASES[case].models}

    def expected(self) -> dict[tuple[str, str], float | None]:
        """Return the printed values by case and quantity; None where the text has lost the number."""
        return read_expected(HERE / f"{self.name}.expected.csv")


def both_guards(condition: str, title: str, request: Request, measures: Mapping[str, str]) -> tuple[Column, ...]:
    """Return the columns of both modes; `measures` gives the title of each rate."""
    return tuple(
        Column(f"{condition}_{measure}", mode, f"{title}{words}, {in_words}", request, (mode, measure))
        for mode, in_words in MODES.items()
        for measure, words in measures.items()
    )


def percent(fraction: float) -> float:
    """Return a rate in percent, two decimals."""
    return round(100.0 * fraction, 2)


def read_expected(path: Path) -> dict[tuple[str, str], float | None]:
    """Read a file of printed values: case, quantity, paper.

    Raises
    ------
    ValueError
        If a case is unknown, a row is there twice, or a value is no percentage.
    """
    values: dict[tuple[str, str], float | None] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            key = row["case"], row["quantity"]
            value = float(row["paper"]) if row["paper"] else None
            if key[0] not in CASES or key in values or (value is not None and not 0 <= value <= 100):
                raise ValueError(f"{path.name}: {row} must be a known case, be there once, and hold a percentage.")
            values[key] = value
    return values


def rows_of(table: Table, records: Records) -> list[Row]:
    """Return the rows of a table, printed values beside ours; a model that the zoo lacks has a row `missing`."""
    expected = table.expected()
    rows: list[Row] = []
    for name in table.cases:
        case = CASES[name]
        found = [model for model in case.models if records.has(model)]
        rows += [Row(name, "missing", model, None, None) for model in case.models if model not in found]
        for column in table.columns:
            measured = [records.get(model, column.request) for model in found]
            if column.backup:
                measured = [backup_record(model, column, case) for model in found]
            rows += _rows_of_column(case, column, measured, expected)
    return rows


def backup_record(model: str, column: Column, case: Case) -> Record | None:
    """Return what `benchmarks/backups.py` has measured of a backup, as a record; None if it has not yet.

    It pools the triggers of a model, so it has no value per trigger.
    """
    row = _backups().get((model, column.backup))
    if row is None or (column.is_per_trigger and case.triggers):
        return None
    return {column.source[0]: {column.source[1]: float(row[column.source[1]])}}


@functools.cache
def _backups() -> dict[tuple[str, str], dict[str, str]]:
    file = PROJECT / "benchmarks" / "results" / "backups.csv"
    with file.open(encoding="utf-8", newline="") as opened:
        return {(row["model"], row["backup"]): row for row in csv.DictReader(opened)}


def _rows_of_column(
    case: Case, column: Column, records: Sequence[Record | None], expected: Mapping[tuple[str, str], float | None]
) -> list[Row]:
    group, rate = column.source
    triggers: tuple[str | None, ...] = case.triggers if column.is_per_trigger and case.triggers else (None,)
    rows = []
    for number, trigger in enumerate(triggers):
        quantity = column.quantity if trigger is None else f"{column.quantity}_{trigger}"
        values = [record[group][rate] for record in records if record is not None]
        values = [value[number] if isinstance(value, list) else value for value in values]
        printed = expected.get((case.name, quantity))
        if column.request is None and not column.backup and printed is None:
            continue
        shown = [float(value) if column.is_count else percent(value) for value in values]
        rows.append(Row(case.name, column.mode, quantity, round(statistics.mean(shown), 2) if shown else None, printed))
        if len(case.models) > 1 and len(shown) > 1:
            worst = max(shown) if column.quantity.endswith(LOW_IS_GOOD) else min(shown)
            rows.append(Row(case.name, column.mode, f"{quantity}_worst_seed", worst, None))
    return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write the tidy CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(["" if value is None else value for value in row] for row in rows)


def read_rows(path: Path) -> list[Row]:
    """Read a file that `write_rows` wrote."""
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Row(row["case"], row["mode"], row["quantity"], *(_number(row[key]) for key in ("ours", "paper")))
            for row in csv.DictReader(file)
        ]


def _number(text: str) -> float | None:
    return float(text) if text else None


def line_labels(case: Case) -> dict[str, str]:
    """Return the lines of a case in a table, and the end of the quantities that stand there."""
    if case.triggers:
        return {f"{case.name}, {trigger}": f"_{trigger}" for trigger in case.triggers}
    lines = {case.name: ""}
    if len(case.models) > 1:
        lines[f"{case.name}, worst seed"] = "_worst_seed"
    return lines


def as_markdown(table: Table, rows: Sequence[Row]) -> str:
    """Return a table with a line per case and `ours / paper (difference)` in every cell."""
    by_key = {(row.case, row.mode, row.quantity): row for row in rows}
    shown = [column for column in table.columns if any(row.mode == column.mode for row in rows)]
    grid = [["case", *(column.title for column in shown)]]
    for name in table.cases:
        for number, (label, ending) in enumerate(line_labels(CASES[name]).items()):
            line = [label]
            for column in shown:
                for_all_triggers = bool(CASES[name].triggers) and not column.is_per_trigger
                wanted = column.quantity if for_all_triggers else column.quantity + ending
                row = by_key.get((name, column.mode, wanted))
                line.append("" if row is None or (for_all_triggers and number) else _cell(row))
            grid.append(line)
    widths = [max(len(line[place]) for line in grid) for place in range(len(grid[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in grid
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    missing = [row.quantity for row in rows if row.mode == "missing"]
    if missing:
        lines += ["", f"Missing in the zoo, so not measured: {', '.join(missing)}."]
    return "\n".join(lines)


def _cell(row: Row) -> str:
    ours = "–" if row.ours is None else f"{row.ours:g}"
    if row.paper is None:
        return ours
    difference = "" if row.difference is None else f" ({row.difference:+g})"
    return f"{ours} / {row.paper:g}{difference}"


def parser(description: str) -> argparse.ArgumentParser:
    """Return the options that all scripts share."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--fresh", action="store_true", help="measure again what an earlier run has measured")
    options.add_argument("--workers", type=int, default=2, help="processes that measure (default: %(default)s)")
    options.add_argument("--zoo", type=Path, default=default_zoo_dir(), help="folder of the models")
    options.add_argument("--records", type=Path, default=PROJECT / "build" / "fusion", help="folder of measured rates")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "fusion")
    options.add_argument("--images", type=Path, default=PROJECT / "docs" / "images" / "fusion")
    return options
