"""Backdoor attacks to measure the guard with: triggers, poisoning, training, and recipes known to work."""

from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.catalogue import ATTACKS, label_consistent, make_attack
from guard.lab.attacks.network_training import (
    EpochReport,
    Goal,
    TrainingReport,
    TrainingSettings,
    accuracy,
    predict_labels,
    train_classifier,
)
from guard.lab.attacks.networks import NETWORKS, MnistCnn, mnist_cnn
from guard.lab.attacks.perturbation import PgdPerturbation
from guard.lab.attacks.poisoning import Backdoor, Cover, Poisoned, poison, poisoned_test_set
from guard.lab.attacks.recipes import DEMO_ATTACKS, AttackRecipe, train_badnet
from guard.lab.attacks.targets import AllToAll, SingleTarget, SourceSpecific, Target
from guard.lab.attacks.triggers import (
    CORNER_PATTERN,
    TRIGGERS,
    NamedTrigger,
    Trigger,
    make_trigger,
    pixel_pattern,
    single_pixel,
)

__all__ = [
    "ATTACKS",
    "CORNER_PATTERN",
    "DEMO_ATTACKS",
    "NETWORKS",
    "TRIGGERS",
    "AllToAll",
    "Attack",
    "AttackRecipe",
    "Backdoor",
    "Cover",
    "CropAndFlip",
    "EpochReport",
    "Goal",
    "MnistCnn",
    "NamedTrigger",
    "PgdPerturbation",
    "Poisoned",
    "SingleTarget",
    "SourceSpecific",
    "Target",
    "TrainingReport",
    "TrainingSettings",
    "Trigger",
    "accuracy",
    "label_consistent",
    "make_attack",
    "make_trigger",
    "mnist_cnn",
    "pixel_pattern",
    "poison",
    "poisoned_test_set",
    "predict_labels",
    "single_pixel",
    "train_badnet",
    "train_classifier",
]
