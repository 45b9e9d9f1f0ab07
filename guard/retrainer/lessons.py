"""What one decided input could teach a guard, and how much of that a guard may learn, over all rounds."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from guard.detection.pipeline import Guard
from guard.relabel.items import Decision, QueueItem, State
from guard.retrainer.settings import RetrainerSettings
from guard.types import Activations

#: Why a decided input is not learned from, for the report.
MEASURED_ONLY = "false alarms, which are only measured on"
CLEAN_AUDITS = "clean audits, which are only measured on"
ALONE = "false alarms without a second reviewer"
CLASS_FULL = "over the cap of one class"
REVIEWER_FULL = "over the cap of one reviewer"
WAITING = "wait for the next round"


@dataclass(frozen=True, slots=True)
class Lesson:
    """One usable item, without its image.

    Attributes
    ----------
    true_label : int
        -1: unknown.
    predicted : int
        What the network answers.
    supporters : int
        How many reviewers said the same of it last.
    was_trained : bool
        Whether a guard has learned from it.
    rank : float
        By hash, in [0, 1).
    audit_probability : float or None
        None: a guard flagged it. Else none did, and it was drawn with this probability.
    """

    id: int
    activations: Activations
    true_label: int
    predicted: int
    is_poisoned: bool
    group: int | None
    reviewer: str
    supporters: int
    was_trained: bool
    rank: float
    audit_probability: float | None = None

    @classmethod
    def of(cls, item: QueueItem, decision: Decision, supporters: int, key: bytes) -> Lesson:
        """Read an item and the decision that counts."""
        predicted = int(item.input.activations.predicted_labels[0])
        label = decision.true_label
        if label is None:  # a false alarm without a label: the suspect model was right
            label = -1 if decision.is_poisoned else predicted
        return cls(
            item.id,
            item.input.activations,
            label,
            predicted,
            decision.is_poisoned,
            item.group,
            decision.reviewer,
            supporters,
            item.state is State.TRAINED,
            keyed_unit(key, f"item {item.id}".encode()),
            item.input.audit_probability,
        )

    @property
    def is_audit(self) -> bool:
        """Whether it was not flagged, and came as one of the audit sample."""
        return self.audit_probability is not None

    @property
    def weight(self) -> float:
        """How many inputs of the traffic it stands for (Horvitz-Thompson): 1 of a flagged one."""
        return 1.0 if self.audit_probability is None else 1.0 / self.audit_probability

    @property
    def teaches(self) -> bool:
        """Whether a detector could learn from it: a poisoned input must contradict the network, or heads unlearn to."""
        return not self.is_poisoned or self.true_label not in (-1, self.predicted)


class Chosen(NamedTuple):
    """What is learned from, and what is not: why, and how many of these may join a later round."""

    lessons: list[Lesson]
    dropped: dict[int, str]
    waiting: int


class ClassLimits:
    """How many lessons of one class a guard may learn, in all rounds together.

    Poisoned inputs teach heads to expect the class that they are said to show: with more than a very small share of
    its clean images, heads expect it where it is not, and contradict a trigger that stands for it no more. False alarms
    join the class's clean images as neighbours, and a triggered input needs one of its kind to look less odd.

    Parameters
    ----------
    guard : Guard
        Its reference is read.
    settings : RetrainerSettings
    n_reviewers : int
        Who have decided something that could be learned.
    """

    def __init__(self, guard: Guard, settings: RetrainerSettings, n_reviewers: int) -> None:
        self._sizes = Counter(guard.reference_labels.tolist())
        self._false_alarms = settings.max_false_alarms_per_class
        self._class_share = settings.max_class_share
        self._reviewer_share = settings.max_reviewer_share if n_reviewers > 1 else 1.0

    def of_class(self, label: int, *, is_poisoned: bool) -> int:
        """Return how many poisoned inputs or false alarms with this true label are learned from."""
        if not is_poisoned:
            return self._false_alarms
        return math.floor(self._class_share * self._sizes[label] + 1e-9)

    def of_reviewer(self, label: int, *, is_poisoned: bool) -> int:
        """Return how many of these one reviewer may give whom nobody backs."""
        return math.ceil(self._reviewer_share * self.of_class(label, is_poisoned=is_poisoned))


def choose(lessons: Sequence[Lesson], guard: Guard, needed: int, settings: RetrainerSettings) -> Chosen:
    """Choose what a guard learns from.

    Parameters
    ----------
    lessons : sequence of Lesson
        Whatever `teaches` and is not held out.
    guard : Guard
        The active one.
    needed : int
        Reviewers who must agree on a false alarm.
    settings : RetrainerSettings
    """
    dropped: dict[int, str] = {}
    limits = ClassLimits(guard, settings, len({lesson.reviewer for lesson in lessons}))
    whole: Counter[tuple[int, bool]] = Counter()
    counts: Counter[tuple[int, bool, str]] = Counter()
    fitting = []
    # What earlier rounds took comes first: a newcomer displaces nothing. Then what no guard flagged, of which there is
    # little; then by hash, which nobody can aim at.
    for lesson in sorted(
        lessons, key=lambda lesson: (not lesson.was_trained, not lesson.is_audit, lesson.rank, lesson.id)
    ):
        kind, label, poisoned = (lesson.true_label, lesson.is_poisoned), lesson.true_label, lesson.is_poisoned
        agreed = lesson.supporters > 1
        if not poisoned and lesson.is_audit:
            dropped[lesson.id] = CLEAN_AUDITS
        elif not poisoned and not settings.max_false_alarms_per_class:
            dropped[lesson.id] = MEASURED_ONLY
        elif not poisoned and lesson.supporters < needed:
            dropped[lesson.id] = ALONE
        elif whole[kind] >= limits.of_class(label, is_poisoned=poisoned):
            dropped[lesson.id] = CLASS_FULL
        elif not agreed and counts[(*kind, lesson.reviewer)] >= limits.of_reviewer(label, is_poisoned=poisoned):
            dropped[lesson.id] = REVIEWER_FULL
        else:
            whole[kind] += 1
            counts[(*kind, lesson.reviewer)] += not agreed
            fitting.append(lesson)
    limit = reviewer_limit(Counter(lesson.reviewer for lesson in fitting), settings)
    by_reviewer: Counter[str] = Counter()
    fair = []
    for lesson in fitting:
        by_reviewer[lesson.reviewer] += 1
        if by_reviewer[lesson.reviewer] > limit:
            dropped[lesson.id] = REVIEWER_FULL
        else:
            fair.append(lesson)
    old = [lesson for lesson in fair if lesson.was_trained]
    new = [lesson for lesson in fair if not lesson.was_trained]
    late = new[settings.max_new_per_round :]
    dropped |= dict.fromkeys((lesson.id for lesson in late), WAITING)
    taken = sorted(old + new[: settings.max_new_per_round], key=lambda lesson: lesson.id)
    return Chosen(taken, dropped, len(late))


def reviewer_limit(counts: Mapping[str, int], settings: RetrainerSettings) -> int:
    """Return how many items one reviewer may give: the most that is within the share once all are cut to it."""
    most = max(counts.values(), default=0)
    if len(counts) < 2:
        return most
    share = settings.max_reviewer_share
    limit = next((n for n in range(most, 0, -1) if n <= share * sum(min(n, count) for count in counts.values())), 0)
    return max(limit, settings.reviewer_allowance)


def reviewers_needed(able: Collection[str], settings: RetrainerSettings) -> int:
    """Return how many reviewers must agree on a false alarm, of those who can decide: two, unless there is only one."""
    if settings.min_reviewers is not None:
        return settings.min_reviewers
    return 2 if len(set(able) - set(settings.leave_out_reviewers)) > 1 else 1


def keyed_unit(key: bytes, data: bytes) -> float:
    """Return a number in [0, 1) that only the holder of the key can foresee."""
    return int.from_bytes(hashlib.blake2b(data, key=key, digest_size=7).digest()) / 2**56
