"""STRIP: a triggered image keeps its label, whatever other image is laid over it."""

from __future__ import annotations

import numpy as np
from scipy.special import log_softmax

from guard.errors import DataError
from guard.lab.rivals.base import Rival
from guard.types import Float32Array, Float64Array, IntArray


class Strip(Rival):
    """Mean entropy of the answers to copies of the image that have clean images laid over them; low is suspicious.

    H(x) = -1/N sum_n sum_c p_c(x + o_n) log2 p_c(x + o_n), and the score is -H. The N overlays o_n are clean images,
    drawn once; sums of pixels are cut off at 1. Chosen where [1]_ leaves it open: both images have weight 1 (an image
    that is laid over another, not a mean of both, which would halve the trigger).

    Parameters
    ----------
    seed : int
    overlays : int
        N, at least 1; 100 as in the paper's experiments. Fewer, if there are fewer clean images.

    References
    ----------
    .. [1] Gao et al. (2019), STRIP: A Defence Against Trojan Attacks on Deep Neural Networks (arXiv 1902.06531),
       sections 4 and 5.
    """

    title = "STRIP"
    source = "Gao et al. 2019, arXiv 1902.06531"

    def __init__(self, *, seed: int = 0, overlays: int = 100) -> None:
        super().__init__(seed=seed)
        if overlays < 1:
            raise DataError(f"overlays must be >= 1, got {overlays}.")
        self.overlays = overlays

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        n = min(self.overlays, len(images))
        self._overlays = images[np.random.default_rng(self.seed).choice(len(images), n, replace=False)]

    def _score(self, images: Float32Array) -> Float64Array:
        entropy = np.zeros(len(images))
        for overlay in self._overlays:
            log_p = log_softmax(self.network.logits(np.minimum(images + overlay, np.float32(1.0))), axis=1)
            entropy -= np.sum(np.exp(log_p) * log_p, axis=1) / np.log(2.0)
        return -entropy / len(self._overlays)


def detection_boundary(clean_scores: Float64Array, false_rejection_rate: float) -> float:
    """Return the score above which STRIP rejects: the quantile of the normal distribution of the clean scores.

    Parameters
    ----------
    clean_scores : ndarray of shape (n,)
        Of clean images.
    false_rejection_rate : float
        Share of clean images that may be rejected, in (0, 1).
    """
    from scipy.stats import norm  # here, as it takes seconds, and most runs need none

    return float(norm.ppf(1.0 - false_rejection_rate, clean_scores.mean(), clean_scores.std()))
