"""Who stays when the queue is full: a fair random sample per group. Plain arithmetic, no database."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

#: Model and suspect label: inputs of one attack share it.
GroupKey = tuple[str, int]
Measure = Literal["items", "bytes"]


class Waiting(NamedTuple):
    """An item that may give way: first those that nobody holds, the lowest ticket first."""

    #: True while a reviewer holds it.
    is_held: bool
    ticket: float
    #: Number of a stored item, or -1 - place of a new one in its batch.
    item_id: int
    #: Bytes, with the body.
    size: int


class Body(NamedTuple):
    """A body that an item can do without, as it is larger than the item's tensors: the largest goes first."""

    is_held: bool
    #: Minus the bytes of the body.
    minus_bytes: int
    item_id: int


@dataclass(slots=True)
class Share:
    """What one group holds."""

    items: int = 0
    bytes: int = 0
    #: Of `bytes`, bodies that can be done without.
    spare: int = 0


@dataclass(slots=True)
class _Plan:
    """How room is made for one input: what would go, until it is carried out or given up."""

    free_items: int
    free_bytes: int
    size: int
    spare: int
    leaving: dict[int, tuple[GroupKey, Waiting]] = field(default_factory=dict)
    bodies: dict[int, tuple[GroupKey, Body]] = field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.free_bytes >= self.size


@dataclass(slots=True)
class Reservoir:
    """Decides for a batch of new inputs which are kept, and what of the stored items gives way.

    Every input draws a ticket from [0, 1). While there is room, all are kept. When there is none, a new input takes the
    place of the lowest ticket of its own group, if its own is higher: what is left of a group is then a uniform random
    sample of all that came [1]_. A group that is smaller than the largest one takes room from that one instead, so that
    a flood in one group never keeps another group out. Small and large are measured in what is short, items or bytes;
    first among models, then among the suspect labels of one model.

    Where bytes are short, bodies that are larger than the tensors of their item go before any item does: the largest
    first, of the group with most bytes first. The network's own input always stays with its item.

    Parameters
    ----------
    free_items, free_bytes : int
        Room that is left.
    lowest : callable
        Group key -> its items with the lowest tickets; called once per group, and only when there is no room.
    largest : callable
        Group key -> its largest bodies that can be done without; as `lowest`.
    shares : callable
        -> what every group holds; called once, and only when there is no room. It may be a little out of date, and is
        kept up to date with what is decided here.

    References
    ----------
    .. [1] Vitter (1985), Random sampling with a reservoir; with random tickets as in Efraimidis and Spirakis (2006),
       Weighted random sampling with a reservoir, algorithm A-Res with equal weights.
    """

    free_items: int
    free_bytes: int
    lowest: Callable[[GroupKey], Iterable[Waiting]]
    largest: Callable[[GroupKey], Iterable[Body]]
    shares: Callable[[], dict[GroupKey, Share]]
    #: Places in the batch that are kept, with their group; those of `bodiless` without their body.
    kept: dict[int, GroupKey] = field(default_factory=dict)
    bodiless: set[int] = field(default_factory=set)
    #: Stored items that give way, with the bytes that they held.
    removed: dict[int, int] = field(default_factory=dict)
    #: Stored items that stay without their body, with the bytes of that.
    stripped: dict[int, int] = field(default_factory=dict)
    #: Inputs dropped per group: new ones, and stored ones that gave way.
    drops: Counter[GroupKey] = field(default_factory=Counter)
    _heaps: dict[GroupKey, list[Waiting]] = field(default_factory=dict)
    _body_heaps: dict[GroupKey, list[Body]] = field(default_factory=dict)
    _fresh: dict[GroupKey, list[tuple[Waiting, Body | None]]] = field(default_factory=lambda: defaultdict(list))
    _shares: dict[GroupKey, Share] | None = None

    def offer(self, place: int, group: GroupKey, ticket: float, size: int, spare: int = 0) -> bool:
        """Keep or drop one new input; True if it is kept, which a later one of the batch may still undo.

        Parameters
        ----------
        place : int
            In the batch.
        group : GroupKey
        ticket : float
            In [0, 1).
        size, spare : int
            Bytes in all, and of the body, if that can be done without.
        """
        plan = _Plan(self.free_items, self.free_bytes, size, spare)
        if not self._make_room(plan, group, ticket):
            for loser, waiting in plan.leaving.values():
                heapq.heappush(self._heaps[loser], waiting)
            self._put_back(plan)
            self.drops[group] += 1
            return False
        for item_id, (owner, body) in plan.bodies.items():
            self._strip(item_id, owner, -body.minus_bytes)
        for item_id, (owner, waiting) in plan.leaving.items():
            self._remove(item_id, owner, waiting)
        self._keep(place, group, ticket, plan)
        if plan.spare < spare:
            self.bodiless.add(place)
        return True

    def _make_room(self, plan: _Plan, group: GroupKey, ticket: float) -> bool:
        if plan.free_items < 1 and not self._take_items(plan, group, ticket, "items"):
            return False
        if not plan.fits:
            self._take_bodies(plan, group)
        return plan.fits or self._take_items(plan, group, ticket, "bytes")

    def _take_items(self, plan: _Plan, group: GroupKey, ticket: float, measure: Measure) -> bool:
        """Let items of the largest group go, or of one's own with lower tickets; False if that is not enough."""
        loser = self._loser(group, measure, 1 if measure == "items" else plan.size)
        heap = self._heap(loser)
        while (plan.free_items < 1 or (measure == "bytes" and not plan.fits)) and heap:
            if loser == group and heap[0].ticket >= ticket:
                return False
            waiting = heapq.heappop(heap)
            body = plan.bodies.get(waiting.item_id)
            plan.leaving[waiting.item_id] = loser, waiting
            plan.free_items += 1
            plan.free_bytes += self._bytes_of(waiting) + (body[1].minus_bytes if body is not None else 0)
        return plan.free_items >= 1 and (measure == "items" or plan.fits)

    def _take_bodies(self, plan: _Plan, group: GroupKey) -> None:
        """Let bodies go: of a larger group, else one's own, else of all others, the group with most bytes first."""
        shares = self._known_shares()
        loser = self._loser(group, "bytes", plan.size)
        if loser != group:
            self._pop_bodies(plan, loser)
            if plan.fits:
                return
            self._put_back(plan)
        plan.size -= plan.spare
        plan.spare = 0
        totals = self._totals("bytes")
        owners = sorted((key for key in shares if shares[key].spare), key=lambda key: -shares[key].bytes)
        for owner in sorted(owners, key=lambda key: -totals[key[0]]):
            if plan.fits:
                return
            self._pop_bodies(plan, owner)

    def _pop_bodies(self, plan: _Plan, owner: GroupKey) -> None:
        heap = self._body_heap(owner)
        while heap and not plan.fits:
            body = heapq.heappop(heap)
            if body.item_id in plan.leaving or not self._is_there(body.item_id):
                continue
            plan.bodies[body.item_id] = owner, body
            plan.free_bytes -= body.minus_bytes

    def _put_back(self, plan: _Plan) -> None:
        for owner, body in plan.bodies.values():
            heapq.heappush(self._body_heaps[owner], body)
            plan.free_bytes += body.minus_bytes
        plan.bodies.clear()

    def _loser(self, group: GroupKey, measure: Measure, amount: int) -> GroupKey:
        """Return the group that has to make room: the largest, unless the input's own would become larger than it."""
        shares, totals = self._known_shares(), self._totals(measure)
        model = group[0]
        largest_model = max(totals, key=lambda key: totals[key], default=model)
        if totals[model] + 2 * amount <= totals[largest_model]:
            model = largest_model
        labels = [key for key in shares if key[0] == model]
        largest = max(labels, key=lambda key: getattr(shares[key], measure), default=group)
        if model != group[0]:
            return largest
        used = getattr(shares.get(group, Share()), measure)
        return largest if largest in shares and used + 2 * amount <= getattr(shares[largest], measure) else group

    def _totals(self, measure: Measure) -> dict[str, int]:
        totals: dict[str, int] = defaultdict(int)
        for (model, _), share in self._known_shares().items():
            totals[model] += getattr(share, measure)
        return totals

    def _known_shares(self) -> dict[GroupKey, Share]:
        if self._shares is None:
            self._shares = self.shares()
            for group, members in self._fresh.items():
                share = self._shares.setdefault(group, Share())
                for waiting, body in members:
                    share.items += 1
                    share.bytes += waiting.size
                    share.spare -= body.minus_bytes if body is not None else 0
        return self._shares

    def _heap(self, group: GroupKey) -> list[Waiting]:
        if group not in self._heaps:
            fresh = [waiting for waiting, _ in self._fresh[group] if self._is_there(waiting.item_id)]
            self._heaps[group] = [*self.lowest(group), *fresh]
            heapq.heapify(self._heaps[group])
        return self._heaps[group]

    def _body_heap(self, group: GroupKey) -> list[Body]:
        if group not in self._body_heaps:
            fresh = [body for _, body in self._fresh[group] if body is not None and self._is_there(body.item_id)]
            self._body_heaps[group] = [*self.largest(group), *fresh]
            heapq.heapify(self._body_heaps[group])
        return self._body_heaps[group]

    def _is_there(self, item_id: int) -> bool:
        return -1 - item_id in self.kept if item_id < 0 else item_id not in self.removed

    def _bytes_of(self, waiting: Waiting) -> int:
        return waiting.size - self.stripped.get(waiting.item_id, 0)

    def _keep(self, place: int, group: GroupKey, ticket: float, plan: _Plan) -> None:
        self.free_items -= 1
        self.free_bytes -= plan.size
        self.kept[place] = group
        waiting = Waiting(False, ticket, -1 - place, plan.size)
        body = Body(False, -plan.spare, -1 - place) if plan.spare else None
        self._fresh[group].append((waiting, body))
        if group in self._heaps:
            heapq.heappush(self._heaps[group], waiting)
        if body is not None and group in self._body_heaps:
            heapq.heappush(self._body_heaps[group], body)
        self._count(group, 1, plan.size, plan.spare)

    def _strip(self, item_id: int, group: GroupKey, size: int) -> None:
        self.stripped[item_id] = size
        self.free_bytes += size
        self._count(group, 0, -size, -size)
        if item_id < 0:
            self.bodiless.add(-1 - item_id)

    def _remove(self, item_id: int, group: GroupKey, waiting: Waiting) -> None:
        size = self._bytes_of(waiting)
        self.free_items += 1
        self.free_bytes += size
        self.drops[group] += 1
        self._count(group, -1, -size, 0)
        if item_id < 0:
            del self.kept[-1 - item_id]
        else:
            self.removed[item_id] = waiting.size
        self.stripped.pop(item_id, None)

    def _count(self, group: GroupKey, items: int, size: int, spare: int) -> None:
        if self._shares is not None:
            share = self._shares.setdefault(group, Share())
            share.items += items
            share.bytes += size
            share.spare += spare
