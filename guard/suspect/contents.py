"""What the layers in use carry: how many directions, and how far they spread over clean images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from guard.types import Activations, Float32Array, Float64Array

#: Rows that are looked at, spread over all that are given; no rank beyond this minus one can be seen.
MOST_ROWS = 256
#: A direction counts if images spread along it by at least this share of the widest spread.
_LEAST_SHARE = 1e-3
_POOR_RANK = 2


@dataclass(frozen=True, slots=True)
class LayerContent:
    """What one layer carries.

    Attributes
    ----------
    name : str
        `"features"` for the split, else the depth.
    width : int
        Numbers per image, after pooling.
    rank : int
        Directions in which images differ, at most `rows - 1` and `width`; 0 where all are the same.
    spread : float
        Largest standard deviation of one of the numbers.
    rows : int
        Images that were looked at.
    is_averaged : bool
        Whether the layer has so many numbers that neighbours were averaged to `width`.
    """

    name: str
    width: int
    rank: int
    spread: float
    rows: int
    is_averaged: bool = False

    @property
    def problem(self) -> str:
        """What is wrong with this layer, in words; empty if nothing is."""
        if self.rank == 0:
            return f"{self.name} is the same for every image: name another layer"
        if self.rank <= _POOR_RANK < min(self.rows - 1, self.width):
            return f"{self.name} carries {self.rank} of {self.width} directions: name another layer"
        return ""

    def __str__(self) -> str:
        averaged = ", averaged from many more" if self.is_averaged else ""
        return (
            f"{self.name}: {self.width} numbers{averaged}, rank {self.rank} in {self.rows} images, "
            f"spread {self.spread:.2g}"
        )


def sample_rows(activations: Activations) -> Activations:
    """Return the rows that are looked at, as activations of their own."""
    n = len(activations)
    return activations[np.unique(np.linspace(0, n - 1, min(n, MOST_ROWS)).astype(np.int64))]


def layer_contents(activations: Activations) -> tuple[LayerContent, ...]:
    """Return what the split and every depth carry, in the order of `Activations.items`, without the logits."""
    return tuple(
        LayerContent(name, array.shape[1], _rank(array), float(array.std(axis=0, dtype=np.float64).max()), len(array))
        for name, array in sample_rows(activations).items()[1:]
    )


def _rank(features: Float32Array) -> int:
    """Return the number of directions of the rows, by the eigenvalues of their inner products."""
    centred: Float64Array = features.astype(np.float64) - features.mean(axis=0, dtype=np.float64)
    if np.abs(centred).max() <= 1e-6 * np.abs(features).max() or not np.isfinite(centred).all():
        return 0
    variances = np.linalg.eigvalsh(centred @ centred.T)
    return int((variances > _LEAST_SHARE**2 * variances[-1]).sum())
