"""The demo's second half: a simulated reviewer answers flagged inputs through the page, and the guard learns."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from guard.data.image_files import encode_png
from guard.errors import ServerError
from guard.statistics.evaluation import attack_success_rate, clean_accuracy, false_positive_rate, true_positive_rate
from guard.storage.bundle import BundleStore
from guard.torchserve.client import Client, Reply, run_load
from guard.torchserve.server import TorchServeInstance
from guard.types import Float32Array, IntArray

#: Inputs that the simulated reviewer answers: half the most suspicious ones, half the oldest ones.
ANSWERS = 50
#: Inputs that are sent again before and after; none of them was sent before, or is seen by the reviewer.
CLEAN_REQUESTS, TRIGGERED_REQUESTS = 1000, 500
_REVIEWER = "simulated"
_SWAP_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Traffic:
    """Labelled images of shape (1, h, w) as they are sent; `attacker_labels` is None for clean ones."""

    images: Float32Array
    true_labels: IntArray
    attacker_labels: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Rates:
    """What the guarded model did on the inputs that are sent before and after; fractions."""

    clean_accuracy_guarded: float
    false_positive_rate: float
    true_positive_rate: float
    attack_success_guarded: float


@dataclass(frozen=True, slots=True)
class LoopReport:
    """What a person's answers changed.

    Attributes
    ----------
    model : str
    answers, called_poisoned : int
        Inputs that were answered, and those of them that were called poisoned.
    outcome : str
        Of the round of retraining: `"promoted"`, or `"refused"` with its reasons.
    reasons : tuple of str
    before, after : Rates
        The same inputs, judged by the bundle before and the one that is active afterwards.
    bundle_before, bundle_after : str
        Digests.
    """

    model: str
    answers: int
    called_poisoned: int
    outcome: str
    reasons: tuple[str, ...]
    before: Rates
    after: Rates
    bundle_before: str
    bundle_after: str

    def as_dict(self) -> dict[str, Any]:
        """Return everything, ready for JSON."""
        return asdict(self)


def run_loop(
    server: TorchServeInstance,
    model: str,
    *,
    queue_url: str,
    bundles: Path,
    seen: Sequence[Traffic],
    fresh: Sequence[Traffic],
    console: Console,
) -> LoopReport:
    """Let a simulated reviewer answer what was flagged, retrain once, and measure the same new inputs before and after.

    The reviewer knows the truth of the images that were sent, finds each by its pixels, and answers through the review
    page's own HTTP interface.

    Parameters
    ----------
    server : TorchServeInstance
        Serves the model behind its guard, with this queue.
    model : str
    queue_url : str
    bundles : Path
        The folder that the served guard follows.
    seen, fresh : sequence of Traffic
        What was sent already, and what is sent now: clean and triggered.
    console : Console

    Raises
    ------
    ServerError
        If the page does not answer, retraining fails, or the server does not take the new bundle.
    """
    from guard.relabel.queue import Queue
    from guard.relabel.reviewers import Reviewers
    from guard.relabel.rounds import Rounds
    from guard.review.known_bundles import KnownBundles
    from guard.review.server import serving_in_thread
    from guard.review.workspace import ReviewSettings, Workspace

    with Queue.open(queue_url) as queue:
        token = Reviewers(queue).add(_REVIEWER, "admin")
        workspace = Workspace(queue, Reviewers(queue), Rounds(queue), KnownBundles(bundles), settings=ReviewSettings())
        with serving_in_thread(workspace) as url, Client(url, token=token) as page:
            console.print(f"a simulated reviewer answers {ANSWERS} flagged inputs on {url}", highlight=False)
            answered = _answer(page, _truth(seen))
            _parsed(page.request("POST", "/api/v1/retrain", json.dumps({"model": model}), headers=_JSON))
        before = _measure(server, model, fresh)
        bundle_before = str(BundleStore(bundles).active_digest())
        with console.status("retraining in a process of its own"):
            _retrain(queue_url, model, bundles)
        done = Rounds(queue).last(model)
    bundle_after = str(BundleStore(bundles).active_digest())
    _wait_for_bundle(server, model, fresh[0].images[0], bundle_after)
    after = _measure(server, model, fresh)
    outcome, report = (done.outcome, done.report) if done is not None else (None, None)
    return LoopReport(
        model=model,
        answers=len(answered),
        called_poisoned=sum(answered),
        outcome=str(outcome),
        reasons=tuple((report or {}).get("reasons", ())),
        before=before,
        after=after,
        bundle_before=bundle_before,
        bundle_after=bundle_after,
    )


_JSON = {"Content-Type": "application/json"}


def print_loop(report: LoopReport, console: Console) -> None:
    """Print what was answered, what came of it, and the table before and after."""
    table = Table(title=f"{report.model}: new inputs over HTTP, before and after the reviewer's answers")
    for heading in ("bundle", "clean accuracy, guarded", "attack success", "detected (TPR)", "false alarms"):
        table.add_column(heading, justify="left" if heading == "bundle" else "right")
    for digest, rates in ((report.bundle_before, report.before), (report.bundle_after, report.after)):
        table.add_row(
            digest[:12],
            f"{rates.clean_accuracy_guarded:.3f}",
            f"{rates.attack_success_guarded:.3f}",
            f"{rates.true_positive_rate:.3f}",
            f"{rates.false_positive_rate:.3f}",
        )
    if not console.is_terminal:  # a pipe or a file: never squeeze the table
        console = Console(width=120, file=console.file)
    console.print(table)
    console.print(
        f"{report.answers} answers, {report.called_poisoned} of them poisoned; retraining: {report.outcome}"
        + "".join(f"\n  {reason}" for reason in report.reasons),
        highlight=False,
    )


def _truth(seen: Sequence[Traffic]) -> dict[bytes, tuple[int, bool]]:
    """Return true label and whether it is triggered, by the pixels of what was sent."""
    return {
        np.rint(image[0] * 255).astype(np.uint8).tobytes(): (int(label), part.attacker_labels is not None)
        for part in seen
        for image, label in zip(part.images, part.true_labels, strict=True)
    }


def _answer(page: Client, truth: Mapping[bytes, tuple[int, bool]]) -> list[bool]:
    """Answer through the page; return which answers said "poisoned"."""
    answered_poisoned = []
    for order in ("suspicion", "age"):
        for _ in range(ANSWERS // 2):
            items = _parsed(page.request("GET", f"/api/v1/items/next?n=1&order={order}"))["items"]
            if not items:
                break
            (item,) = items
            reply = page.request("GET", item["image"])
            if reply.status != 200:
                raise ServerError(f"the review page does not show item {item['id']}: status {reply.status}.")
            with Image.open(io.BytesIO(reply.body)) as picture:
                label, is_poisoned = truth[np.asarray(picture.convert("L")).tobytes()]
            answer = {"is_poisoned": is_poisoned, "true_label": label}
            path = f"/api/v1/items/{item['id']}/decision"
            _parsed(page.request("POST", path, json.dumps(answer), headers=_JSON))
            answered_poisoned.append(is_poisoned)
    return answered_poisoned


def _parsed(reply: Reply) -> dict[str, Any]:
    if reply.status != 200:
        raise ServerError(f"the review page answered {reply.status}: {reply.error or reply.body[:200]!r}.")
    parsed: dict[str, Any] = json.loads(reply.body)
    return parsed


def _measure(server: TorchServeInstance, model: str, traffic: Sequence[Traffic]) -> Rates:
    labels, flagged = [], []
    for part in traffic:
        bodies = [encode_png(image) for image in part.images]
        replies = run_load(
            server.inference_url,
            [model] * len(bodies),
            bodies,
            token=server.token(),
            clients=4,
            content_type="image/png",
        )
        if failed := [reply for reply in replies if reply.status != 200]:
            raise ServerError(f"{len(failed)} of {len(replies)} requests failed: {failed[0]}.")
        labels.append(np.array([json.loads(reply.body)["label"] for reply in replies], dtype=np.int64))
        flagged.append(np.array([reply.headers.get("guard-verdict") == "poisoned" for reply in replies]))
    clean, triggered = traffic
    assert triggered.attacker_labels is not None
    both = np.concatenate(flagged)
    is_poisoned = np.arange(len(both)) >= len(flagged[0])
    return Rates(
        clean_accuracy_guarded=clean_accuracy(labels[0], clean.true_labels, flagged[0]),
        false_positive_rate=false_positive_rate(both, is_poisoned),
        true_positive_rate=true_positive_rate(both, is_poisoned),
        attack_success_guarded=attack_success_rate(
            labels[1], triggered.attacker_labels, triggered.true_labels, flagged[1]
        ),
    )


def _retrain(queue_url: str, model: str, bundles: Path) -> None:
    """Run one round of `guard retrainer`, as a person's button would."""
    command = [sys.executable, "-m", "guard.cli", "retrainer", "--once", "--model", model, "--bundles", str(bundles)]
    environment = {**os.environ, "GUARD_QUEUE_URL": queue_url}  # not in the command line, which everybody can see
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerError(f"the retrainer failed: {done.stderr.strip()[-500:]}")


def _wait_for_bundle(server: TorchServeInstance, model: str, image: Float32Array, digest: str) -> None:
    """Wait until a server with one worker per model answers with that bundle."""
    deadline = time.monotonic() + _SWAP_SECONDS
    with server.client() as client:
        while client.predict(model, encode_png(image), content_type="image/png").headers.get("guard-bundle") != digest:
            if time.monotonic() > deadline:
                raise ServerError(f"the server did not take bundle {digest[:12]} within {_SWAP_SECONDS:g} s.")
            time.sleep(0.1)
