"""What must happen in the queue while nobody clicks: ended leases return, look-alikes find together."""

from __future__ import annotations

import logging
import threading
import time

from guard.errors import GuardError
from guard.relabel.groups import refresh_groups
from guard.review.workspace import Workspace

SWEEP_S = 5.0
REGROUP_S = 60.0

_log = logging.getLogger(__name__)


class Housekeeping:
    """A thread that sweeps the queue every few seconds and groups look-alikes every minute, while it is open.

    Several may run at once, in several processes; they do the same work twice and no harm.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self._workspace = workspace
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="review-housekeeping", daemon=True)

    def __enter__(self) -> Housekeeping:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join(10)

    def _run(self) -> None:
        regrouped_at, pending = -REGROUP_S, -1
        while not self._stopping.is_set():
            try:
                self._workspace.queue.sweep()
                now_pending = sum(self._workspace.queue.counts().by_state.values())
                if time.monotonic() >= regrouped_at + REGROUP_S and now_pending != pending:
                    for model in self._workspace.models():
                        refresh_groups(self._workspace.queue, model)
                    regrouped_at, pending = time.monotonic(), now_pending
            except GuardError as error:  # the database may come back
                _log.warning("housekeeping of the queue failed, and will be tried again: %s", error)
            self._stopping.wait(SWEEP_S)
