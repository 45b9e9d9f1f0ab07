"""Residual and relative distance by hand."""

from __future__ import annotations

import numpy as np
import pytest

from guard import Activations
from guard.detection.detectors.relative_distance import RelativeDistance
from guard.detection.detectors.residual import Residual
from guard.errors import DataError, NotFittedError


def answered(features: list[list[float]], labels: list[int], n_classes: int = 3) -> Activations:
    return Activations(np.eye(n_classes, dtype=np.float32)[labels], np.float32(features))


CLEAN = answered([[-1, 0], [1, 0], [3, 1], [5, -1]], [0, 0, 1, 1])  # means (0, 0) and (4, 0); no class 2


def test_relative_distance_by_hand():
    detector = RelativeDistance().fit(CLEAN, np.array([0, 0, 1, 1]))
    new = answered([[1, 0], [1, 0], [2, 7], [4, 0]], [0, 1, 0, 0])
    np.testing.assert_allclose(detector.score(new)[:3], [np.log(1 / 3), np.log(3), 0.0], rtol=1e-6, atol=1e-6)
    assert detector.score(new)[3] > 20  # at the very mean of another class


def test_relative_distance_is_infinite_for_a_class_without_clean_images():
    detector = RelativeDistance().fit(CLEAN, np.array([0, 0, 1, 1]))
    assert detector.score(answered([[1, 0]], [2]))[0] == np.inf


def test_relative_distance_of_the_only_class_is_minus_infinite():
    detector = RelativeDistance().fit(CLEAN, np.zeros(4, dtype=int))
    assert detector.score(answered([[1, 0]], [0]))[0] == -np.inf


def test_relative_distance_far_from_the_origin_loses_no_digits():
    shifted = Activations(CLEAN.logits, CLEAN.features + np.float32(4096))
    detector = RelativeDistance().fit(shifted, np.array([0, 0, 1, 1]))
    new = answered([[4097, 4096]], [1])
    assert detector.score(new)[0] == pytest.approx(np.log(3), rel=1e-9)


def test_relative_distance_of_other_classes_raises_data_error():
    detector = RelativeDistance().fit(CLEAN, np.array([0, 0, 1, 1]))
    with pytest.raises(DataError, match=r"^logits have 4 columns, fit saw 3\. Is it the same suspect model\?$"):
        detector.score(answered([[1, 0]], [0], n_classes=4))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"means": np.zeros((3, 2))}, r"array means must have shape \(2, any\)"),
        ({"is_present": np.array([1, 2, 0])}, "array is_present must be <= 1, got 2"),
        ({"is_present": np.zeros(3, np.int64), "means": np.zeros((0, 2))}, "must name at least one class"),
    ],
)
def test_relative_distance_from_unsound_state_raises_data_error(changes, text):
    state = RelativeDistance().fit(CLEAN, np.array([0, 0, 1, 1])).state()
    with pytest.raises(DataError, match=text):
        RelativeDistance.from_state({**state, **changes})


def test_residual_by_hand_is_the_length_of_a_row():
    detector = Residual().fit(CLEAN, np.array([0, 0, 1, 1]))
    np.testing.assert_array_equal(detector.score(answered([[3, 4], [0, 0], [-6, 8]], [0, 1, 2])), [5.0, 0.0, 10.0])


def test_residual_of_huge_rows_stays_finite():
    detector = Residual().fit(CLEAN, np.array([0, 0, 1, 1]))
    assert np.isfinite(detector.score(answered([[1e30, 1e30]], [0]))).all()


def test_whitened_detectors_unfitted_raise_not_fitted_error():
    for detector in (Residual(), RelativeDistance()):
        with pytest.raises(NotFittedError, match=r"is not fitted\. Call fit\(activations, labels\) first\.$"):
            detector.score(CLEAN)
