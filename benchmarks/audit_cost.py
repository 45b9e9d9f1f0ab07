"""Measure what the audit sample costs a request: the same guarded network with it and without, in turns.

    python benchmarks/audit_cost.py

Writes `audit_cost.csv` (one row per rate and round). A small backdoored CNN on real MNIST images, one image per call,
through `GuardedModel`, which every engine uses: less than a server takes, so that a share of it is the more. Each
variant has a queue of its own, SQLite, and answers the same clean images; the variants take turns in blocks, in an
order that changes by round, and ratios are taken within a round. An audited request itself waits for its row in the
queue, like a flagged one; its time is `audited_ms`. The aim: p50 at a rate of 0.01 at most 1.01 times that without.
"""

from __future__ import annotations

import argparse
import copy
import csv
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.demo.run import SPLIT
from guard.detection.pipeline import Guard
from guard.lab.attacks.recipes import DEMO_ATTACKS, train_badnet
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings
from guard.serving.guarded_model import GuardedModel
from guard.suspect.model import SuspectModel

SEED = 0
RATES = (0.0, 0.002, 0.01)
AIM_RATE, AIM = 0.01, 1.01
COLUMNS = ("audit_rate", "round", "requests", "audits", "p50_ms", "p99_ms", "mean_ms", "audited_ms")
PROJECT = Path(__file__).resolve().parent.parent


def measure(rounds: int, requests: int) -> list[dict[str, float | str]]:
    """Return one row per rate and round."""
    data = load_dataset("mnist", "test")
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(SEED))
    images, labels = to_tensor_images(data.images), data.labels
    network, _, _ = train_badnet(DEMO_ATTACKS[0], images[train], labels[train], seed=SEED)
    guard = Guard.fit(SuspectModel(network), images[validate], labels[validate], GuardConfig(seed=SEED))
    passed = [row for row, verdict in zip(test, guard.inspect(images[test]), strict=True) if not verdict.is_poisoned]
    rows: list[dict[str, float | str]] = []
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        bundle = guard.save(Path(scratch) / "bundles")
        models = {}
        for rate in RATES:
            url = f"sqlite:///{scratch}/queue-{rate}.db"
            Queue.open(url, QueueSettings(max_audits_per_hour=1_000_000)).close()
            models[rate] = opened.enter_context(
                GuardedModel(copy.deepcopy(network), bundle=bundle, name="m", queue_url=url, audit_rate=rate)
            )
        for number in range(-1, rounds):  # the first one warms up
            order = RATES if number % 2 else RATES[::-1]
            for rate in order:
                row = block(models[rate], images, passed, requests if number >= 0 else requests // 4)
                if number >= 0:
                    rows.append({"audit_rate": rate, "round": number, **row})
    return rows


def block(model: GuardedModel, images: np.ndarray, passed: Sequence[int], requests: int) -> dict[str, float | str]:
    """Return figures of one block of requests."""
    model.runtime.metrics.drain()
    seconds, audited = [], []
    for number in range(requests):
        row = passed[number % len(passed)]
        started = time.perf_counter()
        model.answer(images[row : row + 1])
        seconds.append(time.perf_counter() - started)
        found = {sample.name: sample.value for sample in model.runtime.metrics.drain()}
        if found.get("guard_audited_total", 0) > 0:
            audited.append(seconds[-1])
    milliseconds = 1000 * np.array(seconds)
    return {
        "requests": requests,
        "audits": len(audited),
        "p50_ms": round(float(np.median(milliseconds)), 4),
        "p99_ms": round(float(np.quantile(milliseconds, 0.99)), 4),
        "mean_ms": round(float(milliseconds.mean()), 4),
        "audited_ms": round(1000 * statistics.median(audited), 3) if audited else "",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the table, and say whether the aim holds."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--requests", type=int, default=1000)
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "audit_cost.csv")
    given = options.parse_args(arguments)
    print(f"seed {SEED}")
    rows = measure(given.rounds, given.requests)
    with given.results.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    without = {row["round"]: row for row in rows if row["audit_rate"] == 0}
    ratios: dict[float, float] = {}
    for rate in RATES[1:]:
        for measured in ("p50_ms", "mean_ms", "p99_ms"):
            found = [row[measured] / without[row["round"]][measured] for row in rows if row["audit_rate"] == rate]
            low, high = np.quantile(found, (0.25, 0.75))
            print(f"audit rate {rate}: {measured} x{statistics.median(found):.3f} ({low:.3f} to {high:.3f})")
            if measured == "p50_ms":
                ratios[rate] = statistics.median(found)
    print(f"aim: p50 at {AIM_RATE} at most x{AIM}: {'holds' if ratios[AIM_RATE] <= AIM else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
