"""Who stays when the queue is full: a fair random sample per group. Plain arithmetic, no database."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

#: Model and suspect label: inputs of one attack share it.
GroupKey = tuple[str, int]


class Waiting(NamedTuple):
    """A pending item that may give way; the lowest ticket goes first."""

    ticket: float
    #: Number of a stored item, or -1 - place of a new one in its batch.
    item_id: int
    #: Bytes.
    size: int


@dataclass(slots=True)
class Reservoir:
    """Decides for a batch of new inputs which are kept, and which pending items give way.

    Every input draws a ticket from [0, 1). While there is room, all are kept. When there is none, a new input takes the
    place of the lowest ticket of its own group, if its own is higher: what is left of a group is then a uniform random
    sample of all that came [1]_. A group that is smaller than the largest one takes room from that one instead, so that
    a flood in one group never keeps another group out.

    Parameters
    ----------
    free_items, free_bytes : int
        Room that is left.
    lowest : callable
        Group key -> its pending items with the lowest tickets; called once per group, and only when there is no room.
    pending : callable
        -> pending items per group key; called once, and only when there is no room. It may be a little out of date.

    References
    ----------
    .. [1] Vitter (1985), Random sampling with a reservoir; with random tickets as in Efraimidis and Spirakis (2006),
       Weighted random sampling with a reservoir, algorithm A-Res with equal weights.
    """

    free_items: int
    free_bytes: int
    lowest: Callable[[GroupKey], Iterable[Waiting]]
    pending: Callable[[], Counter[GroupKey]]
    #: Places in the batch that are kept, with their group.
    kept: dict[int, GroupKey] = field(default_factory=dict)
    #: Stored items that give way, with their size.
    removed: dict[int, int] = field(default_factory=dict)
    #: Inputs dropped per group: new ones, and pending ones that gave way.
    drops: Counter[GroupKey] = field(default_factory=Counter)
    _heaps: dict[GroupKey, list[Waiting]] = field(default_factory=dict)
    _fresh: dict[GroupKey, list[Waiting]] = field(default_factory=dict)
    _sizes: Counter[GroupKey] | None = None

    def offer(self, place: int, group: GroupKey, ticket: float, size: int) -> bool:
        """Keep or drop one new input; True if it is kept, which a later one of the batch may still undo."""
        leaving = self._make_room(group, ticket, size)
        if leaving is None:
            self.drops[group] += 1
            return False
        for loser, waiting in leaving:
            self._remove(loser, waiting)
        self.free_items -= 1
        self.free_bytes -= size
        self.kept[place] = group
        newcomer = Waiting(ticket, -1 - place, size)
        if group in self._heaps:
            heapq.heappush(self._heaps[group], newcomer)
        else:
            self._fresh.setdefault(group, []).append(newcomer)
        if self._sizes is not None:
            self._sizes[group] += 1
        return True

    def _make_room(self, group: GroupKey, ticket: float, size: int) -> list[tuple[GroupKey, Waiting]] | None:
        if self.free_items >= 1 and self.free_bytes >= size:
            return []
        if self._sizes is None:
            self._sizes = self.pending()
            for fresh, members in self._fresh.items():
                self._sizes[fresh] += len(members)
        largest, most = max(self._sizes.items(), key=lambda pair: pair[1], default=(group, 0))
        is_small = self._sizes[group] + 1 < most
        loser = largest if is_small else group
        heap = self._heap(loser)
        leaving: list[Waiting] = []
        items, held = self.free_items, self.free_bytes
        while (items < 1 or held < size) and heap and (is_small or heap[0].ticket < ticket):
            leaving.append(heapq.heappop(heap))
            items, held = items + 1, held + leaving[-1].size
        if items < 1 or held < size:
            for waiting in leaving:
                heapq.heappush(heap, waiting)
            return None
        return [(loser, waiting) for waiting in leaving]

    def _heap(self, group: GroupKey) -> list[Waiting]:
        if group not in self._heaps:
            self._heaps[group] = [*self.lowest(group), *self._fresh.pop(group, [])]
            heapq.heapify(self._heaps[group])
        return self._heaps[group]

    def _remove(self, group: GroupKey, waiting: Waiting) -> None:
        self.free_items += 1
        self.free_bytes += waiting.size
        self.drops[group] += 1
        if waiting.item_id < 0:
            del self.kept[-1 - waiting.item_id]
        else:
            self.removed[waiting.item_id] = waiting.size
        if self._sizes is not None:
            self._sizes[group] -= 1
