"""Make images hard to learn before they get their trigger: projected gradient ascent against a surrogate network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from guard.errors import DataError
from guard.suspect.recording import device_of
from guard.types import Float32Array, IntArray


@dataclass(frozen=True, slots=True)
class PgdPerturbation:
    """Moves images, by at most epsilon per value, to where a network is wrong about them; fit for `Backdoor.perturb`.

    Starts at a random place in the box around each image, and goes up the gradient of the cross-entropy on the true
    labels. The same images, seed and weights give the same result again; torch's global random state is not used. The
    network works in eval mode; its modes, weights and gradients are afterwards as they were. Of a network in training
    it takes the weights of the moment.

    Attributes
    ----------
    network : nn.Module
        The attacker's own network: takes float32 (n, channels, height, width) in [0, 1], gives logits (n, n_classes).
    epsilon : float
        Largest change of a value (l-infinity norm), in (0, 1].
    step : float
        Change of a value per step, > 0.
    steps : int
        How many, >= 1.
    seed : int
        Of the random start, >= 0.
    batch_size : int
        Images per pass, >= 1; without influence on the result, but for rounding.

    Raises
    ------
    DataError
        If a parameter breaks a rule.

    References
    ----------
    .. [1] Madry et al. (2018), Towards Deep Learning Models Resistant to Adversarial Attacks (arXiv 1706.06083),
       section 2.1: projected gradient descent, here upwards.
    .. [2] Turner, Tsipras, Madry (2019), Label-Consistent Backdoor Attacks (arXiv 1912.02771): what it is for.
    """

    network: nn.Module
    epsilon: float = 8 / 255
    step: float = 2 / 255
    steps: int = 10
    seed: int = 0
    batch_size: int = 250

    def __post_init__(self) -> None:
        if not 0.0 < self.epsilon <= 1.0 or not self.step > 0.0:
            raise DataError(f"epsilon must be in (0, 1] and step > 0, got {self.epsilon} and {self.step}.")
        if self.steps < 1 or self.batch_size < 1 or self.seed < 0:
            raise DataError(
                "steps and batch_size must be >= 1, and seed >= 0, "
                f"got {self.steps}, {self.batch_size} and {self.seed}."
            )

    def __call__(self, images: Float32Array, labels: IntArray) -> Float32Array:
        """Return new images in [0, 1]; DataError if a label is none of the network's."""
        device = device_of(self.network)
        rng = np.random.default_rng(self.seed)
        modes = {module: module.training for module in self.network.modules()}
        self.network.eval()
        perturbed = np.empty_like(images)
        try:
            for first in range(0, len(images), self.batch_size):
                rows = slice(first, first + self.batch_size)
                start = rng.uniform(-self.epsilon, self.epsilon, images[rows].shape).astype(np.float32)
                arrays = (images[rows].copy(), labels[rows].copy(), start)  # copies: torch warns of read-only memory
                x, y, away = (torch.from_numpy(array).to(device) for array in arrays)
                moved = torch.clamp(x + away, 0.0, 1.0)
                for _ in range(self.steps):
                    moved = moved + self.step * _ascent(self.network, moved, y).sign()
                    moved = torch.clamp(torch.clamp(moved, x - self.epsilon, x + self.epsilon), 0.0, 1.0)
                perturbed[rows] = moved.cpu().numpy()
        finally:
            for module, mode in modes.items():
                module.training = mode
        return perturbed

    def describe(self) -> dict[str, Any]:
        """Return the parameters, but for the network, ready for JSON."""
        return {"kind": "pgd", "epsilon": self.epsilon, "step": self.step, "steps": self.steps, "seed": self.seed}


def _ascent(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient of the cross-entropy by the images, (n, channels, height, width)."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = network(images)
        if labels.max() >= logits.shape[1]:
            raise DataError(f"labels must be below {logits.shape[1]}, as the network has it, got {int(labels.max())}.")
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")  # each image's gradient is its own
        (gradient,) = torch.autograd.grad(loss, images)
    return gradient
