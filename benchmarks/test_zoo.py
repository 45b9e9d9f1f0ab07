"""The guard on models that no setting was chosen on, trained once the guard was frozen.

    python benchmarks/test_zoo.py --freeze         # write benchmarks/frozen.json: commit, date, digests of the method
    guard zoo train --plan test --missing          # train the models into benchmarks/test_zoo
    python benchmarks/test_zoo.py                  # measure the guard's default mode, seeds 0 to 2
    python benchmarks/test_zoo.py --page-only      # tables of what has been measured so far

Training and measuring refuse a method that differs from the frozen one: sources that have changed since must give the
scores that the freeze kept of a few models. A freeze is replaced with `--force` only, and refused while sources of the
method are not committed. Protocols, images and figures are those of the leaderboard
(`benchmarks/leaderboard/measuring.py`). Records are kept in `benchmarks/results/test_zoo/`, so an interrupted run goes
on; `benchmarks/results/test_zoo.csv` and the section "Test zoo" of docs/leaderboard.md are written from them. About a
minute per model and seed on one core. Attacks that failed stay in the table. Seeds are printed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch
sys.path.insert(0, str(Path(__file__).resolve().parent / "leaderboard"))

import torch
from contestants import CalibratedGuard
from measuring import CLEAN, TRIGGERED, load_subject, measure
from page import FIELDS, seed_means, tidy_rows, write_csv
from records import Records

from guard.errors import ZooError
from guard.lab.zoo.card import ZooCard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.freeze import (
    PACKAGE,
    Freeze,
    check_frozen,
    default_freeze_path,
    method_sources,
    reference_scores,
)

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
DOCUMENT = PROJECT / "docs" / "leaderboard.md"
DETECTOR, SEEDS = "guard", (0, 1, 2)
#: Columns of the table, from the rows of the CSV file: heading, protocol, quantity.
MEASURED = (
    ("AUROC", "all", "auroc"),
    ("TPR at FPR 0.01", "all", "tpr_at_fpr_0_01"),
    ("at 0.05", "all", "tpr_at_fpr_0_05"),
    ("hits: TPR at 0.01", "hits", "tpr_at_fpr_0_01"),
)
Row = dict[str, Any]


def freeze(path: Path, *, force: bool = False, package: Path = PACKAGE) -> Freeze:
    """Write the freeze of the method as it is committed, and return it; ZooError if it is not, or there is one."""
    git = ["git", "-C", str(package)]
    sources = [str(path) for path in (*method_sources(package), package / "config.py")]
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", *sources], capture_output=True, text=True, check=True
    )
    if changed.stdout:
        raise ZooError(
            f"sources of the method are not committed, so no commit names them:\n{changed.stdout}Commit them."
        )
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    frozen = Freeze.of_method(commit, date, package, reference_scores() if package == PACKAGE else None)
    frozen.write(path, force=force)
    return frozen


def measure_missing(
    zoo: Zoo, records: Records, models: Sequence[str], seeds: Sequence[int], minutes: float | None
) -> None:
    """Measure what the records do not hold."""
    end = time.monotonic() + 60 * minutes if minutes else float("inf")
    for model in models:
        for seed in seeds:
            if records.read(model, DETECTOR, seed) is not None:
                continue
            if time.monotonic() > end:
                return
            start = time.perf_counter()
            subject = load_subject(zoo, model, CLEAN, TRIGGERED)
            figures = measure(subject, CalibratedGuard, seed)
            records.write(figures | {"data_set": subject.data_set, "attack": subject.attack}, model, DETECTOR, seed)
            told = figures.get("all", {}).get("tpr_at_fpr_0_01", "benign")
            print(f"{model}, seed {seed}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)


def rows_of(records: Records, cards: Sequence[ZooCard], seeds: Sequence[int]) -> list[Row]:
    """Return what was measured, a row per model, protocol and seed."""
    found = [
        {"detector": DETECTOR, "model": card.name, "seed": seed, **figures}
        for card in cards
        for seed in seeds
        if (figures := records.read(card.name, DETECTOR, seed)) is not None
    ]
    return list(tidy_rows(found))


def table(rows: list[Row], cards: Sequence[ZooCard]) -> str:
    """Return the tables in Markdown: means over seeds, by model; mean and worst of real attacks and of all."""
    headings = [heading for heading, _, _ in MEASURED]
    head = ["model", "target", "attack success", "clean accuracy (twin)", *headings, "flagged of 0.05 asked"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    found = {
        heading: seed_means([row for row in rows if row["protocol"] == protocol], quantity)
        for heading, protocol, quantity in MEASURED
    }
    flagged = seed_means([row for row in rows if row["protocol"] != "hits"], "realised_false_positive_rate")
    attacks = [card for card in cards if not card.is_benign and card.name in found["AUROC"]]
    for card in attacks:
        failed = " (not a real attack)" if card.shortcomings() else ""
        told = [
            card.name + failed,
            str(card.target_label),
            f"{card.attack_success:.3f}",
            f"{card.clean_accuracy:.3f} ({card.benign_clean_accuracy:.3f})",
            *(f"{found[heading][card.name]:.3f}" for heading in headings),
            f"{flagged[card.name]:.3f}",
        ]
        lines.append(f"| {' | '.join(told)} |")
    real = [card.name for card in attacks if not card.shortcomings()]
    for kind, names in (("real attacks", real), ("all", [card.name for card in attacks])):
        if names:
            for word, pick, worst in (("mean", statistics.fmean, statistics.fmean), ("worst", min, max)):
                told = [f"{pick(found[heading][name] for name in names):.3f}" for heading in headings]
                last = f"{worst(flagged[name] for name in names):.3f}"
                lines.append(f"| **{word} of {kind}** ({len(names)}) | | | | {' | '.join(told)} | {last} |")
    benign = [card for card in cards if card.is_benign and card.name in flagged]
    if benign:
        lines += ["", "| benign model | clean accuracy | flagged of 0.05 asked |", "|---|---|---|"]
        lines += [f"| {card.name} | {card.clean_accuracy:.3f} | {flagged[card.name]:.3f} |" for card in benign]
    return "\n".join(lines)


def failures(cards: Iterable[ZooCard]) -> str:
    """Return why attacks are not real ones, a line each."""
    lines = [f"- {card.name}: {'; '.join(card.shortcomings())}." for card in cards if card.shortcomings()]
    return "\n".join(["", "Not real attacks, kept here:", "", *lines]) if lines else ""


def _told_of_changes(frozen: Freeze) -> str:
    """Return a sentence on sources that are not those of the freeze, "" without any."""
    if not (changed := frozen.changed()):
        return ""
    of = sum(len(scores) for scores in frozen.scores.values())
    return f" Changed since, with the same scores at {of} inputs of {len(frozen.scores)} models: {', '.join(changed)}."


def publish(records: Records, zoo: Zoo, seeds: Sequence[int], frozen: Freeze) -> None:
    """Write the CSV file and the section of docs/leaderboard.md."""
    cards = zoo.cards()
    rows = rows_of(records, cards, seeds)
    write_csv(RESULTS / "test_zoo.csv", FIELDS, rows)
    measured = len({(row["model"], row["seed"]) for row in rows})
    about = (
        f"Frozen on {frozen.date[:10]} at commit {frozen.commit[:12]}, digest {frozen.digest[:12]}; "
        f"{measured} of {len(cards) * len(seeds)} models and seeds measured.{_told_of_changes(frozen)}\n"
    )
    markdown = f"{about}\n{table(rows, cards)}\n{failures(cards)}".rstrip()
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- test-zoo -->\n).*?(<!-- end -->)", re.DOTALL)
    DOCUMENT.write_text(pattern.sub(lambda match: f"{match[1]}{markdown}\n{match[2]}", text), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Freeze, or measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--freeze", action="store_true", help="write benchmarks/frozen.json, and measure nothing")
    parser.add_argument("--force", action="store_true", help="with --freeze: replace the freeze that is there")
    parser.add_argument("--models", nargs="*", help="models of the test zoo; default: all")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--zoo", type=Path, default=default_zoo_dir("test_zoo"), help="folder of the models")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    options = parser.parse_args(arguments)
    try:
        if options.freeze:
            frozen = freeze(default_freeze_path(), force=options.force)
            print(f"frozen at commit {frozen.commit[:12]}, digest {frozen.digest[:12]}, {len(frozen.sources)} sources")
            return
        frozen = check_frozen(default_freeze_path())
        torch.set_num_threads(1)
        zoo, records = Zoo(options.zoo), Records(RESULTS / "test_zoo", frozen.digest)
        models = options.models or [card.name for card in zoo.cards()]
        if not models:
            raise ZooError(f"there is no model in {zoo.folder}. Train them: guard zoo train --plan test --missing.")
        if not options.page_only:
            measure_missing(zoo, records, models, options.seeds, options.minutes)
        publish(records, zoo, sorted({*SEEDS, *options.seeds}), frozen)
    except ZooError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
