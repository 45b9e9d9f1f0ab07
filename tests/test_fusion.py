"""Fusion: combinations by hand, and the published rule against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.fusion import CalibratedFusion, PaperFusion
from guard.errors import DataError, NotFittedError

#: Two answers that the network cannot decide between, and one that it is sure of.
UNSURE, SURE = np.zeros((1, 2)), np.array([[1e9, 0.0]])


def fitted_on(raw, temperature: float = 1.0) -> CalibratedFusion:
    fusion = CalibratedFusion().fit(raw, np.zeros((len(raw), 2)), np.zeros(len(raw), dtype=int))
    fusion.temperature_ = temperature
    return fusion


def test_calibrated_fusion_combine_by_hand():
    fusion = fitted_on(np.zeros((2, 1)))
    surprise = -np.log([[0.5, 0.5], [norm.sf(1.0), norm.sf(3.0)], [1.0, 1.0]])
    softplus = np.log1p(np.exp([[0.0, 0.0], [1.0, 3.0]]))
    expected = [*np.sqrt(np.square(softplus).mean(axis=1)), 0.0]
    sure = np.repeat(SURE, 3, axis=0)
    np.testing.assert_allclose(fusion.combine(surprise, sure), expected, rtol=1e-12)
    np.testing.assert_allclose(fusion.combine(surprise, 0 * sure), 0.75 * np.array(expected), rtol=1e-12)


def test_calibrated_fusion_temperature_says_how_sure_the_network_is():
    logits = np.log([[3.0, 1.0]])
    surprise = np.array([[2.0]])
    factors = [fitted_on(np.zeros((2, 1)), t).combine(surprise, logits)[0] for t in (1.0, 0.5)]
    assert factors[1] / factors[0] == pytest.approx((1 + 0.9) / (1 + 0.75), rel=1e-12)


def test_calibrated_fusion_factor_is_at_least_a_half_however_unsure_the_network_is():
    fusion = fitted_on(np.zeros((2, 1)))
    surprise = np.array([[9.0, 4.0]])
    unsure, sure = fusion.combine(surprise, np.zeros((1, 10_000)))[0], fusion.combine(surprise, SURE)[0]
    assert 0.5 <= unsure / sure < 0.501


def test_calibrated_fusion_of_an_older_version_is_the_root_mean_square_of_surprise():
    surprise = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 7.0], [5.0, 5.0]])
    older = {name: array for name, array in fitted_on(np.zeros((5, 2))).arrays().items() if name != "temperature"}
    combined = CalibratedFusion().restore(older).combine(surprise, np.zeros((4, 2)))
    np.testing.assert_allclose(combined, [np.sqrt(12.5), 0.0, 5.0, 5.0], rtol=1e-15)


def test_calibrated_fusion_combine_of_huge_surprise_stays_finite():
    combined = fitted_on(np.zeros((2, 2))).combine(np.array([[1e11, 0.0], [1e30, 1e30]]), np.zeros((2, 2)))
    assert np.isfinite(combined).all()
    assert combined[1] > combined[0] > 1e5


def test_calibrated_fusion_largest_scores_bound_what_clean_inputs_reach():
    raw = np.random.default_rng(0).standard_t(3, size=(400, 6))
    fusion = fitted_on(raw)
    combined = np.sort(fusion.combine(fusion.surprise(raw), np.repeat(SURE, 400, axis=0)))
    largest = fusion.largest_scores(400, 6)
    assert (np.diff(largest) > 0).all()
    assert (combined < largest).all()
    assert largest[-1] < 2 * combined[-1] + 3  # no bound that anything keeps


def test_calibrated_fusion_decide_flags_up_to_the_rate_inclusive():
    p_values = np.array([0.04, 0.05, 0.05 + 1e-12, 1.0])
    flagged = CalibratedFusion().decide(np.zeros(4), p_values, 0.05)
    np.testing.assert_array_equal(flagged, [True, True, False, False])


def test_calibrated_fusion_strong_member_wins_over_silent_ones():
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(500, 8))
    fusion = fitted_on(clean)
    one_strong = np.zeros((1, 8))
    one_strong[0, 3] = 12.0
    combined = fusion.combine(fusion.surprise(np.concatenate([clean, one_strong])), np.zeros((501, 2)))
    assert combined[-1] > combined[:-1].max()


def test_calibrated_fusion_unfitted_raises_not_fitted_error():
    with pytest.raises(NotFittedError, match=r"^CalibratedFusion is not fitted\. Call fit\("):
        CalibratedFusion().surprise(np.zeros((1, 2)))


def test_calibrated_fusion_arrays_roundtrip_gives_equal_surprise():
    rng = np.random.default_rng(0)
    raw = rng.normal(size=(200, 3))
    fusion = fitted_on(raw, temperature=2.5)
    restored = CalibratedFusion().restore(fusion.arrays())
    np.testing.assert_array_equal(restored.surprise(raw), fusion.surprise(raw))
    assert restored.temperature_ == 2.5


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
def test_calibrated_fusion_restore_refuses_a_temperature_that_is_none(temperature):
    arrays = {**fitted_on(np.zeros((5, 2))).arrays(), "temperature": np.array([temperature])}
    with pytest.raises(DataError, match="array temperature must be"):
        CalibratedFusion().restore(arrays)


def test_paper_fusion_by_hand_flags_beyond_either_threshold_only():
    raw = np.array([[1.5, 0.0], [1.6, -9.0], [1.0, 0.1], [1.5, -0.1], [9.0, 4.0]])
    logits = np.zeros((5, 2))
    fusion = PaperFusion().fit(raw, logits, np.zeros(5, dtype=int))
    combined = fusion.combine(fusion.surprise(raw), logits)
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
