"""How many more decided items it takes until a figure about detection can be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np

from guard.statistics.review_sample import Stratum
from guard.types import Float64Array

#: An interval of the detection rate or the precision wider than this says too little to be shown.
WIDEST = 0.5
#: Had no decided audit been poisoned, at most so large a share of the unflagged requests may be.
MOST_UNSEEN = 0.05
#: Upper limit, at 95 %, of the mean of a count that was 0 (the rule of three).
_RULE_OF_THREE = 3.0
_MOST = 2**40


def audits_needed(unflagged: Sequence[Stratum]) -> int:
    """Return how many more decided audits could show that at most `MOST_UNSEEN` of the unflagged are poisoned.

    It does not matter what the audits showed, so that what is told is not chosen by it. A stratum that was neither
    counted nor drawn from may be of any size. Here and below, further items are taken to be spread over the strata as
    the requests are.
    """
    if not unflagged or any(stratum.population is None and not stratum.drawn.count for stratum in unflagged):
        return max(1, round(_RULE_OF_THREE / MOST_UNSEEN) - sum(stratum.decided.count for stratum in unflagged))
    sizes, decided = _columns(unflagged)

    def enough(more: int) -> bool:
        reviewed = _with_more(sizes, decided, more)
        # No poisoned audit in any stratum bounds the sum of their expected numbers, so all may be in one stratum.
        return bool((_RULE_OF_THREE * (sizes - reviewed) <= MOST_UNSEEN * sizes.sum() * reviewed).all())

    return _least(enough)


def answers_needed(flagged: Sequence[Stratum], confidence: float) -> int:
    """Return how many more answers about flagged inputs make the interval of the precision `WIDEST` wide.

    At a share of one half, where it is widest, so that it does not matter what was answered.
    """
    sizes, decided = _columns(flagged)
    widths = NormalDist().inv_cdf((1 + confidence) / 2) * 2

    return _least(lambda more: widths * _deviation(sizes, _with_more(sizes, decided, more)) <= WIDEST * sizes.sum())


def answers_to_narrow(flagged: Sequence[Stratum], factor: float) -> int:
    """Return how many more answers multiply the uncertainty of the poisoned flagged inputs by `factor`, below 1."""
    sizes, decided = _columns(flagged)
    wanted = factor * _deviation(sizes, decided)
    return _least(lambda more: _deviation(sizes, _with_more(sizes, decided, more)) <= wanted)


def audits_to_narrow(unflagged: Sequence[Stratum], caught: float, confidence: float) -> int:
    """Return how many more audits make the interval of the detection rate `WIDEST` wide, if they show the same shares.

    Parameters
    ----------
    unflagged : sequence of Stratum
    caught : float
        Poisoned inputs that were flagged, taken as known.
    confidence : float
        Of the interval.

    Returns
    -------
    needed : int
        0 where the uncertainty of the audits alone makes it no wider.

    Notes
    -----
    Limits of each stratum's poisoned requests are those of a Poisson count times its mean weight; those of their sum
    are formed as in Zou and Donner (2008), Construction of confidence limits about effect measures.
    """
    from scipy.special import gammaincinv  # here, as a server loads less without

    sizes, decided = _columns(unflagged)
    found = np.array([stratum.poisoned.count for stratum in unflagged], dtype=np.float64)
    tail = (1 - confidence) / 2

    def enough(more: int) -> bool:
        reviewed = _with_more(sizes, decided, more)
        scale = np.divide(reviewed, decided, out=np.ones(len(sizes)), where=decided > 0)
        weight = (sizes - reviewed) / np.maximum(reviewed, 1)
        count = found * scale
        below = count - np.where(count > 0, gammaincinv(np.maximum(count, 1e-9), tail), 0.0)
        above = gammaincinv(count + 1, 1 - tail) - count
        total = float((count * weight + found).sum())
        least = max(total - float(np.sqrt(((below * weight) ** 2).sum())), 0.0)
        most = total + float(np.sqrt(((above * weight) ** 2).sum()))
        return caught == 0 or caught / (caught + least) - caught / (caught + most) <= WIDEST

    return _least(enough)


def _columns(strata: Sequence[Stratum]) -> tuple[Float64Array, Float64Array]:
    sizes = np.array([stratum.size for stratum in strata], dtype=np.float64)
    return sizes, np.array([stratum.decided.count for stratum in strata], dtype=np.float64)


def _with_more(sizes: Float64Array, decided: Float64Array, more: int) -> Float64Array:
    reviewed: Float64Array = np.minimum(decided + more * sizes / max(sizes.sum(), 1.0), sizes)
    return reviewed


def _deviation(sizes: Float64Array, decided: Float64Array) -> float:
    """Standard deviation of the poisoned inputs in all strata together, at a share of one half in each."""
    unseen = 1 - np.divide(decided, sizes, out=np.ones(len(sizes)), where=sizes > 0)
    return float(np.sqrt((sizes**2 * 0.25 / np.maximum(decided, 1) * unseen).sum()))


def _least(enough: Callable[[int], bool]) -> int:
    """Return the smallest number that is enough; whatever is above one that is enough is, too."""
    if enough(0):
        return 0
    high = 1
    while not enough(high) and high < _MOST:
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
