"""The floor: a rival that does not beat the suspect model's own probability has seen nothing."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from guard.lab.rivals.base import Rival
from guard.types import Float32Array, Float64Array, IntArray


class MaxSoftmax(Rival):
    """The suspect model's probability of its own answer: backdoors fire surely, and honest errors are unsure.

    The score is the log odds of the largest softmax probability p, log p - log(1 - p): the same order as p's, without
    the ties where p rounds to 1.

    References
    ----------
    .. [1] Hendrycks, Gimpel (2017), A baseline for detecting misclassified and out-of-distribution examples
       (arXiv 1610.02136), whose sign is the opposite: there the unsure inputs are looked for.
    """

    title = "max-softmax"
    source = "Hendrycks, Gimpel 2017, arXiv 1610.02136"

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        """There is nothing to learn."""

    def _score(self, images: Float32Array) -> Float64Array:
        logits = self.network.logits(images)
        answers = np.arange(self.n_classes) == logits.argmax(axis=1)[:, np.newaxis]
        others = np.where(answers, -np.inf, logits)
        scores: Float64Array = logits.max(axis=1) - logsumexp(others, axis=1)
        return scores
