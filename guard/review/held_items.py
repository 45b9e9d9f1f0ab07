"""What each reviewer has on the screen: remembered here, leased in the queue."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from guard.relabel.items import QueueItem


class HeldItems:
    """Numbers of the items that the page shows to each reviewer, in the order of claiming, with their groups.

    Lost when the page stops: the queue takes such items back when their leases end.
    """

    def __init__(self) -> None:
        self._held: dict[str, dict[int, int | None]] = {}
        self._lock = threading.Lock()

    def add(self, reviewer: str, items: Iterable[QueueItem], *, first: bool = False) -> None:
        """Note that a reviewer sees these items; `first`: before all others."""
        with self._lock:
            held = self._held.setdefault(reviewer, {})
            new = {item.id: item.group for item in items}
            self._held[reviewer] = {**new, **held} if first else {**held, **new}

    def remove(self, reviewer: str, item_ids: Iterable[int]) -> None:
        """Forget these items."""
        with self._lock:
            for item_id in item_ids:
                self._held.get(reviewer, {}).pop(item_id, None)

    def of(self, reviewer: str, group: int | None = None) -> list[int]:
        """Return a reviewer's items, only those of a group if one is named."""
        with self._lock:
            return [
                item_id
                for item_id, group_of_item in self._held.get(reviewer, {}).items()
                if group is None or group_of_item == group
            ]
