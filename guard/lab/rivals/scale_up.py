"""SCALE-UP: a triggered image keeps its label when all its pixels are multiplied."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from guard.errors import DataError
from guard.lab.rivals.base import Rival
from guard.types import Float32Array, Float64Array, IntArray


class ScaleUp(Rival):
    """Share of the multiplied copies of an image that get its label: the scaled prediction consistency (SPC) of [1]_.

    SPC(x) = 1/|S| sum_{s in S} [C(min(s x, 1)) = C(x)], C the suspect model's answer. This is the data-free form: clean
    images teach nothing.

    Parameters
    ----------
    seed : int
        Without influence: nothing is drawn.
    factors : sequence of float
        S, each > 1; 3, 5, 7, 9 and 11 as in the paper.

    References
    ----------
    .. [1] Guo et al. (2023), SCALE-UP: An Efficient Black-box Input-level Backdoor Detection via Analyzing Scaled
       Prediction Consistency (arXiv 2302.03251), section 4.2.
    """

    title = "SCALE-UP"
    source = "Guo et al. 2023, arXiv 2302.03251"

    def __init__(self, *, seed: int = 0, factors: Sequence[float] = (3.0, 5.0, 7.0, 9.0, 11.0)) -> None:
        super().__init__(seed=seed)
        if not factors or min(factors) <= 1.0:
            raise DataError(f"factors must be one or more numbers > 1, got {list(factors)}.")
        self.factors = tuple(factors)

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        """There is nothing to learn."""

    def _score(self, images: Float32Array) -> Float64Array:
        return self._consistency(images)[0]

    def _consistency(self, images: Float32Array) -> tuple[Float64Array, IntArray]:
        """Return SPC and the suspect model's answers, both (n,)."""
        answers = self.network.logits(images).argmax(axis=1)
        kept = [
            self.network.logits(np.minimum(images * np.float32(factor), np.float32(1.0))).argmax(axis=1) == answers
            for factor in self.factors
        ]
        return np.mean(kept, axis=0), answers


class ScaleUpLimited(ScaleUp):
    """SCALE-UP with a few clean images: SPC less the mean of its class, divided by the standard deviation there.

    The class of a clean image is its true label; that of an input is the suspect model's answer. Chosen where the paper
    leaves it open: a standard deviation counts at least as much as the smallest step of SPC, 1/|S|, because a class
    whose few clean images all have the same SPC has none; a class without clean images has mean and standard deviation
    of all of them.

    Parameters
    ----------
    seed, factors
        As for `ScaleUp`.

    References
    ----------
    .. [1] Guo et al. (2023), arXiv 2302.03251, section 4.3.
    """

    title = "SCALE-UP, data-limited"

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        consistency, _ = self._consistency(images)
        groups = [consistency[labels == label] for label in range(self.n_classes)]
        groups = [group if len(group) else consistency for group in groups]
        self._means = np.array([group.mean() for group in groups])
        self._spreads = np.array([max(float(group.std()), 1.0 / len(self.factors)) for group in groups])

    def _score(self, images: Float32Array) -> Float64Array:
        consistency, answers = self._consistency(images)
        scores: Float64Array = (consistency - self._means[answers]) / self._spreads[answers]
        return scores
