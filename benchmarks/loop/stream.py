"""A stream of requests through the real queue: what rounds of retraining change, and what a hostile reviewer can do.

    python benchmarks/loop/stream.py

Every model's test images come in ten parts; a fifth of the inputs carry the trigger. What the guard flags goes to the
queue as the server sends it. After each of the first parts a simulated reviewer answers everything that is pending, and
the retrainer runs a round with its default gate; the server's bundle is then whatever is ACTIVE. Four variants:

- `nobody`: no answers, no rounds: the guard as it was fitted;
- `person`: true answers after the first two parts (10 and 20 % of the stream);
- `hostile`: the same, but a fifth of the answers are lies: a poisoned input is called a false alarm with the attacker's
  label, a false alarm poisoned with a wrong label;
- `raid`: no person; the retrainer draws its own line between flagged and clean inputs (`demarcation = "purified"`).

Writes `stream.csv` (one row per part) and `stream_rounds.csv` (one row per round, with what the gate said), and draws
`docs/images/loop/stream.png`. About two CPU minutes per model of MNIST, five of GTSRB; finished models are kept.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.serving.evidence import collect_evidence
from guard.serving.review_queue import Flagged, ReviewQueue
from guard.statistics.evaluation import attack_success_rate, clean_accuracy
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.types import Activations, BoolArray, Float32Array, IntArray

PROJECT = Path(__file__).resolve().parent.parent.parent
CASES: dict[str, tuple[str, ...]] = {
    "MNIST all-to-all (a)": tuple(f"mnist-a-mnist_cnn-{seed}" for seed in range(3)),
    "MNIST (b)": tuple(f"mnist-b-mnist_small-{seed}" for seed in range(3)),
    "GTSRB white square (c)": ("gtsrb-c-gtsrb_cnn-0",),
    "GTSRB moving square (d)": ("gtsrb-d-gtsrb_cnn_unpadded-0",),
    "GTSRB filter (e)": ("gtsrb-e-gtsrb_cnn_unpadded-0",),
    "GTSRB Blend": ("gtsrb-blend-gtsrb_cnn-0",),
}
VARIANTS = ("nobody", "person", "hostile", "raid")
PARTS, REVIEWED_PARTS = 10, 2
#: Triggered inputs per clean one.
TRIGGERED_SHARE = 0.25
LIES = 0.2
RATE = 0.01
COLUMNS = (
    *("case", "model", "seed", "variant", "part", "inputs", "rounds_before"),
    *("attack_success", "clean_accuracy", "false_positive_rate", "true_positive_rate"),
)
ROUND_COLUMNS = ("case", "model", "seed", "variant", "after_part", "answers", "lies", "outcome", "reasons")


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a stream: clean inputs first, then triggered ones, as the network sees them."""

    images: Float32Array
    activations: Activations
    true_labels: IntArray
    attacker_labels: IntArray
    is_poisoned: BoolArray


def parts_of(zoo: Zoo, name: str, suspect: SuspectModel) -> list[Part]:
    """Cut a model's test images into parts; the order is drawn by the model's seed."""
    card = zoo.card(name)
    test = load_split(card.data_set).test
    order = np.random.default_rng(card.seed).permutation(len(test.labels))
    (triggered,) = card.restore_attack().test_sets(test.images, test.labels)
    row_of_source = {int(source): row for row, source in enumerate(triggered.source_rows)}
    parts = []
    for rows in np.array_split(order, PARTS):
        chosen = [row_of_source[int(row)] for row in rows if int(row) in row_of_source]
        chosen = chosen[: round(TRIGGERED_SHARE * len(rows))]
        images = np.concatenate([test.images[rows], triggered.images[chosen]])
        parts.append(
            Part(
                images,
                suspect.activations(images),
                np.concatenate([test.labels[rows], triggered.true_labels[chosen]]),
                np.concatenate([np.full(len(rows), -1), triggered.labels[chosen]]),
                np.arange(len(images)) >= len(rows),
            )
        )
    return parts


def measure(guard: Guard, part: Part) -> tuple[dict[str, float], BoolArray]:
    """Return the rates of one part under one guard, fractions, and what it flags."""
    flagged = guard.scores(part.activations).is_poisoned
    clean, bad, predicted = ~part.is_poisoned, part.is_poisoned, part.activations.predicted_labels
    rates = {
        "attack_success": attack_success_rate(
            predicted[bad], part.attacker_labels[bad], part.true_labels[bad], flagged[bad]
        ),
        "clean_accuracy": clean_accuracy(predicted[clean], part.true_labels[clean], flagged[clean]),
        "false_positive_rate": float(flagged[clean].mean()),
        "true_positive_rate": float(flagged[bad].mean()),
    }
    return rates, flagged


def send(sender: ReviewQueue, guard: Guard, part: Part, number: int, flagged: BoolArray) -> None:
    """Queue what was flagged, as a server does; the request id says which input it was."""
    rows = np.flatnonzero(flagged)
    verdicts = guard.inspect_activations(part.activations[rows])
    evidence = collect_evidence(part.activations[rows], torch.from_numpy(part.images[rows]), verdicts)
    requests = [
        Flagged(f"{number}:{row}", verdict, seen, b"", "")
        for row, verdict, seen in zip(rows, verdicts, evidence, strict=True)
        if seen is not None
    ]
    receipts = sender.send(requests, str(guard.digest), guard.config.false_positive_rate)
    if set(receipts) - {"queued"}:
        raise RuntimeError(f"not everything was queued: {sorted(set(receipts))}")


def answer(queue: Queue, parts: Sequence[Part], lies: float, rng: np.random.Generator) -> tuple[int, int]:
    """Answer everything that is pending; return how many answers there were, and how many of them were lies."""
    given = lied = 0
    while items := queue.claim("reviewer", 200, order="age"):
        answers = []
        for item in items:
            number, row = map(int, item.input.request_id.split(":"))
            part = parts[number]
            is_poisoned, label = bool(part.is_poisoned[row]), int(part.true_labels[row])
            if rng.random() < lies:
                lied += 1
                is_poisoned = not is_poisoned
                label = item.input.suspect_label if not is_poisoned else (label + 1) % item.input.n_classes
            answers.append(Answer(item_id=item.id, is_poisoned=is_poisoned, true_label=label))
        queue.decide_many("reviewer", answers)
        given += len(answers)
    return given, lied


def run_variant(
    case: str, name: str, seed: int, variant: str, fitted: Guard, parts: Sequence[Part]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Let one stream run; return its rows and its rounds."""
    rows, rounds, about = [], [], {"case": case, "model": name, "seed": seed, "variant": variant}
    rng = np.random.default_rng(seed)
    settings = RetrainerSettings(demarcation="purified") if variant == "raid" else RetrainerSettings()
    with tempfile.TemporaryDirectory() as scratch:
        bundles, url = Path(scratch) / "bundles", f"sqlite:///{scratch}/queue.db"
        bundles.mkdir()
        store = BundleStore(bundles)
        store.activate(fitted.save(bundles).name)
        sender = ReviewQueue(url, name)
        with Queue.open(url) as queue:
            for number, part in enumerate(parts):
                guard = Guard.load(store.active_path())
                rates, flagged = measure(guard, part)
                rows.append({**about, "part": number, "inputs": len(flagged), "rounds_before": len(rounds), **rates})
                if variant == "nobody" or number >= REVIEWED_PARTS:
                    continue
                send(sender, guard, part, number, flagged)
                refresh_groups(queue, name)
                given, lied = (0, 0) if variant == "raid" else answer(queue, parts, LIES * (variant == "hostile"), rng)
                Rounds(queue).request(name, "benchmark")
                with Retrainer(queue, bundles, name, settings) as retrainer:
                    done = retrainer.step()
                outcome = done.outcome if done is not None else "none"
                reasons = " ".join(done.report.get("reasons", ())) if done is not None else ""
                rounds.append(
                    {
                        **about,
                        "after_part": number,
                        "answers": given,
                        "lies": lied,
                        "outcome": outcome,
                        "reasons": reasons,
                    }
                )
        sender.close()
    return rows, rounds


def run_model(case: str, name: str, folder: Path) -> str:
    """Run all variants of one model and keep the rows; may run in a worker process. Returns a line for people."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(name)
    suspect = SuspectModel(zoo.load(name))
    validation = load_split(card.data_set).validation
    config = GuardConfig(false_positive_rate=RATE, seed=card.seed)
    fitted = Guard.fit(suspect, validation.images, validation.labels, config)
    parts = parts_of(zoo, name, suspect)
    rows, rounds = [], []
    for variant in VARIANTS:
        more, more_rounds = run_variant(case, name, card.seed, variant, fitted, parts)
        rows += more
        rounds += more_rounds
    write(folder / f"{name}.csv", COLUMNS, rows)
    write(folder / f"{name}.rounds.csv", ROUND_COLUMNS, rounds)
    outcomes = ", ".join(f"{row['variant']}: {row['outcome']}" for row in rounds)
    return f"{name}: {time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU; {outcomes}"


def write(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a tidy CSV file, rates with five decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".writing")
    with unfinished.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: round(value, 5) if isinstance(value, float) else value for key, value in row.items()} for row in rows
        )
    unfinished.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """Read a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def mean_of(rows: Sequence[Mapping[str, str]], case: str, variant: str, quantity: str) -> tuple[float, float]:
    """Return the mean over the parts after the reviewed ones and over seeds, and the worst seed's, in percent."""
    by_model: dict[str, list[float]] = {}
    for row in rows:
        if (row["case"], row["variant"]) == (case, variant) and int(row["part"]) >= REVIEWED_PARTS:
            by_model.setdefault(row["model"], []).append(100 * float(row[quantity]))
    means = [statistics.mean(values) for values in by_model.values()]
    return statistics.mean(means), (min if quantity == "clean_accuracy" else max)(means)


def print_table(rows: Sequence[Mapping[str, str]], rounds: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a Markdown table: per case and variant the rates on the parts that nobody reviewed."""
    lines = [
        "| case | variant | attack success | clean accuracy, guarded | false alarms | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(row["case"] for row in rows):
        for variant in VARIANTS:
            cells = []
            for quantity in ("attack_success", "clean_accuracy", "false_positive_rate"):
                mean, worst = mean_of(rows, case, variant, quantity)
                cells.append(f"{mean:.2f}" if abs(mean - worst) < 0.005 else f"{mean:.2f} ({worst:.2f})")
            outcomes = [entry["outcome"] for entry in rounds if (entry["case"], entry["variant"]) == (case, variant)]
            answer = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)) or "–"
            lines.append(f"| {case} | {variant} | {' | '.join(cells)} | {answer} |")
    return lines


def draw(rows: Sequence[Mapping[str, str]], file: Path) -> None:
    """Draw attack success, clean accuracy and false alarms over the stream, one row of panels per case."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = list(dict.fromkeys(row["case"] for row in rows))
    panels = (
        ("attack_success", "attack success, %"),
        ("clean_accuracy", "clean accuracy, guarded, %"),
        ("false_positive_rate", "false alarms, %"),
    )
    colours = {"nobody": "#767676", "person": "#2166ac", "hostile": "#b2182b", "raid": "#e08214"}
    figure = Figure(figsize=(11, 1.9 * len(cases) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), len(panels), squeeze=False, sharex=True)
    for line, case in enumerate(cases):
        for column, (quantity, title) in enumerate(panels):
            axis = axes[line][column]
            for variant in VARIANTS:
                selected = [row for row in rows if (row["case"], row["variant"]) == (case, variant)]
                values = [
                    statistics.mean(100 * float(row[quantity]) for row in selected if int(row["part"]) == part)
                    for part in range(PARTS)
                ]
                share = [100 * (part + 0.5) / PARTS for part in range(PARTS)]
                axis.plot(share, values, color=colours[variant], marker="o", markersize=3, label=variant)
            for part in range(1, REVIEWED_PARTS + 1):
                axis.axvline(100 * part / PARTS, color="#bbbbbb", linewidth=0.8, linestyle=":")
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylim(bottom=None if quantity == "clean_accuracy" else 0)
            if line == 0:
                axis.set_title(title, fontsize=10)
            if line == len(cases) - 1:
                axis.set_xlabel("share of the stream seen, %")
        axes[line][0].set_ylabel(case, fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(VARIANTS), frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table, write the CSV files, and draw the picture."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--fresh", action="store_true", help="run again what an earlier run has kept")
    options.add_argument("--only", nargs="*", help="names of models; default is all")
    options.add_argument("--kept", type=Path, default=PROJECT / "build" / "loop")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "loop")
    options.add_argument("--image", type=Path, default=PROJECT / "docs" / "images" / "loop" / "stream.png")
    given = options.parse_args(arguments)
    wanted = [(case, name) for case, names in CASES.items() for name in names if not given.only or name in given.only]
    missing = [entry for entry in wanted if given.fresh or not (given.kept / f"{entry[1]}.rounds.csv").is_file()]
    if missing:
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            for done in as_completed([pool.submit(run_model, *entry, given.kept) for entry in missing]):
                print(done.result(), flush=True)
    rows = [row for _, name in wanted for row in read(given.kept / f"{name}.csv")]
    rounds = [row for _, name in wanted for row in read(given.kept / f"{name}.rounds.csv")]
    write(given.results / "stream.csv", COLUMNS, rows)
    write(given.results / "stream_rounds.csv", ROUND_COLUMNS, rounds)
    print(f"requested rate {RATE}; percent, mean over the last {PARTS - REVIEWED_PARTS} parts (worst seed)")
    print("\n".join(print_table(rows, rounds)))
    draw(rows, given.image)


if __name__ == "__main__":
    sys.exit(main())
