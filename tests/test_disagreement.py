"""Graded disagreement: by hand, against the published yes/no, and against probabilities."""

from __future__ import annotations

import numpy as np
import pytest

from guard import Activations
from guard.detection.detectors.disagreement import HeadDisagreement, disagreement
from guard.detection.heads.decision_head import DecisionHead
from guard.errors import DataError, NotFittedError


@pytest.fixture(scope="module")
def clean():
    rng = np.random.default_rng(0)
    labels = np.arange(150) % 3
    features = (rng.normal(0, 4, (3, 6))[labels] + rng.normal(size=(150, 6))).astype(np.float32)
    return Activations(np.eye(3, dtype=np.float32)[labels], features, {"early": features[:, :4].copy()}), labels


def test_disagreement_by_hand():
    logits = np.array([[1, 3, 2], [1, 3, 2], [1, 3, 2], [5, 5, 0]], dtype=np.float32)
    np.testing.assert_array_equal(disagreement(logits, np.array([0, 1, 2, 0])), [2.0, -1.0, 1.0, 0.0])


def test_disagreement_is_the_log_ratio_of_probabilities():
    logits = np.random.default_rng(0).normal(0, 3, (50, 4)).astype(np.float32)
    labels = np.arange(50) % 4
    chances = np.exp(logits.astype(np.float64))
    chances /= chances.sum(axis=1, keepdims=True)
    selected = chances[np.arange(50), labels]
    chances[np.arange(50), labels] = 0
    expected = np.log(chances.max(axis=1) / selected)
    np.testing.assert_allclose(disagreement(logits, labels), expected, rtol=1e-9)


def test_disagreement_is_above_0_exactly_where_the_head_answers_otherwise():
    logits = np.random.default_rng(1).normal(size=(500, 5)).astype(np.float32)
    labels = np.random.default_rng(2).integers(0, 5, 500)
    np.testing.assert_array_equal(disagreement(logits, labels) > 0, logits.argmax(axis=1) != labels)


def test_disagreement_leaves_the_logits_alone_and_is_float64():
    logits = np.ones((2, 3), dtype=np.float32)
    assert disagreement(logits, np.array([0, 1])).dtype == np.float64
    np.testing.assert_array_equal(logits, 1)


def test_head_disagreement_score_follows_the_suspects_answer(clean):
    activations, labels = clean
    detector = HeadDisagreement().fit(activations, labels)
    assert (detector.score(activations) < 0).all()
    lying = Activations(np.roll(activations.logits, 1, axis=1), activations.features, activations.depths)
    assert (detector.score(lying) > 0).all()


def test_head_disagreement_is_its_head_at_its_depth(clean):
    activations, labels = clean
    detector = HeadDisagreement(depth="early", feature_noise_std=0.2, seed=3).fit(activations, labels)
    head = DecisionHead(noise_std=0.2, seed=3).fit(activations.depths["early"], labels, 3)
    np.testing.assert_array_equal(detector.logits(activations), head.logits(activations.depths["early"]))
    expected = disagreement(head.logits(activations.depths["early"]), activations.predicted_labels)
    np.testing.assert_array_equal(detector.score(activations), expected)


def test_head_disagreement_fit_twice_forgets_the_first(clean):
    activations, labels = clean
    detector = HeadDisagreement().fit(activations, (labels + 1) % 3)
    fresh = HeadDisagreement().fit(activations, labels)
    np.testing.assert_array_equal(detector.fit(activations, labels).score(activations), fresh.score(activations))


@pytest.mark.parametrize("columns", [2, 4])
def test_head_disagreement_other_number_of_classes_is_refused(clean, columns):
    activations, labels = clean
    detector = HeadDisagreement().fit(activations, labels)
    logits = np.zeros((150, columns), dtype=np.float32)
    with pytest.raises(
        DataError, match=rf"^logits have {columns} columns, fit saw 3\. Is it the same suspect model\?$"
    ):
        detector.score(Activations(logits, activations.features))


def test_head_disagreement_unknown_depth_is_refused(clean):
    with pytest.raises(DataError, match=r"^there is no depth 'late': known are \['features', 'early'\]\.$"):
        HeadDisagreement(depth="late").fit(*clean)


def test_head_disagreement_unfitted_raises_not_fitted_error(clean):
    with pytest.raises(NotFittedError, match="is not fitted"):
        HeadDisagreement().score(clean[0])
