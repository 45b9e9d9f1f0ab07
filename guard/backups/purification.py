"""What one way of purifying leaves behind, and the points of its curve."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

#: Measures a network: clean accuracy on held-out images, and whatever else the caller asked for.
Measure = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One setting of a method that was tried, before any fine-tuning.

    Attributes
    ----------
    at : float
        The threshold of the masks (anp) or the share of units that are pruned (the others).
    pruned : int
        Units.
    measured : mapping of str to float
        `clean_accuracy` on held-out images and the share of every probe, fractions.
    """

    at: float
    pruned: int
    measured: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Purification:
    """What a method did to the copy that it was given.

    Attributes
    ----------
    units, pruned : int
        Neurons that it looked at, and that it removed.
    curve : tuple of CurvePoint
    notes : tuple of str
        What a person should know, in whole sentences.
    """

    units: int
    pruned: int
    curve: tuple[CurvePoint, ...] = ()
    notes: tuple[str, ...] = field(default=())
