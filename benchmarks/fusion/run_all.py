"""Measure the tables of the Fusion paper from the zoo, print them, and write them into docs/reproduction.md.

    python benchmarks/fusion/run_all.py

With what an earlier run has measured it takes seconds; `--fresh` measures everything again. Table 8 happens in service,
with a server, a queue and a retrainer, and takes longer than all others: `table_8.py` measures it, and what it wrote
last goes into the document.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import imperceptible
import red_box
import table_2
import table_4
import table_5
import table_6
import table_7
import table_8
from common import PROJECT, Table, as_markdown, parser, read_rows
from publishing import publish
from side_studies import SIDE_STUDIES
from studies import Records, Request

from guard.lab.zoo.collection import Zoo

MEASURED: tuple[Table, ...] = tuple(
    module.TABLE for module in (table_2, table_4, table_5, table_6, table_7, imperceptible, red_box)
)
TABLES: tuple[Table, ...] = (*MEASURED, table_8.TABLE)
DOCUMENT = PROJECT / "docs" / "reproduction.md"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure everything in one go, so that no guard is fitted twice."""
    options = parser(__doc__.splitlines()[0]).parse_args(arguments)
    start = time.perf_counter()
    records = Records(options.records, Zoo(options.zoo), options.fresh)
    records.require(merged([table.wanted() for table in (*MEASURED, *SIDE_STUDIES)]), options.workers)
    print(f"measured in {time.perf_counter() - start:.0f} s", flush=True)
    for table in MEASURED:
        publish(table, records, options.results, options.images)
    for study in SIDE_STUDIES:
        study.publish(records, options.results)
    DOCUMENT.write_text(with_tables(DOCUMENT.read_text(encoding="utf-8"), options.results), encoding="utf-8")
    print(f"\neverything in {time.perf_counter() - start:.0f} s")


def merged(wishes: Sequence[Mapping[str, Sequence[Request]]]) -> dict[str, list[Request]]:
    """Join what several tables want, model by model; the slowest image sets first, so that no worker ends alone."""
    joined: dict[str, list[Request]] = {}
    for wish in wishes:
        for model, requests in wish.items():
            joined[model] = list(dict.fromkeys([*joined.get(model, []), *requests]))
    order = ("cifar10", "gtsrb", "mnist", "cifar100", "yaleb")
    return dict(sorted(joined.items(), key=lambda item: order.index(item[0].split("-")[0])))


def with_tables(text: str, results: Path) -> str:
    """Return the document with every table between its marks, `<!-- table_2 -->` ... `<!-- end -->`, written anew."""
    for table in TABLES:
        text = _replaced(text, table.name, as_markdown(table, read_rows(results / f"{table.name}.csv")))
    for study in SIDE_STUDIES:
        text = _replaced(text, study.name, study.as_markdown(results))
    return text


def _replaced(text: str, name: str, markdown: str) -> str:
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"docs/reproduction.md has no place for {name}. Add <!-- {name} --> and <!-- end -->.")
    return pattern.sub(lambda found: f"{found[1]}{markdown}\n{found[2]}", text)


if __name__ == "__main__":
    main()
