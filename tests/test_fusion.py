"""Fusion: combinations by hand, and the published rule against its own definition."""

from __future__ import annotations

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.fusion import CalibratedFusion, PaperFusion
from guard.errors import NotFittedError


def test_calibrated_fusion_combine_is_the_root_mean_square():
    surprise = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 7.0], [5.0, 5.0]])
    expected = [np.sqrt(12.5), 0.0, 5.0, 5.0]
    np.testing.assert_allclose(CalibratedFusion().combine(surprise), expected, rtol=1e-15)


def test_calibrated_fusion_combine_of_huge_surprise_stays_finite():
    assert np.isfinite(CalibratedFusion().combine(np.array([[1e11, 0.0]]))).all()


def test_calibrated_fusion_decide_flags_up_to_the_rate_inclusive():
    p_values = np.array([0.04, 0.05, 0.05 + 1e-12, 1.0])
    flagged = CalibratedFusion().decide(np.zeros(4), p_values, 0.05)
    np.testing.assert_array_equal(flagged, [True, True, False, False])


def test_calibrated_fusion_strong_member_wins_over_silent_ones():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(500, 8))
    fusion = CalibratedFusion().fit(clean)
    one_strong = np.zeros((1, 8))
    one_strong[0, 3] = 12.0
    combined = fusion.combine(fusion.surprise(np.concatenate([clean, one_strong])))
    assert combined[-1] > combined[:-1].max()


def test_calibrated_fusion_unfitted_raises_not_fitted_error():
    with pytest.raises(NotFittedError, match=r"^CalibratedFusion is not fitted\. Call fit\("):
        CalibratedFusion().surprise(np.zeros((1, 2)))


def test_calibrated_fusion_arrays_roundtrip_gives_equal_surprise():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(200, 3))
    fusion = CalibratedFusion().fit(raw)
    restored = CalibratedFusion().restore(fusion.arrays())
    np.testing.assert_array_equal(restored.surprise(raw), fusion.surprise(raw))


def test_paper_fusion_by_hand_flags_beyond_either_threshold_only():
    raw = np.array([[1.5, 0.0], [1.6, -9.0], [1.0, 0.1], [1.5, -0.1], [9.0, 4.0]])
    fusion = PaperFusion().fit(raw)
    combined = fusion.combine(fusion.surprise(raw))
    np.testing.assert_allclose(combined, [0.0, 0.1, 0.1, 0.0, 7.5], atol=1e-12)
    for rate in (0.001, 0.9):  # no influence
        np.testing.assert_array_equal(fusion.decide(combined, np.ones(5), rate), [False, True, True, False, True])


def test_paper_fusion_learns_nothing_and_restores_from_nothing():
    fusion = PaperFusion()
    assert fusion.arrays() == {}
    assert fusion.restore({}) is fusion


def test_paper_fusion_equals_equation_13_on_real_activations(
    fitted_guard: Guard, clean_activations: Activations, triggered_activations: Activations
):
    clean, labels = fitted_guard.reference, fitted_guard.reference_labels
    guard = Guard.fit_activations(clean, labels, GuardConfig(false_positive_rate=0.05, mode="paper"))
    lof = PerClassLof(summary=("l1", "l2", "linf"), compare="any").fit(clean, labels)
    head = HeadDisagreement().fit(clean, labels)
    for new in (clean_activations, triggered_activations):
        novel = lof.score_all(new).min(axis=1) > 1.5
        np.testing.assert_array_equal(novel, lof.is_novel(new))
        disagree = head.logits(new).argmax(axis=1) != new.predicted_labels
        scores = guard.scores(new)
        np.testing.assert_array_equal(scores.is_poisoned, novel | disagree)
        np.testing.assert_array_equal(scores.combined > 0, novel | disagree)
        assert (novel | disagree).any()
