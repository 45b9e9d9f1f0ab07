"""Whether a network's answers fit the labels of clean images, and if not, in which order its classes may stand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard.types import IntArray

#: A network that is right no more often than the most frequent label alone would be, by this one-sided level, guesses.
_LEVEL = 0.01
#: From this share of right answers on another order is believed, if it gets so many times the answers of the given one.
_BELIEVED, _TIMES = 0.5, 2.0


@dataclass(frozen=True, slots=True)
class ClassOrder:
    """How labels and answers fit.

    Attributes
    ----------
    right : float
        Share of answers that are the label.
    is_chance : bool
        Whether guessing explains as many.
    order : tuple of int, or None
        For each output of the network, the label that its answers suggest, where that explains far more answers.
    right_in_order : float
        Share of answers that are right if classes stand in that order.
    """

    right: float
    is_chance: bool
    order: tuple[int, ...] | None
    right_in_order: float

    @property
    def is_sound(self) -> bool:
        """Whether neither chance nor another order explains the answers."""
        return self.order is None and not self.is_chance


def class_order(answers: IntArray, labels: IntArray, n_classes: int) -> ClassOrder:
    """Compare a network's answers to clean images with their labels.

    Parameters
    ----------
    answers, labels : ndarray of shape (n,), int64, in [0, n_classes)
    n_classes : int
    """
    from scipy.optimize import linear_sum_assignment  # here, as a server loads less without
    from scipy.stats import binomtest

    n, hits = len(labels), int((answers == labels).sum())
    table = np.zeros((n_classes, n_classes), dtype=np.int64)  # answers down, labels across
    np.add.at(table, (answers, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    best = float(table[rows, columns].sum() / n)
    most_frequent = float(np.bincount(labels).max() / n)
    is_other = best >= _BELIEVED and best >= _TIMES * hits / n and best > most_frequent
    by_chance = binomtest(hits, n, most_frequent, alternative="greater").pvalue > _LEVEL
    return ClassOrder(hits / n, by_chance, tuple(columns.tolist()) if is_other else None, best)
