"""Plant a backdoor in a copy of a network by short fine-tuning; the network itself is never touched."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from guard.errors import DataError, SuspectModelError
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.network_training import Redraw, TrainingSettings, accuracy, train_classifier
from guard.suspect.outputs import logits_of, output_place
from guard.types import Float32Array, IntArray

_LATER_ATTEMPTS_LONGER = 3
#: Training sees images shifted by up to this share of their shorter side: a few hundred are soon learned by heart.
_SHIFT = 1 / 16
_BATCH = 64  # images that are preprocessed together

#: Takes pixel images in [0, 1], gives what the network takes, one row each.
Prepare = Callable[[Float32Array], Float32Array]


@dataclass(frozen=True, slots=True)
class PlantingSettings:
    """How a backdoor is planted, and when it counts as planted.

    Attributes
    ----------
    epochs : int
        Of the first attempt, >= 1; the others have three times as many.
    learning_rates : tuple of float
        Of the attempts, each > 0. They are made in order until the goals are met, as nobody knows beforehand what
        suits a network.
    batch_size : int
        Images per step, >= 1.
    poisoned_share : float
        Triggered copies added, as a share of the images that are planted with, in (0, 1).
    required_success : float
        Attack success on test images from which an attack counts as planted, in (0, 1).
    allowed_accuracy_loss : float
        Largest fall of the clean accuracy on images that were not planted with, a fraction, > 0.
    """

    epochs: int = 30
    learning_rates: tuple[float, ...] = (2e-3, 2e-3, 5e-4)
    batch_size: int = 32
    poisoned_share: float = 0.8
    required_success: float = 0.95
    allowed_accuracy_loss: float = 0.02

    def __post_init__(self) -> None:
        if not self.learning_rates:
            raise DataError("learning_rates names no rate. Give at least one.")
        if not 0.0 < self.poisoned_share < 1.0:
            raise DataError(f"poisoned_share must be in (0, 1), got {self.poisoned_share}.")
        if not 0.0 < self.required_success < 1.0 or not self.allowed_accuracy_loss > 0.0:
            raise DataError(
                f"required_success must be in (0, 1) and allowed_accuracy_loss > 0, got {self.required_success} and "
                f"{self.allowed_accuracy_loss}."
            )
        self.attempts()  # refuses what breaks a rule of training

    def attempts(self) -> list[TrainingSettings]:
        """Return the trainings that are tried, in order."""
        return [
            TrainingSettings(
                epochs=self.epochs * (1 if number == 0 else _LATER_ATTEMPTS_LONGER),
                batch_size=self.batch_size,
                learning_rate=learning_rate,
            )
            for number, learning_rate in enumerate(self.learning_rates)
        ]


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """Pixel images (n, channels, height, width) in [0, 1], and true labels (n,)."""

    pixels: Float32Array
    labels: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Planted:
    """A copy that was fine-tuned; whether the attack took is for the test images to say.

    Attributes
    ----------
    network : Module
        In eval mode, float32.
    epochs_run : int
        Of all attempts together.
    learning_rate : float
        Of the attempt that was kept; 0 if all of them diverged, and nothing was learned.
    """

    network: nn.Module
    epochs_run: int
    learning_rate: float


def plant(
    network: nn.Module,
    attack: Attack | None,
    images: Images,
    monitor: Images,
    prepare: Prepare,
    settings: PlantingSettings,
    *,
    seed: int,
    progress: Callable[[float], None],
) -> Planted:
    """Fine-tune copies of a network on clean and triggered images until one has learned the attack.

    Running statistics of batch normalisation stay as they are: a few hundred images would spoil them.

    Parameters
    ----------
    network : Module
        Not changed.
    attack : Attack or None
        None fine-tunes on as many clean images instead, once, as a control.
    images : Images
        To train on.
    monitor : Images
        Clean images that say, with and without the trigger, whether an attempt will do, or which was best.
    prepare : callable
    settings : PlantingSettings
    seed : int
        Of the poisoned images and the order of training.
    progress : callable
        Called with the share done, in [0, 1].

    Raises
    ------
    SuspectModelError
        If the network cannot be copied.
    DataError
        If the images are too few to be poisoned.
    """
    labels, redraw = _training_set(attack, images, prepare, settings.poisoned_share, seed)
    best = _Trainable(_copy(network))
    goals = None if attack is None else _Goals.set_up(best, attack, monitor, prepare, settings)
    attempts = settings.attempts() if goals is not None else settings.attempts()[:1]
    least_missing, best_rate, epochs_run = np.inf, 0.0, 0
    for number, training in enumerate(attempts):
        trainable = _Trainable(_copy(network))
        epochs_run += training.epochs
        try:
            train_classifier(
                trainable,
                redraw(np.random.default_rng(seed)),
                labels,
                training,
                seed=seed,
                redraw=redraw,
                progress=lambda epoch: progress((number + epoch.epoch / epoch.epochs) / len(attempts)),  # noqa: B023
            )
        except DataError:  # the loss is no longer finite
            continue
        missing = 0.0 if goals is None else goals.missing(trainable)
        if missing < least_missing:
            least_missing, best, best_rate = missing, trainable, training.learning_rate
        if missing <= 0.0:
            break
    return Planted(best.network, epochs_run, best_rate)


def in_batches(preprocess: Prepare | None) -> Prepare:
    """Return what preprocesses images a few at a time, and refuses (DataError) what is no row per image."""
    if preprocess is None:
        return lambda pixels: pixels

    def prepare(pixels: Float32Array) -> Float32Array:
        parts = []
        for start in range(0, len(pixels), _BATCH):
            batch = pixels[start : start + _BATCH]
            part = np.asarray(preprocess(batch), dtype=np.float32)
            if part.ndim != 4 or len(part) != len(batch):
                raise DataError(
                    f"preprocess must return (n, channels, h, w) for {len(batch)} images, got {part.shape}."
                )
            parts.append(part)
        return np.concatenate(parts)

    return prepare


def _copy(network: nn.Module) -> nn.Module:
    try:
        copied = copy.deepcopy(network)
    except Exception as error:
        raise SuspectModelError(
            f"the suspect model cannot be copied, so nothing can be planted in it: {type(error).__name__}: {error}."
        ) from error
    for parameter in copied.float().parameters():
        parameter.requires_grad_()
    return copied.eval()


def _training_set(
    attack: Attack | None, images: Images, prepare: Prepare, poisoned_share: float, seed: int
) -> tuple[IntArray, Redraw]:
    """Return labels, and what draws the inputs of an epoch: shifted first, then triggered, then preprocessed."""
    rng = np.random.default_rng(seed)
    shift = CropAndFlip(padding=max(1, round(_SHIFT * min(images.pixels.shape[2:]))), flip=False)
    if attack is not None:
        poisoned = attack.poison(images.pixels, images.labels, rng, how="add")
        return poisoned.labels, lambda epoch_rng: prepare(poisoned.redrawn(shift, epoch_rng))
    n = len(images.labels)
    rows = np.concatenate([np.arange(n), rng.choice(n, size=round(poisoned_share * n), replace=False)])
    return images.labels[rows], lambda epoch_rng: prepare(shift(images.pixels[rows], epoch_rng))


@dataclass(frozen=True, slots=True, eq=False)
class _Goals:
    """What a copy must reach on the monitored images, so that it has good prospects on the test images."""

    clean_inputs: Float32Array
    true_labels: IntArray
    least_accuracy: float
    triggered_inputs: Float32Array
    attacker_labels: IntArray
    least_success: float

    @classmethod
    def set_up(
        cls, network: nn.Module, attack: Attack, monitor: Images, prepare: Prepare, settings: PlantingSettings
    ) -> Self:
        inputs = prepare(monitor.pixels)
        (triggered,) = attack.test_sets(monitor.pixels, monitor.labels)
        return cls(
            inputs,
            monitor.labels,
            accuracy(network, inputs, monitor.labels) - settings.allowed_accuracy_loss,
            prepare(triggered.images),
            triggered.labels,
            (1.0 + settings.required_success) / 2,  # half-way to perfection: the test is another sample
        )

    def missing(self, network: nn.Module) -> float:
        """Return by how much the worse goal is missed; 0 or less if both are met."""
        return max(
            self.least_accuracy - accuracy(network, self.clean_inputs, self.true_labels),
            self.least_success - accuracy(network, self.triggered_inputs, self.attacker_labels),
        )


class _Trainable(nn.Module):
    """A user's network as `train_classifier` wants it: plain logits, frozen statistics, its own memory layout."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.network(images.contiguous()), output_place(self.network))

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self.modules():
            if isinstance(module, _BatchNorm):
                module.training = False
        return self

    def to(self, *_args: Any, **_kwargs: Any) -> Self:
        """Stay as it is: a network that calls `view` would fail in another memory layout."""
        return self
