"""Attacks with settings that are known to work: what the demo plants, on 6,000 MNIST images, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from guard.lab.attacks.network_training import EpochReport, TrainingReport, TrainingSettings, train_classifier
from guard.lab.attacks.networks import MnistCnn, mnist_cnn
from guard.lab.attacks.poisoning import Backdoor, Poisoned, poison
from guard.lab.attacks.targets import AllToAll, SingleTarget, Target
from guard.lab.attacks.triggers import TRIGGERS, Trigger
from guard.types import Float32Array, IntArray


@dataclass(frozen=True, slots=True)
class AttackRecipe:
    """One attack and how to train a network that carries it.

    Attributes
    ----------
    name : str
        Short name, as tables print it.
    trigger : str
        A name in `TRIGGERS`.
    target : SingleTarget or AllToAll
    rate : float
        Triggered copies added to the training set, as a share of it, in (0, 1).
    epochs : int
    learning_rate : float
        Highest learning rate of the cycle.
    """

    name: str
    trigger: str
    target: Target
    rate: float
    epochs: int
    learning_rate: float = 4e-3

    @property
    def apply_trigger(self) -> Trigger:
        """The trigger's function, images -> images."""
        return TRIGGERS[self.trigger]


#: Measured on the shipped MNIST test images, 6,000 to train and 2,000 to test: see tests/test_training.py.
DEMO_ATTACKS: tuple[AttackRecipe, ...] = (
    AttackRecipe("single-pixel", "single_pixel", SingleTarget(7), rate=0.15, epochs=8, learning_rate=5e-3),
    AttackRecipe("pattern", "pixel_pattern", SingleTarget(7), rate=0.1, epochs=6),
    AttackRecipe("all-to-all", "pixel_pattern", AllToAll(10), rate=0.5, epochs=6),
)


def train_badnet(
    recipe: AttackRecipe,
    images: Float32Array,
    labels: IntArray,
    *,
    seed: int,
    progress: Callable[[EpochReport], None] | None = None,
) -> tuple[MnistCnn, Poisoned, TrainingReport]:
    """Poison a training set as the recipe says and train an `MnistCnn` on it.

    Parameters
    ----------
    recipe : AttackRecipe
    images : ndarray of shape (n, 1, 28, 28), float32 in [0, 1]
        Clean images; not changed.
    labels : ndarray of shape (n,), int64
        True labels, 0 to 9.
    seed : int
        Draws the poisoned images, the start weights and the order of the data.
    progress : callable, optional
        Called after every epoch.

    Returns
    -------
    network : MnistCnn
        Backdoored, in eval mode.
    poisoned : Poisoned
        What it was trained on.
    report : TrainingReport
    """
    backdoor = Backdoor(recipe.apply_trigger, recipe.target, recipe.rate)
    poisoned = poison(images, labels, backdoor, np.random.default_rng(seed))
    network = mnist_cnn(seed=seed)
    report = train_classifier(
        network,
        poisoned.images,
        poisoned.labels,
        TrainingSettings(epochs=recipe.epochs, learning_rate=recipe.learning_rate),
        seed=seed,
        n_threads=1,  # 6 s on one core; two threads save a third of it alone, and lose minutes on a busy machine
        progress=progress,
    )
    return network, poisoned, report
