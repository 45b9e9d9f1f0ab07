"""The reviewed sample of a server's requests: what came to the queue, what of it was answered, by strata.

A stratum is a part of the requests (`guard.statistics.strata`) in which the answered items are taken for a random
sample of all. Flagged inputs come to the queue with probability 1; unflagged ones with a known probability each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from guard.errors import DataError
from guard.statistics.strata import NEAR_FACTOR
from guard.types import UNDECIDED, BoolArray, Float64Array, IntArray

#: Upper ends of the bands of flagged inputs, as shares of the false-positive rate that they were flagged at: reviewers
#: answer the most suspicious first, so that what they answered is nearly a random sample of each band, but not of all.
FLAGGED_BANDS = (0.01, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
#: Band of flagged inputs whose rate was not kept.
UNKNOWN_BAND = len(FLAGGED_BANDS)
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Weights:
    """Items, and how many requests they stand for; an item's weight is 1 / (its probability of being drawn).

    Attributes
    ----------
    count : int
        Items.
    total : float
        Sum of their weights: the Horvitz-Thompson estimate of the requests like them [1]_.
    squares : float
        Sum of the squares of their weights.

    References
    ----------
    .. [1] Horvitz, Thompson (1952), A generalization of sampling without replacement from a finite universe, JASA 47.
    """

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    @classmethod
    def of(cls, probabilities: npt.ArrayLike) -> Weights:
        """Return the sums for items that were drawn with these probabilities, shape (n,), each in (0, 1].

        Raises
        ------
        DataError
            If a probability is not in (0, 1].
        """
        drawn_with = np.asarray(probabilities, dtype=np.float64).ravel()
        if not ((drawn_with > 0) & (drawn_with <= 1)).all():
            wrong = drawn_with[~((drawn_with > 0) & (drawn_with <= 1))][0]
            raise DataError(f"the probability with which an item was drawn must be in (0, 1], got {wrong}.")
        weights = 1 / drawn_with
        return cls(len(weights), float(weights.sum()), float((weights**2).sum()))


@dataclass(frozen=True)
class Stratum:
    """A part of the requests.

    Attributes
    ----------
    is_flagged : bool
        Whether the guard flagged them.
    drawn : Weights
        Items that came to the queue.
    decided : Weights
        Those of them that reviewers decided.
    poisoned : Weights
        Those of the decided that are poisoned.
    population : int, optional
        Requests in this stratum, at least as many as were drawn. None if nobody counted: then it is what the weights
        of the drawn items add up to, with the uncertainty of that.

    Raises
    ------
    DataError
        If the counts contradict each other.
    """

    is_flagged: bool
    drawn: Weights
    decided: Weights
    poisoned: Weights
    population: int | None = None

    def __post_init__(self) -> None:
        smaller = ("poisoned", self.poisoned), ("decided", self.decided), ("drawn", self.drawn)
        for (name, few), (of, many) in itertools.pairwise(smaller):
            if few.count > many.count or few.total > many.total * (1 + _ROUNDING):
                raise DataError(
                    f"of {many.count} {of} items (weight {many.total:g}) {few.count} (weight {few.total:g}) cannot be "
                    f"{name}. Count the {name} ones among the {of} ones."
                )
        for name, items in smaller:
            total, squares = items.total * (1 + _ROUNDING), items.squares * (1 + _ROUNDING)
            if not 0 <= items.count <= total or not items.total <= squares < math.inf:
                raise DataError(f"the weights of the {name} items must each be >= 1 and finite, got {items}.")
        if self.population is not None and self.population < self.drawn.count:
            raise DataError(f"a stratum of {self.population} requests cannot have {self.drawn.count} items drawn.")

    @property
    def size(self) -> float:
        """The number of its requests, as far as known."""
        return self.drawn.total if self.population is None else float(self.population)


class Populations(NamedTuple):
    """Requests that a server counted in the window, by part; None where nobody counted."""

    flagged: int | None = None
    near: int | None = None
    far: int | None = None


def strata_of_items(
    *,
    is_flagged: BoolArray,
    p_values: Float64Array,
    false_positive_rates: Float64Array,
    probabilities: Float64Array,
    answers: IntArray,
    populations: Populations = Populations(),  # noqa: B008
) -> list[Stratum]:
    """Return the strata of the items that came to the queue in a window: bands of the flagged, then near, then far.

    Parameters
    ----------
    is_flagged : ndarray of shape (n,), bool
    p_values : ndarray of shape (n,), float64
        In [0, 1].
    false_positive_rates : ndarray of shape (n,), float64
        The rate in use when each was judged; NaN where it was not kept, of flagged items only.
    probabilities : ndarray of shape (n,), float64
        With which each came to the queue, in (0, 1]; of flagged ones not read.
    answers : ndarray of shape (n,), int
        1 poisoned, 0 clean, `guard.types.UNDECIDED`.
    populations : Populations
        Flagged inputs beyond those in the queue (dropped, expired) are divided among the bands as those in it are. A
        count below the number of items is raised to it, as a killed process loses the last of its counts.

    Raises
    ------
    DataError
        If lengths differ, or a value is out of range.
    """
    columns = {"p_values": p_values, "false_positive_rates": false_positive_rates, "probabilities": probabilities}
    for name, values in {**columns, "answers": answers}.items():
        if np.shape(values) != np.shape(is_flagged):
            raise DataError(f"{name} has shape {np.shape(values)}, is_flagged has {np.shape(is_flagged)}.")
    flagged = np.asarray(is_flagged, dtype=bool)
    given = np.asarray(answers)
    if not np.isin(given, (0, 1, UNDECIDED)).all():
        raise DataError(f"answers must be 0, 1 or {UNDECIDED}, got {given[~np.isin(given, (0, 1, UNDECIDED))][0]}.")
    p, rate = np.asarray(p_values, dtype=np.float64), np.asarray(false_positive_rates, dtype=np.float64)
    _check_values(p, rate, flagged)
    weighed_by = np.where(flagged, 1.0, probabilities)
    bands = _bands(p, rate)
    members = [flagged & (bands == band) for band in np.unique(bands[flagged])]
    counts = _divided(populations.flagged, [int(rows.sum()) for rows in members])
    if not members:
        members, counts = [flagged], [populations.flagged]
    near = p <= NEAR_FACTOR * rate
    for rows, population in ((~flagged & near, populations.near), (~flagged & ~near, populations.far)):
        members.append(rows)
        counts.append(None if population is None else max(population, int(rows.sum())))
    return [
        Stratum(
            bool(number < len(members) - 2),
            Weights.of(weighed_by[rows]),
            Weights.of(weighed_by[rows & (given != UNDECIDED)]),
            Weights.of(weighed_by[rows & (given == 1)]),
            population,
        )
        for number, (rows, population) in enumerate(zip(members, counts, strict=True))
    ]


def _check_values(p_values: Float64Array, rates: Float64Array, flagged: BoolArray) -> None:
    wrong = ~((p_values >= 0) & (p_values <= 1))
    if wrong.any():
        raise DataError(f"p_values must be in [0, 1], got {p_values[wrong][0]}.")
    wrong = ~((rates > 0) & (rates < 1)) & ~(flagged & np.isnan(rates))
    if wrong.any():
        raise DataError(f"false_positive_rates must be in (0, 1), NaN only of flagged items, got {rates[wrong][0]}.")


def _bands(p_values: Float64Array, rates: Float64Array) -> IntArray:
    last = UNKNOWN_BAND - 1
    bands = np.minimum(np.searchsorted(FLAGGED_BANDS, p_values / rates, side="left"), last)
    return np.where(np.isnan(rates), UNKNOWN_BAND, bands)


def _divided(total: int | None, drawn: list[int]) -> list[int | None]:
    """Return the numbers that `total` requests make of each band, in the proportions of the drawn, adding up to it."""
    if total is None or not drawn:
        return [None] * len(drawn)
    rest = max(total - sum(drawn), 0)
    ends = np.rint(rest * np.cumsum(drawn) / sum(drawn)).astype(int)
    return [few + int(more) for few, more in zip(drawn, np.diff(ends, prepend=0), strict=True)]
