"""A rate per class: groups and p-values by hand, the rate in a class that is harder, and guards that keep it so."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
from retrainer_helpers import fit_guard, world
from scipy.stats import betabinom

from guard import Guard, GuardConfig
from guard.detection.retraining import Labelled, retrain
from guard.errors import ConfigError, DataError
from guard.retrainer.movement import Movement
from guard.statistics.calibration import conformal_p_values
from guard.statistics.class_ranks import ClassRanks, class_groups
from guard.storage.bundle import read_bundle

PER_CLASS = {"false_positive_rate_scope": "class"}


def answers_of(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)


def bounds(n_clean: int, rate: float, n_fresh: int) -> tuple[float, float]:
    """Between these numbers of fresh images are flagged in 99.9 % of draws of clean and fresh images."""
    allowed = int(rate * (n_clean + 1) + 1e-9)
    low, high = betabinom(n_fresh, allowed, n_clean + 1 - allowed).ppf([0.0005, 0.9995])
    return float(low), float(high)


# --- groups and p-values by hand ---


@pytest.mark.parametrize(
    ("counts", "groups"),
    [
        ((19, 19, 40), [0, 1, 2]),  # 19 is enough for 0.05
        ((18, 30, 5, 40), [0, 1, 0, 2]),  # 18 and 5 share
        ((3, 30, 5, 40), [0, 0, 0, 1]),  # 8 together are too few: the rarest other joins them
        ((0, 30, 20), [0, 1, 0]),  # what is never answered needs a threshold as well
    ],
)
def test_class_groups_by_hand(counts, groups):
    np.testing.assert_array_equal(class_groups(answers_of(*counts), len(counts), 0.05), groups)


@pytest.mark.parametrize("counts", [(18, 18, 18), (5, 60), (0, 60)])
def test_class_groups_without_a_class_by_itself_are_refused_with_the_number_needed(counts):
    most = counts.index(max(counts))
    if counts == (18, 18, 18):
        most = 2
    told = f"at false_positive_rate=0.05 needs at least 19 clean images that .* class {most} has {max(counts)},"
    with pytest.raises(DataError, match=told):
        class_groups(answers_of(*counts), len(counts), 0.05)


def test_p_values_are_those_among_the_clean_scores_of_the_same_group():
    rng = np.random.default_rng(0)
    clean, answers = rng.normal(size=200), rng.integers(0, 4, 200)
    groups = np.array([1, 0, 2, 0])
    ranks = ClassRanks.among(clean, answers, groups)
    assert ranks.is_shared.tolist() == [False, True, False, True]
    scores, given = rng.normal(size=60), rng.integers(0, 4, 60)
    for score, answer, found in zip(scores, given, ranks.p_values(scores, given), strict=True):
        others = clean[groups[answers] == groups[answer]]
        assert found == conformal_p_values(np.array([score]), np.sort(others))[0]
    assert len(ranks.p_values(scores[:0], given[:0])) == 0


def test_rate_holds_in_every_class_where_one_is_harder():
    rng = np.random.default_rng(1)
    spread = np.array([1.0, 1.0, 3.0])  # of the scores of the classes
    answers, fresh = np.repeat(np.arange(3), 1000), np.repeat(np.arange(3), 2000)
    clean, scores = rng.normal(size=3000) * spread[answers], rng.normal(size=6000) * spread[fresh]
    ranks = ClassRanks.among(clean, answers, class_groups(answers, 3, 0.05))
    low, high = bounds(1000, 0.05, 2000)
    flagged = ranks.p_values(scores, fresh) <= 0.05
    assert [low <= flagged[fresh == label].sum() <= high for label in range(3)] == [True] * 3
    together = conformal_p_values(scores, np.sort(clean)) <= 0.05
    assert low <= together.sum() / 3 <= high
    assert together[fresh == 2].sum() > 1.5 * high  # so this one had many more


# --- guards ---


@pytest.fixture(scope="module")
def per_class() -> Guard:
    """Fitted with the scope, on made-up activations."""
    return fit_guard(false_positive_rate=0.03, false_positive_rate_scope="class")


def test_scope_of_all_is_what_it_was_bit_for_bit(fitted_guard, clean_activations):
    scores = fitted_guard.scores(clean_activations)
    assert fitted_guard.class_ranks is None
    np.testing.assert_array_equal(scores.p_values, conformal_p_values(scores.combined, fitted_guard.clean_scores))
    again = fitted_guard.with_config(**PER_CLASS).with_config(false_positive_rate_scope="all")
    np.testing.assert_array_equal(again.scores(clean_activations).p_values, scores.p_values)


@pytest.mark.parametrize("rate", [0.05, 0.1])
def test_guard_keeps_the_rate_in_every_class_of_held_out_images(fitted_guard, clean_activations, rate):
    guard = fitted_guard.with_config(false_positive_rate=rate, **PER_CLASS)
    answers, flagged = clean_activations.predicted_labels, guard.scores(clean_activations).is_poisoned
    calibrated = np.bincount(guard.clean_answers, minlength=10)
    for label in range(10):
        low, high = bounds(calibrated[label], rate, int((answers == label).sum()))
        assert low <= flagged[answers == label].sum() <= high


def test_scope_changes_p_values_alone_one_by_one_as_in_the_batch(fitted_guard, clean_activations, clean_split):
    guard = fitted_guard.with_config(**PER_CLASS)
    ours, theirs = guard.scores(clean_activations), fitted_guard.scores(clean_activations)
    np.testing.assert_array_equal(ours.combined, theirs.combined)
    assert (ours.p_values != theirs.p_values).any()
    for row in (0, 7, 300):
        assert guard.scores(clean_activations[row : row + 1]).p_values[0] == pytest.approx(ours.p_values[row], abs=0.02)
    flagged = [verdict for verdict in guard.decide(clean_activations) if verdict.is_poisoned]
    assert "of the clean images that its answer is compared with; strongest sign" in flagged[0].reason


def test_guard_is_kept_in_its_bundle_and_the_scope_may_be_changed_there(fitted_guard, clean_activations, tmp_path):
    guard = fitted_guard.with_config(**PER_CLASS)
    stored = read_bundle(guard.save(tmp_path / "class"))
    assert stored.document["settings"]["false_positive_rate_scope"] == "class"
    loaded = Guard.load(tmp_path / "class" / stored.digest)
    some = clean_activations[:200]
    np.testing.assert_array_equal(loaded.scores(some).p_values, guard.scores(some).p_values)
    usual = Guard.load(fitted_guard.save(tmp_path / "all"))
    assert usual.class_ranks is None
    np.testing.assert_array_equal(usual.with_config(**PER_CLASS).scores(some).p_values, guard.scores(some).p_values)


def test_rate_too_small_for_every_class_is_refused_as_a_setting_and_in_a_fit(fitted_guard):
    told = "false_positive_rate_scope='class' at false_positive_rate=0.005 needs at least 199 clean images"
    with pytest.raises(DataError, match=re.escape(told)):
        fitted_guard.with_config(false_positive_rate=0.005, **PER_CLASS)
    with pytest.raises(DataError, match="needs at least 19 clean images that the network answers with one class"):
        fit_guard(n=60, false_positive_rate_scope="class")


def test_bundle_of_a_version_that_kept_no_answers_is_refused_for_a_class(fitted_guard):
    older = dataclasses.replace(fitted_guard, clean_answers=None)
    with pytest.raises(ConfigError, match=r"this bundle is of a version that did not keep it\. Fit again"):
        older.with_config(**PER_CLASS)


def test_paper_mode_is_refused(fitted_guard):
    for settings in ({"mode": "paper", **PER_CLASS}, {"false_positive_rate_scope": "class", "mode": "paper"}):
        with pytest.raises(ConfigError, match=r"^false_positive_rate_scope 'class' goes with mode 'calibrated'"):
            GuardConfig(**settings)


def test_fit_realises_the_rate_in_the_classes_it_was_asked_for(per_class):
    """Each fold is ranked among some 50 others of its class, of which 1 in 51 is the most that 0.03 allows."""
    usual = fit_guard(false_positive_rate=0.03)
    np.testing.assert_array_equal(usual.clean_scores, per_class.clean_scores)
    answers = np.sort(per_class.reference.predicted_labels)
    np.testing.assert_array_equal(np.sort(per_class.clean_answers), answers)
    assert 0.01 < per_class.realised_false_positive_rate < 0.025 < usual.realised_false_positive_rate < 0.035


def test_retrained_guard_keeps_the_scope(per_class):
    poisoned, labels = world(30, seed=3, trigger=1)
    better = retrain(per_class, Labelled(poisoned, labels, np.ones(30, dtype=bool)))
    assert better.class_ranks is not None
    np.testing.assert_array_equal(better.class_ranks.groups, per_class.class_ranks.groups)
    expected = better.class_ranks.p_values(better.scores(poisoned).combined, poisoned.predicted_labels)
    np.testing.assert_array_equal(better.scores(poisoned).p_values, expected)


def test_movement_far_beyond_all_clean_images_is_seen_in_any_scope(per_class):
    """A p-value among few clean images of a class is never as small as one among all of them."""
    poisoned, _ = world(200, seed=4, trigger=1, strength=20.0)
    blind = dataclasses.replace(per_class, clean_scores=per_class.clean_scores + 1e6)
    assert Movement.between(per_class, blind, poisoned, far_only=True).lost.sum() > 100
