"""What detectors learn from: clean inputs, inputs that people have labelled, and anomalies of the traffic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from guard.arrays import check_range
from guard.detection.detectors.base import NO_LABEL, Source
from guard.errors import DataError, RowError
from guard.types import Activations, AnyArray, BoolArray, IntArray

#: One image twice in a batch gives features that differ by less, relative to the largest.
_ROUNDING = 1e-4


class LabelledCounts(NamedTuple):
    """How many labelled inputs a guard has learned from."""

    poisoned: int
    false_alarms: int


@dataclass(frozen=True)
class Labelled:
    """Inputs that a person has looked at, flagged or audited, one row each; there may be none.

    Attributes
    ----------
    activations : Activations of n inputs
        Finite, of the guarded model at the guard's own depths.
    true_labels : ndarray of shape (n,), integers in [0, n_classes)
        What each input really shows, poisoned or not.
    is_poisoned : ndarray of shape (n,), bool
        False for a false alarm.

    Raises
    ------
    DataError
        If shapes, types or labels break a rule, or a value is not finite.
    """

    activations: Activations
    true_labels: IntArray
    is_poisoned: BoolArray

    def __post_init__(self) -> None:
        n, n_classes = len(self.activations), self.activations.logits.shape[1]
        labels = check_labels(self.true_labels, n, n_classes, "true_labels", "per labelled input")
        is_poisoned = np.asarray(self.is_poisoned)
        if is_poisoned.shape != (n,):
            raise DataError(f"is_poisoned must have shape ({n},), one per labelled input, got {is_poisoned.shape}.")
        if is_poisoned.dtype != np.bool_:
            raise DataError(f"is_poisoned must be bool, got {is_poisoned.dtype}.")
        finite = self.activations.finite_rows
        if not finite.all():
            raise DataError(f"activations of labelled input {int(np.argmin(finite))} are not finite. Leave it out.")
        object.__setattr__(self, "true_labels", labels)
        object.__setattr__(self, "is_poisoned", is_poisoned.copy())

    @property
    def counts(self) -> LabelledCounts:
        """How many are poisoned, and how many false alarms."""
        poisoned = int(self.is_poisoned.sum())
        return LabelledCounts(poisoned, len(self) - poisoned)

    @property
    def contradicts_the_network(self) -> BoolArray:
        """Which are poisoned and show another class than the network answers, shape (n,): what heads may learn.

        A head that is taught the network's own answer for an input learns to agree with whatever made the network give
        it, and with a trigger that takes a single input.
        """
        contradicts: BoolArray = self.is_poisoned & (self.true_labels != self.activations.predicted_labels)
        return contradicts

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, rows: slice | AnyArray) -> Labelled:
        """Return the chosen rows (a slice, an index array or a boolean mask)."""
        return Labelled(self.activations[rows], self.true_labels[rows], self.is_poisoned[rows])


class Examples(NamedTuple):
    """Rows for detectors to learn from.

    Attributes
    ----------
    activations : Activations of n inputs
    labels : ndarray of shape (n,), int64
        True labels; `NO_LABEL` for an anomaly.
    sources : ndarray of shape (n,), int64
        A `Source` each.
    """

    activations: Activations
    labels: IntArray
    sources: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class TrainingSet:
    """Everything that one guard learns from.

    Attributes
    ----------
    clean : Activations of n inputs
        Finite.
    labels : ndarray of shape (n,), int64
        Their true labels, in [0, n_classes).
    noisy : Activations of the same n inputs, or None
        With noise; learned from together with their clean row.
    labelled : Labelled or None
        What people have said. See `guard.detection.retraining.retrain`.
    anomalies : Activations or None
        Inputs of the traffic that are poisoned, or thought to be, whatever they show.
    groups : ndarray of shape (n,), int64
        One number per clean input, the same for copies of each other; None = all are distinct.
    is_distinct : ndarray of shape (n,), bool
        The first of every group. What is promised is promised of these.
    same_as : ndarray of shape (n,), int64
        The row of the first of its group where an input is the same as that one but for rounding, else its own.
    teaches : ndarray of shape (n,), bool
        All but inputs that are the same as the first of their group: those would only count several times.

    Raises
    ------
    DataError
        If shapes, types or labels break a rule, or a value is not finite.
    """

    clean: Activations
    labels: IntArray
    noisy: Activations | None = None
    labelled: Labelled | None = None
    anomalies: Activations | None = None
    groups: IntArray | None = None
    is_distinct: BoolArray = field(init=False)
    same_as: IntArray = field(init=False)
    teaches: BoolArray = field(init=False)

    def __post_init__(self) -> None:
        n = len(self.clean)
        labels = check_labels(self.labels, n, self.clean.logits.shape[1], "labels", "per image")
        object.__setattr__(self, "labels", labels)
        if self.noisy is not None and len(self.noisy) != n:
            raise DataError(f"noisy activations must have {n} rows, one per image, got {len(self.noisy)}.")
        finite = self.clean.finite_rows
        if not finite.all():
            row = int(np.argmin(finite))
            raise RowError(f"activations of clean image {row} are not finite. Is the model damaged?", row)
        groups = self.groups
        if groups is None:
            groups = np.arange(n)
        elif groups.shape != (n,):
            raise DataError(f"groups must have shape ({n},), one number per image, got {groups.shape}.")
        _, first, group = np.unique(groups, return_index=True, return_inverse=True)
        features, first_of, rows = self.clean.features, first[group], np.arange(n)
        is_distinct = first_of == rows
        copies = np.flatnonzero(~is_distinct)
        sizes = np.abs(features[copies]).max(axis=1, initial=0.0)
        apart = np.abs(features[copies] - features[first_of[copies]]).max(axis=1, initial=0.0)
        copies = copies[apart <= _ROUNDING * sizes]
        same_as = rows.copy()
        same_as[copies] = first_of[copies]
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "is_distinct", is_distinct)
        object.__setattr__(self, "same_as", same_as)
        object.__setattr__(self, "teaches", same_as == rows)

    @property
    def depths(self) -> tuple[str, ...]:
        """Names of the depths, in order."""
        return tuple(self.clean.depths)

    @property
    def copies(self) -> int:
        """How many rows every clean input has."""
        return 1 if self.noisy is None else 2

    @property
    def has_anomalies(self) -> bool:
        """Whether there is an anomaly to learn from."""
        return self.anomalies is not None and len(self.anomalies) > 0

    def examples(self, rows: BoolArray) -> Examples:
        """Return the chosen rows of the clean inputs, shape (n,), with everything else that may be learned from.

        Poisoned inputs that show what the network answers are left out: nobody could learn from them.
        """
        clean = [part for part in (self.clean, self.noisy) if part is not None]
        parts = [(part[rows], self.labels[rows], Source.CLEAN) for part in clean]
        sources = [np.full(len(part), source) for part, _, source in parts]
        activations, labels = [part for part, _, _ in parts], [label for _, label, _ in parts]
        if self.labelled is not None:
            teaches = self.labelled.contradicts_the_network | ~self.labelled.is_poisoned
            known = self.labelled[teaches]
            activations.append(known.activations)
            labels.append(known.true_labels)
            sources.append(np.where(known.is_poisoned, Source.POISONED, Source.FALSE_ALARM))
        if self.anomalies is not None:
            activations.append(self.anomalies)
            labels.append(np.full(len(self.anomalies), NO_LABEL))
            sources.append(np.full(len(self.anomalies), Source.ANOMALY))
        return Examples(Activations.concatenate(activations), np.concatenate(labels), np.concatenate(sources))


def check_labels(labels: AnyArray, n: int, n_classes: int, name: str, each: str) -> IntArray:
    """Return labels as int64, shape (n,).

    Raises
    ------
    DataError
        If there are not n integers in [0, n_classes).
    """
    labels = np.asarray(labels)
    if labels.shape != (n,):
        raise DataError(f"{name} must have shape ({n},), one {each}, got {labels.shape}.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name} must be integers, got {labels.dtype}.")
    check_range(labels, n_classes, name)
    return labels.astype(np.int64)
