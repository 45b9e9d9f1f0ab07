"""What a round learns from and what it is measured on: decided items, capped and split, the same way every time."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from guard.detection.pipeline import Guard
from guard.detection.retraining import Labelled
from guard.errors import DataError
from guard.relabel.items import Decision, GoldResult, QueueItem
from guard.retrainer.lessons import CLASS_FULL, Lesson, choose, keyed_unit
from guard.retrainer.settings import RetrainerSettings
from guard.types import Activations, BoolArray, Float64Array, IntArray

#: Share of the poisoned inputs that whole groups may hold out.
_MOST_IN_GROUPS = 0.5


class Agreement(NamedTuple):
    """How often reviewers who decided the same input said the same."""

    agreed: int
    shared: int


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Decided inputs that the candidate never learns from.

    Attributes
    ----------
    poisoned : Activations
        Decided as poisoned, with or without a true label.
    poisoned_labels : ndarray of shape (n,), int64
        True labels; -1 where the reviewer could not tell.
    other_group : ndarray of shape (n,), bool
        Whether nothing of the same look-alike group is learned from.
    false_alarms : Activations
    item_ids : tuple of int
        All of the above.
    not_learned : Activations
        Decided false alarms that are not learned from, held out or over a cap or without a second reviewer.
    is_miss : ndarray of shape (n,), bool
        Which poisoned ones no guard flagged: they came as audits.
    poisoned_weights : ndarray of shape (n,), float64
        How many inputs of the traffic each poisoned one stands for: 1 where a guard flagged it, else 1 / probability.
    clean_audits : Activations
        Audits that were decided as clean. Nothing is learned from them.
    clean_audit_weights : ndarray of shape (m,), float64
        How many inputs of the traffic each of these stands for.
    is_confirmed : ndarray of shape (k + m,), bool
        Whether a second reviewer says the same: of the k of `not_learned`, then of the clean audits.
    """

    poisoned: Activations
    poisoned_labels: IntArray
    other_group: BoolArray
    false_alarms: Activations
    item_ids: tuple[int, ...]
    not_learned: Activations
    is_miss: BoolArray
    poisoned_weights: Float64Array
    clean_audits: Activations
    clean_audit_weights: Float64Array
    is_confirmed: BoolArray

    @classmethod
    def of(
        cls, usable: Sequence[Lesson], held: set[int], other: set[int], learned: set[int], like: Activations
    ) -> HeldOut:
        """Return those of the usable lessons that are held out; the sets hold numbers of items."""
        kept = [lesson for lesson in usable if lesson.id in held]
        poisoned = [lesson for lesson in kept if lesson.is_poisoned]
        false_alarms = [lesson for lesson in usable if not lesson.is_poisoned and not lesson.is_audit]
        clean_audits = [lesson for lesson in usable if not lesson.is_poisoned and lesson.is_audit]
        not_learned = [lesson for lesson in false_alarms if lesson.id not in learned]
        return cls(
            _stack(poisoned, like),
            np.array([lesson.true_label for lesson in poisoned], dtype=np.int64),
            np.array([lesson.id in other for lesson in poisoned], dtype=bool),
            _stack([lesson for lesson in false_alarms if lesson.id in held], like),
            tuple(lesson.id for lesson in kept),
            _stack(not_learned, like),
            np.array([lesson.is_audit for lesson in poisoned], dtype=bool),
            _weights(poisoned),
            _stack(clean_audits, like),
            _weights(clean_audits),
            np.array([lesson.supporters > 1 for lesson in (*not_learned, *clean_audits)], dtype=bool),
        )


@dataclass(frozen=True, slots=True)
class Material:
    """Everything that one round uses.

    Attributes
    ----------
    training : Labelled
        What the candidate learns from, beside the clean reference.
    training_ids : tuple of int
        Items of `training`, in its order.
    clean_held_out : ndarray of shape (n,), bool
        Rows of the guard's clean reference that are only measured on.
    held_out : HeldOut
    poisoned : Activations
        Decided as poisoned, with or without a true label, and neither held out nor over a reviewer's cap: what a
        demarcation may learn from.
    poisoned_ids : tuple of int
        Items of `poisoned`, in its order.
    agreement : Agreement
    by_reviewer : dict of str to dict of str to int
        Per reviewer: `decided`, `used`, and how often they `agreed` of `shared`.
    left_out : dict of str to int
        Decided items that are not used, by reason.
    waiting : int
        Of these, how many may join a later round.
    """

    training: Labelled
    training_ids: tuple[int, ...]
    clean_held_out: BoolArray
    held_out: HeldOut
    poisoned: Activations
    poisoned_ids: tuple[int, ...]
    agreement: Agreement
    by_reviewer: dict[str, dict[str, int]] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    waiting: int = 0

    def without_false_alarms(self, why: str) -> Material:
        """Return the same without any false alarm among what is learned from; `why` is for the report."""
        poisoned = self.training.is_poisoned
        false_alarms = self.training.activations[~poisoned]
        not_learned = Activations.concatenate([self.held_out.not_learned, false_alarms])
        n, unconfirmed = len(self.held_out.not_learned), np.zeros(len(false_alarms), dtype=bool)
        is_confirmed = np.concatenate([self.held_out.is_confirmed[:n], unconfirmed, self.held_out.is_confirmed[n:]])
        return dataclasses.replace(
            self,
            training=self.training[poisoned],
            training_ids=tuple(item_id for item_id, kept in zip(self.training_ids, poisoned, strict=True) if kept),
            held_out=dataclasses.replace(self.held_out, not_learned=not_learned, is_confirmed=is_confirmed),
            left_out={**self.left_out, why: len(false_alarms)},
        )

    def without_poisoned(self, doubted: BoolArray, why: str) -> Material:
        """Return the same without some rows of `poisoned`, in `training` too; `why` is for the report."""
        ids = {item_id for item_id, out in zip(self.poisoned_ids, doubted, strict=True) if out}
        kept = np.array([item_id not in ids for item_id in self.training_ids], dtype=bool)
        return dataclasses.replace(
            self,
            training=self.training[kept],
            training_ids=tuple(item_id for item_id in self.training_ids if item_id not in ids),
            poisoned=self.poisoned[~doubted],
            poisoned_ids=tuple(item_id for item_id in self.poisoned_ids if item_id not in ids),
            left_out={**self.left_out, **({why: len(ids)} if ids else {})},
        )


def gather(
    guard: Guard,
    items: Iterable[QueueItem],
    decisions: Iterable[Decision],
    settings: RetrainerSettings,
    *,
    gold: Mapping[str, GoldResult] | None = None,
    locked: Collection[int] = (),
    same_network: Collection[str] | None = None,
    needed: int = 1,
) -> Material:
    """Choose what a round learns from and what it is measured on.

    Every choice is by a keyed hash of what is chosen, never by chance: the same decided items give the same material,
    and more items move nothing that was there. The key comes from the clean reference, so that a reviewer, who never
    sees that, cannot tell which answers will be measured and lie in the others alone.

    Parameters
    ----------
    guard : Guard
        The active one; only its reference is read.
    items : iterable of QueueItem
        All decided items of the model, those of earlier rounds included. Gone through once; their images are not kept.
    decisions : iterable of Decision
        All decisions about them, withdrawn and superseded ones too.
    settings : RetrainerSettings
    gold : mapping of str to GoldResult, optional
        By reviewer.
    locked : collection of int
        Items that an earlier round held out; they stay held out.
    same_network : collection of str, optional
        Digests of guards of the same network, layers included; what others flagged is left out. None = all fit.
    needed : int
        Reviewers who must agree on a false alarm before it is learned from.
    """
    key = _key(guard)
    words = last_words(decisions)
    distrusted = _distrusted(settings, gold or {})
    trusted = {
        item: {name: answer for name, answer in by_name.items() if name not in distrusted}
        for item, by_name in words.items()
    }
    left_out: Counter[str] = Counter()
    usable: list[Lesson] = []
    for item in items:
        decision = item.decision
        if decision is None:
            continue
        words_of_it = trusted.get(item.id, {})
        reason = _unusable(guard, item, decision, distrusted, words_of_it, same_network)
        if reason:
            left_out[reason] += 1
        else:
            usable.append(Lesson.of(item, decision, len(words_of_it), key))
    held, other = _held_out(usable, settings.holdout_share, frozenset(locked), key)
    free = [lesson for lesson in usable if lesson.id not in held]
    chosen = choose([lesson for lesson in free if lesson.teaches], guard, needed, settings)
    learned = {lesson.id for lesson in chosen.lessons}
    left_out.update(chosen.dropped.values())
    left_out["poisoned, true label unknown"] += sum(lesson.true_label < 0 for lesson in free)
    left_out["poisoned, true label is the network's answer"] += sum(
        not lesson.teaches and lesson.true_label >= 0 for lesson in free
    )
    # A demarcation learns no label, so the cap of a class does not concern it.
    anomalies = [
        lesson
        for lesson in free
        if lesson.is_poisoned
        and (not lesson.teaches or lesson.id in learned or chosen.dropped[lesson.id] == CLASS_FULL)
    ]
    return Material(
        training=Labelled(
            _stack(chosen.lessons, guard.reference),
            np.array([lesson.true_label for lesson in chosen.lessons], dtype=np.int64),
            np.array([lesson.is_poisoned for lesson in chosen.lessons], dtype=bool),
        ),
        training_ids=tuple(lesson.id for lesson in chosen.lessons),
        clean_held_out=clean_hold_out(guard, settings.holdout_share),
        held_out=HeldOut.of(usable, held, other, learned, guard.reference),
        poisoned=_stack(anomalies, guard.reference),
        poisoned_ids=tuple(lesson.id for lesson in anomalies),
        agreement=_agreement(trusted.values()),
        by_reviewer=_by_reviewer(words.values(), chosen.lessons),
        left_out={reason: count for reason, count in left_out.items() if count},
        waiting=chosen.waiting,
    )


def clean_hold_out(guard: Guard, share: float) -> BoolArray:
    """Return which rows of the clean reference are held out, shape (n,): of each class the first by hash, with copies.

    The reference stays with the guard through every round, and so does this choice.

    Raises
    ------
    DataError
        If the rows that are left cannot show the guard's false-positive rate, or none is held out.
    """
    key = _key(guard)
    distinct = np.flatnonzero(guard.is_distinct)
    features, labels = np.ascontiguousarray(guard.reference.features[distinct]), guard.reference_labels[distinct]
    ranks = np.array([keyed_unit(key, row.tobytes()) for row in features])
    held = np.zeros(len(features), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[np.argsort(ranks[rows], kind="stable")][: round(share * len(rows))]] = True
    if not held.any():
        raise DataError(
            f"holdout_share={share:g} holds out none of {len(held)} clean images. Raise it, or fit with more images."
        )
    groups = guard.reference_groups
    return held if groups is None else np.isin(groups, groups[distinct[held]])


def last_words(decisions: Iterable[Decision]) -> dict[int, dict[str, Decision]]:
    """Return what every reviewer said last of every item, superseded or not; what was withdrawn was never said."""
    words: dict[int, dict[str, Decision]] = {}
    for decision in sorted(decisions, key=lambda entry: entry.id):
        if not decision.withdrawn:
            words.setdefault(decision.item_id, {})[decision.reviewer] = decision
    return words


def _distrusted(settings: RetrainerSettings, gold: Mapping[str, GoldResult]) -> set[str]:
    """Return the reviewers whose answers are left out: those who are named, and those who got known items wrong."""
    return set(settings.leave_out_reviewers) | {
        name
        for name, score in gold.items()
        if score.answered >= settings.min_gold_items and score.right < settings.min_gold_share * score.answered
    }


def _unusable(
    guard: Guard,
    item: QueueItem,
    decision: Decision,
    distrusted: set[str],
    trusted_words: Mapping[str, Decision],
    same_network: Collection[str] | None,
) -> str:
    """Return why a decided item cannot be used, or an empty text."""
    if decision.reviewer in distrusted:
        return "reviewer left out"
    if not _agree(trusted_words.values()):
        return "reviewers disagree"
    if same_network is not None and item.input.bundle_digest not in same_network:
        return "flagged by a guard of another network"
    if not fits(guard, item.input.activations):
        return "activations do not fit the guard"
    return ""


def fits(guard: Guard, activations: Activations) -> bool:
    """Return whether activations of one input can be scored by a guard."""
    given = dict(activations.items())
    return (
        len(activations) == 1
        and given.keys() == dict(guard.reference.items()).keys()
        and all(given[name].shape[1] == array.shape[1] for name, array in guard.reference.items())
        and bool(activations.finite_rows.all())
    )


def _held_out(usable: Sequence[Lesson], share: float, locked: frozenset[int], key: bytes) -> tuple[set[int], set[int]]:
    """Return the items that are held out, and those of them whose group nothing is learned from.

    An item that a guard has learned from is never held out later, and one that was held out is never learned from.
    Beyond that: false alarms and poisoned inputs without a group one by one; groups of poisoned inputs as a whole
    where there are several, so that some of what is measured looks like nothing that was learned. These groups hold at
    most half of the poisoned inputs: without its largest group, a round may have nothing left to learn from.
    """
    held = {lesson.id for lesson in usable if not lesson.was_trained and (lesson.id in locked or lesson.rank < share)}
    groups: dict[int, list[Lesson]] = {}
    for lesson in usable:
        if lesson.is_poisoned and lesson.group is not None:
            groups.setdefault(lesson.group, []).append(lesson)
    # Groups are numbered anew when they are clustered anew; the oldest member stays.
    ranks = {
        group: keyed_unit(key, f"group of {min(lesson.id for lesson in members)}".encode())
        for group, members in groups.items()
    }
    free = [group for group, members in groups.items() if not any(lesson.was_trained for lesson in members)]
    free.sort(key=ranks.__getitem__)
    free = _smaller_half(free, groups, _MOST_IN_GROUPS * sum(lesson.is_poisoned for lesson in usable))
    whole = {group for group in free if ranks[group] < share or any(lesson.id in locked for lesson in groups[group])}
    if len(groups) > 1:
        if not whole and free:
            whole = {free[0]}
        if len(whole) == len(groups):  # something must be learned from
            unlocked = [group for group in free if not any(lesson.id in locked for lesson in groups[group])]
            whole -= set(unlocked[-1:])
    else:
        whole = set()
    other: set[int] = set()
    for group in whole:
        ids = {lesson.id for lesson in groups[group]}
        held |= ids
        other |= ids
    return held, other


def _smaller_half(free: Sequence[int], groups: Mapping[int, Sequence[Lesson]], most: float) -> list[int]:
    """Return those of the groups, in order, that hold at most so many inputs together."""
    fitting, room = [], most
    for group in free:
        if len(groups[group]) <= room:
            fitting.append(group)
            room -= len(groups[group])
    return fitting


def _agree(decisions: Collection[Decision]) -> bool:
    """Return whether decisions about one input say the same; a label that was not named contradicts none."""
    labels = {decision.true_label for decision in decisions} - {None}
    return len({decision.is_poisoned for decision in decisions}) <= 1 and len(labels) <= 1


def _agreement(words: Iterable[Mapping[str, Decision]]) -> Agreement:
    shared = [by_name.values() for by_name in words if len(by_name) > 1]
    return Agreement(sum(map(_agree, shared)), len(shared))


def _by_reviewer(words: Iterable[Mapping[str, Decision]], chosen: Sequence[Lesson]) -> dict[str, dict[str, int]]:
    rows: dict[str, Counter[str]] = {}
    for by_name in words:
        for name, decision in by_name.items():
            row = rows.setdefault(name, Counter())
            row["decided"] += 1
            if len(by_name) > 1:
                row["shared"] += 1
                row["agreed"] += all(_agree((decision, other)) for other in by_name.values())
    for lesson in chosen:
        rows.setdefault(lesson.reviewer, Counter())["used"] += 1
    columns = ("decided", "used", "agreed", "shared")
    return {name: {column: rows[name][column] for column in columns} for name in sorted(rows)}


def _stack(decided: Sequence[Lesson], like: Activations) -> Activations:
    return Activations.concatenate([like[:0], *(lesson.activations for lesson in decided)])


def _weights(decided: Sequence[Lesson]) -> Float64Array:
    return np.array([lesson.weight for lesson in decided], dtype=np.float64)


def _key(guard: Guard) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(guard.reference.logits).tobytes()).digest()
