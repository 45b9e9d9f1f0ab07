"""Take every trained network through `guard fit`, `archive`, `wrap`, `serve`, real requests, and `unwrap`.

    python benchmarks/networks/serving.py

Two ways, as a user has weights or has an archive: (1) `guard fit` and `guard archive` with the plain image handler;
(2) an archive made by the stock torch-model-archiver with a handler of one's own, `guard wrap`. Three archives per
network are served at once: the plain one, the wrapped one, and that of way 1. Clean and triggered test images are sent
to each over HTTP, one by one. Writes `networks_served.csv`; networks are those with the patch trigger, seed 0.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from detection import RESULTS, suspect_model
from PIL import Image
from training import ATTACKS, BENIGN, WORK, planted, weights_path

from guard.detection.pipeline import Guard
from guard.lab.zoo.splits import load_split
from guard.storage.bundle import BundleStore
from guard.torchserve.client import Client, Reply
from guard.torchserve.server import TorchServeInstance
from guard.types import Float32Array

HERE = Path(__file__).parent
RATE = 0.05
PER_CLASS = 24
N_REQUESTS = 200
FILES = [HERE / name for name in ("sign_networks.py", "torchvision_stand_in.py")]
#: Of p-values: rounding differs with the size of a batch.
SAME = 5e-3


def png(image: Float32Array) -> bytes:
    """Return an image (channels, height, width) in [0, 1] as PNG."""
    stream = io.BytesIO()
    Image.fromarray(np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def write_clean(folder: Path) -> None:
    """Write clean validation images, one folder per class."""
    part = load_split("gtsrb").validation
    for label in range(43):
        (folder / str(label)).mkdir(parents=True)
        for row in np.flatnonzero(part.labels == label)[:PER_CLASS]:
            (folder / str(label) / f"{row}.png").write_bytes(png(part.images[row]))


def command(*words: object) -> float:
    """Run a command in this folder's environment and return its seconds; what it says goes to the terminal."""
    start = time.perf_counter()
    places = os.pathsep.join([str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, *map(str, words)], check=True, env={**os.environ, "PYTHONPATH": places})
    return time.perf_counter() - start


def guard(*words: object) -> float:
    """Run a `guard` command."""
    return command("-m", "guard.cli", *words)


def stock_archive(name: str, folder: Path) -> Path:
    """Make an archive with the stock archiver and the handler of `own_handler.py`."""
    (folder / "network.txt").write_text(name)
    command(
        *("-m", "model_archiver.model_packaging", "--model-name", "plain", "--version", "1.0"),
        *("--serialized-file", weights_path(name, ATTACKS[0]), "--handler", HERE / "own_handler.py"),
        *("--extra-files", ",".join(map(str, [*FILES, folder / "network.txt"])), "--export-path", folder / "store"),
    )
    return folder / "store" / "plain.mar"


def ask(server: TorchServeInstance, models: Sequence[str], bodies: Sequence[bytes]) -> dict[str, list[Reply]]:
    """Send every body to all models, one after the other, so that all have the same moments of a busy machine."""
    replies: dict[str, list[Reply]] = {model: [] for model in models}
    with Client(server.inference_url, token=server.token()) as client:
        for body in bodies:
            for model in models:
                replies[model].append(client.predict(model, body))
    return replies


def served(name: str, folder: Path, clean: Path) -> dict[str, Any]:
    """Take one network both ways and return what was seen."""
    (folder / "store").mkdir(parents=True)
    stores = ("--bundles", folder / "bundles")
    weights = ("--weights", weights_path(name, ATTACKS[0]), "--architecture", f"sign_networks:{name}")
    fit_seconds = guard("fit", *weights, "--images", clean, "--false-positive-rate", RATE, *stores)
    guard("archive", "fitted", *weights, "--images", clean, *stores, "--model-store", folder / "store")
    plain = stock_archive(name, folder)
    wrapped = folder / "store" / "plain.guarded.mar"
    guard("wrap", plain, "--images", clean, "--false-positive-rate", RATE, "--bundles", folder / "wrapped")
    guard("unwrap", wrapped, "--output", folder / "back.mar")
    split = load_split("gtsrb").test
    (triggered,) = planted(ATTACKS[0], 0).test_sets(split.images[:N_REQUESTS], split.labels[:N_REQUESTS])
    images = np.concatenate([split.images[:N_REQUESTS], triggered.images])
    bodies = [png(image) for image in images]
    images = (np.rint(images * 255) / 255).astype(np.float32)
    suspect = suspect_model(name, ATTACKS[0])
    models = {"plain": "plain.mar", "wrapped": "plain.guarded.mar", "fitted": "fitted.mar"}
    detail = {"GUARD_VERDICT_DETAIL": "full"}
    places = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    with TorchServeInstance(folder / "store", models, environment={**detail, "PYTHONPATH": places}) as server:
        server.wait_ready(300)
        ask(server, list(models), bodies[:10])  # what the first requests cost is nobody's latency
        replies = ask(server, list(models), bodies)
    row: dict[str, Any] = {
        "network": name,
        "requests": len(bodies),
        "statuses": " ".join(sorted({str(reply.status) for answers in replies.values() for reply in answers})),
        "bodies_as_unguarded": sum(a.body == b.body for a, b in zip(replies["plain"], replies["wrapped"], strict=True)),
        "unwrapped_byte_for_byte": (folder / "back.mar").read_bytes() == plain.read_bytes(),
        "fit_seconds": fit_seconds,
    }
    for model, bundles in (("fitted", folder / "bundles"), ("wrapped", folder / "wrapped")):
        expected = [
            verdict.p_value for verdict in Guard.load(BundleStore(bundles).active_path(), suspect).inspect(images)
        ]
        answers = replies[model]
        p_values = [float(reply.headers.get("guard-p-value", "nan")) for reply in answers]
        flagged = np.array([reply.headers.get("guard-verdict") == "poisoned" for reply in answers])
        row[f"{model}_p_values_as_offline"] = int((np.abs(np.subtract(p_values, expected)) <= SAME).sum())
        row[f"{model}_false_positive_rate"] = float(flagged[:N_REQUESTS].mean())
        row[f"{model}_true_positive_rate"] = float(flagged[N_REQUESTS:].mean())
    for model, answers in replies.items():
        row[f"{model}_median_ms"] = 1000 * float(np.median([reply.seconds for reply in answers]))
    return row


def main(arguments: Sequence[str] | None = None) -> None:
    """Take all networks the two ways, and write what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(BENIGN), choices=list(BENIGN))
    chosen = parser.parse_args(arguments).networks
    output = RESULTS.with_name("networks_served.csv")
    rows: list[Any] = []
    if output.exists():
        with output.open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["network"] not in chosen]
    work = WORK / "served"
    shutil.rmtree(work, ignore_errors=True)
    write_clean(work / "clean")
    for name in chosen:
        row = served(name, work / name, work / "clean")
        rows.append({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()})
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {key: round(v, 4) if isinstance(v, float) else v for key, v in row.items()} for row in rows
            )
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
