"""How many requests of a stratum are poisoned, and how many are clean: a number, and draws of what it may be.

The poisoned requests of a stratum (`guard.statistics.review_sample`) are those that were found, and an unknown number
among the requests that nobody reviewed. The share among the reviewed, weighted by 1 / (probability of being drawn),
estimates theirs (Horvitz and Thompson [1]_, as a ratio: Hajek [2]_). Its uncertainty at small counts is the fiducial
distribution of a binomial share: with x poisoned of n reviewed, half of Beta(x, n - x + 1) and half of
Beta(x + 1, n - x), whose quantiles are the limits of Clopper and Pearson [3]_ (Krishnamoorthy and Lee [4]_). Unlike
Jeffreys' Beta(x + 1/2, n - x + 1/2) [5]_ it can be 0 where nothing was found, so that strata with no poisoned requests
do not add up to some, and it is anything between 0 and 1 where nothing was reviewed.

Unequal weights: x becomes the number of equally weighted items whose total has the same variance (Kish [6]_), and the
one more of the upper half has the mean weight of a request's item, in the manner of the gamma intervals of Fay and
Feuer [7]_. Requests that nobody counted are as many as the weights say, with the uncertainty of that (negative
binomial, drawn from a gamma distribution of the same mean and variance).

A sum over strata: half of the draws of a stratum in which nothing was found are above 0, and would raise the lower
limit of the sum. An exact lower limit takes them all for 0 and is too low on average; here half of them are, which
keeps the level also where poisoned requests are rare. Upper limits where everything found is poisoned: likewise.

References
----------
.. [1] Horvitz, Thompson (1952), A generalization of sampling without replacement from a finite universe, JASA 47.
.. [2] Hajek (1971), Comment on "An essay on the logical foundations of survey sampling, part one".
.. [3] Clopper, Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial,
   Biometrika 26.
.. [4] Krishnamoorthy, Lee (2010), Inference for functions of parameters in discrete distributions based on fiducial
   approach: binomial and Poisson cases, Journal of Statistical Planning and Inference 140.
.. [5] Brown, Cai, DasGupta (2001), Interval estimation for a binomial proportion, Statistical Science 16.
.. [6] Kish (1965), Survey sampling, section 11.7.
.. [7] Fay, Feuer (1997), Confidence intervals for directly standardized rates: a method based on the gamma
   distribution, Statistics in Medicine 16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from guard.statistics.review_sample import Stratum
from guard.types import Float64Array

#: Even.
DRAWS = 4000
_ROUNDING = 1e-9
#: Of the draws in which a stratum has poisoned requests though none was found, the share that counts for lower limits.
_COUNTED_UNFOUND = 0.5


@dataclass(frozen=True)
class Uncertain:
    """A number of requests.

    Attributes
    ----------
    value : float
        The estimate.
    low, high : ndarray of shape (DRAWS,), float64
        What it may be, each as likely: for a lower and for an upper limit.
    """

    value: float = 0.0
    low: Float64Array = field(default_factory=lambda: np.zeros(DRAWS))
    high: Float64Array = field(default_factory=lambda: np.zeros(DRAWS))

    def __add__(self, other: Uncertain) -> Uncertain:
        return Uncertain(self.value + other.value, self.low + other.low, self.high + other.high)


def predicted_totals(strata: Iterable[Stratum], rng: np.random.Generator) -> tuple[Uncertain, Uncertain]:
    """Return the poisoned and the clean requests of all these strata together."""
    poisoned, clean = Uncertain(), Uncertain()
    for stratum in strata:
        found, cleared = stratum.poisoned.count, stratum.decided.count - stratum.poisoned.count
        unseen, draws = _unseen(stratum, rng)
        poisoned += _certain(found)
        clean += _certain(cleared)
        if not draws.any():
            continue
        share, shares = _share(stratum, rng)
        of_these = rng.binomial(draws.astype(np.int64), shares).astype(np.float64)
        counted = rng.random(DRAWS) < _COUNTED_UNFOUND
        low = of_these if found else np.where(counted, of_these, 0)
        high = of_these if cleared else np.where(counted, of_these, draws)
        poisoned += Uncertain(unseen * share, low, high)
        clean += Uncertain(unseen * (1 - share), draws - high, draws - low)
    return poisoned, clean


def _certain(number: int) -> Uncertain:
    draws = np.full(DRAWS, float(number))
    return Uncertain(float(number), draws, draws)


def _unseen(stratum: Stratum, rng: np.random.Generator) -> tuple[float, Float64Array]:
    """Requests that nobody reviewed: undecided items, and what was never drawn."""
    drawn, decided = stratum.drawn, stratum.decided
    if stratum.population is not None:
        rest = stratum.population - decided.count
        return float(rest), np.full(DRAWS, float(rest))
    undecided = drawn.count - decided.count
    # Requests passed over before each of `count` draws: mean and variance of their sum.
    mean, variance = drawn.total - drawn.count, drawn.squares - drawn.total
    if min(mean, variance) <= _ROUNDING * drawn.count:
        return float(undecided), np.full(DRAWS, float(undecided))
    half_an_item_more = 1 + 0.5 / drawn.count
    passed_over = rng.gamma(half_an_item_more * mean**2 / variance, variance / mean, DRAWS)
    return undecided + mean, np.rint(undecided + passed_over)


def _share(stratum: Stratum, rng: np.random.Generator) -> tuple[float, Float64Array]:
    """Share of poisoned among the requests that nobody reviewed; the two halves of its draws in random order."""
    decided, poisoned = stratum.decided, stratum.poisoned
    half = DRAWS // 2
    if not decided.count:
        return 0.5, rng.permutation(np.repeat([0.0, 1.0], half))
    one_more = decided.squares / decided.total  # mean weight of the item of a random request
    in_all = decided.total + one_more
    lower = _beta(poisoned.total, poisoned.squares, in_all, half, rng)
    upper = _beta(poisoned.total + one_more, poisoned.squares + one_more**2, in_all, half, rng)
    return poisoned.total / decided.total, rng.permutation(np.concatenate([lower, upper]))


def _beta(total: float, squares: float, in_all: float, size: int, rng: np.random.Generator) -> Float64Array:
    """Draws of the share that items with this total weight have, of all."""
    if total <= 0 or total >= in_all * (1 - _ROUNDING):
        return np.full(size, float(total > 0))
    items = total**2 / squares  # of equal weight
    return rng.beta(items, items * (in_all - total) / total, size)
