"""From records to a printed table, its CSV file and its picture; the way through every script of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from common import Row, Table, as_markdown, parser, rows_of, write_rows
from pictures import draw
from studies import STREAM_SEED, Records

from guard.lab.zoo.collection import Zoo


def publish(table: Table, records: Records, results: Path, images: Path) -> list[Row]:
    """Print a table, write its CSV file and draw its picture."""
    rows = rows_of(table, records)
    write_rows(results / f"{table.name}.csv", rows)
    draw(table, rows, images / f"{table.name}.png")
    print(
        f"\n{table.title}\nours / paper (difference), percent. Seeds: guards that of their model, stream {STREAM_SEED}"
    )
    print("\n".join([as_markdown(table, rows), *table.notes]), flush=True)
    return rows


def main(table: Table, arguments: Sequence[str] | None = None) -> None:
    """Measure what one table needs, and publish it."""
    options = parser(table.title).parse_args(arguments)
    records = Records(options.records, Zoo(options.zoo), options.fresh)
    records.require(table.wanted(), options.workers)
    publish(table, records, options.results, options.images)
