"""Every statement that the queue runs, by name, with a line of purpose. None is built from strings."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cache
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from guard.relabel.items import State
from guard.relabel.schema import (
    blobs,
    decisions,
    drops,
    gold,
    items,
    ledger,
    retrain_requests,
    reviewers,
    rounds,
    sessions,
    skips,
    traffic,
)

Order = Literal["suspicion", "age", "group"]

#: Tickets of ordinary items are below 1; gold items have 2, and so never give way or expire.
GOLD_TICKET = 2.0


def is_in(state: State) -> sa.ColumnElement[bool]:
    """Say that an item is in a state; written into the statement, not bound: only then may a partial index be used."""
    return items.c.state == sa.literal_column(f"'{state.value}'")


@cache
def advisory_lock(number: int, with_key: bool = False) -> sa.Select[Any]:
    """Wait until nobody else holds a lock, and hold it until the transaction ends; PostgreSQL only.

    Numbers are the same in every process: 5140701 migrates, 5140702 adds to the chain of decisions, 5140703 changes how
    many items the reviewer `key` holds. On SQLite the transaction itself is the lock.
    """
    key: tuple[sa.BindParameter[Any], ...] = (sa.bindparam("key"),) if with_key else ()
    return sa.select(sa.func.pg_advisory_xact_lock(number, *key))


_IS_PENDING = is_in(State.PENDING)
_IS_CLAIMED = is_in(State.CLAIMED)
_IS_ORDINARY = items.c.ticket < 1.0

# --- enqueueing ---

#: What is held. In PostgreSQL it is also the lock behind which enqueues queue up.
LEDGER = sa.select(ledger.c.last_item_id, ledger.c.held_items, ledger.c.held_bytes, ledger.c.settings).with_for_update()
#: Note what came and went.
UPDATE_LEDGER = sa.update(ledger).values(
    last_item_id=ledger.c.last_item_id + sa.bindparam("new_ids"),
    held_items=ledger.c.held_items + sa.bindparam("more_items"),
    held_bytes=ledger.c.held_bytes + sa.bindparam("more_bytes"),
)
#: The settings of the queue, and a change of them.
SETTINGS = sa.select(ledger.c.settings)
CHANGE_SETTINGS = sa.update(ledger).values(settings=sa.bindparam("changed"))
INSERT_ITEM = sa.insert(items)
INSERT_BLOBS = sa.insert(blobs)
INSERT_GOLD = sa.insert(gold)
#: What may give way: nobody has answered it, or not enough have.
_OPEN = (_IS_PENDING, _IS_CLAIMED)
_IN_GROUP_KEY = (items.c.model == sa.bindparam("model"), items.c.room == sa.bindparam("room"))


def _share_of(is_state: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return (
        sa.select(
            items.c.model,
            items.c.room,
            sa.func.count().label("items"),
            sa.func.sum(items.c.size).label("bytes"),
            sa.func.sum(items.c.spare_bytes).label("spare"),
        )
        .where(is_state, _IS_ORDINARY)
        .group_by(items.c.model, items.c.room)
    )


def _lowest_tickets(is_state: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return (
        sa.select(items.c.ticket, items.c.id, items.c.size)
        .where(is_state, _IS_ORDINARY, *_IN_GROUP_KEY)
        .order_by(items.c.ticket)
        .limit(sa.bindparam("n"))
        .with_for_update(skip_locked=True)
    )


def _largest_bodies(is_state: sa.ColumnElement[bool]) -> sa.Select[Any]:
    return (
        sa.select(-items.c.spare_bytes, items.c.id)
        .where(is_state, items.c.spare_bytes > sa.literal_column("0"), *_IN_GROUP_KEY)
        .order_by(items.c.spare_bytes.desc())
        .limit(sa.bindparam("n"))
        .with_for_update(skip_locked=True)
    )


#: What every group holds, to see which takes most room; pending and held items apart.
SHARES = sa.union_all(*map(_share_of, _OPEN))
#: The items of a group that would give way first: of the pending ones, and of those that a reviewer holds.
LOWEST_TICKETS, LOWEST_TICKETS_HELD = map(_lowest_tickets, _OPEN)
#: The largest bodies of a group that its items can do without, as above.
LARGEST_BODIES, LARGEST_BODIES_HELD = map(_largest_bodies, _OPEN)
#: An item is out of the queue: `state` is `discarded` or `expired`.
REMOVE_ITEM = (
    sa.update(items)
    .where(items.c.id == sa.bindparam("item_id"))
    .values(state=sa.bindparam("new_state"), claimed_by=None, lease_expires_at=None)
)
DELETE_BLOBS = sa.delete(blobs).where(blobs.c.item_id == sa.bindparam("item_id"))
#: An item stays without its body.
REMOVE_BODY = sa.update(blobs).where(blobs.c.item_id == sa.bindparam("of_item")).values(body=b"")
NOTE_BODY_REMOVED = (
    sa.update(items)
    .where(items.c.id == sa.bindparam("of_item"))
    .values(size=items.c.size - items.c.spare_bytes, spare_bytes=0, content_type="")
)
DELETE_SKIPS = sa.delete(skips).where(skips.c.item_id == sa.bindparam("item_id"))


@cache
def count_drops(dialect: str) -> Any:
    """Add to the drops of a group."""
    insert = sqlite.insert(drops) if dialect == "sqlite" else postgresql.insert(drops)
    return insert.on_conflict_do_update(
        index_elements=[drops.c.model, drops.c.suspect_label],
        set_={"dropped": drops.c.dropped + insert.excluded.dropped},
    )


# --- the audit sample ---

_IS_AUDIT = items.c.audit_probability.is_not(None)
#: Audits of a model between two times, to hold `max_audits_per_hour`; a server whose clock is ahead takes no others'.
COUNT_AUDITS = (
    sa.select(sa.func.count())
    .select_from(items)
    .where(
        _IS_AUDIT,
        _IS_ORDINARY,
        items.c.model == sa.bindparam("model"),
        items.c.received_at > sa.bindparam("since"),
        items.c.received_at <= sa.bindparam("until"),
    )
)
#: Where the newest flagged items of a model stand among those that reviewers are given.
NEWEST_RANKS = (
    sa.select(items.c.review_rank, items.c.review_score)
    .where(items.c.model == sa.bindparam("model"), ~_IS_AUDIT, _IS_ORDINARY)
    .order_by(items.c.received_at.desc())
    .limit(sa.bindparam("n"))
)
#: Whether audits are drawn or ever were: then nobody is shown what would tell one. A server that draws audits says so
#: with its first counts, when it starts, so that the first audit does not show by what disappears.
HAS_AUDITS = sa.select(sa.or_(sa.exists().where(_IS_AUDIT), sa.select(traffic.c.model).exists()))


@cache
def count_traffic(dialect: str) -> Any:
    """Add to the requests of an hour."""
    insert = sqlite.insert(traffic) if dialect == "sqlite" else postgresql.insert(traffic)
    return insert.on_conflict_do_update(
        index_elements=[traffic.c.model, traffic.c.bundle_digest, traffic.c.hour, traffic.c.stratum],
        set_={"requests": traffic.c.requests + insert.excluded.requests},
    )


# --- claiming ---

_ORDERS: dict[Order, list[sa.ColumnElement[Any]]] = {
    "suspicion": [items.c.review_rank.asc(), items.c.review_score.desc(), items.c.id.asc()],
    "age": [items.c.received_at.asc(), items.c.id.asc()],
    "group": [items.c.group_id.desc(), items.c.review_rank.asc(), items.c.review_score.desc(), items.c.id.asc()],
}
_later = decisions.alias("later")
_is_replaced = sa.exists().where(_later.c.supersedes == decisions.c.id)
_answered_by_reviewer = sa.and_(
    items.c.votes > 0,
    sa.exists().where(
        decisions.c.item_id == items.c.id,
        decisions.c.reviewer == sa.bindparam("reviewer"),
        decisions.c.kind == "answer",
        ~_is_replaced,
    ),
)
#: Who answered the item that a gold one is a copy of would know it again.
_copied_from_reviewer = sa.and_(
    items.c.ticket >= 1.0,
    sa.exists().where(
        gold.c.item_id == items.c.id,
        decisions.c.item_id == gold.c.copy_of,
        decisions.c.reviewer == sa.bindparam("reviewer"),
        decisions.c.kind == "answer",
    ),
)
_is_for_reviewer = sa.and_(~_answered_by_reviewer, ~_copied_from_reviewer)
_skipped_by_reviewer = sa.exists().where(skips.c.item_id == items.c.id, skips.c.reviewer == sa.bindparam("reviewer"))


@cache
def pick(order: Order, in_group: bool) -> sa.Select[Any]:
    """Find pending items in an order; those that the reviewer skipped or answered are left out."""
    statement = sa.select(items.c.id).where(_IS_PENDING, _is_for_reviewer, ~_skipped_by_reviewer)
    if in_group:
        statement = statement.where(items.c.group_id == sa.bindparam("group"))
    return statement.order_by(*_ORDERS[order]).limit(sa.bindparam("n")).with_for_update(skip_locked=True)


@cache
def pick_skipped(in_group: bool) -> sa.Select[Any]:
    """Find pending items that the reviewer skipped, the longest ago first."""
    statement = (
        sa.select(items.c.id)
        .join_from(skips, items, skips.c.item_id == items.c.id)
        .where(_IS_PENDING, _is_for_reviewer, skips.c.reviewer == sa.bindparam("reviewer"))
    )
    if in_group:
        statement = statement.where(items.c.group_id == sa.bindparam("group"))
    statement = statement.order_by(skips.c.skipped_at, items.c.id).limit(sa.bindparam("n"))
    return statement.with_for_update(skip_locked=True, of=items)


#: Of the named items, those that the reviewer may have: pending, or already the reviewer's.
PICK_NAMED = (
    sa.select(items.c.id)
    .where(
        items.c.id.in_(sa.bindparam("ids", expanding=True)),
        sa.or_(
            sa.and_(_IS_PENDING, _is_for_reviewer),
            sa.and_(_IS_CLAIMED, items.c.claimed_by == sa.bindparam("reviewer")),
        ),
    )
    .order_by(items.c.id)
    .with_for_update(skip_locked=True)
)
#: Items that a reviewer holds now.
HELD_BY = (
    sa.select(items.c.id)
    .where(
        _IS_CLAIMED,
        items.c.claimed_by == sa.bindparam("reviewer"),
        items.c.lease_expires_at > sa.bindparam("now"),
    )
    .order_by(items.c.lease_expires_at, items.c.id)
)
#: Give items to a reviewer until a time.
TAKE = (
    sa.update(items)
    .where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(state="claimed", claimed_by=sa.bindparam("reviewer"), lease_expires_at=sa.bindparam("until"))
)
#: Of the named items, those that are the reviewer's now.
PICK_HELD = (
    sa.select(items.c.id)
    .where(
        items.c.id.in_(sa.bindparam("ids", expanding=True)),
        _IS_CLAIMED,
        items.c.claimed_by == sa.bindparam("reviewer"),
        items.c.lease_expires_at > sa.bindparam("now"),
    )
    .order_by(items.c.id)
    .with_for_update()
)
#: Give items back.
RETURN = (
    sa.update(items)
    .where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
    .values(state="pending", claimed_by=None, lease_expires_at=None)
)


@cache
def note_skip(dialect: str) -> Any:
    """Remember that a reviewer skipped an item, or did so again."""
    insert = sqlite.insert(skips) if dialect == "sqlite" else postgresql.insert(skips)
    return insert.on_conflict_do_update(
        index_elements=[skips.c.item_id, skips.c.reviewer], set_={"skipped_at": insert.excluded.skipped_at}
    )


# --- deciding ---

#: The items that are about to be answered, locked in the order of their numbers.
LOCK_ITEMS = (
    sa.select(
        items.c.id,
        items.c.state,
        items.c.claimed_by,
        items.c.lease_expires_at,
        items.c.n_classes,
        items.c.votes,
        items.c.ticket,
    )
    .where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
    .order_by(items.c.id)
    .with_for_update()
)
#: The newest row of the chain.
LAST_DECISION = sa.select(decisions.c.id, decisions.c.hash).order_by(decisions.c.id.desc()).limit(1)
INSERT_DECISION = sa.insert(decisions)
#: Where an item stands after an answer.
SETTLE = (
    sa.update(items)
    .where(items.c.id == sa.bindparam("item_id"))
    .values(
        state=sa.bindparam("new_state"),
        claimed_by=sa.bindparam("new_claimed_by"),
        lease_expires_at=sa.bindparam("new_lease"),
        votes=sa.bindparam("new_votes"),
        decision_id=sa.bindparam("new_decision_id"),
    )
)
#: Answers, each with the row that replaced it, if any.
ANSWERS = (
    sa.select(
        decisions.c.id,
        decisions.c.item_id,
        decisions.c.reviewer,
        decisions.c.is_poisoned,
        decisions.c.true_label,
        decisions.c.note,
        decisions.c.decided_at,
        decisions.c.supersedes,
        _later.c.id.label("replaced_by"),
        _later.c.kind.label("replaced_by_kind"),
    )
    .join_from(decisions, _later, _later.c.supersedes == decisions.c.id, isouter=True)
    .where(decisions.c.kind == "answer")
)
ANSWER = ANSWERS.where(decisions.c.id == sa.bindparam("decision_id"))
#: Answers above a number, by number; all, or one reviewer's.
ANSWERS_AFTER = (
    ANSWERS.where(decisions.c.id > sa.bindparam("after_id")).order_by(decisions.c.id).limit(sa.bindparam("n"))
)
ANSWERS_OF_REVIEWER_AFTER = ANSWERS_AFTER.where(decisions.c.reviewer == sa.bindparam("reviewer"))
ANSWERS_BY_ID = ANSWERS.where(decisions.c.id.in_(sa.bindparam("ids", expanding=True)))
#: How many answers of one reviewer above a number stand.
COUNT_STANDING = (
    sa.select(sa.func.count())
    .select_from(decisions)
    .where(
        decisions.c.reviewer == sa.bindparam("reviewer"),
        decisions.c.id > sa.bindparam("after_id"),
        decisions.c.kind == "answer",
        ~_is_replaced,
    )
)
#: Answers about one item that stand, oldest first.
STANDING = ANSWERS.where(decisions.c.item_id == sa.bindparam("item_id"), _later.c.id.is_(None)).order_by(decisions.c.id)
#: The chain, oldest first.
CHAIN = sa.select(decisions).order_by(decisions.c.id)
#: Items whose answer that counts is none: removed, replaced, or about another item.
UNFOUNDED = (
    sa.select(items.c.id, items.c.decision_id)
    .join_from(items, decisions, decisions.c.id == items.c.decision_id, isouter=True)
    .where(
        items.c.decision_id.is_not(None),
        sa.or_(decisions.c.id.is_(None), decisions.c.item_id != items.c.id, decisions.c.kind != "answer", _is_replaced),
    )
    .order_by(items.c.id)
)
#: A bundle learned from these answers; one that was changed meanwhile is left as it is.
MARK_TRAINED = (
    sa.update(items)
    .where(items.c.id == sa.bindparam("item_id"), items.c.state == "decided")
    .values(state="trained", trained_bundle=sa.bindparam("digest"))
)
MARK_TRAINED_IF_UNCHANGED = MARK_TRAINED.where(items.c.decision_id == sa.bindparam("expected_decision_id"))

# --- reading ---

#: Items that still have their images.
WHOLE_ITEMS = sa.select(
    items,
    blobs.c.sealed,
    blobs.c.body,
    blobs.c.inputs,
    blobs.c.activations,
).join_from(items, blobs, blobs.c.item_id == items.c.id)
#: The same without the bodies of requests, which may be large.
_ITEMS_WITHOUT_BODY = sa.select(
    items,
    blobs.c.sealed,
    sa.literal(b"", sa.LargeBinary).label("body"),
    blobs.c.inputs,
    blobs.c.activations,
).join_from(items, blobs, blobs.c.item_id == items.c.id)
ITEMS_WITHOUT_BODY_BY_ID = _ITEMS_WITHOUT_BODY.where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
_IS_SETTLED = sa.and_(sa.or_(is_in(State.DECIDED), is_in(State.TRAINED)), items.c.model == sa.bindparam("model"))
#: Items of a model whose answer counts, without anything large.
SETTLED = (
    sa.select(items.c.id, items.c.state, items.c.decision_id, items.c.bundle_digest)
    .where(_IS_SETTLED)
    .order_by(items.c.id)
)
#: How many there are, and how many of them were answered after a time.
COUNT_SETTLED = sa.select(sa.func.count()).select_from(items).where(_IS_SETTLED)
COUNT_SETTLED_SINCE = (
    sa.select(sa.func.count())
    .join_from(items, decisions, decisions.c.id == items.c.decision_id)
    .where(_IS_SETTLED, decisions.c.decided_at > sa.bindparam("since"))
)
#: Pending items of a model above a number.
_PENDING_OF = (_IS_PENDING, items.c.model == sa.bindparam("model"))
COUNT_PENDING_AFTER = (
    sa.select(sa.func.count()).select_from(items).where(*_PENDING_OF, ~_IS_AUDIT, items.c.id > sa.bindparam("after_id"))
)
NEWEST_PENDING = sa.select(sa.func.coalesce(sa.func.max(items.c.id), 0)).where(*_PENDING_OF)
STATE_OF_ITEM = sa.select(items.c.state).where(items.c.id == sa.bindparam("item_id"))


@cache
def whole_items(states: tuple[State, ...], of_model: bool) -> sa.Select[Any]:
    """List items in some states above a number, of one model or of all."""
    statement = sa.select(items.c.id).where(items.c.id > sa.bindparam("after_id"), sa.or_(*map(is_in, states)))
    if of_model:
        statement = statement.where(items.c.model == sa.bindparam("model"))
    return statement.order_by(items.c.id).limit(sa.bindparam("n"))


ITEMS_BY_ID = WHOLE_ITEMS.where(items.c.id.in_(sa.bindparam("ids", expanding=True)))
#: Every state's size.
COUNT_BY_STATE = sa.union_all(
    *(sa.select(sa.literal(state.value), sa.func.count()).select_from(items).where(is_in(state)) for state in State)
)
#: Gold items per state; they are to be left out.
COUNT_GOLD_BY_STATE = (
    sa.select(items.c.state, sa.func.count())
    .join_from(gold, items, gold.c.item_id == items.c.id)
    .group_by(items.c.state)
)
OLDEST_PENDING = (
    sa.select(items.c.received_at).where(_IS_PENDING, _IS_ORDINARY).order_by(items.c.received_at, items.c.id).limit(1)
)
DROPS = sa.select(drops.c.model, drops.c.suspect_label, drops.c.dropped)
HELD_IN_ALL = sa.select(ledger.c.held_items, ledger.c.held_bytes)
#: Answers by what they say and by what became of them.
COUNT_ANSWERS = (
    sa.select(decisions.c.is_poisoned, _later.c.kind, sa.func.count())
    .join_from(decisions, _later, _later.c.supersedes == decisions.c.id, isouter=True)
    .where(decisions.c.kind == "answer")
    .group_by(decisions.c.is_poisoned, _later.c.kind)
)
#: How the standing answers of one reviewer about gold items compare with the known ones.
GOLD_ANSWERS = (
    sa.select(decisions.c.is_poisoned, decisions.c.true_label, gold.c.is_poisoned, gold.c.true_label)
    .join_from(gold, decisions, decisions.c.item_id == gold.c.item_id)
    .where(decisions.c.kind == "answer", decisions.c.reviewer == sa.bindparam("reviewer"), ~_is_replaced)
)

# --- gold items, and what a reviewer sees ---

#: The newest ordinary item of a model.
NEWEST_OF_MODEL = (
    sa.select(items.c.bundle_digest, items.c.false_positive_rate, items.c.scores)
    .where(items.c.model == sa.bindparam("model"), _IS_ORDINARY)
    .order_by(items.c.id.desc())
    .limit(1)
)
#: Of the named items, those whose answer is known.
GOLD_BY_ID = sa.select(gold.c.item_id, gold.c.learned_to).where(gold.c.item_id.in_(sa.bindparam("ids", expanding=True)))
#: One reviewer's answers about the named items.
OWN_ANSWERS = ANSWERS.where(
    decisions.c.item_id.in_(sa.bindparam("ids", expanding=True)), decisions.c.reviewer == sa.bindparam("reviewer")
)
#: Answers of others about gold items, as `COUNT_ANSWERS`.
COUNT_GOLD_ANSWERS_OF_OTHERS = COUNT_ANSWERS.join(gold, gold.c.item_id == decisions.c.item_id).where(
    decisions.c.reviewer != sa.bindparam("reviewer")
)
#: All gold items that a reviewer may be asked.
GOLD_STATES = (
    sa.select(items.c.id, items.c.model, items.c.state, items.c.claimed_by, items.c.received_at, gold.c.learned_to)
    .join_from(gold, items, gold.c.item_id == items.c.id)
    .where(~_copied_from_reviewer)
)
#: Per model, the newest answer of the named items.
LEARNED_TO = (
    sa.select(items.c.model, sa.func.max(items.c.decision_id))
    .where(items.c.id.in_(sa.bindparam("ids", expanding=True)), is_in(State.TRAINED))
    .group_by(items.c.model)
)
#: The first answer after one that no bundle has learned from.
NEXT_NOT_LEARNED = sa.select(sa.func.min(items.c.decision_id)).where(
    is_in(State.DECIDED),
    items.c.model == sa.bindparam("of_model"),
    items.c.decision_id > sa.bindparam("decision_id"),
)
NOTE_LEARNED = (
    sa.update(gold)
    .where(
        gold.c.item_id.in_(
            sa.select(items.c.id).where(items.c.ticket >= 1.0, items.c.model == sa.bindparam("of_model"))
        ),
        gold.c.learned_to < sa.bindparam("decision_id"),
    )
    .values(learned_to=sa.bindparam("decision_id"))
)

# --- groups ---

#: Pending items of a model, newest first, for clustering; gold ones too, or they alone would have no group.
PENDING_FEATURES = (
    sa.select(items.c.id, items.c.suspect_label, items.c.group_id, blobs.c.sealed, blobs.c.activations)
    .join_from(items, blobs, blobs.c.item_id == items.c.id)
    .where(_IS_PENDING, items.c.model == sa.bindparam("model"))
    .order_by(items.c.received_at.desc(), items.c.id.desc())
    .limit(sa.bindparam("n"))
)
SET_GROUP = sa.update(items).where(items.c.id == sa.bindparam("item_id")).values(group_id=sa.bindparam("group"))
_in_group = sa.and_(items.c.group_id > 0, items.c.state.in_(("pending", "claimed", "decided", "trained")))
#: Size and pending items of every group, per suspect label.
GROUPS = (
    sa.select(
        items.c.group_id,
        items.c.suspect_label,
        sa.func.count().label("size"),
        sa.func.sum(sa.case((_IS_PENDING, 1), else_=0)).label("pending"),
    )
    .where(_in_group)
    .group_by(items.c.group_id, items.c.suspect_label)
    .order_by(items.c.group_id, items.c.suspect_label)
)
_place = (
    sa.func.row_number()
    .over(partition_by=items.c.group_id, order_by=(sa.case((_IS_PENDING, 0), else_=1), items.c.id))
    .label("place")
)
_placed = sa.select(items.c.group_id, items.c.id, _place).where(_in_group).subquery()
#: The first items of every group, pending ones first.
GROUP_SAMPLES = (
    sa.select(_placed.c.group_id, _placed.c.id)
    .where(_placed.c.place <= sa.bindparam("n"))
    .order_by(_placed.c.group_id, _placed.c.place)
)

#: Pending items of every group that a reviewer is not asked.
NOT_ASKED_PER_GROUP = (
    sa.select(items.c.group_id, sa.func.count().label("pending"))
    .where(_IS_PENDING, items.c.group_id > 0, ~_is_for_reviewer)
    .group_by(items.c.group_id)
)
_open = (
    sa.select(items.c.group_id, items.c.id, _place)
    .where(items.c.group_id > 0, sa.or_(_IS_PENDING, _IS_CLAIMED), _is_for_reviewer)
    .subquery()
)
#: The first items of every group that are not answered, pending ones first.
OPEN_GROUP_SAMPLES = (
    sa.select(_open.c.group_id, _open.c.id)
    .where(_open.c.place <= sa.bindparam("n"))
    .order_by(_open.c.group_id, _open.c.place)
)

# --- sweeping ---

#: Claimed items whose lease has ended.
ENDED_LEASES = (
    sa.select(items.c.id)
    .where(_IS_CLAIMED, items.c.lease_expires_at <= sa.bindparam("before"))
    .order_by(items.c.lease_expires_at)
    .limit(sa.bindparam("n"))
)


@cache
def old_items(state: State) -> sa.Select[Any]:
    """Find items in a state that are too old; gold ones only while pending: one that outlived all others would show."""
    of_kind = () if state is State.PENDING else (_IS_ORDINARY,)
    return (
        sa.select(items.c.id, items.c.size)
        .where(is_in(state), *of_kind, items.c.received_at <= sa.bindparam("before"))
        .order_by(items.c.received_at)
        .limit(sa.bindparam("n"))
    )


#: Decided items that are too old and were called clean: they wait for no round, of which there may be none.
OLD_CLEAN_ITEMS = old_items(State.DECIDED).where(
    sa.exists().where(decisions.c.id == items.c.decision_id, decisions.c.is_poisoned.is_(False))
)


@cache
def unanswered(state: State) -> sa.Select[Any]:
    """Find removed items that are too old and that nobody ever answered."""
    return old_items(state).where(~sa.exists().where(decisions.c.item_id == items.c.id))


DELETE_ITEM = sa.delete(items).where(items.c.id == sa.bindparam("item_id"))

# --- activity: what came and was answered over time ---

#: Of an answer that was replaced: `taken_back`, or `overturned` if the later one says something else.
_became = sa.case(
    (_later.c.kind == "withdrawal", "taken_back"),
    (
        sa.and_(
            _later.c.kind == "answer",
            sa.or_(
                _later.c.is_poisoned != decisions.c.is_poisoned,
                _later.c.true_label.is_distinct_from(decisions.c.true_label),
            ),
        ),
        "overturned",
    ),
    else_="",
)


def _interval(column: sa.Column[Any], start: datetime, width: timedelta) -> sa.ColumnElement[int]:
    """Return the number of the interval that a time is in; times are whole microseconds in the database."""
    since = sa.type_coerce(column, sa.BigInteger) - sa.bindparam(None, start, type_=column.type)
    return sa.type_coerce(since, sa.BigInteger) // (width // timedelta(microseconds=1))


def _between(
    column: sa.Column[Any], start: datetime, end: datetime, model: str | None, with_gold: bool
) -> list[sa.ColumnElement[bool]]:
    found = [column >= start, column < end]
    found += [] if with_gold else [_IS_ORDINARY]
    return found if model is None else [*found, items.c.model == model]


def arrivals_per(
    width: timedelta, start: datetime, end: datetime, model: str | None, with_gold: bool
) -> sa.Select[int, int]:
    """Count flagged inputs by number of the interval since `start`."""
    place = _interval(items.c.received_at, start, width)
    within = _between(items.c.received_at, start, end, model, with_gold)
    return sa.select(place, sa.func.count()).where(*within).group_by(place)


def answers_per(
    width: timedelta, start: datetime, end: datetime, model: str | None, with_gold: bool
) -> sa.Select[int, int]:
    """Count answers, as `arrivals_per`."""
    place = _interval(decisions.c.decided_at, start, width)
    within = _between(decisions.c.decided_at, start, end, model, with_gold)
    return (
        sa.select(place, sa.func.count())
        .join_from(decisions, items, items.c.id == decisions.c.item_id)
        .where(decisions.c.kind == "answer", *within)
        .group_by(place)
    )


def answers_by_reviewer(start: datetime, end: datetime, model: str | None, with_gold: bool) -> sa.Select[Any]:
    """Count answers by reviewer, by what they say, and by what became of them."""
    kinds = (decisions.c.reviewer, decisions.c.is_poisoned, _became)
    return (
        sa.select(*kinds, sa.func.count())
        .join_from(decisions, items, items.c.id == decisions.c.item_id)
        .join(_later, _later.c.supersedes == decisions.c.id, isouter=True)
        .where(decisions.c.kind == "answer", *_between(decisions.c.decided_at, start, end, model, with_gold))
        .group_by(*kinds)
    )


def arrivals(start: datetime, end: datetime, model: str | None) -> sa.Select[Any]:
    """List ordinary items that came between two times, oldest first."""
    return (
        sa.select(items.c.request_id, items.c.model, items.c.received_at, items.c.state, _IS_AUDIT.label("is_audit"))
        .where(*_between(items.c.received_at, start, end, model, with_gold=False))
        .order_by(items.c.id)
    )


def turned_away(model: str | None) -> tuple[sa.Select[Any], sa.Select[Any]]:
    """Count flagged inputs that found no room, and of these the ones that have a row: they gave way later."""
    dropped = sa.select(sa.func.coalesce(sa.func.sum(drops.c.dropped), 0)).where(drops.c.suspect_label >= 0)
    gave_way = sa.select(sa.func.count()).select_from(items).where(is_in(State.DISCARDED), ~_IS_AUDIT)
    if model is None:
        return dropped, gave_way
    return dropped.where(drops.c.model == model), gave_way.where(items.c.model == model)


MODELS = sa.select(items.c.model).distinct()

# --- rounds of retraining ---

INSERT_ROUND = sa.insert(rounds).returning(rounds.c.id)
#: What came of a round that has no outcome yet, or is a canary.
FINISH_ROUND = (
    sa.update(rounds)
    .where(rounds.c.id == sa.bindparam("round_id"), rounds.c.outcome.is_(None) | (rounds.c.outcome == "canary"))
    .values(
        outcome=sa.bindparam("new_outcome"),
        report=sa.bindparam("new_report"),
        candidate_digest=sa.bindparam("new_digest"),
        finished_at=sa.bindparam("now"),
    )
)
#: Rounds, newest first.
ROUNDS = sa.select(rounds).order_by(rounds.c.id.desc()).limit(sa.bindparam("n"))
ROUNDS_OF_MODEL = ROUNDS.where(rounds.c.model == sa.bindparam("model"))
RETRAINED_MODELS = sa.select(rounds.c.model).distinct()
UNFINISHED_ROUNDS = sa.select(rounds.c.id).where(rounds.c.model == sa.bindparam("model"), rounds.c.outcome.is_(None))
INSERT_RETRAIN_REQUEST = sa.insert(retrain_requests)
#: The request for a retraining of a model is gone; tells who made it.
TAKE_RETRAIN_REQUEST = (
    sa.delete(retrain_requests)
    .where(retrain_requests.c.model == sa.bindparam("of_model"))
    .returning(retrain_requests.c.reviewer)
)

# --- reviewers and their sessions ---

_IS_ENABLED = reviewers.c.disabled_at.is_(None)
LOCK_REVIEWER = sa.select(reviewers.c.disabled_at).where(reviewers.c.name == sa.bindparam("reviewer")).with_for_update()
INSERT_REVIEWER = sa.insert(reviewers)
#: A reviewer that was disabled may answer again, with a new token.
ENABLE_REVIEWER = (
    sa.update(reviewers)
    .where(reviewers.c.name == sa.bindparam("reviewer"))
    .values(
        role=sa.bindparam("new_role"),
        token_hash=sa.bindparam("new_token_hash"),
        added_at=sa.bindparam("now"),
        disabled_at=None,
    )
)
DISABLE_REVIEWER = (
    sa.update(reviewers)
    .where(reviewers.c.name == sa.bindparam("reviewer"), _IS_ENABLED)
    .values(disabled_at=sa.bindparam("now"))
)
#: Reviewers who may answer; one by name; one by the hash of a token; one by the hash of a session's token.
REVIEWERS = sa.select(reviewers.c.name, reviewers.c.role).where(_IS_ENABLED)
REVIEWER_BY_NAME = REVIEWERS.where(reviewers.c.name == sa.bindparam("reviewer"))
REVIEWER_BY_TOKEN = REVIEWERS.where(reviewers.c.token_hash == sa.bindparam("token_hash"))
REVIEWER_BY_SESSION = REVIEWERS.join(sessions, sessions.c.reviewer == reviewers.c.name).where(
    sessions.c.token_hash == sa.bindparam("token_hash"), sessions.c.expires_at > sa.bindparam("now")
)
INSERT_SESSION = sa.insert(sessions)
DELETE_SESSION = sa.delete(sessions).where(sessions.c.token_hash == sa.bindparam("of_token_hash"))
DELETE_SESSIONS_OF = sa.delete(sessions).where(sessions.c.reviewer == sa.bindparam("of_reviewer"))
DELETE_ENDED_SESSIONS = sa.delete(sessions).where(sessions.c.expires_at <= sa.bindparam("now"))

# --- the key, and the schema ---

KEY_CHECK = sa.select(ledger.c.key_check)
SET_KEY_CHECK = sa.update(ledger).values(key_check=sa.bindparam("new_check"))
#: Alembic's own table: one row, the revision of the schema.
VERSION_TABLE = sa.table("alembic_version", sa.column("version_num"))
REVISION_OF_SCHEMA = sa.select(VERSION_TABLE.c.version_num)
