"""P-values within the class that the network answers, so that the false-positive rate holds in each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from guard.errors import DataError
from guard.statistics.calibration import images_needed
from guard.types import BoolArray, Float64Array, IntArray

_TOLD = 3  # classes that an error names


def class_groups(answers: IntArray, n_classes: int, false_positive_rate: float) -> IntArray:
    """Return the number of the group in which each class is calibrated, shape (n_classes,), int64.

    A class with enough clean images for the rate is a group of its own. All others, those that no clean image is
    answered with too, are group 0 together; while these are too few, the rarest of the former joins them.

    Parameters
    ----------
    answers : ndarray of shape (n,), int
        The network's answers to the clean images.
    n_classes : int
    false_positive_rate : float
        The requested one, in (0, 1).

    Raises
    ------
    DataError
        If no class would be by itself.
    """
    needed = images_needed(false_positive_rate)
    counts = np.bincount(answers, minlength=n_classes)
    rarest_first = np.argsort(counts, kind="stable")
    n_shared = int((counts < needed).sum())
    while 0 < n_shared < n_classes and counts[rarest_first[:n_shared]].sum() < needed:
        n_shared += 1
    if n_shared == n_classes:
        most = ", ".join(f"class {label} has {counts[label]}" for label in rarest_first[: -_TOLD - 1 : -1])
        raise DataError(
            f"false_positive_rate_scope='class' at false_positive_rate={false_positive_rate:g} needs at least {needed} "
            f"clean images that the network answers with one class, and as many of the rarer classes together: {most}, "
            "the others no more. Give more images, raise the rate, or take the scope 'all'."
        )
    groups = np.zeros(n_classes, dtype=np.int64)
    groups[np.sort(rarest_first[n_shared:])] = np.arange(n_classes - n_shared) + (n_shared > 0)
    return groups


@dataclass(frozen=True, slots=True, eq=False)
class ClassRanks:
    """Conformal ranks among the clean inputs that the network answers with the same class, or one of the same group.

    The p-value of a clean input is then uniform given its answer (Mondrian, or label-conditional by the predicted
    label), where that of `conformal_p_values` is uniform over all answers together. Two binary searches give all of a
    batch.

    Attributes
    ----------
    groups : ndarray of shape (n_classes,), int64
        From `class_groups`.
    clean_scores : ndarray of shape (n,), float64, ascending
        Of all groups.
    keys : ndarray of shape (n,), int64, ascending
        Group times n + 1, plus place in `clean_scores`, of every clean score.
    starts : ndarray of shape (n_groups + 1,), int64
        Where each group begins in `keys`.

    References
    ----------
    .. [1] Vovk (2012), Conditional validity of inductive conformal predictors, section 4.
    """

    groups: IntArray
    clean_scores: Float64Array
    keys: IntArray
    starts: IntArray

    @classmethod
    def among(cls, scores: Float64Array, answers: IntArray, groups: IntArray) -> Self:
        """Sort clean scores, shape (n,), into the groups of the network's answers, shape (n,)."""
        order, step = np.argsort(scores, kind="stable"), len(scores) + 1
        keys = np.sort(groups[answers[order]] * step + np.arange(len(scores)))
        return cls(groups, scores[order], keys, np.searchsorted(keys, np.arange(groups.max() + 2) * step))

    def p_values(self, scores: Float64Array, answers: IntArray) -> Float64Array:
        """Return p = (1 + #{clean >= score}) / (n + 1) among the n of its answer's group, shape (m,), float64."""
        group, step = self.groups[answers], len(self.clean_scores) + 1
        below = np.searchsorted(self.keys, group * step + np.searchsorted(self.clean_scores, scores, side="left"))
        ends = self.starts[group + 1]
        return np.asarray((1.0 + ends - below) / (1.0 + ends - self.starts[group]), dtype=np.float64)

    @property
    def is_shared(self) -> BoolArray:
        """Which classes are calibrated together with others, shape (n_classes,)."""
        shared: BoolArray = np.bincount(self.groups)[self.groups] > 1
        return shared
