"""Probabilities of answers, and the temperature that clean images tell."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax

from guard.statistics.confidence import confidence, fit_temperature


def test_confidence_by_hand():
    logits = np.log(np.array([[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]))
    np.testing.assert_allclose(confidence(logits, 1.0), [0.75, 0.5, 0.9], rtol=1e-12)
    np.testing.assert_allclose(confidence(logits, 0.5), [0.9, 0.5, 81 / 82], rtol=1e-12)


def test_confidence_of_huge_logits_stays_in_bounds():
    np.testing.assert_array_equal(confidence(np.float32([[1e30, 0.0, -1e30]]), 1e-6), [1.0])
    np.testing.assert_allclose(confidence(np.float32([[1e30, 1e30, 1e30]]), 1e6), [1 / 3])


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_fit_temperature_finds_the_one_that_labels_were_drawn_with(temperature):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (20_000, 5))
    chances = softmax(logits / temperature, axis=1)
    labels = (chances.cumsum(axis=1) < rng.random((20_000, 1))).sum(axis=1)
    assert fit_temperature(logits, labels) == pytest.approx(temperature, rel=0.05)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_fit_temperature_is_in_the_unit_of_the_logits(unit):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(300, 4)), rng.integers(0, 4, 300)
    logits[np.arange(300), labels] += 1.0
    np.testing.assert_allclose(
        fit_temperature(logits * unit, labels), unit * fit_temperature(logits, labels), rtol=1e-3
    )


def test_fit_temperature_of_answers_that_are_all_right_is_small_and_above_zero():
    logits = 5.0 * np.eye(3)[np.arange(30) % 3] + np.random.default_rng(0).normal(size=(30, 3))
    temperature = fit_temperature(logits, np.arange(30) % 3)
    assert temperature > 0
    assert confidence(logits, temperature).min() > 0.99


def test_fit_temperature_of_logits_that_are_all_the_same_is_above_zero():
    temperature = fit_temperature(np.zeros((10, 3)), np.arange(10) % 3)
    assert temperature > 0
    np.testing.assert_allclose(confidence(np.zeros((1, 3)), temperature), [1 / 3])
