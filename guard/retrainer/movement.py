"""What passes after a change that did not pass before, against what chance explains: all together and per answer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from guard.detection.pipeline import Guard
from guard.types import Activations, BoolArray, IntArray

#: What happens by chance more often than this is held against nobody.
CHANCE = 0.05


class Region(NamedTuple):
    """Inputs with one answer of the network; None = all of them."""

    label: int | None
    lost: int
    gained: int
    of: int


@dataclass(frozen=True, slots=True, eq=False)
class Movement:
    """The same inputs under two guards.

    Attributes
    ----------
    predicted : ndarray of shape (n,), int64
        What the network answers.
    lost : ndarray of shape (n,), bool
        Pass under the second guard, and should not by the first.
    gained : ndarray of shape (n,), bool
        The other way round.
    """

    predicted: IntArray
    lost: BoolArray
    gained: BoolArray

    @classmethod
    def between(cls, first: Guard, second: Guard, inputs: Activations, *, far_only: bool = False) -> Movement:
        """Compare two guards at their own rates.

        Parameters
        ----------
        first, second : Guard
        inputs : Activations of n inputs
            n may be 0.
        far_only : bool
            Count only what the other guard calls more suspicious than every clean image of its calibration: where
            clean inputs hardly are, and triggered ones mostly. Else false alarms, which lie at the edge, and which any
            two guards flag differently, would hide those in their number.
        """
        if not len(inputs):
            nothing = np.zeros(0, dtype=bool)
            return cls(np.zeros(0, dtype=np.int64), nothing, nothing)
        flagged, sure = [], []
        for guard in (first, second):
            scores = guard.scores(inputs)
            flagged.append(scores.is_poisoned)
            far = scores.combined > guard.clean_scores[-1]
            sure.append(scores.is_poisoned & far if far_only else scores.is_poisoned)
        return cls(inputs.predicted_labels, sure[0] & ~flagged[1], sure[1] & ~flagged[0])

    def beyond_chance(self) -> Region | None:
        """Return a region where more inputs are lost than chance explains, the least likely one; None if there is none.

        A one-sided sign test for all inputs together and for every answer of the network, at 5 % in all (Bonferroni).
        """
        found: tuple[float, Region] | None = None
        labels = np.unique(self.predicted)
        for label in (None, *labels.tolist()):
            of_label = np.ones(len(self.predicted), dtype=bool) if label is None else self.predicted == label
            region = Region(
                label, int(self.lost[of_label].sum()), int(self.gained[of_label].sum()), int(of_label.sum())
            )
            likely = sign_test(region.lost, region.gained)
            if likely <= CHANCE / (1 + len(labels)) and (found is None or likely < found[0]):
                found = likely, region
        return found[1] if found is not None else None


def sign_test(lost: int, gained: int) -> float:
    """Return how likely chance alone loses as many of those that only one of two guards is right on (McNemar)."""
    n = lost + gained
    return float(sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n)
