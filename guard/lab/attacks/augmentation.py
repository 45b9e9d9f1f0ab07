"""What training shows of an image: shifted and mirrored copies. Triggers are put on afterwards, so they stay whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard.errors import DataError
from guard.types import Float32Array


@dataclass(frozen=True, slots=True)
class CropAndFlip:
    """Shift every image by up to `padding` pixels each way, edges repeated; mirror half of them if asked.

    Attributes
    ----------
    padding : int
        Largest shift, in pixels, >= 0.
    flip : bool
        Mirror left and right with probability 1/2. Not for digits, signs or faces that a light comes from a side of.
    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise DataError(f"padding must be >= 0, got {self.padding}.")

    def __call__(self, images: Float32Array, rng: np.random.Generator) -> Float32Array:
        """Return new images of the same shape, (n, channels, height, width)."""
        n, _, height, width = images.shape
        augmented = np.empty_like(images)
        shifts = rng.integers(0, 2 * self.padding + 1, (n, 2))
        sides = 2 * self.padding + 1
        order = shifts[:, 0] * sides + shifts[:, 1]
        pad = ((0, 0), (0, 0), (self.padding, self.padding), (self.padding, self.padding))
        for shift in range(sides * sides):  # all images of one shift at once: plain slices, no giant padded copy
            rows = np.flatnonzero(order == shift)
            if len(rows):
                top, left = divmod(shift, sides)
                padded = np.pad(images[rows], pad, mode="edge")
                augmented[rows] = padded[:, :, top : top + height, left : left + width]
        if self.flip:
            rows = np.flatnonzero(rng.random(n) < 0.5)
            augmented[rows] = augmented[rows, :, :, ::-1]
        return augmented
