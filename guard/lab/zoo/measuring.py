"""Measure a model of the zoo: clean accuracy, attack success of every trigger, and of every control."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from guard.lab.attacks.attack import Attack
from guard.lab.attacks.network_training import accuracy, predict_labels
from guard.lab.zoo.splits import LabelledImages
from guard.statistics.evaluation import attack_success_rate


@dataclass(frozen=True, slots=True)
class Measured:
    """Rates on test images, fractions.

    Attributes
    ----------
    clean_accuracy : float
    attack_success : tuple of float
        One per backdoor; empty for a benign model.
    control_success : tuple of float
        One per control, which should be near what a benign model does by mistake.
    """

    clean_accuracy: float
    attack_success: tuple[float, ...] = ()
    control_success: tuple[float, ...] = ()


def measure(network: nn.Module, attack: Attack | None, test: LabelledImages) -> Measured:
    """Return what a network in eval mode does with clean and with triggered test images."""
    clean = accuracy(network, test.images, test.labels)
    if attack is None:
        return Measured(clean)
    rates = [
        tuple(
            attack_success_rate(predict_labels(network, test_set.images), test_set.labels, test_set.true_labels)
            for test_set in triggered
        )
        for triggered in (attack.test_sets(test.images, test.labels), attack.control_sets(test.images, test.labels))
    ]
    return Measured(clean, *rates)
