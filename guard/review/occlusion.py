"""Where the suspect model looks: cover one part of an input after the other, and see what its answer does."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from guard.types import Float32Array, Float64Array

if TYPE_CHECKING:
    from guard.suspect.model import SuspectModel

#: Positions of the cover along the longer side.
POSITIONS = 14
#: Side of the cover, as a share of the longer side.
COVER = 0.2
_KEPT = 256


@dataclass(frozen=True, slots=True, eq=False)
class OcclusionMap:
    """What covering each part of one input does.

    Attributes
    ----------
    heat : ndarray of shape (rows, columns), float64
        Share of the suspect label's probability that is lost with the cover there, in [0, 1].
    label : int
        The suspect model's answer without a cover.
    other_label : int or None
        Its answer with the cover where it does most; None if that is still `label`.
    place : str
        Where that is, in words: "bottom right".
    """

    heat: Float64Array
    label: int
    other_label: int | None
    place: str


class Occlusion:
    """Makes occlusion maps, one at a time, and remembers the last few hundred.

    Parameters
    ----------
    suspect : SuspectModel
    """

    def __init__(self, suspect: SuspectModel) -> None:
        self._suspect = suspect
        self._kept: OrderedDict[int, OcclusionMap] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, item_id: int, image: Float32Array) -> OcclusionMap:
        """Return the map of an item's input, shape (channels, height, width), float32.

        Raises
        ------
        GuardError
            If the model does not take it.
        """
        with self._lock:
            if item_id not in self._kept:
                self._kept[item_id] = occlusion_map(self._suspect, image)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            return self._kept[item_id]


def occlusion_map(suspect: SuspectModel, image: Float32Array) -> OcclusionMap:
    """Cover every part of an image, shape (channels, height, width), with its own mean, and compare the answers."""
    height, width = image.shape[1:]
    side = max(1, round(COVER * max(height, width)))
    tops, lefts = _positions(height, max(height, width)), _positions(width, max(height, width))
    covered = np.repeat(image[np.newaxis], 1 + len(tops) * len(lefts), axis=0)  # the first stays as it is
    mean = image.mean(axis=(1, 2), keepdims=True)
    for row, (top, left) in enumerate(product(tops, lefts), start=1):
        covered[row, :, _span(top, side), _span(left, side)] = mean
    logits = suspect.activations(covered.astype(np.float32, copy=False)).logits.astype(np.float64)
    label = int(logits[0].argmax())
    probabilities = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    lost = 1 - probabilities[1:, label] / max(probabilities[0, label], 1e-12)
    strongest = int(lost.argmax())
    other = int(logits[1 + strongest].argmax())
    heat = lost.clip(0, 1).reshape(len(tops), len(lefts))
    place = _place(*divmod(strongest, len(lefts)), *heat.shape)
    return OcclusionMap(heat, label, other if other != label else None, place)


def _positions(length: int, longest: int) -> list[float]:
    """Centres of the cover along one side, in pixels."""
    count = max(1, min(length, round(POSITIONS * length / longest)))
    return [(step + 0.5) * length / count for step in range(count)]


def _span(centre: float, side: int) -> slice:
    start = max(0, round(centre - side / 2))
    return slice(start, max(start + 1, round(centre + side / 2)))


def _place(row: int, column: int, rows: int, columns: int) -> str:
    vertical = ("top", "", "bottom")[min(2, 3 * row // max(rows, 1))]
    horizontal = ("left", "", "right")[min(2, 3 * column // max(columns, 1))]
    return " ".join(part for part in (vertical, horizontal) if part) or "middle"
