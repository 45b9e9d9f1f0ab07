"""What it costs the retrainer to look whether a round is due, with many decided items in the queue.

    python benchmarks/retrainer_look.py

Fills a queue (SQLite) with answered items of a small network, then looks again and again in this process, as
`guard retrainer` does every few seconds. Writes `results/retrainer_look.csv`: items, looks, milliseconds per look
(median and 95th percentile), and the resident memory of the process in MiB before the first look and after the last.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil

from guard.relabel.items import Answer, FlaggedInput
from guard.relabel.queue import Queue
from guard.relabel.settings import QueueSettings
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.types import Activations

BATCH = 100
MODEL = "digits"


def main() -> None:
    """Fill, look, write."""
    project = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description="Measure one look of the retrainer.")
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--looks", type=int, default=100)
    parser.add_argument("--output", type=Path, default=project / "benchmarks" / "results" / "retrainer_look.csv")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bundles = Path(folder) / "bundles"
        bundles.mkdir()
        with Queue.open(f"sqlite:///{folder}/queue.db", QueueSettings(max_held=BATCH)) as queue:
            fill(queue, arguments.items)
            row = measured(
                Retrainer(queue, bundles, MODEL, settings_without_a_round()), arguments.items, arguments.looks
            )
    print(", ".join(f"{name} {value}" for name, value in row.items()))
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)


def settings_without_a_round() -> RetrainerSettings:
    """Return settings under which no round is due, however many items are decided."""
    return RetrainerSettings(enough_decisions=10**9, every_hours=0)


def fill(queue: Queue, n_items: int) -> None:
    """Put answered items into the queue: bodies of 4 KiB, images of 3 x 32 x 32, 256 features and three depths."""
    rng = np.random.default_rng(0)
    for start in range(0, n_items, BATCH):
        ids = [item for item in queue.enqueue([flagged(rng, start + place) for place in range(BATCH)]).ids if item]
        queue.claim_items("ada", ids)
        queue.decide_many("ada", [Answer(item_id=item, is_poisoned=True, true_label=3) for item in ids])


def flagged(rng: np.random.Generator, number: int) -> FlaggedInput:
    """Return one flagged input."""
    depths = {name: rng.random((1, 64), dtype=np.float32) for name in ("one", "two", "three")}
    return FlaggedInput(
        request_id=str(number),
        model=MODEL,
        bundle_digest="0" * 64,
        suspect_label=int(rng.integers(10)),
        backup_label=None,
        backup_confidence=None,
        raw={"lof:features": 1.0},
        surprise={"lof:features": 5.0},
        combined=5.0,
        p_value=0.001,
        false_positive_rate=0.01,
        reason="benchmark",
        content_type="image/png",
        body=rng.bytes(4096),
        inputs=rng.random((3, 32, 32), dtype=np.float32),
        activations=Activations(rng.random((1, 10), dtype=np.float32), rng.random((1, 256), dtype=np.float32), depths),
        received_at=datetime.now(UTC),
    )


def measured(retrainer: Retrainer, n_items: int, n_looks: int) -> dict[str, object]:
    """Return the figures of so many looks."""
    process, seconds = psutil.Process(), []
    with retrainer:
        before = process.memory_info().rss
        for _ in range(n_looks):
            started = time.perf_counter()
            assert retrainer.step() is None
            seconds.append(time.perf_counter() - started)
        after = process.memory_info().rss
    p50, p95 = 1000 * np.percentile(seconds, [50, 95])
    return {
        "items": n_items,
        "looks": n_looks,
        "look_ms_p50": round(float(p50), 2),
        "look_ms_p95": round(float(p95), 2),
        "idle_rss_mib_before": round(before / 2**20, 1),
        "idle_rss_mib_after": round(after / 2**20, 1),
    }


if __name__ == "__main__":
    main()
