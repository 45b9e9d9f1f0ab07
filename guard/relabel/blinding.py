"""Items as people may see them where audits are mixed in: without anything that would tell an audit from a flagged one.

Reviewers judge honestly only what they cannot tell apart. Once a queue has an audit sample, scores and reasons are
shown for no item, whoever asks: what is missing for some items only would tell these.
"""

from __future__ import annotations

from dataclasses import replace

from guard.relabel.items import QueueItem


def blinded(item: QueueItem) -> QueueItem:
    """Return an item with the same placeholder in every field of which an audit has other values than a flagged one.

    These are its scores, p-value, reason, rate and probability; picture, labels, second opinion and group stay.
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
    return replace(item, input=kept, is_blinded=True)
