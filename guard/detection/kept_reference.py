"""What a guard keeps of the clean activations it was fitted on: rounded to half precision, where that changes nothing.

The reference is most of a bundle. It is read when a guard is retrained, when a bundle is checked, and by people who
compare an input with clean ones; detectors score by arrays of their own. A bundle keeps numbers that half precision
holds in half the bytes (`guard.storage.packing`), and what was rounded once stays as it is when it is rounded again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from guard.types import Activations, Float32Array, Float64Array, IntArray

#: Root mean square that rounding may change a column by, in units of its standard deviation: 1/40,000 of the variance.
_LARGEST_CHANGE = 5e-3
#: A column that spreads less, relative to the one that spreads most, does not vary, and is measured by the mean
#: standard deviation of those that do; see `WhitenedSpace.fit`.
_VARIES = 1e-6
_ROWS = 1024  # that are looked at together


def kept_reference(activations: Activations, same_as: IntArray) -> Activations:
    """Return activations as a guard keeps them: each array in half precision, or as it is where that would show.

    An array stays as it is if a value is too large for half precision, or if rounding would change a column by more
    than 0.5 % of its standard deviation (a mean that is hundreds of standard deviations away from 0, or tiny numbers).
    The network's answers stay what they are: where rounding makes another logit the largest, the right one is raised to
    the next larger number.

    Parameters
    ----------
    activations : Activations of n inputs
        Finite.
    same_as : ndarray of shape (n,), int64
        For each row the one that it equals but for rounding, or itself: they shall not be rounded apart.

    Returns
    -------
    kept : Activations of n inputs
        Of the same types. Returned again where it is given again.
    """
    logits, features, *depths = ((name, _kept(rows)) for name, rows in activations.items())
    kept_features = features[1]
    if kept_features is not activations.features:
        kept_features = kept_features[same_as]
    return Activations(_with_answers(logits[1], activations), kept_features, dict(depths))


def _kept(rows: Float32Array) -> Float32Array:
    """Return an array (n, d) in half precision, in its own type; the very same array if that would show."""
    kept = np.empty_like(rows)
    for part in _parts(len(rows)):
        with np.errstate(over="ignore"):
            kept[part] = rows[part].astype(np.float16)
    if not np.isfinite(kept).all():
        return rows
    spread = np.sqrt(_mean_squares(rows, rows.mean(axis=0, dtype=np.float64)))
    change = np.sqrt(_mean_squares(rows, kept))
    varies = spread > _VARIES * spread.max(initial=0.0)
    unit = np.where(varies, spread, spread[varies].mean() if varies.any() else 0.0)
    return kept if (change <= _LARGEST_CHANGE * unit).all() else rows


def _with_answers(logits: Float32Array, activations: Activations) -> Float32Array:
    """Return rounded logits whose largest are where they were."""
    answers = activations.predicted_labels
    changed = np.flatnonzero(logits.argmax(axis=1) != answers)
    if len(changed) == 0:
        return logits
    largest = logits[changed].max(axis=1).astype(np.float16)
    with np.errstate(over="ignore"):
        raised = np.nextafter(largest, np.float16(np.inf)).astype(logits.dtype)
    if not np.isfinite(raised).all():
        return activations.logits
    logits[changed, answers[changed]] = raised
    return logits


def _mean_squares(rows: Float32Array, less: Float32Array | Float64Array) -> Float64Array:
    """Return the mean square of each column of (n, d), less what is given for each column, (d,), or value, (n, d)."""
    total: Float64Array = np.zeros(rows.shape[1])
    for part in _parts(len(rows)):
        difference = rows[part] - (less[part] if less.ndim == 2 else less)
        total += np.einsum("ij,ij->j", difference, difference, dtype=np.float64)
    return total / max(1, len(rows))


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, start + _ROWS) for start in range(0, n, _ROWS))
