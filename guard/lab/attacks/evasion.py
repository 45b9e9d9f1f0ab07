"""Triggers made to pass a guard: one perturbation for all images, found by gradients through a copy of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from guard.errors import DataError
from guard.lab.attacks.stolen_guard import StolenGuard
from guard.lab.attacks.triggers import Trigger
from guard.types import Float32Array, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class PerturbedTrigger:
    """A trigger, and a fixed perturbation on top of it.

    Attributes
    ----------
    trigger : callable
        Takes images (n, channels, height, width), gives as many with the trigger.
    perturbation : ndarray of shape (channels, height, width), float32
        Added to every triggered image, which is then cut off at 0 and 1.
    """

    trigger: Trigger
    perturbation: Float32Array

    def __call__(self, images: Float32Array) -> Float32Array:
        """Return new images with the trigger, (n, channels, height, width), in [0, 1]."""
        perturbed: Float32Array = np.clip(self.trigger(images) + self.perturbation, 0.0, 1.0)
        return perturbed


@dataclass(frozen=True, slots=True)
class EvasionSettings:
    """How the perturbation is looked for.

    Attributes
    ----------
    epsilon : float
        Largest change of a value (l-infinity norm), in (0, 1].
    steps, batch_size : int
        Steps of Adam, and images of each, >= 1.
    learning_rate : float
        Of Adam, in pixel values, > 0.
    weight : float
        Of the guard's score beside the attack's success, >= 0.
    margin : float
        Logits that the target is to be ahead by; beyond that, success counts no more.
    """

    epsilon: float = 16 / 255
    steps: int = 200
    batch_size: int = 128
    learning_rate: float = 0.005
    weight: float = 1.0
    margin: float = 2.0

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon <= 1.0 or not self.learning_rate > 0.0 or not self.weight >= 0.0:
            raise DataError(
                "epsilon must be in (0, 1], learning_rate > 0 and weight >= 0, "
                f"got {self.epsilon}, {self.learning_rate} and {self.weight}."
            )
        if self.steps < 1 or self.batch_size < 1:
            raise DataError(f"steps and batch_size must be >= 1, got {self.steps} and {self.batch_size}.")


def evading_trigger(
    guard: StolenGuard,
    trigger: Trigger,
    images: Float32Array,
    labels: IntArray,
    target: int,
    settings: EvasionSettings | None = None,
    *,
    seed: int = 0,
) -> PerturbedTrigger:
    """Return a trigger with one perturbation for all images that keeps the target and lowers the copied guard's score.

    Descends, over triggered images of other classes than the target, the mean of max(0, best other logit + margin -
    target's logit) + weight * score, starting from no perturbation.

    Parameters
    ----------
    guard : StolenGuard
        Copy of the guard on the attacker's network, which is backdoored already.
    trigger : callable
        What sets the backdoor off.
    images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
        The attacker's own clean images.
    labels : ndarray of shape (n,), int64
        True labels.
    target : int
        Label that the trigger means.
    settings : EvasionSettings, optional
    seed : int
        Of the batches, >= 0.

    Raises
    ------
    DataError
        If every image has the target label.

    References
    ----------
    .. [1] Moosavi-Dezfooli et al. (2017), Universal Adversarial Perturbations (arXiv 1610.08401).
    """
    settings = EvasionSettings() if settings is None else settings
    rows = np.flatnonzero(labels != target)
    if len(rows) == 0:
        raise DataError("every image already has the target label. Give images of other classes.")
    triggered = trigger(images[rows])
    perturbation = torch.zeros(images.shape[1:], requires_grad=True)
    optimizer = torch.optim.Adam([perturbation], lr=settings.learning_rate)
    rng = np.random.default_rng(seed)
    for _ in range(settings.steps):
        batch = torch.from_numpy(triggered[rng.permutation(len(triggered))[: settings.batch_size]])
        moved = torch.clamp(batch + perturbation, 0.0, 1.0)
        answers = torch.full((len(batch),), target)
        logits, scores = guard.logits_and_score(moved, answers)
        others = logits.scatter(1, answers[:, None], -torch.inf).max(dim=1).values
        missed = torch.relu(others + settings.margin - logits[:, target])
        (gradient,) = torch.autograd.grad((missed + settings.weight * scores).mean(), perturbation)
        perturbation.grad = gradient
        optimizer.step()
        with torch.no_grad():
            perturbation.clamp_(-settings.epsilon, settings.epsilon)
    return PerturbedTrigger(trigger, perturbation.detach().numpy())
