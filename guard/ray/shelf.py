"""The models of one replica: opened when they are asked for, a bounded number at once, by Serve's multiplexing."""

from __future__ import annotations

import asyncio
import itertools
import logging
import shutil
import threading
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from ray import serve

from guard.errors import GuardError
from guard.local.archived_model import open_archived_model
from guard.ray.batches import ServeBatcher
from guard.telemetry import Sample
from guard.v2.batching import OverloadedError
from guard.v2.models import ServedModel

logger = logging.getLogger(__name__)
#: A model that could not be opened is not tried again for so long: trying closes another one.
_PAUSE_S = 10.0


class Shelf:
    """Archives as models that are lent for one request each (`guard.v2.rest.Models`).

    What is asked for and not open is opened; if as many are open as may be, the one that was not asked for longest is
    closed first, once its requests are answered: so many models are the most in memory. The name comes from the
    request's path and is one of `archives`, whatever id a header gives to Serve.

    Parameters
    ----------
    archives : mapping of str to Path
        By the name of the model.
    folder : Path
        Where they are unpacked to.
    max_open : int
        How many may be open.
    batch_size : int
    max_delay_s : float
        As for `ServedModel`.
    """

    def __init__(
        self, archives: Mapping[str, Path], folder: Path, *, max_open: int, batch_size: int, max_delay_s: float
    ) -> None:
        self._archives, self._folder, self._max_open = dict(archives), folder, max_open
        self._batch_size, self._max_delay_s = batch_size, max_delay_s
        self._numbers = itertools.count()
        self._failed: dict[str, float] = {}
        self._opening: set[asyncio.Task[_Lendable]] = set()
        self._lock = threading.Lock()
        self._open: set[_Lendable] = set()
        self._counts_left: list[Sample] = []  # of models that are closed

        @serve.multiplexed(max_num_models_per_replica=max_open)  # type: ignore[untyped-decorator]
        async def get(name: str) -> _Lendable:
            return await asyncio.to_thread(self._opened, name)

        self._get = get

    def names(self) -> Collection[str]:
        """Return the names of all models, open or not."""
        return self._archives.keys()

    @asynccontextmanager
    async def lent(self, name: str) -> AsyncIterator[ServedModel]:
        """Lend a model of this name; it stays open inside the block.

        Raises
        ------
        OverloadedError
            If it cannot be opened now; the log says why.
        """
        while not (found := await self._found(name)).take():
            await asyncio.sleep(0)  # it was closed to make room between these two
        try:
            yield found.served
        finally:
            found.give_back()

    async def open_first(self) -> None:
        """Open as many models as may be open, so that requests find them, and what is wrong is seen at the start.

        Raises
        ------
        GuardError
            If one cannot be opened.
        """
        for name in itertools.islice(self._archives, self._max_open):
            await self._get(name)

    def drain(self) -> list[Sample]:
        """Return what all models have counted since the last drain, and forget it."""
        with self._lock:
            samples, self._counts_left = self._counts_left, []
            buffers = [lendable.served.model.runtime.metrics for lendable in self._open]
        return samples + [sample for buffer in buffers for sample in buffer.drain()]

    def close(self) -> None:
        """Close all models, once their requests are answered."""
        with self._lock:
            still_open = tuple(self._open)
        for lendable in still_open:
            lendable.close()

    async def _found(self, name: str) -> _Lendable:
        if time.monotonic() - self._failed.get(name, -_PAUSE_S) < _PAUSE_S:
            raise OverloadedError(f"model {name!r} could not be opened a moment ago. Try again later.")
        task = asyncio.get_running_loop().create_task(self._get(name))
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)
        try:
            return await asyncio.shield(task)  # a sender who leaves meanwhile leaves no model behind that nobody knows
        except Exception as error:  # whatever is in the archive
            self._failed[name] = time.monotonic()
            why = str(error) if isinstance(error, GuardError) else type(error).__name__
            logger.error("model %s cannot be opened: %s", name, why)
            raise OverloadedError(f"model {name!r} cannot be opened now; the server's log says why.") from error

    def _opened(self, name: str) -> _Lendable:
        with ExitStack() as opened:
            folder = self._folder / str(next(self._numbers))
            opened.callback(shutil.rmtree, folder, ignore_errors=True)
            model = opened.enter_context(open_archived_model(self._archives[name], folder, name))
            served = ServedModel(
                model, batch_size=self._batch_size, max_delay_s=self._max_delay_s, make_batcher=ServeBatcher
            )
            opened.callback(served.close)
            lendable = _Lendable(served, opened.pop_all(), self._closed)
        with self._lock:
            self._open.add(lendable)
        return lendable

    def _closed(self, lendable: _Lendable) -> None:
        model = lendable.served.model
        metrics = model.runtime.metrics
        metrics.set("guard_bundle_info", model.name, str(model.guard.digest), value=0)
        with self._lock:
            self._open.discard(lendable)
            self._counts_left += metrics.drain()


class _Lendable:
    """One open model, and how many requests have it; `__del__` is what Serve's multiplexing calls to close it."""

    def __init__(self, served: ServedModel, opened: ExitStack, closed: Callable[[_Lendable], None]) -> None:
        self.served = served
        self._opened, self._closed = opened, closed
        self._lent, self._is_closing = 0, False
        self._changed = threading.Condition()

    def take(self) -> bool:
        """Keep it open until `give_back`; False if it is closed."""
        with self._changed:
            self._lent += not self._is_closing
            return not self._is_closing

    def give_back(self) -> None:
        """Undo one `take`."""
        with self._changed:
            self._lent -= 1
            self._changed.notify_all()

    def close(self) -> None:
        """Lend it no more, wait for those who have it, and close it. Safe to call twice."""
        with self._changed:
            is_first, self._is_closing = not self._is_closing, True
            self._changed.wait_for(lambda: self._lent == 0)
        if is_first:
            self._opened.close()
            self._closed(self)

    def __del__(self) -> None:
        self.close()
