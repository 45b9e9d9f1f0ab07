"""Serve one guarded network by every engine: the same verdicts? and what does each cost beside itself unguarded?

    python benchmarks/engines.py [--engine ray --replicas 2] [--rounds 3] [--seconds 4]

Writes `engines.csv`: one row per engine, number of replicas and of clients, variant and round; rows of what is not
measured this time stay. The small CNN of `guard demo` on real
MNIST images: 1,000 requests are compared with what the guard says of the same images in this process
(`verdict_differences`: the verdict differs, or the p-value by more than 1e-4). Variants take turns in short blocks, one
at a time; ratios are taken within a round. TorchServe gets PNG files, as its handler takes them; the other
engines get tensors. An engine's unguarded variant is the same engine with the network alone. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
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
from guard.local.engine import EngineServer
from guard.local.server import LocalServer
from guard.processes.ports import LOOPBACK, free_port
from guard.ray.server import OWN_CLUSTER, RayServer
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.torchserve.client import Reply, run_load
from guard.torchserve.server import TorchServeInstance

TABLE = Path(__file__).resolve().parent / "results" / "engines.csv"
COLUMNS = (
    *("engine", "replicas", "clients", "batch_size", "variant"),
    *("p50_ms", "requests_per_second", "verdict_differences", "round"),
)
ENGINES = ("torchserve", "local", "ray")
VARIANTS = ("unguarded", "guarded")
CLIENTS = (1, 8)
BATCH_SIZE = 8
WARM_UP_SECONDS = 8.0
LARGEST_DIFFERENCE = 1e-4
SETTINGS: dict[str, Any] = {
    "batch_size": BATCH_SIZE,
    "max_batch_delay_ms": MAX_BATCH_DELAY_MS,
    "token_authorization": False,
}


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
def torchserve(store: Path, material: Material, _replicas: int) -> Iterator[Side]:
    archives = {variant: f"{variant}.mar" for variant in VARIANTS}
    with TorchServeInstance(store, archives, batch_size=BATCH_SIZE, max_batch_delay_ms=MAX_BATCH_DELAY_MS) as server:
        server.wait_ready(180)
        bodies = [encode_png(image) for image in material.sent]
        urls = dict.fromkeys(VARIANTS, server.inference_url)
        yield Side("torchserve", urls, server.token(), bodies, SocketClient, "image/png")


def v2_bodies(material: Material) -> list[bytes]:
    """Return one request of the open inference protocol per image, in binary."""
    shape = [1, *material.sent.shape[1:]]
    size = 4 * int(np.prod(shape))
    entry = {"name": "input", "datatype": "FP32", "shape": shape, "parameters": {"binary_data_size": size}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    V2Client.json_bytes = len(head)
    return [head + image.astype("<f4").tobytes() for image in material.sent]


@contextlib.contextmanager
def v2_engine(name: str, guarded: EngineServer, material: Material, replicas: int) -> Iterator[Side]:
    """Run an engine of the open inference protocol beside the same one with the network alone."""
    port, bodies = free_port(), v2_bodies(material)
    arguments = [name, str(material.weights), material.architecture, str(port), str(replicas)]
    plain = subprocess.Popen(
        [sys.executable, __file__, "--unguarded", *arguments],
        env={**os.environ, **OWN_CLUSTER, "RAY_AUTH_TOKEN": secrets.token_hex(32)},
    )
    try:
        with guarded:
            guarded.wait_ready(180)
            urls = {"guarded": guarded.inference_url, "unguarded": f"http://{LOOPBACK}:{port}"}
            wait_until_answered(f"{urls['unguarded']}/v2/health/ready")
            yield Side(name, urls, None, bodies, V2Client, "application/octet-stream")
    finally:
        plain.terminate()
        plain.wait()


def wait_until_answered(url: str, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def local(store: Path, material: Material, replicas: int) -> contextlib.AbstractContextManager[Side]:
    return v2_engine("local", LocalServer(store, {"guarded": "guarded.mar"}, **SETTINGS), material, replicas)


def ray(store: Path, material: Material, replicas: int) -> contextlib.AbstractContextManager[Side]:
    guarded = RayServer(store, {"guarded": "guarded.mar"}, replicas=replicas, **SETTINGS)
    return v2_engine("ray", guarded, material, replicas)


def serve_unguarded(name: str, weights: str, architecture: str, port: int, replicas: int) -> None:
    """Serve the network alone, by the same engine: the same protocol, the same batching."""
    if name == "local":
        import uvicorn

        app = unguarded_app(weights, architecture)
        uvicorn.run(app, port=port, log_level="warning", access_log=False, lifespan="off")
        return
    import ray
    from ray import serve

    from guard.ray.app import door
    from guard.ray.settings import DEPLOYMENTS, GUARDED

    ray.init(address="local", num_cpus=replicas + 1, include_dashboard=False, object_store_memory=100 << 20)
    serve.start(http_options={"host": LOOPBACK, "port": port}, logging_config={"enable_access_log": False})
    options = {**DEPLOYMENTS[GUARDED], "num_replicas": replicas}
    deployment = serve.deployment(name="Unguarded", **options)(serve.ingress(door)(Unguarded))
    serve.run(deployment.bind(weights, architecture), logging_config={"enable_access_log": False})
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        while True:
            time.sleep(1)
    serve.shutdown()
    ray.shutdown()


class Unguarded:
    """A replica of the Ray engine with the network alone."""

    def __init__(self, weights: str, architecture: str) -> None:
        from guard.ray.batches import ServeBatcher

        self._app = unguarded_app(weights, architecture, make_batcher=ServeBatcher)

    async def answer(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, as ASGI has it."""
        await self._app(scope, receive, send)


def unguarded_app(weights: str, architecture: str, **options: Any) -> Any:
    """Return the application of the open inference protocol around the network alone."""
    import torch

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
    delay_s = MAX_BATCH_DELAY_MS / 1000
    served = Served(model, batch_size=BATCH_SIZE, max_delay_s=delay_s, **options)  # type: ignore[arg-type]
    return create_app({"unguarded": served})


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare the engines.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="per block")
    parser.add_argument("--engine", choices=ENGINES, action="append", help="may be repeated; default: all")
    parser.add_argument("--replicas", type=int, default=1, help="of the Ray engine")
    parser.add_argument("--output", type=Path, default=TABLE)
    parser.add_argument("--unguarded", nargs=5, help=argparse.SUPPRESS)  # of the process that serves it
    options = parser.parse_args()
    if options.unguarded:
        name, weights, architecture, port, replicas = options.unguarded
        serve_unguarded(name, weights, architecture, int(port), int(replicas))
        return
    chosen = {name: options.replicas if name == "ray" else 1 for name in options.engine or ENGINES}
    rows: list[dict[str, Any]] = []
    if options.output.exists():
        with options.output.open(newline="") as file:
            rows += [row for row in csv.DictReader(file) if chosen.get(row["engine"]) != int(row["replicas"])]
    kept = len(rows)
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
        engines: dict[str, Callable[..., Any]] = {"torchserve": torchserve, "local": local, "ray": ray}
        for name, replicas in chosen.items():
            with engines[name](store, material, replicas) as side:
                fixed = {"engine": side.engine, "replicas": replicas, "batch_size": BATCH_SIZE}
                fixed["verdict_differences"] = differences(side, expected)
                rows += [fixed | figures for figures in measure(side, options.rounds, options.seconds)]
                report(side.engine, fixed["verdict_differences"], rows[kept:])
    with options.output.open("w", newline="") as file:
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
