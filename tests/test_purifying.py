"""Do poisoned inputs have something in common? A trigger has; clean inputs that somebody called poisoned have not."""

from __future__ import annotations

import numpy as np
import pytest
from retrainer_helpers import fit_guard, world

from guard import Guard
from guard.retrainer.anomalies import recognise


@pytest.fixture(scope="module")
def fitted() -> Guard:
    return fit_guard()


@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("trigger", [0, 1])
def test_triggered_inputs_are_recognised_by_a_line_against_others(fitted, n, trigger):
    assert recognise(fitted, world(n, 5, trigger, 3.5)[0]).mean() > 0.5


@pytest.mark.parametrize("n", [10, 15, 60])
def test_most_suspicious_clean_inputs_are_mostly_not(fitted, n):
    clean = world(3000, 6)[0]
    rows = np.argsort(fitted.scores(clean).p_values, kind="stable")[:n]
    assert recognise(fitted, clean[rows]).mean() < 0.5


def test_single_input_shows_nothing(fitted):
    assert not recognise(fitted, world(1, 5, 0)[0]).any()
    assert recognise(fitted, fitted.reference[:0]).shape == (0,)
