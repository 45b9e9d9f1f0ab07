"""Rules for arrays that come from a file: shape, kind, finite values, range, order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from guard.errors import DataError
from guard.types import AnyArray, IntArray

_KINDS = {"f": "floating-point numbers", "i": "integers"}


def require(
    arrays: Mapping[str, AnyArray],
    name: str,
    shape: Sequence[int | None],
    *,
    kind: str = "f",
    low: float | None = None,
    high: float | None = None,
    ascending: bool = False,
) -> AnyArray:
    """Return one of several arrays if it keeps the rules.

    Parameters
    ----------
    arrays : mapping of str to ndarray
    name : str
    shape : sequence of int or None
        None: any length.
    kind : {"f", "i"}
        Floating-point numbers, all finite; or integers.
    low, high : float, optional
        Least and greatest value allowed.
    ascending : bool
        Along the last axis; equal neighbours are allowed.

    Raises
    ------
    DataError
        If it is missing, or breaks a rule; the text names the array, the rule and what was found.
    """
    if name not in arrays:
        raise DataError(f"array {name} is missing.")
    array = arrays[name]
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise DataError(f"array {name} must have shape ({wanted}), got {array.shape}.")
    if array.dtype.kind not in ("iu" if kind == "i" else "f"):
        raise DataError(f"array {name} must hold {_KINDS[kind]}, got {array.dtype}.")
    if kind == "f" and not np.isfinite(array).all():
        raise DataError(f"array {name} must be finite: {int((~np.isfinite(array)).sum())} values are not.")
    if array.size and low is not None and array.min() < low:
        raise DataError(f"array {name} must be >= {low:g}, got {array.min()}.")
    if array.size and high is not None and array.max() > high:
        raise DataError(f"array {name} must be <= {high:g}, got {array.max()}.")
    if ascending and not (array[..., 1:] >= array[..., :-1]).all():
        raise DataError(f"array {name} must ascend along its last axis, and does not.")
    return array


def check_range(labels: IntArray, n_classes: int, name: str = "labels") -> None:
    """Refuse labels outside [0, n_classes), with DataError."""
    if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
        raise DataError(f"{name} must be in [0, {n_classes}), got {labels.min()} to {labels.max()}.")
