"""Fusion: combinations by hand, and the published rule against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_ndtr, ndtri, ndtri_exp

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.base import Kind
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.fusion import CalibratedFusion, PaperFusion
from guard.detection.kind_scores import KindScores
from guard.errors import DataError, NotFittedError
from guard.statistics.calibration import SurpriseMap

#: Two answers that the network cannot decide between, and one that it is sure of.
UNSURE, SURE = np.zeros((1, 2)), np.array([[1e9, 0.0]])


def fitted_on(raw, temperature: float = 1.0) -> CalibratedFusion:
    fusion = CalibratedFusion().fit(raw, np.zeros((len(raw), 2)), np.zeros(len(raw), dtype=int))
    fusion.temperature_ = temperature
    return fusion


#: Two novel kinds, of which one looks at two depths, and a contradiction.
KINDS = (Kind("lof"), Kind("lof"), Kind("residual", over_depths="compared"), Kind("disagreement", "contradiction"))


def softplus(z):
    return np.log1p(np.exp(z))


def test_calibrated_fusion_combine_by_hand():
    raw = np.random.default_rng(0).normal(size=(400, 4))
    fusion = CalibratedFusion().fit(raw, np.zeros((400, 2)), np.zeros(400, dtype=int), KINDS)
    fusion.temperature_ = 1.0
    z = np.array([[0.0, 1.0, 2.0, 3.0], [-1.0, 0.5, -2.0, -9.0]])
    residual = softplus(z[:, 2])
    clean = softplus(-ndtri_exp(-SurpriseMap.fit(raw).surprise(raw)))[:, 2]
    of_kinds = np.column_stack(
        [softplus(z[:, :2]).mean(axis=1), np.abs(residual - clean.mean()) / clean.std(), softplus(z[:, 3])]
    )
    again = softplus(-ndtri_exp(-fusion.kind_map_.surprise(of_kinds)))
    novelty, contradiction = np.square(again[:, :2]) @ [2 / 3, 1 / 3], np.square(again[:, 2])  # two detectors and one
    surprise = -log_ndtr(-z)
    for logits, sure in (
        (np.array([[1e9, 0.0]] * 2), 1.0),
        (np.log([[3.0, 1.0]] * 2), 0.75),
        (np.zeros((2, 9)), 1 / 9),
    ):
        expected = np.sqrt((novelty * ((1 + sure) / 2) ** 2 + contradiction * max(sure, 0.5) ** 2) / 2)
        np.testing.assert_allclose(fusion.combine(surprise, logits), expected, rtol=1e-9)


def test_calibrated_fusion_temperature_says_how_sure_the_network_is():
    logits = np.log([[3.0, 1.0]])
    surprise = np.array([[2.0]])
    clean = np.random.default_rng(0).normal(size=(100, 1))
    factors = [fitted_on(clean, t).combine(surprise, logits)[0] for t in (1.0, 0.5)]
    assert factors[1] / factors[0] == pytest.approx((1 + 0.9) / (1 + 0.75), rel=1e-12)


def test_calibrated_fusion_factor_is_at_least_a_half_however_unsure_the_network_is():
    fusion = fitted_on(np.zeros((2, 2)))
    surprise = np.array([[9.0, 4.0]])
    unsure, sure = fusion.combine(surprise, np.zeros((1, 10_000)))[0], fusion.combine(surprise, SURE)[0]
    assert 0.5 <= unsure / sure < 0.501


def test_calibrated_fusion_bounds_the_factor_of_contradictions_as_well():
    raw = np.random.default_rng(0).normal(size=(100, 2))
    kinds = [Kind("disagreement", "contradiction")] * 2
    fusion = CalibratedFusion().fit(raw, np.zeros((100, 2)), np.zeros(100, dtype=int), kinds)
    surprise = np.array([[9.0, 4.0]])
    unsure, sure = fusion.combine(surprise, np.zeros((1, 10_000)))[0], fusion.combine(surprise, SURE)[0]
    assert unsure / sure == pytest.approx(0.5, rel=1e-12)


def test_calibrated_fusion_counts_a_kind_once_for_each_of_its_detectors():
    kinds = [Kind("lof"), Kind("lof"), Kind("lof"), Kind("probe"), Kind("disagreement", "contradiction")]
    scores = KindScores.fit(np.zeros((2, 5)), kinds)
    np.testing.assert_allclose(scores.weights, [3 / 8, 1 / 8, 1 / 2], rtol=1e-15)


def test_calibrated_fusion_gives_what_resembles_anomalies_a_part_of_its_own_and_no_factor():
    raw = np.random.default_rng(0).normal(size=(400, 3))
    kinds = [Kind("lof"), Kind("residual"), Kind("demarcation", "resemblance")]
    fusion = CalibratedFusion().fit(raw, np.zeros((400, 2)), np.zeros(400, dtype=int), kinds)
    surprise = -log_ndtr([[0.0, 0.0, -5.0]])
    unsure, sure = fusion.combine(surprise, np.zeros((1, 10_000)))[0], fusion.combine(surprise, SURE)[0]
    assert sure > unsure > 0.9 * sure
    np.testing.assert_allclose(fusion.kind_scores_.weights, [1 / 2, 1 / 2, 0.0], rtol=1e-15)
    graded = np.logaddexp(0.0, -ndtri(np.exp(-fusion.surprise_of_kinds(surprise))))[0]
    by_hand = np.sqrt(np.square(graded[:2]).mean() + (graded[2] - 1.5) ** 2)
    assert sure == pytest.approx(by_hand, rel=1e-9)


def test_calibrated_fusion_takes_nothing_away_where_nothing_resembles_an_anomaly():
    """What nobody has shown the guard yet is found as before."""
    rng = np.random.default_rng(0)
    raw, logits, labels = rng.normal(size=(400, 3)), np.zeros((400, 2)), np.zeros(400, dtype=int)
    kinds = [Kind("lof"), Kind("disagreement", "contradiction"), Kind("demarcation", "resemblance")]
    with_it = CalibratedFusion().fit(raw, logits, labels, kinds)
    without = CalibratedFusion().fit(raw[:, :2], logits, labels, kinds[:2])
    surprise = -log_ndtr(-rng.normal(2.0, 1.0, (50, 3)))
    surprise[:, 2] = -log_ndtr(-rng.uniform(-2.0, 1.0, 50))
    np.testing.assert_allclose(
        with_it.combine(surprise, logits[:50]), without.combine(surprise[:, :2], logits[:50]), rtol=1e-12
    )
    bound = without.largest_scores(400, 2)
    assert (with_it.largest_scores(400, 3) > bound).all()


def test_fusion_minus_infinity_is_the_least_surprise():
    """The relative distance where one class alone has images."""
    raw = np.random.default_rng(0).normal(size=(200, 2))
    kinds = [Kind("lof"), Kind("relative_distance")]
    raw[:20, 1] = -np.inf
    fusion = CalibratedFusion().fit(raw, np.zeros((200, 2)), np.zeros(200, dtype=int), kinds)
    at = np.array([[0.0, -np.inf], [0.0, -9.0], [0.0, 3.0]])
    low, also_low, high = fusion.combine(fusion.surprise(at), np.zeros((3, 2)))
    assert low <= also_low < high
    assert np.isfinite(fusion.kind_map_.knots).all()
    assert fusion.kind_map_.knots[:, -1].max() < 10


def test_compared_depths_tell_an_input_that_is_unusual_at_one_depth_from_those_that_are_at_all():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(2000, 1))
    z = common + 0.3 * rng.normal(size=(2000, 4))
    compared = KindScores.fit(z, [Kind("residual", over_depths="compared")] * 4)
    averaged = KindScores.fit(z, [Kind("residual")] * 4)
    everywhere, once = np.full((1, 4), 2.0), np.array([[2.0, 0.0, 0.0, 0.0]])
    assert compared(once)[0, 0] > 1.5 * compared(everywhere)[0, 0]
    assert averaged(once)[0, 0] < averaged(everywhere)[0, 0]
    covariance = np.cov(z.T, bias=True)
    shrunk = 0.9 * covariance + 0.1 * covariance.trace() / 4 * np.eye(4)
    from_mean = z[:5] - z.mean(axis=0)
    expected = np.sqrt(np.einsum("ij,jk,ik->i", from_mean, np.linalg.inv(shrunk), from_mean))
    np.testing.assert_allclose(compared(z[:5])[:, 0], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("kinds", np.array([0, 3, 1, 2])),
        ("kinds", np.array([0, 0, 1])),
        ("shows", np.array([0, 0, 3])),
        ("centre", np.array([0.0, 0.0, np.nan, 0.0])),
        ("whiten", np.zeros((4, 3))),
        ("whiten", np.full((4, 4), np.inf)),
        ("whiten", np.diag([0.0, 0.0, 0.0, 0.0]) + np.eye(4)[:, [1, 0, 3, 2]]),  # across kinds
        ("whiten", np.diag([1.0, 0.0, 1.0, 0.0])),  # half of a kind
        ("kinds", np.array([0, 0, 1, 1])),  # the third has no detector
        ("kind.knots", np.zeros((2, 33))),
        ("kind.scale", np.zeros(3)),
    ],
)
def test_calibrated_fusion_restore_refuses_scores_of_kinds_that_are_none(name, array):
    raw = np.random.default_rng(0).normal(size=(50, 4))
    fusion = CalibratedFusion().fit(raw, np.zeros((50, 2)), np.zeros(50, dtype=int), KINDS)
    CalibratedFusion().restore(fusion.arrays())
    with pytest.raises(
        DataError, match=r"^array \w+ must" if name == "kind.knots" else f"array {name.removeprefix('kind.')} must"
    ):
        CalibratedFusion().restore({**fusion.arrays(), name: array})


def test_calibrated_fusion_is_not_stretched_by_infinite_scores_of_a_few_clean_inputs():
    raw = np.random.default_rng(0).normal(size=(500, 4))
    some = raw.copy()
    some[:4, 0] = np.inf  # a class of two images: no local outlier factor
    logits, labels = np.zeros((500, 2)), np.zeros(500, dtype=int)
    fusion, undisturbed = (CalibratedFusion().fit(scores, logits, labels, KINDS) for scores in (some, raw))
    strange = np.array([[8.0, 8.0, 0.0, 0.0]])
    score, expected = (part.combine(part.surprise(strange), SURE)[0] for part in (fusion, undisturbed))
    assert score == pytest.approx(expected, rel=0.2)
    clean = fusion.combine(fusion.surprise(some), np.repeat(SURE, 500, axis=0))
    assert np.isfinite(clean).all()
    assert set(np.argsort(clean)[-4:]) == set(range(4))
    assert score > np.median(clean)
    everything = CalibratedFusion().fit(np.full((500, 4), np.inf), logits, labels, KINDS)
    assert np.isfinite(everything.combine(everything.surprise(strange), SURE)).all()


def test_calibrated_fusion_of_an_older_version_is_the_root_mean_square_of_surprise():
    surprise = np.array([[3.0, 4.0], [0.0, 0.0], [1.0, 7.0], [5.0, 5.0]])
    older = {
        name: array
        for name, array in fitted_on(np.zeros((5, 2))).arrays().items()
        if name in ("knots", "levels", "scale", "shape")
    }
    combined = CalibratedFusion().restore(older).combine(surprise, np.zeros((4, 2)))
    np.testing.assert_allclose(combined, [np.sqrt(12.5), 0.0, 5.0, 5.0], rtol=1e-15)


def test_calibrated_fusion_combine_of_huge_surprise_stays_finite():
    fusion = fitted_on(np.random.default_rng(0).normal(size=(100, 2)))
    combined = fusion.combine(np.array([[1e11, 0.0], [1e30, 1e30]]), np.zeros((2, 2)))
    assert np.isfinite(combined).all()
    assert combined[1] > combined[0] > 10


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
    surprise, logits = fusion.surprise(raw), rng.normal(size=(200, 5))
    np.testing.assert_array_equal(restored.surprise(raw), surprise)
    np.testing.assert_array_equal(restored.combine(surprise, logits), fusion.combine(surprise, logits))
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
