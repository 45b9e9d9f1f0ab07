"""Strong augmentation for small clean sets: moved, turned, dimmed, partly covered and noisy copies of a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from guard.errors import DataError


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may happen to an image that a backup learns from; zero switches a part off.

    Works on what the network takes, after any preprocessing, so strengths are relative to the spread of the batch.

    Attributes
    ----------
    rotation : float
        Largest angle either way, in degrees.
    scale : float
        Largest relative change of size, a fraction.
    shift : float
        Largest shift either way, as a share of the side.
    contrast : float
        Largest relative change of contrast and of brightness, a fraction.
    erase : float
        Chance that a rectangle of 2 to 20 % of the area is covered by one colour: teaches not to trust one place.
    noise : float
        Gaussian noise, in standard deviations of the batch.
    flip : bool
        Mirror half of the images left and right. Not for digits or signs.
    """

    rotation: float = 10.0
    scale: float = 0.1
    shift: float = 0.08
    contrast: float = 0.3
    erase: float = 0.5
    noise: float = 0.1
    flip: bool = False

    def __post_init__(self) -> None:
        for name in ("rotation", "scale", "shift", "contrast", "erase", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0.0):
                raise DataError(f"{name} must be >= 0, got {value}.")
        for name in ("scale", "shift", "contrast", "erase"):
            if getattr(self, name) > 1.0:
                raise DataError(f"{name} must be in [0, 1], got {getattr(self, name)}.")

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return new images of the same shape, (n, channels, height, width); random numbers are drawn on the CPU."""
        n, device = len(images), images.device

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator) * 2 - 1  # in [-1, 1)

        angle = uniform(n) * math.radians(self.rotation)
        size = 1.0 + uniform(n) * self.scale
        shift = uniform(n, 2) * 2 * self.shift  # affine_grid counts the side as 2
        mirror = torch.where(uniform(n) < 0, -1.0, 1.0) if self.flip else torch.ones(n)
        turn = torch.stack(
            [
                torch.stack([mirror * angle.cos() / size, -angle.sin() / size, shift[:, 0]], 1),
                torch.stack([mirror * angle.sin() / size, angle.cos() / size, shift[:, 1]], 1),
            ],
            1,
        )  # (n, 2, 3)
        grid = F.affine_grid(turn.to(device), list(images.shape), align_corners=False)
        moved = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        spread = float(images.std()) if images.numel() > 1 else 0.0
        middle = moved.mean(dim=(1, 2, 3), keepdim=True)
        gain, lift = (uniform(n, 1, 1, 1).to(device) * self.contrast for _ in range(2))
        changed = (moved - middle) * (1.0 + gain) + middle + lift * spread
        self._erase(changed, float(images.mean()), spread, generator)
        if self.noise:
            changed += self.noise * spread * torch.randn(images.shape, generator=generator).to(device)
        return changed

    def _erase(self, images: Tensor, middle: float, spread: float, generator: torch.Generator) -> None:
        n, channels, height, width = images.shape
        draws = torch.rand(n, 5, generator=generator).tolist()
        colours = middle + spread * torch.randn(n, channels, generator=generator).to(images.device)
        for row, (chance, area, shape, down, right) in enumerate(draws):
            if chance >= self.erase:
                continue
            side = math.sqrt((0.02 + 0.18 * area) * height * width)
            ratio = 2.0 ** (2 * shape - 1)  # of height to width, 1/2 to 2
            tall = min(height, max(1, round(side * math.sqrt(ratio))))
            wide = min(width, max(1, round(side / math.sqrt(ratio))))
            top, left = int(down * (height - tall + 1)), int(right * (width - wide + 1))
            images[row, :, top : top + tall, left : left + wide] = colours[row, :, None, None]
