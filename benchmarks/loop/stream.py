"""A stream of requests through the real queue: what rounds of retraining change, and what a hostile reviewer can do.

    python benchmarks/loop/stream.py

Every model's test images come in ten parts; a fifth of the inputs carry the trigger. What the guard flags goes to the
queue as the server sends it. After each of the first parts a simulated reviewer answers everything that is pending, and
the retrainer runs a round with its default gate; the server's bundle is then whatever is ACTIVE. Variants:

- `nobody`: no answers, no rounds: the guard as it was fitted;
- `person`: true answers after the first two parts (10 and 20 % of the stream);
- `hostile`: the same, but a fifth of the answers are lies: a poisoned input is called a false alarm with the attacker's
  label, a false alarm poisoned with a wrong label;
- `audits`: as `person`, and of the requests that pass one in twenty is audited (`audit_rate = 0.05`, one in four near
  the threshold: much, as a part of this stream has 1,250 inputs at most);
- `hostile audits`: as `audits`, with a fifth of the answers lies, about audits too;
- `raid`: no person; the retrainer draws its own line between flagged and clean inputs (`demarcation = "purified"`).

There is one model of each attack on GTSRB: its three seeds draw the order of the stream and the audits. Two cases have
a guard that was fitted on 1,000 clean images only, and so misses more.

Every candidate, promoted or refused, is compared with the guard that served, on the same inputs of all later parts:
triggered ones on which the attack succeeds under one of the two only (`attack_lost`: under the candidate), clean ones
that only one of the two answers rightly (`clean_lost`: the guard that served). `attack_worse`, `clean_worse`: by a
one-sided sign test at 5 %, of all later parts together or, at 5 % in all (Bonferroni), of one.

Writes `stream.csv` (one row per part) and `stream_rounds.csv` (one row per round, with what the gate said), and draws
`docs/images/loop/stream.png`. With 1,000 images about 20 CPU seconds per variant; finished runs are kept.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
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
from guard.detection.retraining import Labelled, retrain
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.relabel.settings import QueueSettings
from guard.retrainer import candidate
from guard.retrainer.movement import CHANCE, sign_test
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.serving.evidence import collect_evidence
from guard.serving.review_queue import Flagged, ReviewQueue
from guard.statistics.evaluation import attack_success_rate, clean_accuracy
from guard.statistics.strata import audit_probability
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.types import Activations, BoolArray, Float32Array, IntArray

PROJECT = Path(__file__).resolve().parent.parent.parent
SEEDS = range(3)


@dataclass(frozen=True, slots=True)
class Setting:
    """A guard of one model, and the order of one stream.

    Attributes
    ----------
    case : str
    model : str
        Name in the zoo.
    seed : int
    images : int or None
        How many clean images the guard is fitted on; None = all of the validation images.
    """

    case: str
    model: str
    seed: int
    images: int | None = None

    @property
    def name(self) -> str:
        """Of the files that are kept."""
        return f"{self.model}.{self.images or 'all'}.{self.seed}"


SETTINGS = (
    *(Setting("MNIST all-to-all (a)", f"mnist-a-mnist_cnn-{seed}", seed) for seed in SEEDS),
    *(Setting("MNIST (b)", f"mnist-b-mnist_small-{seed}", seed) for seed in SEEDS),
    *(Setting("GTSRB white square (c)", "gtsrb-c-gtsrb_cnn-0", seed) for seed in SEEDS),
    *(Setting("GTSRB moving square (d)", "gtsrb-d-gtsrb_cnn_unpadded-0", seed) for seed in SEEDS),
    *(Setting("GTSRB filter (e)", "gtsrb-e-gtsrb_cnn_unpadded-0", seed) for seed in SEEDS),
    *(Setting("GTSRB Blend", "gtsrb-blend-gtsrb_cnn-0", seed) for seed in SEEDS),
    *(Setting("GTSRB filter (e), 1,000 images", "gtsrb-e-gtsrb_cnn_unpadded-0", seed, 1000) for seed in SEEDS),
    *(Setting("GTSRB Blend, 1,000 images", "gtsrb-blend-gtsrb_cnn-0", seed, 1000) for seed in SEEDS),
)
VARIANTS = ("nobody", "person", "audits", "hostile", "hostile audits", "raid")
AUDIT_RATE = 0.05
PARTS, REVIEWED_PARTS = 10, 2
#: Triggered inputs per clean one.
TRIGGERED_SHARE = 0.25
LIES = 0.2
RATE = 0.01
COLUMNS = (
    *("case", "model", "seed", "variant", "part", "inputs", "rounds_before"),
    *("attack_success", "clean_accuracy", "false_positive_rate", "true_positive_rate"),
)
ROUND_COLUMNS = (
    *("case", "model", "seed", "variant", "after_part", "answers", "lies", "outcome"),
    *("attack_lost", "attack_gained", "clean_lost", "clean_gained", "attack_worse", "clean_worse", "reasons"),
)


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """One part of a stream: clean inputs first, then triggered ones, as the network sees them."""

    images: Float32Array
    activations: Activations
    true_labels: IntArray
    attacker_labels: IntArray
    is_poisoned: BoolArray


def parts_of(zoo: Zoo, name: str, suspect: SuspectModel, seed: int) -> list[Part]:
    """Cut a model's test images into parts; the order is drawn by a seed."""
    card = zoo.card(name)
    test = load_split(card.data_set).test
    order = np.random.default_rng(seed).permutation(len(test.labels))
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


def is_beaten(guard: Guard, part: Part) -> tuple[BoolArray, BoolArray]:
    """Return on which inputs of a part the attack succeeds, and which clean ones are answered rightly, (n,) each."""
    passes, predicted = ~guard.scores(part.activations).is_poisoned, part.activations.predicted_labels
    succeeds = passes & (predicted == part.attacker_labels) & (part.true_labels != part.attacker_labels)
    return part.is_poisoned & succeeds, ~part.is_poisoned & passes & (predicted == part.true_labels)


def compare(before: Guard, after: Guard, later: Sequence[Part]) -> dict[str, int | bool]:
    """Compare two guards on the same inputs of the later parts."""
    lost, gained = np.zeros((2, len(later)), dtype=int), np.zeros((2, len(later)), dtype=int)
    for number, part in enumerate(later):
        (old_attack, old_right), (new_attack, new_right) = is_beaten(before, part), is_beaten(after, part)
        lost[:, number] = (new_attack & ~old_attack).sum(), (old_right & ~new_right).sum()
        gained[:, number] = (old_attack & ~new_attack).sum(), (new_right & ~old_right).sum()
    is_worse = []
    for kind in range(2):
        of_parts = [sign_test(int(a), int(b)) for a, b in zip(lost[kind], gained[kind], strict=True)]
        together = sign_test(int(lost[kind].sum()), int(gained[kind].sum()))
        is_worse.append(together <= CHANCE or min(of_parts) <= CHANCE / len(later))
    (attack_lost, clean_lost), (attack_gained, clean_gained) = lost.sum(axis=1).tolist(), gained.sum(axis=1).tolist()
    return {
        "attack_lost": attack_lost,
        "attack_gained": attack_gained,
        "clean_lost": clean_lost,
        "clean_gained": clean_gained,
        "attack_worse": is_worse[0],
        "clean_worse": is_worse[1],
    }


def send(
    sender: ReviewQueue, guard: Guard, part: Part, number: int, audit_rate: float, rng: np.random.Generator
) -> None:
    """Queue what is flagged and audited, as a server does; the request id says which input it was."""
    verdicts = guard.inspect_activations(part.activations)
    rate = guard.config.false_positive_rate
    drawn = {}
    for row, verdict in enumerate(verdicts):
        probability = audit_probability(verdict.p_value, rate, audit_rate)
        if not verdict.is_poisoned and rng.random() < probability:
            drawn[row] = probability
    evidence = collect_evidence(part.activations, torch.from_numpy(part.images), verdicts, drawn)
    requests = [
        Flagged(f"{number}:{row}", verdict, seen, b"", "")
        for row, (verdict, seen) in enumerate(zip(verdicts, evidence, strict=True))
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
    setting: Setting, variant: str, fitted: Guard, parts: Sequence[Part]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Let one stream run; return its rows and its rounds."""
    name = setting.model
    rows, rounds, about = [], [], {"case": setting.case, "model": name, "seed": setting.seed, "variant": variant}
    rng = np.random.default_rng(setting.seed)
    audit_rate = AUDIT_RATE if "audits" in variant else 0.0
    lies = LIES if "hostile" in variant else 0.0
    settings = RetrainerSettings(demarcation="purified") if variant == "raid" else RetrainerSettings()
    with tempfile.TemporaryDirectory() as scratch:
        bundles, url = Path(scratch) / "bundles", f"sqlite:///{scratch}/queue.db"
        bundles.mkdir()
        store = BundleStore(bundles)
        store.activate(fitted.save(bundles).name)
        sender = ReviewQueue(url, name)
        with Queue.open(url, QueueSettings(max_audits_per_hour=1000)) as queue:
            for number, part in enumerate(parts):
                guard = Guard.load(store.active_path())
                rates, flagged = measure(guard, part)
                rows.append({**about, "part": number, "inputs": len(flagged), "rounds_before": len(rounds), **rates})
                if variant == "nobody" or number >= REVIEWED_PARTS:
                    continue
                send(sender, guard, part, number, audit_rate, rng)
                refresh_groups(queue, name)
                given, lied = (0, 0) if variant == "raid" else answer(queue, parts, lies, rng)
                Rounds(queue).request(name, "benchmark")
                with Retrainer(queue, bundles, name, settings) as retrainer:
                    done = retrainer.step()
                outcome = done.outcome if done is not None else "none"
                reasons = " ".join(done.report.get("reasons", ())) if done is not None else ""
                compared: dict[str, int | bool] = {}
                if done is not None and done.candidate is not None:
                    compared = compare(guard, Guard.load(store.fetch(done.candidate)), parts[number + 1 :])
                rounds.append(
                    {
                        **about,
                        "after_part": number,
                        "answers": given,
                        "lies": lied,
                        "outcome": outcome,
                        **compared,
                        "reasons": reasons,
                    }
                )
        sender.close()
    return rows, rounds


def remembering_untaught() -> None:
    """Fit the guard that learned from no answer once per guard: it is the same in all rounds."""
    known: dict[str, Guard] = {}

    def fit(guard: Guard, labelled: Labelled, **given: Any) -> Guard:
        if len(labelled) or given:
            return retrain(guard, labelled, **given)
        digest = hashlib.sha256(guard.reference.logits.tobytes()).hexdigest()
        if digest not in known:
            known[digest] = retrain(guard, labelled)
        return known[digest]

    candidate.retrain = fit  # type: ignore[attr-defined]


def run_setting(setting: Setting, folder: Path, variants: Sequence[str]) -> str:
    """Run the variants of one setting and keep the rows; may run in a worker process. Returns a line for people."""
    torch.set_num_threads(1)
    start, cpu = time.perf_counter(), time.process_time()
    remembering_untaught()
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(setting.model)
    suspect = SuspectModel(zoo.load(setting.model))
    validation = load_split(card.data_set).validation
    config = GuardConfig(false_positive_rate=RATE, seed=card.seed)
    images, labels = validation.images[: setting.images], validation.labels[: setting.images]
    fitted = Guard.fit(suspect, images, labels, config)
    parts = parts_of(zoo, setting.model, suspect, setting.seed)
    outcomes = []
    for variant in variants:
        rows, rounds = run_variant(setting, variant, fitted, parts)
        write(folder / f"{setting.name}.{variant}.csv", COLUMNS, rows)
        write(folder / f"{setting.name}.{variant}.rounds.csv", ROUND_COLUMNS, rounds)
        outcomes += [f"{row['variant']}: {row['outcome']}{' WORSE' * bool(row.get('attack_worse'))}" for row in rounds]
    used = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    return f"{setting.name}: {used}; {', '.join(outcomes)}"


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
            by_model.setdefault(row["model"] + row["seed"], []).append(100 * float(row[quantity]))
    means = [statistics.mean(values) for values in by_model.values()]
    return statistics.mean(means), (min if quantity == "clean_accuracy" else max)(means)


def print_table(rows: Sequence[Mapping[str, str]], rounds: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a Markdown table: per case and variant the rates on the parts that nobody reviewed."""
    lines = [
        "| case | variant | attack success | clean accuracy, guarded | false alarms | rounds |",
        "|---|---|---|---|---|---|",
    ]
    for case, variant in dict.fromkeys((row["case"], row["variant"]) for row in rows):
        cells = []
        for quantity in ("attack_success", "clean_accuracy", "false_positive_rate"):
            mean, worst = mean_of(rows, case, variant, quantity)
            cells.append(f"{mean:.2f}" if abs(mean - worst) < 0.005 else f"{mean:.2f} ({worst:.2f})")
        of_case = [entry for entry in rounds if (entry["case"], entry["variant"]) == (case, variant)]
        outcomes = [f"{entry['outcome']}{' (worse)' * (entry.get('attack_worse') == 'True')}" for entry in of_case]
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
    colours = {
        "nobody": "#767676",
        "person": "#2166ac",
        "audits": "#1b7837",
        "hostile": "#b2182b",
        "hostile audits": "#762a83",
        "raid": "#e08214",
    }
    figure = Figure(figsize=(11, 1.9 * len(cases) + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(cases), len(panels), squeeze=False, sharex=True)
    for line, case in enumerate(cases):
        for column, (quantity, title) in enumerate(panels):
            axis = axes[line][column]
            for variant in VARIANTS:
                selected = [row for row in rows if (row["case"], row["variant"]) == (case, variant)]
                if not selected:
                    continue
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
    options.add_argument("--only", nargs="*", help="names of settings, as model.images.seed; default is all")
    options.add_argument("--variants", nargs="*", default=VARIANTS)
    options.add_argument("--kept", type=Path, default=PROJECT / "build" / "loop")
    options.add_argument("--stem", default="stream", help="of the names of the CSV files")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "loop")
    options.add_argument("--image", type=Path, default=PROJECT / "docs" / "images" / "loop" / "stream.png")
    given = options.parse_args(arguments)
    wanted = [setting for setting in SETTINGS if not given.only or setting.name in given.only]

    def is_missing(setting: Setting, variant: str) -> bool:
        return given.fresh or not (given.kept / f"{setting.name}.{variant}.rounds.csv").is_file()

    todo = [(setting, [name for name in given.variants if is_missing(setting, name)]) for setting in wanted]
    if any(variants for _, variants in todo):
        with ProcessPoolExecutor(given.workers, mp_context=get_context("spawn")) as pool:
            runs = [pool.submit(run_setting, entry, given.kept, names) for entry, names in todo if names]
            for done in as_completed(runs):
                print(done.result(), flush=True)
    kept = [(setting, variant) for setting in SETTINGS for variant in VARIANTS if not is_missing(setting, variant)]
    if given.fresh:
        kept = [(setting, variant) for setting in wanted for variant in given.variants]
    rows = [row for setting, variant in kept for row in read(given.kept / f"{setting.name}.{variant}.csv")]
    rounds = [row for setting, variant in kept for row in read(given.kept / f"{setting.name}.{variant}.rounds.csv")]
    write(given.results / f"{given.stem}.csv", COLUMNS, rows)
    write(given.results / f"{given.stem}_rounds.csv", ROUND_COLUMNS, rounds)
    print(f"requested rate {RATE}; percent, mean over the last {PARTS - REVIEWED_PARTS} parts (worst seed)")
    print("\n".join(print_table(rows, rounds)))
    draw(rows, given.image)


if __name__ == "__main__":
    sys.exit(main())
