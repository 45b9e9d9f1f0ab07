"""Serve one guarded network by every engine: the same verdicts? and what does each cost beside itself unguarded?

    python benchmarks/engines.py [--rounds 3] [--seconds 4]

Writes `engines.csv`: one row per engine, number of clients, variant and round. The small CNN of `guard demo` on real
MNIST images: 1,000 requests are compared with what the guard says of the same images in this process
(`verdict_differences`: the verdict differs, or the p-value by more than 1e-4). Variants take turns in short blocks, one
at a time; ratios are taken within a round. TorchServe gets PNG files, as its handler takes them; the local
engine gets tensors. An engine's unguarded variant is the same engine with the network alone. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: threads that wait take the server's cores

import numpy as np
from serving_overhead import LARGEST_RATE, MAX_BATCH_DELAY_MS, SEED, Material, of_demo
from socket_client import SocketClient

from guard.config import GuardConfig
from guard.data.image_files import encode_png
from guard.detection.pipeline import Guard
from guard.local.server import LocalServer
from guard.processes.ports import LOOPBACK, free_port
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.torchserve.client import Reply, run_load
from guard.torchserve.server import TorchServeInstance

TABLE = Path(__file__).resolve().parent / "results" / "engines.csv"
COLUMNS = (
    *("engine", "replicas", "clients", "batch_size", "variant"),
    *("p50_ms", "requests_per_second", "verdict_differences", "round"),
)
VARIANTS = ("unguarded", "guarded")
CLIENTS = (1, 8)
BATCH_SIZE = 8
WARM_UP_SECONDS = 8.0
LARGEST_DIFFERENCE = 1e-4


class V2Client(SocketClient):
    """Sends what the open inference protocol takes: JSON, and behind it the tensor."""

    json_bytes = 0

    def predict(self, model: str, body: bytes | str, **_: Any) -> Reply:
        """Ask a model for one prediction."""
        headers = {"Inference-Header-Content-Length": str(self.json_bytes)}
        return self.request("POST", f"/v2/models/{model}/infer", body, headers=headers)


class Side(NamedTuple):
    """One engine with both variants: where each is asked, and how."""

    engine: str
    urls: Mapping[str, str]
    token: str | None
    bodies: Sequence[bytes]
    client: type[SocketClient]
    content_type: str


def send(side: Side, variant: str, clients: int, seconds: float) -> list[Reply]:
    """Keep `clients` connections busy for some seconds and return the replies."""
    replies = run_load(
        side.urls[variant],
        variant,
        list(itertools.islice(itertools.cycle(side.bodies), int(LARGEST_RATE * seconds))),
        token=side.token,
        clients=clients,
        content_type=side.content_type,
        limit_seconds=seconds,
        client_class=side.client,
    )
    sent = [reply for reply in replies if not reply.error.startswith("not sent")]
    if failed := [reply for reply in sent if reply.status != 200]:
        raise SystemExit(f"{side.engine}: {len(failed)} of {len(sent)} requests failed: {failed[0]}.")
    return sent


def differences(side: Side, expected: Sequence[tuple[bool, float]]) -> int:
    """Send every image once, and count the verdicts that are not those of this process."""
    replies = run_load(
        side.urls["guarded"],
        "guarded",
        list(side.bodies),
        token=side.token,
        clients=4,
        content_type=side.content_type,
        client_class=side.client,
    )
    found = [
        (r.headers.get("guard-verdict") == "poisoned", float(r.headers.get("guard-p-value", "nan"))) for r in replies
    ]
    return sum(
        is_poisoned != other or not abs(p_value - p_other) <= LARGEST_DIFFERENCE
        for (is_poisoned, p_value), (other, p_other) in zip(found, expected, strict=True)
    )


def measure(side: Side, rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of all blocks, one after the other."""
    until = time.monotonic() + WARM_UP_SECONDS
    for clients, variant in itertools.cycle(itertools.product(CLIENTS, VARIANTS)):
        if time.monotonic() > until:
            break
        send(side, variant, clients, 0.5)
    for number in range(1, rounds + 1):
        for clients in CLIENTS:
            for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
                start = time.perf_counter()
                replies = send(side, variant, clients, seconds)
                wall = time.perf_counter() - start
                yield {
                    "clients": clients,
                    "variant": variant,
                    "p50_ms": round(1e3 * float(np.median([reply.seconds for reply in replies])), 3),
                    "requests_per_second": round(len(replies) / wall, 1),
                    "round": number,
                }


@contextlib.contextmanager
def torchserve(store: Path, material: Material) -> Iterator[Side]:
    archives = {variant: f"{variant}.mar" for variant in VARIANTS}
    with TorchServeInstance(store, archives, batch_size=BATCH_SIZE, max_batch_delay_ms=MAX_BATCH_DELAY_MS) as server:
        server.wait_ready(180)
        bodies = [encode_png(image) for image in material.sent]
        urls = dict.fromkeys(VARIANTS, server.inference_url)
        yield Side("torchserve", urls, server.token(), bodies, SocketClient, "image/png")


@contextlib.contextmanager
def local(store: Path, material: Material) -> Iterator[Side]:
    shape = [1, *material.sent.shape[1:]]
    size = 4 * int(np.prod(shape))
    entry = {"name": "input", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    V2Client.json_bytes = len(head)
    bodies = [head + image.astype("<f4").tobytes() for image in material.sent]
    port = free_port()
    command = [sys.executable, __file__, "--unguarded", str(material.weights), material.architecture, str(port)]
    guarded = LocalServer(
        store,
        {"guarded": "guarded.mar"},
        batch_size=BATCH_SIZE,
        max_batch_delay_ms=MAX_BATCH_DELAY_MS,
        token_authorization=False,
    )
    plain = subprocess.Popen(command)
    try:
        with guarded:
            guarded.wait_ready()
            urls = {"guarded": guarded.inference_url, "unguarded": f"http://{LOOPBACK}:{port}"}
            yield Side("local", urls, None, bodies, V2Client, "application/octet-stream")
    finally:
        plain.terminate()
        plain.wait()


def serve_unguarded(weights: str, architecture: str, port: int) -> None:
    """Serve the network alone, behind the same protocol and the same batching."""
    import torch
    import uvicorn

    from guard.serving.answers import Response
    from guard.serving.guarded_model import RowAnswer
    from guard.v2.models import ServedModel as Served
    from guard.v2.rest import create_app

    module = SuspectModel.load(weights, architecture).module.eval()

    def answer(rows: np.ndarray, _requests: Any, guard: Any = None) -> list[RowAnswer]:
        with torch.inference_mode():
            logits = module(torch.from_numpy(np.require(rows, requirements=["C", "W"]))).numpy()
        return [RowAnswer(row, "bypassed", float("nan"), Response(200, None)) for row in logits]

    config = SimpleNamespace(verdict_detail="flag")
    model = SimpleNamespace(
        name="unguarded", answer=answer, input_shape=None, n_classes=10, guard=SimpleNamespace(config=config)
    )
    served = Served(model, batch_size=BATCH_SIZE, max_delay_s=MAX_BATCH_DELAY_MS / 1000)  # type: ignore[arg-type]
    uvicorn.run(create_app({"unguarded": served}), port=port, log_level="warning", access_log=False, lifespan="off")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the engines.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="per block")
    parser.add_argument("--unguarded", nargs=3, help=argparse.SUPPRESS)  # of the process that serves it
    options = parser.parse_args()
    if options.unguarded:
        weights, architecture, port = options.unguarded
        serve_unguarded(weights, architecture, int(port))
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch)
        material = of_demo(store, Path("build/demo"))
        suspect = SuspectModel.load(material.weights, material.architecture)
        guard = Guard.fit(suspect, material.clean, material.labels, GuardConfig(seed=SEED))
        served = ServedModel(material.weights, None, material.architecture, tuple(material.sent.shape[1:]), {})
        make_plain_archive("unguarded", served, model_store=store)
        settings = {"verdict_detail": "full"}
        make_guarded_archive("guarded", served, guard.save(store / "bundles"), model_store=store, settings=settings)
        expected = [(verdict.is_poisoned, verdict.p_value) for verdict in guard.inspect(material.sent)]
        engines: tuple[Callable[..., Any], ...] = (torchserve, local)
        for engine in engines:
            with engine(store, material) as side:
                fixed = {"engine": side.engine, "replicas": 1, "batch_size": BATCH_SIZE}
                fixed["verdict_differences"] = differences(side, expected)
                rows += [fixed | figures for figures in measure(side, options.rounds, options.seconds)]
                report(side.engine, fixed["verdict_differences"], rows)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(engine: str, n_different: int, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print one engine's medians over rounds, and the medians of the ratios within a round."""
    print(f"{engine}: {n_different} of 1000 verdicts differ from those of this process")
    for clients in CLIENTS:
        of = {
            (row["variant"], row["round"]): row for row in rows if (row["engine"], row["clients"]) == (engine, clients)
        }
        line = f"  {clients} clients, batch {BATCH_SIZE}:"
        for column in ("p50_ms", "requests_per_second"):
            plain, guarded = (
                [row[column] for (variant, _), row in sorted(of.items()) if variant == name] for name in VARIANTS
            )
            ratio = statistics.median(after / before for before, after in zip(plain, guarded, strict=True))
            line += f"  {column} {statistics.median(plain):.2f} -> {statistics.median(guarded):.2f} (x{ratio:.2f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
