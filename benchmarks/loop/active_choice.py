"""How many answers it takes, asked in order of suspicion or one of each kind first, until the attack is stopped.

    python benchmarks/loop/active_choice.py

Guards are fitted on 300 clean images at a rate of 0.5 %, so that the attack succeeds now and then. What one flags of
the first part of a stream (`stream.py`) waits in the queue; a reviewer answers so many items truly, in order
of suspicion (lowest p-value first, as the queue gives them) or of usefulness (one of each group of look-alikes, few of
a flood), and one round of retraining runs with the default gate. Two streams: `even`, triggered inputs as they come,
and `flood`, four of five of one true class, so that the rest of the attack hides behind look-alikes.
Attack success is of the triggered inputs of the other parts, as they come, under the guard that serves afterwards.

Writes `active_choice.csv`, and prints a table with the fewest answers after which, and after any more of them, attack
success is at most half of what it was with no answer.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch
from stream import (
    PROJECT,
    Part,
    is_beaten,
    parts_of,
    read,
    remembering_untaught,
    send,
    write,
)

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer, State
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.serving.review_queue import ReviewQueue
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, Float64Array, IntArray

NETWORKS = ("mnist-wanet-mnist_cnn",)
SEEDS = range(3)
IMAGES, RATE = 300, 0.005
Order = Literal["suspicion", "usefulness"]
STREAMS = ("even", "flood")
ANSWERS = (12, 16, 24, 48, 96)
#: Share of the triggered inputs of a flood that are of one class.
FLOOD = 0.8
COLUMNS = (
    "network",
    "seed",
    "stream",
    "order",
    "answers",
    "poisoned",
    "outcome",
    "attack_success_before",
    "attack_success",
)


def flooded(part: Part) -> Part:
    """Return a part with fewer triggered inputs, four of five of them of its commonest class."""
    poisoned = np.flatnonzero(part.is_poisoned)
    labels = part.true_labels[poisoned]
    commonest = int(np.bincount(labels).argmax())
    of_class, others = poisoned[labels == commonest], poisoned[labels != commonest]
    n_others = max(1, round(len(of_class) * (1 - FLOOD) / FLOOD))
    rows = np.concatenate([np.flatnonzero(~part.is_poisoned), of_class, others[:n_others]])
    return replace(
        part,
        images=part.images[rows],
        activations=part.activations[rows],
        true_labels=part.true_labels[rows],
        attacker_labels=part.attacker_labels[rows],
        is_poisoned=part.is_poisoned[rows],
    )


def success(guard: Guard, parts: Sequence[Part]) -> float:
    """Return the attack success on the triggered inputs of some parts, a fraction."""
    counted = sum(int((part.is_poisoned & (part.true_labels != part.attacker_labels)).sum()) for part in parts)
    return sum(int(is_beaten(guard, part)[0].sum()) for part in parts) / counted


def usefulness(groups: IntArray, features: Float32Array) -> Float64Array:
    """Return how much an answer about each input would tell, shape (n,), > 0; higher = ask first.

    The k-th input of a group of m look-alikes gets sqrt(m) / k, one that is like no other gets 1: an answer stands for
    its look-alikes, and the next one of them says less. Within a group the input nearest to the centre comes first,
    then always the one that is farthest from all before it [1]_.

    Parameters
    ----------
    groups : ndarray of shape (n,), int64
        As `refresh_groups` sets them; 0 = none.
    features : ndarray of shape (n, d), float32

    References
    ----------
    .. [1] Gonzalez (1985), Clustering to minimize the maximum intercluster distance; Sener and Savarese (2018), Active
       learning for convolutional neural networks: a core-set approach.
    """
    useful = np.ones(len(groups))
    lengths = np.linalg.norm(features, axis=1, keepdims=True)
    directions = features / np.maximum(lengths, np.finfo(np.float32).tiny)
    for group in np.unique(groups[groups > 0]):
        rows = np.flatnonzero(groups == group)
        useful[rows[_spread(directions[rows])]] = np.sqrt(len(rows)) / np.arange(1, len(rows) + 1)
    return useful


def _spread(rows: Float32Array) -> IntArray:
    """Return the rows' numbers, the one nearest to the centre first, then always the farthest from those before."""
    order = np.empty(len(rows), dtype=np.int64)
    order[0] = np.linalg.norm(rows - rows.mean(axis=0), axis=1).argmin()
    nearest = np.linalg.norm(rows - rows[order[0]], axis=1)
    for place in range(1, len(rows)):
        nearest[order[:place]] = -1.0  # copies are as near as the row itself, and still come once
        order[place] = nearest.argmax()
        nearest = np.minimum(nearest, np.linalg.norm(rows - rows[order[place]], axis=1))
    return order


def in_order(queue: Queue, order: Order) -> list[int]:
    """Return the numbers of all pending items, what is to be asked first at first."""
    if order == "suspicion":
        items = queue.items(state=State.PENDING, limit=2000)
        return [item.id for item in sorted(items, key=lambda item: (item.input.p_value, -item.input.combined))]
    ids, _, groups, features = queue.pending_rows("model", 2000)
    return ids[np.argsort(-usefulness(groups, features), kind="stable")].tolist()


def answer_some(queue: Queue, part: Part, n: int, order: Order) -> int:
    """Answer up to n items truly in an order; return how many of them were poisoned."""
    answers = []
    for item_id in in_order(queue, order)[:n]:
        row = int(queue.get(item_id).input.request_id.split(":")[1])
        label = int(part.true_labels[row])
        answers.append(Answer(item_id=item_id, is_poisoned=bool(part.is_poisoned[row]), true_label=label))
    queue.decide_many("reviewer", answers, also_free=True)
    return sum(entry.is_poisoned for entry in answers)


def run(fitted: Guard, part: Part, later: Sequence[Part], order: Order, n: int, before: float) -> dict[str, Any]:
    """Ask for n answers in one order, and let a round run."""
    with tempfile.TemporaryDirectory() as scratch:
        bundles, url = Path(scratch) / "bundles", f"sqlite:///{scratch}/queue.db"
        bundles.mkdir()
        store = BundleStore(bundles)
        store.activate(fitted.save(bundles).name)
        sender = ReviewQueue(url, "model")
        with Queue.open(url) as queue:
            send(sender, Guard.load(store.active_path()), part, 0, 0.0, np.random.default_rng(0))
            refresh_groups(queue, "model")
            poisoned = answer_some(queue, part, n, order)
            Rounds(queue).request("model", "benchmark")
            with Retrainer(queue, bundles, "model", RetrainerSettings(min_decisions=1)) as retrainer:
                done = retrainer.step()
        sender.close()
        outcome = "none" if done is None else done.outcome
        after = success(Guard.load(store.active_path()), later) if outcome == "promoted" else before
    return {"order": order, "answers": n, "poisoned": poisoned, "outcome": outcome, "attack_success": after}


def run_network(network: str, seed: int) -> list[dict[str, Any]]:
    """Run both streams in both orders, with every number of answers."""
    zoo = Zoo(default_zoo_dir())
    name = f"{network}-{seed}"
    suspect = SuspectModel(zoo.load(name))
    validation = load_split(zoo.card(name).data_set).validation
    config = GuardConfig(false_positive_rate=RATE, seed=seed)
    fitted = Guard.fit(suspect, validation.images[:IMAGES], validation.labels[:IMAGES], config)
    first, *later = parts_of(zoo, name, suspect, seed)
    before = success(fitted, later)
    rows = []
    for stream in STREAMS:
        part = first if stream == "even" else flooded(first)
        for order in get_args(Order):
            for n in ANSWERS:
                row = run(fitted, part, later, order, n, before)
                rows.append(
                    {"network": network, "seed": seed, "stream": stream, "attack_success_before": before, **row}
                )
    return rows


def reached(rows: Sequence[dict[str, str]]) -> int | None:
    """Return the fewest answers from which on the attack succeeds at most half as often; None = none of these."""
    ordered = sorted(rows, key=lambda row: int(row["answers"]))
    found = None
    for row in reversed(ordered):
        if float(row["attack_success"]) > 0.5 * float(row["attack_success_before"]):
            break
        found = int(row["answers"])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, write the CSV file, and print a table."""
    torch.set_num_threads(1)
    remembering_untaught()
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--fresh", action="store_true", help="run again what an earlier run has written")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "loop")
    given = options.parse_args(arguments)
    file = given.results / "active_choice.csv"
    rows: list[dict[str, Any]] = [*read(file)] if file.is_file() and not given.fresh else []
    for network in NETWORKS:
        for seed in SEEDS:
            if any((row["network"], int(row["seed"])) == (network, seed) for row in rows):
                continue
            started = time.perf_counter()
            rows += run_network(network, seed)
            write(file, COLUMNS, rows)
            print(f"{network}-{seed}: {time.perf_counter() - started:.0f} s", flush=True)
    print("\n".join(table(read(file))))


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Return a Markdown table: per network, stream and order the answers that halve the attack's success, per seed."""
    lines = [
        "| network | stream | order | answers that halve attack success, per seed | % after 12, 24, 48, 96 answers |"
    ]
    lines.append("|---|---|---|---|---|")
    for network, stream, order in dict.fromkeys((row["network"], row["stream"], row["order"]) for row in rows):
        chosen = [row for row in rows if (row["network"], row["stream"], row["order"]) == (network, stream, order)]
        seeds = sorted({row["seed"] for row in chosen})
        needed = ", ".join(str(reached([row for row in chosen if row["seed"] == seed]) or "–") for seed in seeds)
        means = [
            statistics.mean(100 * float(row["attack_success"]) for row in chosen if int(row["answers"]) == n)
            for n in (12, 24, 48, 96)
        ]
        lines.append(f"| {network} | {stream} | {order} | {needed} | {', '.join(f'{mean:.2f}' for mean in means)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
