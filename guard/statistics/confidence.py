"""How sure a network is of its answers: the probability of each, at a temperature that clean images tell."""

from __future__ import annotations

import math

import numpy as np

from guard.types import Float64Array, FloatArray, IntArray

#: Temperatures are looked for up to so many times above and below the spread of the logits, as a natural logarithm.
_SEARCH = 6.0


def confidence(logits: FloatArray, temperature: float) -> Float64Array:
    """Return the softmax probability of each row's largest logit, shape (n,), in (0, 1].

    Parameters
    ----------
    logits : ndarray of shape (n, n_classes), finite
    temperature : float
        What logits are divided by, > 0.
    """
    below = logits.astype(np.float64)
    below -= np.maximum.reduce(logits, axis=1, keepdims=True)
    below /= temperature
    sure: Float64Array = np.reciprocal(np.add.reduce(np.exp(below, out=below), axis=1))
    return sure


def fit_temperature(logits: FloatArray, labels: IntArray) -> float:
    """Return the temperature at which the true labels are likeliest (temperature scaling [1]_).

    Parameters
    ----------
    logits : ndarray of shape (n, n_classes), finite
        Of clean inputs that the network was not trained on.
    labels : ndarray of shape (n,), int
        True labels in [0, n_classes).

    Returns
    -------
    temperature : float
        In units of the logits, > 0; the least one looked at where all answers are right.

    References
    ----------
    .. [1] Guo, Pleiss, Sun, Weinberger (2017), On Calibration of Modern Neural Networks, ICML, section 4.2.
    """
    from scipy.optimize import minimize_scalar  # here, as a server loads less without

    below = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    true = below[np.arange(len(labels)), labels]
    spread = max(float(below.std()), 1e-12)

    def loss(log_temperature: float) -> float:
        temperature = spread * math.exp(log_temperature)
        return float((np.log(np.exp(below / temperature).sum(axis=1)) - true / temperature).mean())

    best = minimize_scalar(loss, bounds=(-_SEARCH, _SEARCH), method="bounded", options={"xatol": 1e-4})
    return spread * math.exp(float(best.x))
