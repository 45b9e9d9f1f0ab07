"""What a guard before another server costs: a request through `guard proxy` beside one to the server itself.

    python benchmarks/proxy.py [--rounds 3] [--seconds 4]

Writes `proxy.csv`: one row per number of clients, variant and round. The small CNN of `guard demo`, exported to ONNX,
is run by KServe's Python server with ONNX Runtime (`make kserve`, or an interpreter in KSERVE_PYTHON);
1,000 MNIST images go to it as binary tensors, one row a request. `direct` asks the server for its logits, `features`
also for what the guard looks at, `proxy` asks the proxy before it for logits, verdict and p-value. Variants take turns
in short blocks, one at a time; ratios are taken within a round. 1,000 verdicts are compared with what the guard says of
the same images in this process (`verdict_differences`: the verdict differs, or the p-value by more than 1e-4). Run it
on a quiet machine.
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
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch: threads that wait take the server's cores

import numpy as np
from serving_overhead import LARGEST_RATE, SEED, of_demo

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.export.exporting import new_record, write_models
from guard.export.record import RECORD, ExportRecord
from guard.processes.ports import LOOPBACK, free_port
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.torchserve.client import Client, Reply, run_load

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "proxy.csv"
COLUMNS = ("upstream", "clients", "variant", "p50_ms", "requests_per_second", "verdict_differences", "round")
VARIANTS = ("direct", "features", "proxy")
CLIENTS = (1, 8)
WARM_UP_SECONDS = 8.0
LARGEST_DIFFERENCE = 1e-4
NAME = "digits"


class V2Client(Client):
    """Sends what the open inference protocol takes: JSON, and behind it the tensor."""

    json_bytes = 0

    def predict(self, model: str, body: bytes | str, **_: Any) -> Reply:
        """Ask a model for one prediction."""
        headers = {"Inference-Header-Content-Length": str(self.json_bytes), "Content-Type": "application/octet-stream"}
        return self.request("POST", f"/v2/models/{model}/infer", body, headers=headers)


class Side(NamedTuple):
    """One variant: where it is asked, and with what."""

    url: str
    bodies: Sequence[bytes]
    client: type[V2Client]


def side(url: str, outputs: Sequence[str], images: Any) -> Side:
    """Return a variant that asks for some outputs as binary data."""
    shape = [1, *images.shape[1:]]
    entry = {"name": "input", "datatype": "FP32", "shape": shape}
    entry["parameters"] = {"binary_data_size": 4 * int(np.prod(shape))}
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
    head = json.dumps({"id": "1", "inputs": [entry], "outputs": wanted}).encode()

    class Sized(V2Client):
        json_bytes = len(head)

    return Side(url, [head + image.astype("<f4").tobytes() for image in images], Sized)


def send(asked: Side, bodies: Sequence[bytes], clients: int, seconds: float = 600.0) -> list[Reply]:
    """Send bodies over `clients` connections, for some seconds at most, and return the replies."""
    replies = run_load(asked.url, NAME, bodies, clients=clients, limit_seconds=seconds, client_class=asked.client)
    sent = [reply for reply in replies if not reply.error.startswith("not sent")]
    if failed := [reply for reply in sent if reply.status != 200]:
        raise SystemExit(f"{len(failed)} of {len(sent)} requests failed: {failed[0]}.")
    return sent


def differences(asked: Side, expected: Sequence[tuple[bool, float]]) -> int:
    """Send every image once, and count the verdicts that are not those of this process."""
    found = [
        (reply.headers["guard-verdict"] == "poisoned", float(reply.headers["guard-p-value"]))
        for reply in send(asked, asked.bodies, 4)
    ]
    return sum(
        is_poisoned != other or not abs(p_value - p_other) <= LARGEST_DIFFERENCE
        for (is_poisoned, p_value), (other, p_other) in zip(found, expected, strict=True)
    )


def measure(sides: Mapping[str, Side], rounds: int, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield the figures of all blocks, one after the other."""

    def block(variant: str, clients: int, seconds: float) -> list[Reply]:
        asked = sides[variant]
        bodies = list(itertools.islice(itertools.cycle(asked.bodies), int(LARGEST_RATE * seconds)))
        return send(asked, bodies, clients, seconds)

    until = time.monotonic() + WARM_UP_SECONDS
    for clients, variant in itertools.cycle(itertools.product(CLIENTS, VARIANTS)):
        if time.monotonic() > until:
            break
        block(variant, clients, 0.5)
    for number in range(1, rounds + 1):
        for clients in CLIENTS:
            for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
                start = time.perf_counter()
                replies = block(variant, clients, seconds)
                wall = time.perf_counter() - start
                yield {
                    "clients": clients,
                    "variant": variant,
                    "p50_ms": round(1e3 * float(np.median([reply.seconds for reply in replies])), 3),
                    "requests_per_second": round(len(replies) / wall, 1),
                    "round": number,
                }


@contextlib.contextmanager
def process(command: Sequence[str], log: Path, url: str, **settings: Any) -> Iterator[None]:
    """Run a server until the block ends; it is ready when it tells of the model."""
    with log.open("w") as file:
        server = subprocess.Popen(command, stdout=file, stderr=file, **settings)
        try:
            until = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"{url}/v2/models/{NAME}", timeout=5).close()
                    break
                except OSError:
                    if server.poll() is not None or time.monotonic() > until:
                        raise SystemExit(f"{command[0]} did not start:\n{log.read_text()[-2000:]}") from None
                    time.sleep(0.2)
            yield
        finally:
            server.terminate()
            server.wait()


@contextlib.contextmanager
def servers(folder: Path, record: ExportRecord, bundles: Path, images: Any) -> Iterator[dict[str, Side]]:
    """Start KServe and the proxy before it, and yield all variants."""
    kserve = os.environ.get("KSERVE_PYTHON", str(ROOT / "build" / "kserve" / "bin" / "python"))
    ports = free_port(), free_port()
    direct, proxied = (f"http://{LOOPBACK}:{port}" for port in ports)
    script = ROOT / "tests" / "upstreams" / "kserve_onnx.py"
    upstream = [kserve, str(script), str(folder / "model.onnx"), NAME, str(ports[0])]
    proxy = [sys.executable, "-m", "guard.cli", "proxy", "--upstream", direct, "--model", NAME, "--binary"]
    proxy += ["--exported", str(folder), "--bundles", str(bundles), "--port", str(ports[1]), "--no-token"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    full = {**os.environ, "GUARD_VERDICT_DETAIL": "full"}
    with (
        process(upstream, folder / "kserve.log", direct, env=alone),
        process(proxy, folder / "proxy.log", proxied, env=full),
    ):
        yield {
            "direct": side(direct, ["logits"], images),
            "features": side(direct, [*record.outputs], images),
            "proxy": side(proxied, ["logits", "guard_verdict", "guard_p_value"], images),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what the proxy costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="per block")
    parser.add_argument("--output", type=Path, default=TABLE)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        material = of_demo(folder, Path("build/demo"))
        suspect = SuspectModel.load(material.weights, material.architecture)
        guard = Guard.fit(suspect, material.clean, material.labels, GuardConfig(seed=SEED))
        bundle = guard.save(folder / "bundles")
        BundleStore(folder / "bundles").activate(bundle.name)
        record = new_record(Guard.load(bundle, suspect), suspect, NAME)
        write_models(record, suspect, {"onnx": folder / "model.onnx"})
        (folder / RECORD).write_text(record.text())
        expected = [(verdict.is_poisoned, verdict.p_value) for verdict in guard.inspect(material.sent)]
        with servers(folder, record, folder / "bundles", material.sent) as sides:
            fixed = {"upstream": "kserve", "verdict_differences": differences(sides["proxy"], expected)}
            rows += [fixed | figures for figures in measure(sides, options.rounds, options.seconds)]
    report(rows)
    with options.output.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the medians over rounds, and the medians of the ratios to `direct` within a round."""
    print(f"{rows[0]['verdict_differences']} of 1000 verdicts differ from those of this process")
    for clients in CLIENTS:
        for column in ("p50_ms", "requests_per_second"):
            of = {
                variant: [row[column] for row in rows if (row["clients"], row["variant"]) == (clients, variant)]
                for variant in VARIANTS
            }
            line = f"  {clients} clients, {column}: {statistics.median(of['direct']):.2f} direct"
            for variant in VARIANTS[1:]:
                ratio = statistics.median(
                    after / before for before, after in zip(of["direct"], of[variant], strict=True)
                )
                line += f", {statistics.median(of[variant]):.2f} {variant} (x{ratio:.2f})"
            print(line, flush=True)


if __name__ == "__main__":
    main()
