"""What counts: the one place that says what a success, a miss and a recovery are.

Rates are fractions in [0, 1]. Positive means poisoned. A flagged input counts as not answered. Empty input raises;
no rate is ever NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from guard.errors import DataError
from guard.types import BoolArray, Float64Array, FloatArray, IntArray


class Interval(NamedTuple):
    """A confidence interval of a rate, both ends in [0, 1]."""

    lower: float
    upper: float


def clean_accuracy(predicted_labels: IntArray, true_labels: IntArray, flagged: BoolArray | None = None) -> float:
    """Return the share of clean inputs that were answered with their true label.

    Parameters
    ----------
    predicted_labels, true_labels : ndarray of shape (n,), integer
    flagged : ndarray of shape (n,), bool, optional
        Inputs that the guard flagged: not answered, so wrong. None measures the unguarded model.

    Raises
    ------
    DataError
        If there is no input, or lengths or types do not fit.
    """
    predicted, true = _labels("predicted_labels", predicted_labels), _labels("true_labels", true_labels)
    _same_length(predicted_labels=predicted, true_labels=true)
    return float(((predicted == true) & _answered(flagged, len(true))).mean())


def attack_success_rate(
    predicted_labels: IntArray, attacker_labels: IntArray, true_labels: IntArray, flagged: BoolArray | None = None
) -> float:
    """Return the share of poisoned inputs, true label not the attacker's, that got the attacker's label unflagged.

    Parameters
    ----------
    predicted_labels : ndarray of shape (n,), integer
        Answers to poisoned inputs.
    attacker_labels : ndarray of shape (n,), integer
        The label that the attacker wants for each.
    true_labels : ndarray of shape (n,), integer
        Inputs whose true label is the attacker's are left out.
    flagged : ndarray of shape (n,), bool, optional
        Inputs that the guard flagged: the attack failed. None measures the unguarded model.

    Raises
    ------
    DataError
        If no input is left, or lengths or types do not fit.
    """
    predicted, wanted = _labels("predicted_labels", predicted_labels), _labels("attacker_labels", attacker_labels)
    true = _labels("true_labels", true_labels)
    _same_length(predicted_labels=predicted, attacker_labels=wanted, true_labels=true)
    counts = true != wanted
    if not counts.any():
        raise DataError("every true label is the attacker's label, so no attack can succeed. Give other inputs.")
    return float(((predicted == wanted) & _answered(flagged, len(true)))[counts].mean())


def recovery_accuracy(final_labels: IntArray, true_labels: IntArray) -> float:
    """Return the share of poisoned inputs whose final answer, after the guard's action, is their true label.

    Parameters
    ----------
    final_labels, true_labels : ndarray of shape (n,), integer
        Of poisoned inputs only.

    Raises
    ------
    DataError
        If there is no input, or lengths or types do not fit.
    """
    return clean_accuracy(final_labels, true_labels)


def true_positive_rate(flagged: BoolArray, is_poisoned: BoolArray) -> float:
    """Return the share of poisoned inputs that were flagged.

    Parameters
    ----------
    flagged, is_poisoned : ndarray of shape (n,), bool

    Raises
    ------
    DataError
        If no input is poisoned, or lengths or types do not fit.
    """
    flags, poisoned = _flags("flagged", flagged), _flags("is_poisoned", is_poisoned)
    _same_length(flagged=flags, is_poisoned=poisoned)
    if not poisoned.any():
        raise DataError("a true-positive rate needs at least one poisoned input, got none.")
    return float(flags[poisoned].mean())


def false_positive_rate(flagged: BoolArray, is_poisoned: BoolArray) -> float:
    """Return the share of clean inputs that were flagged.

    Parameters
    ----------
    flagged, is_poisoned : ndarray of shape (n,), bool

    Raises
    ------
    DataError
        If no input is clean, or lengths or types do not fit.
    """
    flags, poisoned = _flags("flagged", flagged), _flags("is_poisoned", is_poisoned)
    _same_length(flagged=flags, is_poisoned=poisoned)
    if poisoned.all():
        raise DataError("a false-positive rate needs at least one clean input, got none.")
    return float(flags[~poisoned].mean())


def auroc(scores: FloatArray, is_poisoned: BoolArray) -> float:
    """Return the chance that a poisoned input scores higher than a clean one; a tie counts one half.

    Parameters
    ----------
    scores : ndarray of shape (n,)
        Higher = more suspicious; infinite values are allowed, NaN is not.
    is_poisoned : ndarray of shape (n,), bool

    Raises
    ------
    DataError
        If all inputs are clean or all poisoned, a score is NaN, or lengths or types do not fit.

    References
    ----------
    .. [1] Hanley, McNeil (1982), The meaning and use of the area under a receiver operating characteristic curve.
    """
    from sklearn.metrics import roc_auc_score  # here, as it loads much that a server does not need

    values, poisoned = _scores(scores, is_poisoned)
    _, ranks = np.unique(values, return_inverse=True)  # an infinite score has a rank like any other
    return float(roc_auc_score(poisoned, ranks))


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Return Wilson's confidence interval of a rate; it stays in [0, 1] and is of use with 0 or all successes too.

    Parameters
    ----------
    successes, trials : int
        0 <= successes <= trials, trials >= 1.
    confidence : float
        In (0, 1).

    Raises
    ------
    DataError
        If an argument is out of range.

    References
    ----------
    .. [1] Wilson (1927), Probable inference, the law of succession, and statistical inference.
    """
    if not 0.0 < confidence < 1.0:
        raise DataError(f"confidence must be in (0, 1), got {confidence}.")
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"a rate needs 0 <= successes <= trials and trials >= 1, got {successes} of {trials}.")
    from scipy.stats import binomtest

    interval = binomtest(successes, trials).proportion_ci(confidence, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def _labels(name: str, labels: npt.ArrayLike) -> IntArray:
    array: npt.NDArray[Any] = np.asarray(labels)
    if array.ndim == 1 and len(array) and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{name} must be integers, got {array.dtype}.")
    return array.astype(np.int64, copy=False)


def _flags(name: str, flags: npt.ArrayLike) -> BoolArray:
    array: npt.NDArray[Any] = np.asarray(flags)
    if array.ndim == 1 and len(array) and array.dtype != np.bool_:
        raise DataError(f"{name} must be bool, got {array.dtype}.")
    return array.astype(np.bool_, copy=False)


def _answered(flagged: BoolArray | None, n: int) -> BoolArray:
    if flagged is None:
        return np.ones(n, dtype=bool)
    flags = _flags("flagged", flagged)
    if flags.shape != (n,):
        raise DataError(f"flagged must have shape ({n},), got {flags.shape}.")
    return ~flags


def _scores(scores: FloatArray, is_poisoned: BoolArray) -> tuple[Float64Array, BoolArray]:
    values = np.asarray(scores, dtype=np.float64)
    poisoned = _flags("is_poisoned", is_poisoned)
    _same_length(scores=values, is_poisoned=poisoned)
    if np.isnan(values).any():
        raise DataError(f"scores must be numbers, got NaN at row {int(np.isnan(values).argmax())}.")
    if poisoned.all() or not poisoned.any():
        kind = "poisoned" if poisoned.all() else "clean"
        raise DataError(f"a ROC curve needs clean and poisoned inputs, got only {kind} ones.")
    return values, poisoned


def _same_length(**arrays: npt.NDArray[Any]) -> None:
    shapes = {name: array.shape for name, array in arrays.items()}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) != 1:
        raise DataError(f"arrays must be one-dimensional and equally long, got {shapes}.")
    if next(iter(shapes.values())) == (0,):
        raise DataError(f"{', '.join(arrays)} are empty, so there is no rate. Give at least one input.")
