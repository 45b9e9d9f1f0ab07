"""Traffic of a rehearsal: phases of clean requests, an attack, inputs that cannot be scored, and a shift; all noted."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from guard.torchserve.client import Client, Reply
from guard.types import Float32Array

#: Requests under way at the same time; more than the server needs at the rates of a rehearsal.
_CLIENTS = 8


@dataclass(frozen=True, slots=True)
class Phase:
    """Some seconds of traffic of one kind.

    Attributes
    ----------
    name : str
    seconds : float
    share : float
        Of the requests that are of `kind`; the others are clean.
    kind : str
        Key of the bodies: `clean`, `triggered`, `broken`, `failing` or `shifted`.
    """

    name: str
    seconds: float
    kind: str = "clean"
    share: float = 0.0


@dataclass(frozen=True, slots=True)
class Span:
    """When a phase was sent, seconds since 1970."""

    phase: Phase
    start: float
    end: float


class Traffic:
    """Sends phases one after the other at a fixed rate, whatever the answers take, and notes every answer.

    Parameters
    ----------
    url : str
        Inference address.
    model : str
    token : str or None
    bodies : mapping of str to sequence of bytes
        By kind; each kind's are sent in turns.
    per_second : float
    log : Path
        One JSON object per request is added to it, as `guard audit --client-log` reads them, and with the kind.
    """

    def __init__(
        self,
        url: str,
        model: str,
        token: str | None,
        bodies: Mapping[str, Sequence[bytes]],
        per_second: float,
        log: Path,
    ) -> None:
        self._url, self._model, self._token = url, model, token
        self._turns = {kind: itertools.cycle(some) for kind, some in bodies.items()}
        self._per_second = per_second
        self._log = log

    def send(self, phases: Sequence[Phase], seed: int) -> list[Span]:
        """Send everything; return when each phase was sent."""
        rng = np.random.default_rng(seed)
        kinds: list[str] = []
        spans, begin = [], time.time() + 0.5
        start = begin
        for phase in phases:
            count = round(phase.seconds * self._per_second)
            kinds += [phase.kind if drawn < phase.share else "clean" for drawn in rng.random(count)]
            spans.append(Span(phase, start, start + phase.seconds))
            start += phase.seconds
        schedule = [(begin + turn / self._per_second, kind, next(self._turns[kind])) for turn, kind in enumerate(kinds)]
        turns = itertools.count()
        lock = threading.Lock()
        with self._log.open("a", encoding="utf-8") as log:

            def work() -> None:
                with Client(self._url, token=self._token) as client:
                    while (turn := next(turns)) < len(schedule):
                        due, kind, body = schedule[turn]
                        time.sleep(max(0.0, due - time.time()))
                        sent_at = datetime.now(UTC)
                        line = self._noted(sent_at, kind, client.predict(self._model, body))
                        with lock:
                            log.write(line)

            threads = [threading.Thread(target=work) for _ in range(_CLIENTS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        return spans

    def _noted(self, sent_at: datetime, kind: str, reply: Reply) -> str:
        noted = {
            "kind": kind,
            "time": sent_at.isoformat(),
            "request_id": reply.headers.get("x-request-id", ""),
            "status": reply.status,
            "verdict": reply.headers.get("guard-verdict", ""),
            "review": reply.headers.get("guard-review", ""),
            "model": self._model,
        }
        return json.dumps(noted) + "\n"


def bodies_of(clean: Float32Array, triggered: Float32Array, seed: int) -> dict[str, list[bytes]]:
    """Return the bodies of every kind, float32 as the tensor handler reads them.

    Parameters
    ----------
    clean, triggered : ndarray of shape (n, channels, height, width), float32 in [0, 1]
    seed : int
        Of the shift: a worn sensor's noise and less contrast.
    """
    rng = np.random.default_rng(seed)
    shifted = np.clip(0.75 * clean + rng.normal(0.08, 0.08, clean.shape), 0, 1)
    broken = clean[:64].copy()
    broken[:, :, :2] = np.nan
    failing = clean[64:128].copy()
    failing[:, 0, 0, 0] = -1e-6
    kinds = {"clean": clean, "triggered": triggered, "shifted": shifted, "broken": broken, "failing": failing}
    return {kind: [np.ascontiguousarray(image, "<f4").tobytes() for image in images] for kind, images in kinds.items()}
