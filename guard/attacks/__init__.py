"""Backdoor attacks to measure the guard with: triggers, poisoning, training, and recipes known to work."""

from guard.attacks.networks import MnistCnn, mnist_cnn
from guard.attacks.poisoning import AllToAll, Poisoned, SingleTarget, Target, poison, poisoned_test_set
from guard.attacks.recipes import DEMO_ATTACKS, AttackRecipe, train_badnet
from guard.attacks.training import EpochReport, Goal, TrainingReport, accuracy, predict_labels, train_classifier
from guard.attacks.triggers import CORNER_PATTERN, TRIGGERS, Trigger, pixel_pattern, single_pixel

__all__ = [
    "CORNER_PATTERN",
    "DEMO_ATTACKS",
    "TRIGGERS",
    "AllToAll",
    "AttackRecipe",
    "EpochReport",
    "Goal",
    "MnistCnn",
    "Poisoned",
    "SingleTarget",
    "Target",
    "TrainingReport",
    "Trigger",
    "accuracy",
    "mnist_cnn",
    "pixel_pattern",
    "poison",
    "poisoned_test_set",
    "predict_labels",
    "single_pixel",
    "train_badnet",
    "train_classifier",
]
