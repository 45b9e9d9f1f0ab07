"""From the server to the queue of the reviewers: before the answer leaves, and never at the price of an answer."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from guard.errors import BodyTooLarge, GuardError
from guard.serving.evidence import Evidence
from guard.types import Verdict

if TYPE_CHECKING:
    from guard.relabel.items import FlaggedInput
    from guard.relabel.queue import Queue
    from guard.serving.runtime import Outcome

logger = logging.getLogger(__name__)

#: `queued`: durable, a person will see it. `dropped`: the queue is full, and this one was not drawn to stay.
#: `unavailable`: the queue did not answer in time.
Receipt = Literal["queued", "dropped", "unavailable"]
RECEIPTS: tuple[Receipt, ...] = ("queued", "dropped", "unavailable")
#: After a failure the queue is left alone for so long, so that it costs one short wait and not one per batch.
PAUSE_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Flagged:
    """One flagged request, with what its answer says of it.

    Attributes
    ----------
    request_id : str
    verdict : Verdict
    evidence : Evidence
    body : bytes
        As the client sent it; where the server had already parsed it (JSON), written anew.
    content_type : str
    """

    request_id: str
    verdict: Verdict
    evidence: Evidence
    body: bytes
    content_type: str


def flagged_request(context: Any, index: int, outcome: Outcome, item: Any) -> Flagged:
    """Return one flagged request as it goes to the queue.

    Parameters
    ----------
    context : ts.context.Context
        TorchServe's, of the batch.
    index : int
        Of the request in its batch.
    outcome : Outcome
        With verdict and evidence.
    item : object
        What the server handed to the handler: a mapping with the body under `data` or `body`, or the body itself.
        TorchServe has parsed JSON bodies; those are written anew.
    """
    assert outcome.verdict is not None
    assert outcome.evidence is not None  # only flagged requests have both
    body = (item.get("data") or item.get("body") or next(iter(item.values()), b"")) if isinstance(item, dict) else item
    if isinstance(body, str):
        body = body.encode("utf-8", "backslashreplace")
    elif not isinstance(body, bytes | bytearray | memoryview):
        body = _written_anew(body)
    headers = context.get_all_request_header(index)
    content_type = next((str(value) for name, value in headers.items() if name.lower() == "content-type"), "")
    return Flagged(str(context.get_request_id(index)), outcome.verdict, outcome.evidence, bytes(body), content_type)


def _written_anew(parsed: Any) -> bytes:
    """Return what the server had parsed as JSON; nothing where that cannot be: the network's own input is enough."""
    try:
        return json.dumps(parsed, default=repr).encode()
    except (RecursionError, ValueError, TypeError):  # nested too deeply, in itself, or with keys that are no text
        return b""


class ReviewQueue:
    """Hands flagged inputs of one model over to the queue, all of a batch in one transaction.

    A queue that does not answer never fails a request: its flagged inputs get the receipt `unavailable`, and for
    `PAUSE_SECONDS` nobody waits for it again. One that cannot be opened at first is tried again in the background.

    Parameters
    ----------
    url : str
        Of the database; see `Queue.open`.
    model : str
        Name under which the model is served.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self._queue: Queue | None = None
        self._pause_until = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # of `_queue`, so that `close` and a late `_open` do not miss each other
        if not self._open():
            threading.Thread(target=self._open_until_it_works, name="guard-queue", daemon=True).start()

    def close(self) -> None:
        """Close the connection, if there is one, and give up opening it."""
        self._stopped.set()
        with self._lock:
            if self._queue is not None:
                self._queue.close()
                self._queue = None

    def send(self, flagged: Sequence[Flagged], bundle_digest: str) -> list[Receipt]:
        """Put the flagged requests of one batch into the queue; return one receipt per request."""
        queue = self._queue
        if queue is None or time.monotonic() < self._pause_until:
            return ["unavailable"] * len(flagged)
        received_at = datetime.now(UTC)
        try:
            inputs = [self._input(one, bundle_digest, received_at) for one in flagged]
            try:
                ids = queue.enqueue(inputs).ids
            except BodyTooLarge as error:  # the network's own input is enough to look at
                for position in error.positions:
                    inputs[position] = replace(inputs[position], body=b"", content_type="")
                ids = queue.enqueue(inputs).ids
        except Exception as error:  # whatever it is, the answers must leave
            self._pause_until = time.monotonic() + PAUSE_SECONDS
            logger.error("%d flagged inputs could not be queued: %s", len(flagged), _plain(error))
            return ["unavailable"] * len(flagged)
        return ["dropped" if item_id is None else "queued" for item_id in ids]

    def _input(self, one: Flagged, bundle_digest: str, received_at: datetime) -> FlaggedInput:
        from guard.relabel.items import FlaggedInput

        verdict, evidence = one.verdict, one.evidence
        return FlaggedInput(
            request_id=one.request_id,
            model=self.model,
            bundle_digest=bundle_digest,
            suspect_label=verdict.label,
            backup_label=evidence.backup_label,
            backup_confidence=evidence.backup_confidence,
            raw=verdict.detector_scores,
            surprise=evidence.surprise,
            combined=verdict.score,
            p_value=verdict.p_value,
            reason=verdict.reason,
            content_type=one.content_type,
            body=one.body,
            inputs=evidence.inputs,
            activations=evidence.activations,
            received_at=received_at,
        )

    def _open(self) -> bool:
        from guard.relabel.queue import Queue  # loads a database library, which a server without a queue does not need

        try:
            queue = Queue.open(self.url)
        except Exception as error:  # a server without its queue is still a guarded server
            logger.error("the queue cannot be opened, flagged inputs are not kept: %s", _plain(error))
            return False
        with self._lock:
            if self._stopped.is_set():
                queue.close()
            else:
                self._queue = queue
        return True

    def _open_until_it_works(self) -> None:
        while not self._stopped.wait(PAUSE_SECONDS) and not self._open():
            pass


def _plain(error: Exception) -> str:
    return str(error) if isinstance(error, GuardError) else type(error).__name__
