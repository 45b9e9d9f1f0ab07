"""The scores of detectors at several depths in a few array operations: what a decision costs while serving."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from guard.detection.detectors import Detector
from guard.detection.detectors.lof import PerClassLof
from guard.detection.detectors.relative_distance import RelativeDistance
from guard.detection.detectors.residual import Residual
from guard.detection.detectors.stacked import StackedMeans, StackedReferences
from guard.detection.stacked_spaces import StackedSpaces
from guard.detection.whitening import RANK, WhitenedSpace
from guard.types import Activations, Float64Array, IntArray

_OfDepth = TypeVar("_OfDepth", PerClassLof, RelativeDistance, Residual)


class FusedScores:
    """Scores the detectors that read whitened depths, all depths of a kind at once.

    A kind is fused where one detector of it reads each depth, and all of them have learned from the same images. Scores
    equal those of the detectors but for rounding. Features are whitened once.

    Parameters
    ----------
    detectors : sequence of Detector
        Fitted; all of a guard, in the order of the columns of its scores.
    spaces : mapping of str to WhitenedSpace
        By depth; at least one.

    Attributes
    ----------
    others : tuple of int
        Columns of the detectors that are not fused.
    """

    def __init__(self, detectors: Sequence[Detector], spaces: Mapping[str, WhitenedSpace]) -> None:
        self._depths = tuple(spaces)
        self._spaces = StackedSpaces([*spaces.values()])
        lofs = self._one_per_depth(detectors, PerClassLof, _compare_alike)
        means = self._one_per_depth(detectors, RelativeDistance, _know_the_same_classes)
        residuals = self._one_per_depth(detectors, Residual, lambda _: True)
        self._lofs, self._means, self._residuals = _columns(lofs), _columns(means), _columns(residuals)
        if lofs:
            self._references = StackedReferences([one.references_ for one in lofs.values()], RANK)
        if means:
            self._class_means = StackedMeans([*means.values()], RANK)
        fused = {*lofs, *means, *residuals}
        self.others = tuple(column for column in range(len(detectors)) if column not in fused)
        self._n_classes = {
            *(one.references_.n_classes for one in lofs.values()),
            *(len(one.is_present_) for one in means.values()),
            *(one.shape_[1] for one in residuals.values()),
        }

    def score_into(self, raw: Float64Array, activations: Activations) -> bool:
        """Write the scores of the fused detectors into their columns of `raw`, shape (n, n_detectors).

        Returns
        -------
        is_done : bool
            False where the detectors themselves must look, or complain: values are not finite or huge, or shapes are
            not those of `fit`.
        """
        if self._n_classes != {activations.logits.shape[1]}:
            return False
        if not (activations.is_finite or np.isfinite(activations.logits).all()):
            return False  # what the spaces read, they look at themselves
        features = [activations.at(depth) for depth in self._depths]
        whitened = self._spaces(features)
        if whitened is None:
            return False
        leading, lengths = whitened
        labels = activations.predicted_labels
        if self._lofs is not None:
            raw[:, self._lofs] = self._references.factors(leading, labels).T
        if self._means is not None:
            raw[:, self._means] = self._class_means.scores(leading, labels).T
        if self._residuals is not None:
            raw[:, self._residuals] = lengths.T
        return True

    def _one_per_depth(
        self, detectors: Sequence[Detector], kind: type[_OfDepth], go_together: Callable[[Sequence[_OfDepth]], bool]
    ) -> dict[int, _OfDepth]:
        """Return the detectors of a kind by column, in the order of the depths; none if they cannot be fused."""
        found = [(one.depth, column, one) for column, one in enumerate(detectors) if type(one) is kind]
        if sorted(depth for depth, _, _ in found) != sorted(self._depths):
            return {}
        found.sort(key=lambda entry: self._depths.index(entry[0]))
        return {column: one for _, column, one in found} if go_together([one for *_, one in found]) else {}


def _columns(detectors: Collection[int]) -> slice | IntArray | None:
    """Return where the scores of some detectors stand; as a slice if they stand side by side, which is faster."""
    if not detectors:
        return None
    columns = np.array([*detectors])
    return slice(columns[0], columns[-1] + 1) if (np.diff(columns) == 1).all() else columns


def _compare_alike(lofs: Sequence[PerClassLof]) -> bool:
    first = lofs[0].references_
    return all(
        lof.compare == "predicted"
        and lof.summary is None
        and lof.references_.vectors.dtype == np.float32
        and lof.references_.n_neighbors == first.n_neighbors
        and lof.references_.n_classes == first.n_classes
        and np.array_equal(lof.references_.labels, first.labels)
        for lof in lofs
    )


def _know_the_same_classes(detectors: Sequence[RelativeDistance]) -> bool:
    return all(np.array_equal(one.places_, detectors[0].places_) for one in detectors)
