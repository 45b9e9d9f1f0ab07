"""What a guard does on the hold-outs of a round, in counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from guard.detection.pipeline import Guard
from guard.retrainer.material import HeldOut
from guard.types import Activations, BoolArray, IntArray


class Count(NamedTuple):
    """So many of so many."""

    hits: int
    of: int

    @property
    def rate(self) -> float | None:
        """The share, a fraction; None of nothing."""
        return self.hits / self.of if self.of else None

    @classmethod
    def where(cls, flags: BoolArray) -> Count:
        """Count a mask."""
        return cls(int(flags.sum()), len(flags))


@dataclass(frozen=True, slots=True, eq=False)
class Measurement:
    """One guard on the hold-outs: a mask each, one row per input, in the same order for every guard.

    Attributes
    ----------
    clean_right : ndarray of bool
        Clean inputs that are answered with their true label: clean accuracy after the guard.
    clean_flagged : ndarray of bool
        Clean inputs that are flagged: the realised false-positive rate.
    other_groups_flagged, same_groups_flagged : ndarray of bool
        Decided poisoned inputs that some guard flagged and that are flagged; of look-alike groups that nothing was
        learned from, and the rest.
    misses_flagged : ndarray of bool
        Decided poisoned inputs that no guard had flagged, of the audit sample.
    false_alarms_flagged : ndarray of bool
        Decided false alarms that are flagged (again).
    recovered : ndarray of bool
        Decided poisoned inputs with a known true label: whether the replacement head finds it.
    not_learned_flagged : ndarray of bool
        Decided false alarms that were not learned from.
    clean_audits_flagged : ndarray of bool
        Decided clean inputs of the audit sample.
    undecided_flagged : ndarray of bool
        Flagged inputs in the queue that nobody has decided.
    """

    clean_right: BoolArray
    clean_flagged: BoolArray
    other_groups_flagged: BoolArray
    same_groups_flagged: BoolArray
    misses_flagged: BoolArray
    false_alarms_flagged: BoolArray
    recovered: BoolArray
    not_learned_flagged: BoolArray
    clean_audits_flagged: BoolArray
    undecided_flagged: BoolArray

    def count(self, name: str) -> Count:
        """Count one of the masks."""
        return Count.where(getattr(self, name))

    def as_dict(self) -> dict[str, Any]:
        """Return counts and rates, ready for JSON."""
        counts = {name: self.count(name) for name in self.__slots__}
        return {name: {"hits": count.hits, "of": count.of, "rate": count.rate} for name, count in counts.items()}


def measure(
    guard: Guard, clean: Activations, clean_labels: IntArray, held_out: HeldOut, undecided: Activations
) -> Measurement:
    """Measure a guard on inputs that it has not learned from."""
    clean_flags = flags_of(guard, clean)
    poisoned_flags = flags_of(guard, held_out.poisoned)
    known = held_out.poisoned_labels >= 0
    recovered = np.zeros(0, dtype=bool)
    if known.any():
        answers = guard.ensemble.replacement_logits(held_out.poisoned[known]).argmax(axis=1)
        recovered = answers == held_out.poisoned_labels[known]
    return Measurement(
        clean_right=(clean.predicted_labels == clean_labels) & ~clean_flags,
        clean_flagged=clean_flags,
        other_groups_flagged=poisoned_flags[held_out.other_group & ~held_out.is_miss],
        same_groups_flagged=poisoned_flags[~held_out.other_group & ~held_out.is_miss],
        misses_flagged=poisoned_flags[held_out.is_miss],
        false_alarms_flagged=flags_of(guard, held_out.false_alarms),
        recovered=recovered,
        not_learned_flagged=flags_of(guard, held_out.not_learned),
        clean_audits_flagged=flags_of(guard, held_out.clean_audits),
        undecided_flagged=flags_of(guard, undecided),
    )


def flags_of(guard: Guard, activations: Activations) -> BoolArray:
    """Return which inputs a guard flags, shape (n,); there may be none."""
    if len(activations) == 0:
        return np.zeros(0, dtype=bool)
    return guard.scores(activations).is_poisoned
