"""Whether a network was trained on the clean images that it is to be guarded with, as far as that can be noticed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import bdtr, logsumexp

from guard.suspect.model import SuspectModel
from guard.types import Float32Array, Float64Array, IntArray

#: Images that are looked at, evenly spread.
_MOST = 1000
#: One part in so many of a side is an image moved by: 1 pixel of 28, 8 of 224.
_STEP = 28
#: Networks had 1.5 to 1.8 times the loss and 1.2 to 1.7 times the errors on unseen images that were moved; on images
#: that they were trained on, 30 to 170 times the loss.
_LOSS_RATIO, _ERROR_RATIO, _CHANCE = 5.0, 2.5, 0.01


class Membership(NamedTuple):
    """How a network does on clean images as they are, and moved a little, as unseen ones would be.

    Attributes
    ----------
    loss, moved_loss : float
        Mean cross-entropy.
    errors, moved_errors : float
        Share of wrong answers, in [0, 1].
    n : int
        Images that were looked at.
    """

    loss: float
    moved_loss: float
    errors: float
    moved_errors: float
    n: int

    @property
    def is_noticed(self) -> bool:
        """Whether the network does so much better on the images as they are that it must have seen them.

        The moved images stand for a share that was held out. A network that was trained with moved images does equally
        well on both, and cannot be told.
        """
        likely_errors = self.moved_errors / _ERROR_RATIO
        chance = float(bdtr(round(self.errors * self.n), self.n, likely_errors))
        return self.moved_loss > _LOSS_RATIO * self.loss and chance < _CHANCE


def membership(suspect: SuspectModel, images: Float32Array, labels: IntArray) -> Membership:
    """Compare what a network makes of clean images with what it makes of the same images moved a little.

    Parameters
    ----------
    suspect : SuspectModel
    images : ndarray of shape (n, channels, height, width), float32
    labels : ndarray of shape (n,), int64

    Returns
    -------
    result : Membership

    References
    ----------
    .. [1] Yeom et al. (2018), Privacy Risk in Machine Learning: Analyzing the Connection to Overfitting (the loss as a
       sign of membership); Choquette-Choo et al. (2021), Label-Only Membership Inference Attacks (moved images).
    """
    chosen = np.unique(np.linspace(0, len(images) - 1, min(len(images), _MOST)).astype(np.int64))
    images, labels = images[chosen], labels[chosen]
    loss, errors = _measured(suspect, images, labels)
    step = max(1, round(min(images.shape[2:]) / _STEP))
    margins = ((0, 0), (0, 0), (step, step), (step, step))
    padded = np.pad(images, margins, mode="edge")
    height, width = images.shape[2:]
    moved = [
        _measured(suspect, np.ascontiguousarray(padded[:, :, down : down + height, right : right + width]), labels)
        for down, right in ((0, step), (2 * step, step), (step, 0), (step, 2 * step))
    ]
    moved_loss, moved_errors = np.mean(moved, axis=0)
    return Membership(loss, float(moved_loss), errors, float(moved_errors), len(images))


def _measured(suspect: SuspectModel, images: Float32Array, labels: IntArray) -> tuple[float, float]:
    """Return mean loss, and the share of wrong answers."""
    activations = suspect.activations(images)
    logits: Float64Array = activations.logits.astype(np.float64)
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    return float(losses.mean()), float((activations.predicted_labels != labels).mean())
