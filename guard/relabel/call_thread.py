"""A thread that runs calls one after the other, so that whoever hands one over can stop waiting for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar

from guard.errors import QueueUnavailable

Result = TypeVar("Result")


class _Call(Generic[Result]):
    """One call on its way."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work
        self._done = threading.Event()
        self._result: Result
        self._error: BaseException | None = None
        self.is_abandoned = False

    def run(self) -> None:
        if not self.is_abandoned:
            try:
                self._result = self._work()
            except BaseException as error:
                self._error = error
        self._done.set()

    def wait(self, timeout_s: float) -> Result:
        if not self._done.wait(timeout_s):
            self.is_abandoned = True
            raise QueueUnavailable(f"the queue's database did not answer within {timeout_s:g} s. Is it overloaded?")
        if self._error is not None:
            raise self._error
        return self._result


class CallThread:
    """Bounds the time that a caller waits, also for a database whose machine no longer answers at all.

    A call that was given up is not started any more; one that had started may still come to its end later.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._calls: SimpleQueue[_Call[object] | None] = SimpleQueue()
        self._running: _Call[object] | None = None
        self._process: int | None = None

    def run(self, work: Callable[[], Result], timeout_s: float) -> Result:
        """Run `work` in the thread, and return what it returns or raise what it raises.

        Raises
        ------
        QueueUnavailable
            If it takes longer than `timeout_s`; at once if a call that was given up is still running.
        """
        self._start()
        running = self._running
        if running is not None and running.is_abandoned:
            raise QueueUnavailable("the queue's database still does not answer. It is tried again by a later call.")
        call = _Call(work)
        self._calls.put(call)  # type: ignore[arg-type]
        return call.wait(timeout_s)

    def close(self) -> None:
        """Let the thread end after what it was given."""
        with self._lock:
            if self._process == os.getpid():
                self._calls.put(None)
                self._process = None

    def _start(self) -> None:
        with self._lock:
            if self._process != os.getpid():  # the first call, or the first after a fork: threads are not inherited
                self._calls = SimpleQueue()
                self._running = None
                self._process = os.getpid()
                threading.Thread(target=self._work, args=(self._calls,), name="guard-queue", daemon=True).start()

    def _work(self, calls: SimpleQueue[_Call[object] | None]) -> None:
        while (call := calls.get()) is not None:
            self._running = call
            call.run()
            self._running = None
