"""The demarcation: a line between anomalies and clean inputs, and a guard that has one."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from retrainer_helpers import fit_guard, world

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors.base import NO_LABEL
from guard.detection.detectors.demarcation import Demarcation
from guard.detection.ensemble import Ensemble
from guard.detection.retraining import Labelled, retrain
from guard.errors import DataError, NotFittedError
from guard.retrainer.anomalies import purify

STRONG = 4.0


@pytest.fixture(scope="module")
def guard():
    return fit_guard()


@pytest.fixture(scope="module")
def anomalies():
    return world(30, 5, 0, STRONG)[0]


@pytest.fixture(scope="module")
def retrained(guard, anomalies):
    clean = world(2, 1)[0]
    nothing = Labelled(clean[:0], np.zeros(0, dtype=int), np.zeros(0, dtype=bool))
    return retrain(guard, nothing, anomalies=anomalies)


def fitted(line, clean, anomalies):
    labels = np.r_[np.zeros(len(clean), dtype=int), np.full(len(anomalies), NO_LABEL)]
    return line.fit(Activations.concatenate([clean, anomalies]), labels)


def plane(n, shift, seed):
    features = np.random.default_rng(seed).normal(0, 1, (n, 3)).astype(np.float32)
    features[:, 0] += shift
    return Activations(np.zeros((n, 2), dtype=np.float32), features)


def test_demarcation_points_from_clean_to_anomalies_and_is_zero_in_the_middle():
    line = fitted(Demarcation(), plane(400, 0, 0), plane(40, 6, 1))
    assert line.weights_[0] > 2 * np.abs(line.weights_[1:]).max()
    middle = Activations(np.zeros((1, 2), dtype=np.float32), np.array([[3, 0, 0]], dtype=np.float32))
    assert abs(line.score(middle)[0]) < 0.5
    assert (line.score(plane(50, 6, 2)) > 0).mean() > 0.9
    assert (line.score(plane(50, 0, 3)) < 0).mean() > 0.9


def test_demarcation_roundtrip_scores_equal(anomalies):
    line = fitted(Demarcation(depth="early", softness=0.1), world(100, 0)[0], anomalies)
    again = Demarcation.from_state(line.state(), depth="early", softness=0.1)
    np.testing.assert_array_equal(line.score(anomalies), again.score(anomalies))


def test_demarcation_bad_input_is_refused(anomalies):
    clean = world(20, 0)[0]
    with pytest.raises(DataError, match=r"^a line needs inputs on both sides, got 20 clean, 0 anomalies\.$"):
        fitted(Demarcation(), clean, anomalies[:0])
    with pytest.raises(NotFittedError, match=r"^Demarcation is not fitted\."):
        Demarcation().score(clean)
    damaged = dataclasses.replace(clean, features=np.full_like(clean.features, np.nan))
    with pytest.raises(DataError, match=r"^features must be finite"):
        fitted(Demarcation(), clean, damaged)
    with pytest.raises(DataError, match=r"^features have 11 columns, fit saw 12\."):
        fitted(Demarcation(), clean, anomalies).score(dataclasses.replace(clean, features=clean.features[:, 1:]))


def test_a_guard_without_anomalies_has_no_demarcation(guard):
    assert not any(name.startswith("demarcation") for name in guard.ensemble.names)
    assert Ensemble.for_mode(GuardConfig(mode="paper"), (), with_anomalies=True).names == (
        "lof:norms",
        "disagreement:features",
    )


def test_a_guard_with_anomalies_finds_more_of_the_kind_at_the_same_rate(guard, retrained):
    poisoned, clean = world(500, 77, 0, STRONG)[0], world(2000, 78)[0]
    assert retrained.ensemble.names == (*guard.ensemble.names, "demarcation:features")
    found, before = (entry.scores(poisoned).is_poisoned.mean() for entry in (retrained, guard))
    assert found > before + 0.1
    assert found > 0.9
    assert retrained.scores(clean).is_poisoned.mean() < 0.08


def test_a_guard_with_a_demarcation_survives_its_bundle(retrained, tmp_path):
    again = Guard.load(retrained.save(tmp_path))
    activations = world(50, 3, 1)[0]
    np.testing.assert_array_equal(again.scores(activations).combined, retrained.scores(activations).combined)
    assert json.loads(json.dumps(again.ensemble.describe())) == retrained.ensemble.describe()


def test_retrain_anomalies_of_another_network_are_refused(guard, anomalies):
    nothing = Labelled(anomalies[:0], np.zeros(0, dtype=int), np.zeros(0, dtype=bool))
    narrow = dataclasses.replace(anomalies, features=anomalies.features[:, 1:])
    with pytest.raises(DataError, match=r"^features of labelled inputs have 11 columns"):
        retrain(guard, nothing, anomalies=narrow)


def test_purify_keeps_most_of_the_poisoned_and_half_of_the_false_alarms(guard):
    clean, poisoned = world(8000, 31)[0], world(400, 32, 1, STRONG)[0]
    shares = []
    for entry in (guard, fit_guard(seed=1), fit_guard(seed=2)):  # one draw of clean images says it within a tenth only
        flagged = clean[entry.scores(clean).is_poisoned], poisoned[entry.scores(poisoned).is_poisoned]
        shares.append([purify(entry, part).mean() for part in flagged])
    false_alarms, hits = np.mean(shares, axis=0)
    assert hits > 0.7
    assert 0.4 < false_alarms < 0.6
    assert purify(guard, clean[:0]).shape == (0,)
