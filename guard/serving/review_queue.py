"""From the server to the queue of the reviewers: before the answer leaves, and never at the price of an answer."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from guard.errors import BodyTooLarge, DataError, GuardError
from guard.relabel.request_body import pack_body
from guard.serving.audit_sample import AuditSample
from guard.serving.evidence import Evidence
from guard.serving.outcomes import Outcome, Requests
from guard.serving.traffic import Traffic
from guard.types import Verdict

if TYPE_CHECKING:
    from guard.relabel.items import Enqueued, FlaggedInput
    from guard.relabel.queue import Queue

logger = logging.getLogger(__name__)

#: `queued`: durable, a person will see it. `dropped`: the queue is full, and this one was not drawn to stay.
#: `unavailable`: the queue did not answer in time.
Receipt = Literal["queued", "dropped", "unavailable"]
RECEIPTS: tuple[Receipt, ...] = ("queued", "dropped", "unavailable")
#: After a failure the queue is left alone for so long, so that it costs one short wait and not one per batch.
PAUSE_SECONDS = 1.0
_LONGEST_TEXT = 1024  # characters of a request id or a content type that are kept


@dataclass(frozen=True, slots=True)
class Flagged:
    """One flagged request, or one of the audit sample, with what its answer says of it.

    Attributes
    ----------
    request_id : str
    verdict : Verdict
    evidence : Evidence
    body : bytes
        As the client sent it; where the server had already parsed it (JSON), written anew; of several fields all.
    content_type : str
    """

    request_id: str
    verdict: Verdict
    evidence: Evidence
    body: bytes
    content_type: str

    @property
    def is_audit(self) -> bool:
        """True if it was not flagged, and drawn for the audit sample."""
        return self.evidence.audit_probability is not None


def flagged_request(requests: Requests, index: int, outcome: Outcome, item: Any) -> Flagged:
    """Return one flagged request, or one of the audit sample, as it goes to the queue.

    Parameters
    ----------
    requests : Requests
        Of the batch.
    index : int
        Of the request in its batch.
    outcome : Outcome
        With verdict and evidence.
    item : object
        What the server handed to the handler: a mapping of fields, or a body by itself. All fields are kept, see
        `guard.relabel.request_body`. A body that the server has parsed is written anew.
    """
    assert outcome.verdict is not None
    assert outcome.evidence is not None  # flagged requests and audits have both
    headers = requests.headers(index)
    content_type = next((str(value) for name, value in headers.items() if name.lower() == "content-type"), "")
    try:
        body, content_type = pack_body(item, content_type)
    except Exception as error:  # whatever a client, or an envelope, made of it: the network's own input is enough
        logger.error("the body of a flagged request could not be kept: %s", type(error).__name__)
        body, content_type = b"", ""
    request_id = str(requests.request_id(index))
    return Flagged(_storable(request_id), outcome.evidence.verdict, outcome.evidence, body, _storable(content_type))


class ReviewQueue:
    """Hands flagged inputs and audits of one model over to the queue, all of a batch in one transaction.

    A queue that does not answer never fails a request: its flagged inputs get the receipt `unavailable`, and for
    `PAUSE_SECONDS` nobody waits for it again. One that cannot be opened at first is tried again in the background.

    Parameters
    ----------
    url : str
        Of the database; see `Queue.open`.
    model : str
        Name under which the model is served.

    Attributes
    ----------
    sample : AuditSample
    traffic : Traffic
        What the audit sample stands for: its counts are added to those of the queue.
    """

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model
        self.sample = AuditSample()
        self.traffic = Traffic(self._note_traffic)
        self._queue: Queue | None = None
        self._pause_until = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()  # of `_queue`, so that `close` and a late `_open` do not miss each other
        if not self._open():
            threading.Thread(target=self._open_until_it_works, name="guard-queue", daemon=True).start()

    def close(self) -> None:
        """Close the connection, if there is one, and give up opening it."""
        self._stopped.set()
        self.traffic.close()
        with self._lock:
            if self._queue is not None:
                self._queue.close()
                self._queue = None

    def send(
        self, flagged: Sequence[Flagged], bundle_digest: str, false_positive_rate: float, *, is_counted: bool = False
    ) -> list[Receipt]:
        """Put requests of one batch into the queue; return one receipt each.

        Parameters
        ----------
        flagged : sequence of Flagged
            Audits among them.
        bundle_digest, false_positive_rate
            By which, and at which rate, they were judged.
        is_counted : bool
            Whether what this bundle judges is counted in `traffic`.
        """
        queue = self._queue
        if queue is None or time.monotonic() < self._pause_until:
            return ["unavailable"] * len(flagged)
        received_at = datetime.now(UTC)
        inputs: dict[int, FlaggedInput] = {}
        for place, row in enumerate(flagged):
            try:
                inputs[place] = self._input(row, bundle_digest, false_positive_rate, received_at, is_counted)
            except DataError as error:  # one that no queue takes costs its neighbours nothing
                logger.error("a flagged input cannot be queued: %s", error)
        receipts: list[Receipt] = ["unavailable"] * len(flagged)
        try:
            enqueued = self._enqueue(queue, [*inputs.values()])
        except Exception as error:  # whatever it is, the answers must leave
            if not all(row.is_audit for row in flagged):  # no audit costs a flagged request its place
                self._pause_until = time.monotonic() + PAUSE_SECONDS
            logger.error("%d flagged inputs could not be queued: %s", len(flagged), _plain(error))
            return receipts
        for place, item_id in zip(inputs, enqueued.ids, strict=True):
            receipts[place] = "dropped" if item_id is None else "queued"
        if enqueued.audit_share_left is not None:
            self.sample.note_left(enqueued.audit_share_left)
        return receipts

    def _note_traffic(self, bundle_digest: str, requests: Mapping[tuple[datetime, str], int]) -> bool:
        """Add counts to those of the queue; False if it did not take them."""
        queue = self._queue
        if queue is None:
            return False
        try:
            queue.note_traffic(self.model, bundle_digest, requests)
        except Exception as error:  # whatever it is, they are kept for the next time
            logger.error("counts of requests could not be written to the queue: %s", _plain(error))
            return False
        return True

    @staticmethod
    def _enqueue(queue: Queue, inputs: list[FlaggedInput]) -> Enqueued:
        try:
            return queue.enqueue(inputs)
        except BodyTooLarge as error:  # the network's own input is enough to look at
            for position in error.positions:
                inputs[position] = replace(inputs[position], body=b"", content_type="")
            return queue.enqueue(inputs)

    def _input(
        self, row: Flagged, bundle_digest: str, false_positive_rate: float, received_at: datetime, is_counted: bool
    ) -> FlaggedInput:
        from guard.relabel.items import FlaggedInput

        verdict, evidence = row.verdict, row.evidence
        return FlaggedInput(
            request_id=row.request_id,
            model=self.model,
            bundle_digest=bundle_digest,
            suspect_label=verdict.label,
            backup_label=evidence.backup_label,
            backup_confidence=evidence.backup_confidence,
            raw=verdict.detector_scores,
            surprise=verdict.surprise,
            combined=verdict.score,
            p_value=verdict.p_value,
            false_positive_rate=false_positive_rate,
            reason=verdict.reason,
            content_type=row.content_type,
            body=row.body,
            inputs=evidence.inputs,
            activations=evidence.activations,
            received_at=received_at,
            audit_probability=evidence.audit_probability,
            is_counted=is_counted,
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


def _storable(text: str) -> str:
    """Return what a client wrote as a database takes it: no zero bytes, no half characters, not without end."""
    return text[:_LONGEST_TEXT].encode("utf-8", "replace").decode().replace("\0", "?")


def _plain(error: Exception) -> str:
    return str(error) if isinstance(error, GuardError) else type(error).__name__
