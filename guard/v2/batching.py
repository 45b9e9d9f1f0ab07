"""Dynamic batching: requests that come close together share one forward pass, and each gets its own rows back."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from guard.errors import GuardError
from guard.serving.guarded_model import RowAnswer, RowRequests
from guard.types import Float32Array

#: Takes rows and who sent them, and returns one answer per row.
Answer = Callable[[Float32Array, RowRequests], list[RowAnswer]]


class OverloadedError(GuardError):
    """More rows wait than may wait; the request was not answered, and may be sent again."""


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way.

    Attributes
    ----------
    rows : ndarray of shape (n, ...), float32
    id : str
    headers : mapping of str to str
    answers : Future
        Of one `RowAnswer` per row.
    """

    rows: Float32Array
    id: str
    headers: Mapping[str, str]
    answers: Future[list[RowAnswer]] = field(default_factory=Future)


class Batching(Protocol):
    """What puts requests together."""

    #: The most rows of one request.
    max_waiting_rows: int

    def submit(self, rows: Float32Array, id: str, headers: Mapping[str, str]) -> Future[list[RowAnswer]]:
        """Take one request; its answers come later."""

    def close(self) -> None:
        """Answer what waits, and take no more."""


class Batcher:
    """Collects calls and lets a model answer several at once, in a thread of its own.

    What waits is bounded, and so is what one call may bring: the others wait for it.

    Parameters
    ----------
    begin : callable
        Called once per batch; returns what takes rows and who sent them, and returns one answer per row, such as
        `GuardedModel.answer` with the guard of that moment.
    batch_size : int
        A batch is sent off once it has so many rows; a call of more rows is cut.
    max_delay_s : float
        How long the first call waits for others, in seconds.
    max_waiting_rows : int
        Rows that may wait, those of one call at most; what comes beyond is refused.
    """

    def __init__(
        self,
        begin: Callable[[], Answer],
        *,
        batch_size: int = 8,
        max_delay_s: float = 0.001,
        max_waiting_rows: int = 1024,
    ) -> None:
        self._begin = begin
        self._batch_size, self._max_delay_s, self.max_waiting_rows = batch_size, max_delay_s, max_waiting_rows
        self._calls: queue.SimpleQueue[Call | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting_rows = 0
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="guard-batches", daemon=True)
        self._thread.start()

    def submit(self, rows: Float32Array, id: str, headers: Mapping[str, str]) -> Future[list[RowAnswer]]:
        """Take one request; its answers come later.

        Raises
        ------
        OverloadedError
            If too many rows wait, or the batcher is closed.
        """
        call = Call(rows, id, headers)
        with self._lock:
            if self._is_closed:
                raise OverloadedError("the server is stopping.")
            if self._waiting_rows + len(rows) > self.max_waiting_rows:
                raise OverloadedError(f"{self._waiting_rows} rows wait already. Try again later.")
            self._waiting_rows += len(rows)
        self._calls.put(call)
        return call.answers

    def close(self) -> None:
        """Answer what waits, and end the thread. Safe to call twice."""
        with self._lock:
            is_first, self._is_closed = not self._is_closed, True
        if is_first:
            self._calls.put(None)
        self._thread.join()

    def _work(self) -> None:
        is_last = False
        while not is_last and (call := self._calls.get()) is not None:
            batch, n_rows, deadline = [call], len(call.rows), time.monotonic() + self._max_delay_s
            while n_rows < self._batch_size:
                try:
                    more = self._calls.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    is_last = True
                    break
                batch.append(more)
                n_rows += len(more.rows)
            taken = [call for call in batch if call.answers.set_running_or_notify_cancel()]  # its sender is there
            answer_calls(taken, self._begin(), self._batch_size)
            with self._lock:
                self._waiting_rows -= n_rows


def answer_calls(calls: Sequence[Call], answer: Answer, batch_size: int) -> None:
    """Answer calls together, in forward passes of at most `batch_size` rows; an error is the answer of those it hit."""
    for same in _of_one_shape(calls):
        _answer_together(same, answer, batch_size)


def _answer_together(batch: Sequence[Call], answer: Answer, batch_size: int) -> None:
    ids = [call.id if len(call.rows) == 1 else f"{call.id}/{row}" for call in batch for row in range(len(call.rows))]
    sent = [call.headers for call in batch for _ in call.rows]
    try:
        rows = np.concatenate([call.rows for call in batch])
        answers: list[RowAnswer] = []
        for start in range(0, len(rows), batch_size):
            part = slice(start, start + batch_size)
            answers += answer(rows[part], RowRequests(ids[part], sent[part]))
    except BaseException as error:  # nobody else would hear of it
        for call in batch:
            call.answers.set_exception(error)
    else:
        bounds = pairwise(accumulate((len(call.rows) for call in batch), initial=0))
        for call, (first, last) in zip(batch, bounds, strict=True):
            call.answers.set_result(answers[first:last])


def _of_one_shape(batch: Sequence[Call]) -> list[list[Call]]:
    """Return the calls of a batch by the shape of their rows: only the guard says what is wrong with a shape."""
    by_shape: dict[tuple[int, ...], list[Call]] = {}
    for call in batch:
        by_shape.setdefault(call.rows.shape[1:], []).append(call)
    return list(by_shape.values())
