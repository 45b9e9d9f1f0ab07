"""The norm summary against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from guard.detection.detectors.norms import NORM_ORDERS, norm_summary
from guard.errors import ConfigError, DataError


def test_norm_summary_of_small_vectors_matches_values_by_hand() -> None:
    features = np.array([[3.0, -4.0, 0.0], [0.0, 0.0, 0.0], [1.0, -1.0, 1.0]], dtype=np.float32)
    summary = norm_summary(features, ("l0", "l1", "l2", "linf"))
    expected = [[2.0, 7.0, 5.0, 4.0], [0.0, 0.0, 0.0, 0.0], [3.0, 3.0, np.sqrt(3.0), 1.0]]
    np.testing.assert_allclose(summary, expected, rtol=1e-15)
    assert summary.dtype == np.float64


def test_norm_summary_orders_given_otherwise_follow_the_order_given() -> None:
    features = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    columns = dict(zip(NORM_ORDERS, norm_summary(features, NORM_ORDERS).T, strict=True))
    swapped = norm_summary(features, ("linf", "l0"))
    np.testing.assert_array_equal(swapped, np.column_stack([columns["linf"], columns["l0"]]))


def test_norm_summary_l0_ignores_components_at_or_below_tolerance() -> None:
    features = np.array([[1000.0, 1.0, 1.1, -2.0, 0.0]])
    assert norm_summary(features, ("l0",), l0_tolerance=1e-3).item() == 3.0
    assert norm_summary(features, ("l0",), l0_tolerance=0.0).item() == 4.0


def test_norm_summary_l0_of_scaled_features_does_not_change() -> None:
    features = np.random.default_rng(1).exponential(size=(20, 50)) ** 6
    np.testing.assert_array_equal(norm_summary(features, ("l0",)), norm_summary(features * 1e-7, ("l0",)))


def test_norm_summary_of_float32_is_summed_in_float64() -> None:
    features = np.full((1, 100_000), 0.1, dtype=np.float32)
    assert norm_summary(features, ("l1",)).item() == pytest.approx(100_000 * float(np.float32(0.1)), rel=1e-12)


def test_norm_summary_of_no_rows_is_empty() -> None:
    assert norm_summary(np.empty((0, 4)), ("l0", "l1", "l2", "linf")).shape == (0, 4)


@pytest.mark.parametrize("orders", [(), ("l3",), ("l1", "l1"), "l1"])
def test_norm_summary_refuses_unknown_repeated_or_missing_orders(orders: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="norm orders must be one or more of"):
        norm_summary(np.ones((2, 2)), orders)


@pytest.mark.parametrize("tolerance", [-0.1, 1.0, float("nan")])
def test_norm_summary_refuses_tolerance_outside_zero_to_one(tolerance: float) -> None:
    with pytest.raises(ConfigError, match=r"l0_tolerance must be in \[0, 1\)"):
        norm_summary(np.ones((2, 2)), ("l0",), tolerance)


def test_norm_summary_refuses_features_that_are_no_matrix() -> None:
    with pytest.raises(DataError, match="must be a 2-D array"):
        norm_summary(np.ones(3), ("l1",))
