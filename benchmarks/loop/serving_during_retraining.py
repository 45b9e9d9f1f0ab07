"""Measure what live requests notice of a retraining beside them, and of the swap at its end.

    python benchmarks/loop/serving_during_retraining.py

One guarded model on real MNIST images in a real TorchServe, flagged requests going to a SQLite queue. In every round a
block of requests runs alone, then the same while `guard retrainer` works in its own process at low priority and
promotes its candidate; so the ratio is taken within a round. Writes `serving_during_retraining.csv` (round, block,
requests, failed, p50_ms, p99_ms, seconds, bundles). Run it on a quiet machine; about 4 minutes.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from safetensors.torch import save_file

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.data.image_files import encode_png
from guard.demo.run import ARCHITECTURE, SPLIT
from guard.detection.pipeline import Guard
from guard.lab.attacks.poisoning import poisoned_test_set
from guard.lab.attacks.recipes import DEMO_ATTACKS, train_badnet
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.torchserve.client import Reply, run_load
from guard.torchserve.server import TorchServeInstance

PROJECT = Path(__file__).resolve().parent.parent.parent
SEED, ROUNDS, CLIENTS = 0, 5, 1
BLOCK = 2000  # requests of a block
ANSWERS = 60  # inputs that are decided before each retraining
COLUMNS = ("round", "block", "requests", "failed", "p50_ms", "p99_ms", "seconds", "bundles")
MODEL = "digits"


def row_of(number: int, block: str, replies: Sequence[Reply]) -> dict[str, Any]:
    """Return one row from the replies of a block."""
    milliseconds = np.array([1000 * reply.seconds for reply in replies])
    return {
        "round": number,
        "block": block,
        "requests": len(replies),
        "failed": sum(reply.status != 200 for reply in replies),
        "p50_ms": round(float(np.quantile(milliseconds, 0.5)), 3),
        "p99_ms": round(float(np.quantile(milliseconds, 0.99)), 3),
        "seconds": round(float(milliseconds.sum()) / 1000 / CLIENTS, 2),
        "bundles": len({reply.headers.get("guard-bundle") for reply in replies}),
    }


def decide(url: str, truth: dict[bytes, tuple[int, bool]]) -> None:
    """Answer some of what waits in the queue, truly."""
    with Queue.open(url) as queue:
        items = queue.claim("reviewer", ANSWERS // 2) + queue.claim("reviewer", ANSWERS // 2, order="age")
        answers = []
        for item in items:
            label, is_poisoned = truth[item.input.body]
            answers.append(Answer(item_id=item.id, is_poisoned=is_poisoned, true_label=label))
        queue.decide_many("reviewer", answers)


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, measure, print the ratios, write the CSV file."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--output", type=Path, default=PROJECT / "benchmarks" / "results" / "loop")
    given = options.parse_args(arguments)
    data = load_dataset("mnist", "test")
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(SEED))
    images, labels = to_tensor_images(data.images), data.labels
    recipe = DEMO_ATTACKS[0]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        network, _, _ = train_badnet(recipe, images[train], labels[train], seed=SEED)
        save_file(network.state_dict(), folder / "weights.safetensors")
        suspect = SuspectModel.load(folder / "weights.safetensors", ARCHITECTURE)
        guard = Guard.fit(suspect, images[validate], labels[validate], GuardConfig(false_positive_rate=0.05, seed=SEED))
        bundle = guard.save(folder / "bundles")
        BundleStore(folder / "bundles").activate(bundle.name)
        url = f"sqlite:///{folder}/queue.db"
        model = ServedModel(folder / "weights.safetensors", None, ARCHITECTURE, (1, 28, 28))
        make_guarded_archive(
            MODEL,
            model,
            bundle,
            model_store=folder / "store",
            bundles=folder / "bundles",
        )
        triggered = poisoned_test_set(images[test], labels[test], recipe.apply_trigger, recipe.target)
        clean = [
            (encode_png(image), (int(label), False)) for image, label in zip(images[test], labels[test], strict=True)
        ]
        bad = [
            (encode_png(image), (int(label), True))
            for image, label in zip(triggered.images, triggered.true_labels, strict=True)
        ]
        truth = dict([*clean, *bad])
        # One triggered request in ten: what a server sees, and enough to decide in every round.
        block = [(bad if turn % 10 == 0 else clean)[turn % 1500][0] for turn in range(BLOCK)]
        retrainer = [sys.executable, "-m", "guard.cli", "retrainer", "--once", "--now", "--model", MODEL]
        retrainer += ["--bundles", str(folder / "bundles")]
        with TorchServeInstance(
            folder / "store", {MODEL: f"{MODEL}.mar"}, batch_size=8, environment={"GUARD_QUEUE_URL": url}
        ) as server:
            server.wait_ready(180)

            def send(bodies: Sequence[bytes]) -> list[Reply]:
                return run_load(server.inference_url, MODEL, bodies, token=server.token(), clients=CLIENTS)

            for _ in range(5):
                send(block)  # Java compiles what is called often
            for number in range(ROUNDS):
                decide(url, truth)
                rows.append(row_of(number, "alone", send(block)))
                process = subprocess.Popen(
                    retrainer, env={**os.environ, "GUARD_QUEUE_URL": url}, stdout=subprocess.PIPE
                )
                ended = threading.Event()
                threading.Thread(target=lambda p=process, e=ended: (p.wait(), e.set()), daemon=True).start()  # type: ignore[misc]
                replies: list[Reply] = []
                while not ended.is_set():
                    replies += send(block[:250])
                replies += send(block[:1000])  # the swap may come a little later
                rows.append(row_of(number, "retraining", replies))
                assert process.stdout is not None
                print(process.stdout.read().decode().splitlines()[0], flush=True)
                print(rows[-2], rows[-1], sep="\n", flush=True)
    given.output.mkdir(parents=True, exist_ok=True)
    with (given.output / "serving_during_retraining.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    ratios = [after["p99_ms"] / before["p99_ms"] for before, after in zip(rows[0::2], rows[1::2], strict=True)]
    print(f"p99 while retraining / alone: median {statistics.median(ratios):.2f}, highest {max(ratios):.2f}")
    print(f"failed requests: {sum(row['failed'] for row in rows)} of {sum(row['requests'] for row in rows)}")


if __name__ == "__main__":
    main()
