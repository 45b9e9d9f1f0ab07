"""What a rehearsal serves and starts: one backdoored network behind its guard, with everything that watches it."""

from __future__ import annotations

import json
import os
import queue as queues
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
from safetensors.torch import save_file

from guard.config import GuardConfig
from guard.data.datasets import load_dataset, split_rows, to_tensor_images
from guard.demo.run import SPLIT
from guard.detection.pipeline import Guard
from guard.lab.attacks.poisoning import poisoned_test_set
from guard.lab.attacks.recipes import DEMO_ATTACKS, train_badnet
from guard.storage.bundle import BundleStore
from guard.suspect.model import SuspectModel
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.types import Float32Array, IntArray

MODEL = "digits"
RATE = 0.01
_HERE = Path(__file__).resolve().parent
_START_SECONDS = 180.0


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Test images, clean and with the trigger, the true labels of both, and which clean image each trigger is on."""

    clean: Float32Array
    clean_labels: IntArray
    triggered: Float32Array
    triggered_labels: IntArray
    triggered_sources: IntArray


def prepare(folder: Path, seed: int, **settings: object) -> tuple[Images, Guard]:
    """Backdoor a network on the real images that ship with the package, guard it, and write its archive.

    Inputs that cannot be scored are answered and marked (`failure_mode = "open"`), so that there is a bypass to see.
    More serving settings of the archive may be given.
    """
    data = load_dataset("mnist", "test")
    train, validate, test = split_rows(len(data), SPLIT, np.random.default_rng(seed))
    images, labels = to_tensor_images(data.images), data.labels
    recipe = DEMO_ATTACKS[0]
    network, _, _ = train_badnet(recipe, images[train], labels[train], seed=seed)
    save_file(network.state_dict(), folder / "weights.safetensors")
    guard = Guard.fit(
        SuspectModel(network), images[validate], labels[validate], GuardConfig(false_positive_rate=RATE, seed=seed)
    )
    bundle = guard.save(folder / "bundles")
    BundleStore(folder / "bundles").activate(bundle.name)
    about = {"architecture": "mnist_cnn", "n_classes": 10, "input_shape": images.shape[1:]}
    (folder / "tensor_handler.json").write_text(json.dumps(about))
    make_guarded_archive(
        MODEL,
        ServedModel(
            folder / "weights.safetensors",
            _HERE / "faulty_handler.py",
            extra_files=[_HERE.parent / "tensor_handler.py", folder / "tensor_handler.json"],
        ),
        bundle,
        model_store=folder / "model_store",
        bundles=folder / "bundles",
        settings={"failure_mode": "open", "verdict_detail": "full", **settings},
    )
    triggered = poisoned_test_set(images[test], labels[test], recipe.apply_trigger, recipe.target)
    return Images(images[test], labels[test], triggered.images, triggered.true_labels, triggered.source_rows), guard


class Command:
    """One `guard` command as a person would start it; its lines on standard output are read as they come."""

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments = list(arguments)
        self._lines: queues.Queue[str | None] = queues.Queue()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "guard.cli", *arguments],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C reaches the rehearsal, which stops everything in order
        )
        threading.Thread(target=self._read, daemon=True).start()

    def wait_for(self, pattern: str) -> str:
        """Return the first group of the first line that the pattern is found in."""
        message = []
        while True:
            line = self._lines.get(timeout=_START_SECONDS)
            if line is None:
                raise RuntimeError(f"guard {self.arguments[0]} has ended: {' '.join(message)[-500:]}")
            message.append(line.strip())
            if found := re.search(pattern, line):
                return found[1]

    def family(self) -> list[psutil.Process]:
        """Return the process and all that it started."""
        process = psutil.Process(self.process.pid)
        return [process, *process.children(recursive=True)]

    def stop(self) -> None:
        """Stop it as `systemctl stop` does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)


@dataclass(frozen=True, slots=True)
class Service:
    """Addresses of all that runs."""

    inference_url: str
    token: str
    prometheus_url: str
    review_url: str
    queue_url: str
    server: Command
    observer: Command


@contextmanager
def running(folder: Path, rules: Sequence[Path], scrape_seconds: float, *, retrain: bool = True) -> Iterator[Service]:
    """Start server, review page, retrainer and Prometheus; stop them, and make sure that nothing is left.

    Raises
    ------
    RuntimeError
        If something does not start, or runs on after it was stopped.
    """
    queue, work = folder / "queue.db", folder / "work"
    started: list[Command] = []
    seen: list[psutil.Process] = []
    try:
        serve = ["serve", MODEL, "--model-store", "model_store", "--port", "0", "--work-dir", str(work)]
        serve += ["--queue", str(queue), "--review", "--review-port", str(_free_port())]
        serve += ["--retrain", "--retrain-option=--interval=1"] if retrain else []
        started.append(server := Command(serve, folder))
        inference = server.wait_for(r"ready after .* on (http://\S+);")
        review = server.wait_for(r"review page on (http://\S+)")
        targets = server.wait_for(r"--targets (\S+)")
        seen += server.family()
        observe = ["observe", "--targets", targets, "--port", "0", "--scrape-seconds", str(scrape_seconds)]
        started.append(observer := Command([*observe, *(f"--rules={file}" for file in rules)], folder))
        prometheus = observer.wait_for(r"Prometheus on (http://[^\s;]+)")
        seen += observer.family()
        token = json.loads((work / "key_file.json").read_text())["inference"]["key"]
        yield Service(inference, token, prometheus, review, f"sqlite:///{queue}", server, observer)
        seen += [entry for command in started for entry in command.family()]
    finally:
        for command in reversed(started):
            if command.process.poll() is None:
                command.stop()
    _, left = psutil.wait_procs(set(seen), timeout=10)
    if left:
        raise RuntimeError(f"{len(left)} processes run on: {[entry.name() for entry in left]}")


def _free_port() -> int:
    from guard.processes.ports import free_port

    return free_port()
