"""What all rivals share: the contract, and networks that count the images that pass through them."""

from __future__ import annotations

import abc
import math
from typing import ClassVar, NamedTuple, Self, final

import numpy as np
from scipy.special import softmax
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from guard.backups.backup_training import copy_network, predict_logits
from guard.backups.clean_set import check_images
from guard.detection.training_set import check_labels
from guard.errors import DataError, NotFittedError
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, Float64Array, IntArray

_BATCH = 64  # rows of a forward pass: on one core 1.4 to 1.8 times faster than 256, whose maps fit no cache


class CountedNetwork:
    """A copy of a network, in eval mode, that counts the images that pass through it, whoever sends them.

    Parameters
    ----------
    module : Module
        Not changed, and never run.

    Attributes
    ----------
    module : Module
        The copy; what is done to it counts for the copy alone.
    rows : int
        Images that have passed so far.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = copy_network(module)
        self.rows = 0
        self.module.register_forward_pre_hook(self._count)

    def _count(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.rows += len(args[0])

    def logits(self, images: Float32Array) -> Float64Array:
        """Return logits of shape (n, n_classes), float64."""
        return predict_logits(self.module, images, _BATCH).astype(np.float64)

    def probabilities(self, images: Float32Array) -> Float64Array:
        """Return the softmax of the logits, shape (n, n_classes), float64."""
        probabilities: Float64Array = softmax(self.logits(images), axis=1)
        return probabilities


class Rival(abc.ABC):
    """A published detector of triggered inputs, in the one form in which all of them are compared.

    It is fitted on clean images and true labels, never on poisoned ones, and works on copies of the suspect model. The
    same seed, network and images give the same scores, and the score of an image does not depend on its batch. A rival
    is a class with `_fit` and `_score`, and one line in `guard.lab.rivals.RIVALS`.

    Parameters
    ----------
    seed : int
        Of all that is drawn, >= 0.

    Attributes
    ----------
    title, source : str
        For tables: the name, and authors, year and number of the paper.
    network : CountedNetwork
        Copy of the suspect model; there after `fit`.
    n_classes : int
    """

    title: ClassVar[str]
    source: ClassVar[str]
    network: CountedNetwork
    n_classes: int

    def __init__(self, *, seed: int = 0) -> None:
        if seed < 0:
            raise DataError(f"seed must be >= 0, got {seed}.")
        self.seed = seed
        self._networks: list[CountedNetwork] = []
        self._shape: tuple[int, ...] | None = None
        self._scored = 0

    @final
    def fit(self, suspect: SuspectModel, images: Float32Array, labels: IntArray) -> Self:
        """Learn from clean images.

        Parameters
        ----------
        suspect : SuspectModel
            Takes pixels in [0, 1], as the networks of the zoo do; not changed.
        images : ndarray of shape (n, channels, height, width), float32 in [0, 1]
            Clean, and not among those that the suspect model was trained on.
        labels : ndarray of shape (n,), int
            True labels.

        Raises
        ------
        DataError
            If images or labels break a rule.
        NotApplicableError
            If this detector has no meaning for such a network.
        SuspectModelError
            If the network cannot be copied or run.
        """
        _check_pixels(images)
        self._networks, self._shape = [], None
        self.network = self.counted(suspect.module)
        self.n_classes = self.network.logits(images[:1]).shape[1]
        self._fit(images, check_labels(labels, len(images), self.n_classes, "labels", "image"))
        self._shape, self._scored = images.shape[1:], 0
        for network in self._networks:
            network.rows = 0
        return self

    @final
    def score(self, images: Float32Array) -> Float64Array:
        """Return one score per image, shape (n,), float64; higher = more suspicious, infinite where none can be had.

        Parameters
        ----------
        images : ndarray of shape (n, channels, height, width), float32 in [0, 1]

        Raises
        ------
        NotFittedError
            Before `fit`.
        DataError
            If the images break a rule, or are of another shape than those of `fit`.
        """
        if self._shape is None:
            raise NotFittedError(f"{self.title} was not fitted. Call fit(suspect, images, labels) first.")
        _check_pixels(images)
        if images.shape[1:] != self._shape:
            raise DataError(f"images must have shape (n, {', '.join(map(str, self._shape))}), got {images.shape}.")
        scores = self._score(images)
        self._scored += len(images)
        return np.where(np.isnan(scores), np.inf, scores)

    @property
    def passes(self) -> float:
        """Forward passes per image scored since `fit`, of all networks together, as they were counted; NaN of none.

        The answer to the image itself is among them only where the score needs it: STRIP's does not.
        """
        rows = sum(network.rows for network in self._networks)
        return rows / self._scored if self._scored else float("nan")

    def counted(self, module: nn.Module) -> CountedNetwork:
        """Return a copy of a network whose passes count as the rival's."""
        network = CountedNetwork(module)
        self._networks.append(network)
        return network

    @abc.abstractmethod
    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        """Learn from clean images (n, channels, height, width) and true labels (n,), both checked."""

    @abc.abstractmethod
    def _score(self, images: Float32Array) -> Float64Array:
        """Return one score per image, shape (n,), of images that were checked."""


class Layer(NamedTuple):
    """A layer without layers inside, as it ran.

    Attributes
    ----------
    name : str
        In its network.
    module : Module
    shape : tuple of int
        Of its output for one image; () if that is no tensor.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Pixels or tokens of a feature map with one row per image; 1 of a vector, 0 of anything else."""
        if self.shape[:1] != (1,) or len(self.shape) not in (2, 3, 4):
            return 0
        return math.prod(self.shape[2:]) if len(self.shape) != 3 else self.shape[1]


def executed_layers(network: CountedNetwork, image: Float32Array) -> list[Layer]:
    """Return the innermost layers in the order in which they run, each once, where it runs last.

    Parameters
    ----------
    network : CountedNetwork
    image : ndarray of shape (1, channels, height, width), float32
    """
    found: dict[str, Layer] = {}

    def note(name: str, module: nn.Module, output: object) -> None:
        found.pop(name, None)
        found[name] = Layer(name, module, tuple(output.shape) if isinstance(output, Tensor) else ())

    handles = [
        module.register_forward_hook(lambda module, _args, output, name=name: note(name, module, output))
        for name, module in network.module.named_modules()
        if name and next(module.children(), None) is None
    ]
    try:
        network.logits(image)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())


def weighted_layers(layers: list[Layer]) -> list[Layer]:
    """Return the convolutions and the fully connected layers among them."""
    return [layer for layer in layers if isinstance(layer.module, _ConvNd | nn.Linear)]


def _check_pixels(images: Float32Array) -> None:
    check_images(images)
    if images.min() < 0.0 or images.max() > 1.0:
        raise DataError(f"images must be pixels in [0, 1], got {images.min():g} to {images.max():g}. Rescale them.")
