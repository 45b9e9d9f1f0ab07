"""BadNets, table 2: errors per digit of the all-to-all attack with the pattern trigger.

    python benchmarks/badnets/all_to_all.py

Measures networks of the zoo on the 10,000 test images, three seeds each. Prints mean and worst seed beside the paper's
values and writes `all_to_all.csv`. Needs no training data; seconds.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from trials import HERE, load_mnist, parser, read_expected

from guard.lab.attacks.attack import Attack
from guard.lab.attacks.network_training import predict_labels
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import LabelledImages
from guard.types import BoolArray, IntArray

SEEDS = (0, 1, 2)
BASELINE, BADNET = "mnist-benign-mnist_cnn-{seed}", "mnist-a-mnist_cnn-{seed}"
QUANTITIES = {
    "baseline_clean": "baseline, clean",
    "badnet_clean": "BadNet, clean",
    "badnet_backdoor": "BadNet, backdoored",
}
CLASSES = (*map(str, range(10)), "average")


class Row(TypedDict):
    """One line of the table: an error of one network on one digit, or on all images (`average`)."""

    quantity: str
    seed: int
    digit: str
    images: int
    error: float


def measure_seed(zoo: Zoo, seed: int, test: LabelledImages) -> list[Row]:
    """Measure the baseline and the BadNet of one seed."""
    name = BADNET.format(seed=seed)
    attack: Attack = zoo.card(name).restore_attack()
    (triggered,) = attack.test_sets(test.images, test.labels)  # all-to-all: every image is in it
    baseline, badnet = zoo.load(BASELINE.format(seed=seed)), zoo.load(name)
    wrong = {
        "baseline_clean": predict_labels(baseline, test.images) != test.labels,
        "badnet_clean": predict_labels(badnet, test.images) != test.labels,
        "badnet_backdoor": predict_labels(badnet, triggered.images) != triggered.labels,
    }
    return [row for quantity, errors in wrong.items() for row in rows_of(quantity, seed, errors, test.labels)]


def rows_of(quantity: str, seed: int, is_wrong: BoolArray, true_labels: IntArray) -> list[Row]:
    """Return a row per digit, by true label, and one for all images.

    The paper's average is over images as well: its values per digit are whole numbers of wrong test images, and the 56
    backdoored ones make 0.56 %, where the mean of the ten values would be 0.57 %.
    """
    rows: list[Row] = []
    for digit in CLASSES:
        selected = is_wrong if digit == "average" else is_wrong[true_labels == int(digit)]
        rows.append(
            Row(quantity=quantity, seed=seed, digit=digit, images=len(selected), error=float(np.mean(selected)))
        )
    return rows


def as_table(rows: Sequence[Row], expected: Mapping[tuple[str, ...], float]) -> list[str]:
    """Return a Markdown table: per digit `mean, worst seed / paper (difference of the mean)`, in percent."""
    lines = ["| digit | " + " | ".join(QUANTITIES.values()) + " |", "|---|" + "---|" * len(QUANTITIES)]
    for digit in CLASSES:
        cells = []
        for quantity in QUANTITIES:
            selected = [100 * row["error"] for row in rows if (row["quantity"], row["digit"]) == (quantity, digit)]
            mean, paper = statistics.mean(selected), expected[quantity, digit]
            cells.append(f"{mean:.2f}, {max(selected):.2f} / {paper:.2f} ({mean - paper:+.2f})")
        lines.append(f"| {digit} | " + " | ".join(cells) + " |")
    return lines


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the tidy CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(Row.__annotations__), lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, "error": round(row["error"], 6)} for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the CSV file."""
    options = parser(__doc__)
    options.add_argument("--zoo", type=Path, default=default_zoo_dir(), help="folder of the models")
    given = options.parse_args(arguments)
    zoo, test = Zoo(given.zoo), load_mnist("test")
    rows = [row for seed in SEEDS for row in measure_seed(zoo, seed, test)]
    write_rows(given.results / "all_to_all.csv", rows)
    print(f"seeds {SEEDS}; percent: mean of the seeds, worst seed / paper (difference of the mean)")
    print("\n".join(as_table(rows, read_expected(HERE / "table_2.expected.csv"))))


if __name__ == "__main__":
    main()
