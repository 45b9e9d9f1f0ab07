"""Do poisoned inputs have something in common? A trigger has; clean inputs that somebody called poisoned have not."""

from __future__ import annotations

import numpy as np
import pytest
from retrainer_helpers import fit_guard, world

from guard import Guard
from guard.retrainer.standing import stand_together


@pytest.fixture(scope="module")
def fitted() -> Guard:
    return fit_guard()


@pytest.mark.parametrize("n", [10, 60])
@pytest.mark.parametrize("trigger", [0, 1])
def test_triggered_inputs_stand_together(fitted, n, trigger):
    assert stand_together(fitted.reference, world(n, 5, trigger, 3.5)[0])


@pytest.mark.parametrize("n", [10, 15, 60])
def test_most_suspicious_clean_inputs_do_not_stand_together(fitted, n):
    clean = world(3000, 6)[0]
    rows = np.argsort(fitted.scores(clean).p_values, kind="stable")[:n]
    assert not stand_together(fitted.reference, clean[rows])


def test_single_input_shows_nothing(fitted):
    assert not stand_together(fitted.reference, world(1, 5, 0)[0])
    assert not stand_together(fitted.reference, fitted.reference[:0])
