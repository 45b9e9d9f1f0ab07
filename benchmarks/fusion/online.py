"""Table 8 as it happens in service: a real TorchServe, the queue, a reviewer who answers everything, the retrainer."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from subjects import Guards, Record, Request, Subject, rates_on_rest

from guard.detection.pipeline import Guard
from guard.relabel.groups import refresh_groups
from guard.relabel.items import Answer
from guard.relabel.queue import Queue
from guard.relabel.rounds import Rounds
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.worker import Retrainer
from guard.storage.bundle import BundleStore
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive
from guard.torchserve.client import Reply, run_load
from guard.torchserve.server import TorchServeInstance
from guard.types import BoolArray, Float32Array

#: Seed of the order in which test images are seen.
STREAM_SEED = 0
#: Shares of the test images after which a round of retraining is held; the paper says that 10-20 % are enough.
SEEN_SHARES = (0.1, 0.2)
_READY_SECONDS = 180.0
_SWAP_SECONDS = 30.0
_CLIENTS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Sent:
    """What is sent in one part of the stream, clean inputs and triggered ones in a drawn order.

    Attributes
    ----------
    bodies : list of bytes
    truth : list of (int, bool)
        True label, and whether the input carries a trigger.
    """

    bodies: list[bytes]
    truth: list[tuple[int, bool]]


def learn_in_service(subject: Subject, request: Request) -> Record:
    """Serve a model behind both guards, let a reviewer answer what they flag, and measure them on what nobody has sent.

    A test image and its triggered copies are sent together, so that the others are new in both forms. After each of
    `SEEN_SHARES` a reviewer gives every queued input its true label and says whether it is poisoned; the retrainer
    holds a round, and the server follows if its gate promotes the candidate.
    """
    guards = subject.guards(request.noise_std, request.validation_quarters)
    n_images = len(subject.split.test.labels)
    order = np.random.default_rng(STREAM_SEED).permutation(n_images)
    ends = [round(share * n_images) for share in SEEN_SHARES]
    parts = [order[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    is_rest = np.ones(n_images, dtype=bool)
    is_rest[order[: ends[-1]]] = False
    record: Record = {mode: _rates("not_retrained", subject, guard, is_rest) for mode, guard in _by_mode(guards)}
    with tempfile.TemporaryDirectory() as scratch:
        served = _Served(Path(scratch), subject, guards)
        with Queue.open(served.queue_url) as queue, served.server:
            served.server.wait_ready(_READY_SECONDS)
            message: dict[str, list[bool]] = {mode: [] for mode in record}
            for share, rows in zip(SEEN_SHARES, parts, strict=True):
                sent = _part(subject, rows)
                requests, differing = served.send(sent)
                _answer(queue, sent, message)
                for mode, selected in record.items():
                    outcome, reasons = served.retrain(queue, mode)
                    selected |= {
                        "inputs": len(message[mode]),
                        "poisoned_inputs": sum(message[mode]),
                        "promoted_rounds": selected.get("promoted_rounds", 0) + (outcome == "promoted"),
                        f"requests_{_name(share)}": requests[mode],
                        f"differing_{_name(share)}": differing[mode],
                        f"round_{_name(share)}": outcome,
                        f"reasons_{_name(share)}": reasons,
                        **_rates(f"retrained_{_name(share)}", subject, served.active(mode), is_rest),
                    }
    return record


def _name(share: float) -> str:
    return f"{100 * share:.0f}percent"


def _by_mode(guards: Guards) -> list[tuple[str, Guard]]:
    return list(guards._asdict().items())


class _Served:
    """One network behind two guards in one server, with one queue."""

    def __init__(self, folder: Path, subject: Subject, guards: Guards) -> None:
        self.queue_url = f"sqlite:///{folder}/queue.db"
        self._suspect = subject.suspect
        self._stores: dict[str, BundleStore] = {}
        self._settings: dict[str, RetrainerSettings] = {}
        shape = tuple(subject.split.test.images.shape[1:])
        save_file(subject.suspect.module.state_dict(), folder / "weights.safetensors")
        card = subject.card
        about = {"architecture": card.architecture, "n_classes": card.n_classes, "input_shape": shape}
        (folder / "tensor_handler.json").write_text(json.dumps(about))
        model = ServedModel(
            folder / "weights.safetensors",
            handler=Path(__file__).parent.parent / "tensor_handler.py",
            extra_files=[folder / "tensor_handler.json"],
        )
        for mode, guard in _by_mode(guards):
            bundles = folder / f"bundles-{mode}"
            bundle = replace(guard, suspect=subject.suspect, input_shape=shape).save(bundles)
            store = self._stores[mode] = BundleStore(bundles)
            store.activate(bundle.name)
            # The paper learns from everything that was relabelled, and its rule has the rate that it happens to have.
            self._settings[mode] = RetrainerSettings(
                max_new_per_round=10**6,
                max_class_share=1,
                max_false_alarms_per_class=10**6,
                false_positive_rate=max(guard.realised_false_positive_rate, 1.0 / (len(guard.reference_labels) + 1)),
            )
            make_guarded_archive(
                mode,
                model,
                bundle,
                model_store=folder / "store",
                bundles=bundles,
                settings={"verdict_detail": "full"},
            )
        names = {mode: f"{mode}.mar" for mode in self._stores}
        self.server = TorchServeInstance(
            folder / "store",
            names,
            batch_size=16,
            work_dir=folder / "work",
            environment={"GUARD_QUEUE_URL": self.queue_url},
        )

    def active(self, mode: str) -> Guard:
        """Return the guard whose bundle is active."""
        return Guard.load(self._stores[mode].active_path())

    def send(self, sent: Sent) -> tuple[dict[str, int], dict[str, int]]:
        """Send everything to both guards; return, per mode, how many were answered and how many verdicts the library
        does not share.
        """
        requests, differing = {}, {}
        for mode, store in self._stores.items():
            self._wait_for(mode, str(store.active_digest()), sent.bodies[0])
            replies = self._load(mode, sent.bodies)
            flagged = np.array([reply.headers["guard-verdict"] == "poisoned" for reply in replies])
            kept = sum(reply.headers.get("guard-review") == "queued" for reply in replies)
            if kept != flagged.sum():
                raise RuntimeError(f"{mode}: {flagged.sum()} inputs were flagged, {kept} of them queued.")
            requests[mode] = len(replies)
            differing[mode] = int((flagged != self._library_says(mode, sent.bodies)).sum())
        return requests, differing

    def retrain(self, queue: Queue, mode: str) -> tuple[str, str]:
        """Hold one round; return its outcome, and the gate's reasons."""
        refresh_groups(queue, mode)
        Rounds(queue).request(mode, "benchmark")
        with Retrainer(queue, self._stores[mode].root, mode, self._settings[mode]) as retrainer:
            done = retrainer.step()
        if done is None:
            raise RuntimeError(f"{mode}: no round was held.")
        return done.outcome, " ".join(done.report.get("reasons", ()))

    def _library_says(self, mode: str, bodies: Sequence[bytes]) -> BoolArray:
        guard = self.active(mode)
        assert guard.input_shape is not None
        images: Float32Array = np.stack([np.frombuffer(body, "<f4").reshape(guard.input_shape) for body in bodies])
        return guard.scores(self._suspect.activations(images)).is_poisoned

    def _load(self, mode: str, bodies: Sequence[bytes]) -> list[Reply]:
        replies = run_load(
            self.server.inference_url, mode, bodies, token=self.server.token(), clients=_CLIENTS, timeout_seconds=60
        )
        if failed := [reply for reply in replies if reply.status != 200]:
            raise RuntimeError(f"{mode}: {len(failed)} of {len(replies)} requests failed: {failed[0]}.")
        return replies

    def _wait_for(self, mode: str, digest: str, body: bytes) -> None:
        deadline = time.monotonic() + _SWAP_SECONDS
        while (self._load(mode, [body])[0].headers["guard-bundle"]) != digest:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{mode}: the server did not take bundle {digest[:12]}.")
            time.sleep(0.1)


def _part(subject: Subject, rows: Any) -> Sent:
    """Return the test images of these rows and their triggered copies."""
    test = subject.split.test
    wanted = np.zeros(len(test.labels), dtype=bool)
    wanted[rows] = True
    everything = [(test.images[row], int(test.labels[row]), False) for row in rows]
    for _, entry in subject.triggered:
        chosen = np.flatnonzero(wanted[entry.source_rows])
        everything += [(entry.images[row], int(entry.true_labels[row]), True) for row in chosen]
    order = np.random.default_rng(STREAM_SEED).permutation(len(everything))
    shuffled = [everything[place] for place in order]
    return Sent(
        [np.ascontiguousarray(image, dtype="<f4").tobytes() for image, _, _ in shuffled],
        [(label, is_poisoned) for _, label, is_poisoned in shuffled],
    )


def _answer(queue: Queue, sent: Sent, message: Mapping[str, list[bool]]) -> None:
    """Answer everything that is pending; note, per model, which answers said "poisoned"."""
    truth = dict(zip(sent.bodies, sent.truth, strict=True))
    while items := queue.claim("reviewer", 200, order="age"):
        answers = []
        for item in items:
            label, is_poisoned = truth[item.input.body]
            answers.append(Answer(item_id=item.id, is_poisoned=is_poisoned, true_label=label))
            message[item.input.model].append(is_poisoned)
        queue.decide_many("reviewer", answers)


def _rates(condition: str, subject: Subject, guarded: Guard, rest: BoolArray) -> dict[str, Any]:
    """Return the rates on the test images that were not sent, clean and triggered, under a condition's names."""
    return {f"{condition}_{measure}": value for measure, value in rates_on_rest(subject, guarded, rest).items()}
