"""What a scrape asks the queue's database: one statement each, which reads no image and no tensor."""

from __future__ import annotations

import sqlalchemy as sa

from guard.relabel.schema import decisions, items, rounds

_is_ordinary = items.c.ticket < 1.0  # gold items measure reviewers; they are nobody's requests
_earlier = decisions.alias("earlier")

#: Per model and state: how many items there are, and when the oldest pending one came.
ITEMS = (
    sa.select(
        items.c.model,
        items.c.state,
        sa.func.count().label("n"),
        sa.func.min(sa.case((items.c.state == "pending", items.c.received_at))).label("oldest"),
    )
    .where(_is_ordinary)
    .group_by(items.c.model, items.c.state)
)
_overturns = sa.and_(
    decisions.c.kind == "answer",
    sa.or_(
        _earlier.c.is_poisoned != decisions.c.is_poisoned,
        _earlier.c.true_label.is_distinct_from(decisions.c.true_label),
    ),
)
#: Rows of the chain by what they say, and by whether they took the place of an answer that said something else.
DECISIONS = (
    sa.select(
        decisions.c.kind,
        decisions.c.is_poisoned,
        sa.func.count().label("n"),
        sa.func.sum(sa.case((sa.and_(_earlier.c.id.is_not(None), _overturns), 1), else_=0)).label("overturned"),
    )
    .join_from(decisions, items, items.c.id == decisions.c.item_id)
    .join(_earlier, _earlier.c.id == decisions.c.supersedes, isouter=True)
    .where(_is_ordinary)
    .group_by(decisions.c.kind, decisions.c.is_poisoned)
)
#: Retrainings of one model that are over, by what came of them.
ROUNDS = (
    sa.select(rounds.c.outcome, sa.func.count().label("n"))
    .where(rounds.c.model == sa.bindparam("model"), rounds.c.outcome.in_(("promoted", "refused", "failed")))
    .group_by(rounds.c.outcome)
)
