"""Items as people may see them where audits are mixed in: without anything that would tell an audit from a flagged one.

Reviewers judge honestly only what they cannot tell apart. Once a queue has an audit sample, scores and reasons are
shown for no item, whoever asks: what is missing for some items only would tell these. Nor does an item show that a
bundle learned from it: of flagged inputs and audits it learns differently.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from guard.relabel.items import QueueItem, State


def blinded(item: QueueItem) -> QueueItem:
    """Return an item with the same placeholder in every field of which an audit has other values than a flagged one.

    These are its scores, p-value, reason, rate and probability, and whether a bundle learned from it; picture, labels,
    second opinion and group stay.
    """
    kept = replace(
        item.input,
        raw={},
        surprise={},
        combined=0.0,
        p_value=1.0,
        reason="",
        false_positive_rate=None,
        audit_probability=None,
    )
    state = State.DECIDED if item.state is State.TRAINED else item.state
    return replace(item, input=kept, state=state, is_blinded=True)


def blinded_counts(by_state: Mapping[State, int]) -> dict[State, int]:
    """Return how many items are in each state, as `blinded` items show it."""
    answered = by_state[State.DECIDED] + by_state[State.TRAINED]
    return {**by_state, State.DECIDED: answered, State.TRAINED: 0}
