"""Dynamic batching by Ray Serve (`@serve.batch`) in the place of our own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from ray import serve

from guard.serving.guarded_model import RowAnswer
from guard.types import Float32Array
from guard.v2.batching import Answer, Call, OverloadedError, answer_calls


class ServeBatcher:
    """Collects calls with `@serve.batch`, and lets a model answer several at once, in a thread.

    Serve keeps one queue per decorated function, and would put the calls of two models into one batch if they shared
    it; so every model has a function of its own. Serve's queue has no bound; what waits is bounded here.

    Parameters
    ----------
    begin : callable
        As for `guard.v2.batching.Batcher`.
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
        self.max_waiting_rows = max_waiting_rows
        self._lock = threading.Lock()
        self._waiting_rows = 0
        self._is_closed = False
        self._tasks: set[asyncio.Task[None]] = set()

        def size(calls: list[Call]) -> int:
            return min(batch_size, sum(len(call.rows) for call in calls))  # Serve refuses one that is beyond the most

        self._begin: Callable[[], Answer] | None = begin

        def work(calls: list[Call]) -> None:
            begin = self._begin
            if begin is None:
                raise OverloadedError("the server is stopping.")
            answer_calls([call for call in calls if call.answers.set_running_or_notify_cancel()], begin(), batch_size)

        @serve.batch(max_batch_size=batch_size, batch_wait_timeout_s=max_delay_s, batch_size_fn=size)
        async def together(calls: list[Call]) -> list[None]:
            await asyncio.to_thread(work, calls)
            return [None] * len(calls)

        self._together = together

    def submit(self, rows: Float32Array, id: str, headers: Mapping[str, str]) -> Future[list[RowAnswer]]:
        """Take one request; its answers come later. Call it in the event loop of the replica.

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
        task = asyncio.get_running_loop().create_task(self._answered(call))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return call.answers

    def close(self) -> None:
        """Take no more; whoever closes has no request open. Safe to call twice."""
        with self._lock:
            self._is_closed = True
        self._begin = None  # Serve's task for this queue never ends, and would keep the network

    async def _answered(self, call: Call) -> None:
        try:
            await self._together(call)
        except Exception as error:  # of Serve's: a call's own error is in its answers
            if not call.answers.done():
                call.answers.set_exception(error)
        finally:
            with self._lock:
                self._waiting_rows -= len(call.rows)
