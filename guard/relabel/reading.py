"""What the queue holds: items, decisions, groups and counts. Nothing here writes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from sqlalchemy.engine import Connection

from guard.errors import ItemGone
from guard.relabel import statements
from guard.relabel.deciding import gone
from guard.relabel.items import Counts, Decision, GoldResult, Group, QueueItem, Settled, State
from guard.relabel.rows import Codec, decision_of
from guard.relabel.settings import QueueSettings
from guard.types import Float32Array, IntArray

#: Items that are read by one statement; SQLite bounds how many numbers one may name.
_AT_ONCE = 500
#: Items of a group that stand for it.
_SAMPLES = 12


def read_items(
    connection: Connection, codec: Codec, ids: Sequence[int], *, with_bodies: bool = True
) -> list[QueueItem]:
    """Return the named items in that order; those without images are left out."""
    found: dict[int, QueueItem] = {}
    statement = statements.ITEMS_BY_ID if with_bodies else statements.ITEMS_WITHOUT_BODY_BY_ID
    for start in range(0, len(ids), _AT_ONCE):
        some = list(ids[start : start + _AT_ONCE])
        rows = connection.execute(statement, {"ids": some}).mappings().all()
        counting = [row["decision_id"] for row in rows if row["decision_id"] is not None]
        answers = read_answers(connection, counting)
        found |= {row["id"]: codec.decode(row, answers.get(row["decision_id"])) for row in rows}
    return [found[item_id] for item_id in ids if item_id in found]


def read_answers(connection: Connection, ids: Sequence[int]) -> dict[int, Decision]:
    """Return decisions by number."""
    if not ids:
        return {}
    rows = connection.execute(statements.ANSWERS_BY_ID, {"ids": list(ids)}).mappings()
    return {row["id"]: decision_of(row) for row in rows}


def read_item(connection: Connection, codec: Codec, item_id: int) -> QueueItem:
    """Return one item.

    Raises
    ------
    ItemGone
        If there is none, or its images were removed.
    """
    found = read_items(connection, codec, [item_id])
    if not found:
        state = connection.execute(statements.STATE_OF_ITEM, {"item_id": item_id}).scalar()
        if state is None:
            raise ItemGone(f"there is no item {item_id}. It may have been removed long ago.")
        raise ItemGone(gone(item_id, State(state)))
    return found[0]


def list_items(
    connection: Connection, *, state: State | None, model: str | None, limit: int, after_id: int
) -> list[int]:
    """Return numbers of items that still have their images, ascending."""
    states = (State.PENDING, State.CLAIMED, State.DECIDED, State.TRAINED) if state is None else (state,)
    values = {"after_id": after_id, "n": limit, "model": model}
    return list(connection.execute(statements.whole_items(states, model is not None), values).scalars())


def list_settled(connection: Connection, model: str) -> list[Settled]:
    """Return the items whose answer counts, by number."""
    rows = connection.execute(statements.SETTLED, {"model": model}).all()
    return [Settled(row.id, State(row.state), row.decision_id, row.bundle_digest) for row in rows]


def list_decisions(connection: Connection, *, after_id: int, reviewer: str | None, limit: int) -> list[Decision]:
    """Return answers, oldest first, also those that were superseded or withdrawn."""
    statement = statements.ANSWERS_AFTER if reviewer is None else statements.ANSWERS_OF_REVIEWER_AFTER
    values = {"after_id": after_id, "n": limit, "reviewer": reviewer}
    return [decision_of(row) for row in connection.execute(statement, values).mappings()]


def read_settings(connection: Connection) -> QueueSettings:
    """Return the settings of the queue."""
    return QueueSettings.from_json(connection.execute(statements.SETTINGS).scalar())


def read_counts(connection: Connection) -> Counts:
    """Count everything."""
    by_state = dict.fromkeys(State, 0)
    for state, count in connection.execute(statements.COUNT_BY_STATE):
        by_state[State(state)] += count
    for state, count in connection.execute(statements.COUNT_GOLD_BY_STATE):
        by_state[State(state)] -= count
    held = connection.execute(statements.HELD_IN_ALL).one()
    return Counts(
        by_state=by_state,
        oldest_pending_at=connection.execute(statements.OLDEST_PENDING).scalar(),
        dropped={(model, label): count for model, label, count in connection.execute(statements.DROPS)},
        decisions=answer_kinds(connection.execute(statements.COUNT_ANSWERS)),
        held_items=held.held_items,
        held_bytes=held.held_bytes,
    )


def answer_kinds(rows: Iterable[Any]) -> dict[str, int]:
    """Return how many answers say what, and how many of these were replaced, from rows of `COUNT_ANSWERS`."""
    kinds = dict.fromkeys(("poisoned", "false_alarm", "superseded", "withdrawn"), 0)
    for is_poisoned, later, count in rows:
        kinds["poisoned" if is_poisoned else "false_alarm"] += count
        if later is not None:
            kinds["withdrawn" if later == "withdrawal" else "superseded"] += count
    return kinds


def read_groups(connection: Connection, seen_by: str | None) -> list[Group]:
    """Return all groups, those with most pending items first; for a reviewer only with what is open for that one."""
    samples: dict[int, list[int]] = defaultdict(list)
    values = {"n": _SAMPLES, "reviewer": seen_by}
    statement = statements.GROUP_SAMPLES if seen_by is None else statements.OPEN_GROUP_SAMPLES
    for group, item_id in connection.execute(statement, values):
        samples[group].append(item_id)
    hidden: dict[int, int] = {}
    if seen_by is not None:
        hidden |= {row.group_id: row.pending for row in connection.execute(statements.NOT_ASKED_PER_GROUP, values)}
    parts: dict[int, list[Any]] = defaultdict(list)
    for row in connection.execute(statements.GROUPS):
        parts[row.group_id].append(row)
    groups = [
        Group(
            group,
            sum(row.size for row in rows),
            sum(row.pending for row in rows) - hidden.get(group, 0),
            tuple(row.suspect_label for row in rows),
            tuple(samples[group]),
        )
        for group, rows in parts.items()
    ]
    return sorted(groups, key=lambda group: (-group.pending, -group.size, group.id))


def read_gold_results(connection: Connection, reviewer: str) -> GoldResult:
    """Compare a reviewer's answers about gold items with the known ones."""
    right = answered = 0
    for is_poisoned, true_label, known_poisoned, known_label in connection.execute(
        statements.GOLD_ANSWERS, {"reviewer": reviewer}
    ):
        answered += 1
        said_no_label = true_label is None and not is_poisoned  # a false alarm needs none
        right += is_poisoned == known_poisoned and (known_label in (None, true_label) or said_no_label)
    return GoldResult(right, answered)


def read_pending_features(
    connection: Connection, codec: Codec, model: str, limit: int
) -> tuple[IntArray, IntArray, IntArray, Float32Array]:
    """Return numbers, suspect labels, groups (0 = none) and features of pending items, newest first.

    Items of a bundle with another width of the features than the newest one's are left out.
    """
    rows = connection.execute(statements.PENDING_FEATURES, {"model": model, "n": limit}).mappings().all()
    features = [codec.decode_activations(row).features[0] for row in rows]
    same = [place for place, row in enumerate(features) if len(row) == len(features[0])]

    def column(name: str) -> IntArray:
        return np.array([rows[place][name] for place in same], dtype=np.int64)

    stacked = np.stack([features[place] for place in same]) if same else np.empty((0, 0), dtype=np.float32)
    return column("id"), column("suspect_label"), column("group_id"), stacked
