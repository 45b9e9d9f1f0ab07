"""A short summary of a feature vector: a few of its norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from guard.errors import ConfigError, DataError
from guard.types import Float64Array, FloatArray

_NORMS: dict[str, Callable[[Float64Array, float], Float64Array]] = {
    "l0": lambda size, tolerance: np.count_nonzero(
        size > tolerance * size.max(axis=1, initial=0.0, keepdims=True), axis=1
    ).astype(np.float64),
    "l1": lambda size, _: size.sum(axis=1),
    "l2": lambda size, _: np.sqrt(np.einsum("ij,ij->i", size, size)),
    "linf": lambda size, _: size.max(axis=1, initial=0.0),
}

#: The norms that `norm_summary` knows.
NORM_ORDERS: tuple[str, ...] = tuple(_NORMS)


def check_orders(orders: Sequence[str], l0_tolerance: float) -> None:
    """Refuse settings that `norm_summary` cannot follow.

    Raises
    ------
    ConfigError
        If an order is unknown or given twice, none is given, or the tolerance is outside [0, 1).
    """
    if isinstance(orders, str) or not orders or len(set(orders)) != len(orders) or set(orders) - set(NORM_ORDERS):
        raise ConfigError(f"norm orders must be one or more of {list(NORM_ORDERS)}, each once, got {orders!r}.")
    if not 0.0 <= l0_tolerance < 1.0:
        raise ConfigError(f"l0_tolerance must be in [0, 1), got {l0_tolerance}.")


def norm_summary(features: FloatArray, orders: Sequence[str], l0_tolerance: float = 1e-3) -> Float64Array:
    """Return the chosen norms of every row, the "low-dimensional summary" of the Fusion paper [1]_.

    `"l0"` counts the components larger than `l0_tolerance` times the row's largest. Exact zeros alone would do behind
    a ReLU, but not behind a GELU or an average pooling, where an idle unit is small and not zero. The tolerance is
    relative because features have no unit: multiplying a layer by a constant then leaves its l0 as it was, and one
    default serves every layer of every network.

    Parameters
    ----------
    features : ndarray of shape (n, d)
        Finite features, one row per input. Norms are summed in float64.
    orders : sequence of {"l0", "l1", "l2", "linf"}
        Norms to compute, in the order of the columns wanted.
    l0_tolerance : float
        Share of a row's largest absolute component, in [0, 1); read by `"l0"` only.

    Returns
    -------
    summary : ndarray of shape (n, len(orders)), float64

    Raises
    ------
    ConfigError
        If an order is unknown or given twice, none is given, or the tolerance is outside [0, 1).
    DataError
        If features are not 2-D.

    References
    ----------
    .. [1] Fu et al. (2020), Detecting Backdoors in Neural Networks Using Novel Feature-Based Anomaly Detection,
       arXiv 2011.02526.
    """
    check_orders(orders, l0_tolerance)
    if features.ndim != 2:
        raise DataError(f"features must be a 2-D array, got shape {features.shape}.")
    size = np.abs(features.astype(np.float64))
    summary = np.empty((len(size), len(orders)))
    for column, order in enumerate(orders):
        summary[:, column] = _NORMS[order](size, l0_tolerance)
    return summary
