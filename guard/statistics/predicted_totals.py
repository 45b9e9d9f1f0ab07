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
from dataclasses import dataclass

import numpy as np

from guard.statistics.review_sample import Stratum
from guard.types import Float64Array

DRAWS = 4000


@dataclass(frozen=True)
class Uncertain:
    """A number of requests.

    Attributes
    ----------
    value : float
        The estimate.
    draws : ndarray of shape (DRAWS,), float64
        What it may be, each as likely.
    """

    value: float
    draws: Float64Array

    def __add__(self, other: Uncertain) -> Uncertain:
        return Uncertain(self.value + other.value, self.draws + other.draws)


def predicted_totals(strata: Iterable[Stratum], rng: np.random.Generator) -> tuple[Uncertain, Uncertain]:
    """Return the poisoned and the clean requests of all these strata together."""
    poisoned, clean = Uncertain(0.0, np.zeros(DRAWS)), Uncertain(0.0, np.zeros(DRAWS))
    for stratum in strata:
        found, decided = stratum.poisoned.count, stratum.decided.count
        more, unseen = _share(stratum, rng), _unseen(stratum, rng)
        of_these = rng.binomial(unseen.draws.astype(np.int64), more.draws)
        poisoned += Uncertain(found + unseen.value * more.value, found + of_these)
        clean += Uncertain(decided - found + unseen.value * (1 - more.value), decided - found + unseen.draws - of_these)
    return poisoned, clean


def _unseen(stratum: Stratum, rng: np.random.Generator) -> Uncertain:
    """Requests that nobody reviewed: undecided items, and what was never drawn."""
    drawn = stratum.drawn
    undecided = drawn.count - stratum.decided.count
    if stratum.population is not None:
        rest = float(stratum.population - stratum.decided.count)
        return Uncertain(rest, np.full(DRAWS, rest))
    # The number of failures before each of `count` draws: mean and variance of the sum over the items.
    mean, variance = drawn.total - drawn.count, drawn.squares - drawn.total
    if variance <= 0:
        return Uncertain(undecided + mean, np.full(DRAWS, np.rint(undecided + mean)))
    half_an_item_more = 1 + 0.5 / drawn.count
    shape, scale = half_an_item_more * mean**2 / variance, variance / mean
    return Uncertain(undecided + mean, np.rint(undecided + rng.gamma(shape, scale, DRAWS)))


def _share(stratum: Stratum, rng: np.random.Generator) -> Uncertain:
    """Share of poisoned among the requests that nobody reviewed; its two halves in random order."""
    decided, poisoned = stratum.decided, stratum.poisoned
    if not decided.count:
        halves = np.zeros(DRAWS // 2), np.ones(DRAWS - DRAWS // 2)
        return Uncertain(0.5, rng.permutation(np.concatenate(halves)))
    one_more = decided.squares / decided.total  # mean weight of the item of a random request
    in_all = decided.total + one_more
    total, squares = poisoned.total, poisoned.squares
    lower = _beta(total**2 / squares if squares else 0.0, total / in_all, DRAWS // 2, rng)
    total, squares = total + one_more, squares + one_more**2
    upper = _beta(total**2 / squares, total / in_all, DRAWS - DRAWS // 2, rng)
    return Uncertain(poisoned.total / decided.total, rng.permutation(np.concatenate([lower, upper])))


def _beta(a: float, mean: float, size: int, rng: np.random.Generator) -> Float64Array:
    b = a * (1 - mean) / mean if mean else 1.0
    if a <= 0 or b <= 1e-9:
        return np.full(size, float(a > 0))
    return rng.beta(a, b, size)
