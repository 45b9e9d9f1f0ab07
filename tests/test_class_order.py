"""Answers of a network against labels: right, guessed, or right in another order of the classes."""

from __future__ import annotations

import numpy as np
import pytest

from guard.statistics.class_order import class_order

LABELS = np.arange(600) % 6


def answers(share_right: float, order: list[int] | None = None, seed: int = 0) -> np.ndarray:
    """Return answers of which a share is right, where output j stands for the label order[j]."""
    rng = np.random.default_rng(seed)
    outputs = np.argsort(order or list(range(6)))[LABELS]
    wrong = rng.random(600) >= share_right
    return np.where(wrong, rng.integers(0, 6, 600), outputs)


@pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
def test_network_that_is_right_is_sound_however_poor(share):
    found = class_order(answers(share), LABELS, 6)
    assert found.is_sound
    assert found.right == pytest.approx(share + (1 - share) / 6, abs=0.05)


def test_order_is_found_and_names_the_label_of_every_output():
    order = [3, 0, 1, 2, 5, 4]
    found = class_order(answers(0.9, order), LABELS, 6)
    assert found.order == tuple(order)
    assert not found.is_sound
    assert found.right_in_order > 0.85 > 0.2 > found.right


def test_guessing_is_chance_and_suggests_no_order():
    found = class_order(answers(0.0), LABELS, 6)
    assert (found.is_chance, found.order) == (True, None)
    one_answer = class_order(np.full(600, 2), LABELS, 6)
    assert (one_answer.is_chance, one_answer.order) == (True, None)


def test_most_frequent_label_alone_is_guessing_and_two_swapped_classes_are_an_order():
    labels = np.repeat([0, 1], [540, 60])
    assert class_order(np.zeros(600, dtype=np.int64), labels, 2).is_chance
    assert class_order(labels, labels, 2).is_sound
    even = np.arange(600) % 2
    assert class_order(1 - even, even, 2).order == (1, 0)
    assert class_order(even, even, 3).is_sound  # a class without images
