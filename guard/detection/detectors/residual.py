"""What an input shows in directions that do not tell classes apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from guard.arrays import require
from guard.detection.detectors.base import Joins, OverDepths, Reads, Shows, Source, check_columns
from guard.errors import NotFittedError
from guard.types import FEATURES, Activations, AnyArray, Float64Array, IntArray


@dataclass
class Residual:
    """Length of a row of the trailing columns of the whitened space, those that do not tell classes apart.

    A trigger need not look like any class: blended patterns and patches leave most of their trace where clean images
    hardly vary. The whitened space has unit spread there, so that a clean input's length is about the root of the
    number of columns, and the square of it a Mahalanobis distance in these directions.

    Parameters
    ----------
    depth : str
        Where to look: `"features"` (the split layer) or the name of an earlier depth.
    """

    joins: ClassVar[Joins] = "once_per_depth"
    learns_from: ClassVar[frozenset[Source]] = frozenset({Source.CLEAN})
    reads: ClassVar[Reads] = "trailing"
    shows: ClassVar[Shows] = "novelty"
    over_depths: ClassVar[OverDepths] = "compared"

    depth: str = FEATURES

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn the number of columns and of classes, no more; DataError if a value is not finite."""
        self.shape_ = (activations.require_finite(self.depth).shape[1], activations.logits.shape[1])
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return the length per row, shape (n,), float64, >= 0; higher = more suspicious.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns or of classes differs from `fit`, or a value is not finite.
        """
        if not hasattr(self, "shape_"):
            raise NotFittedError("Residual is not fitted. Call fit(activations, labels) first.")
        rows = activations.require_finite(self.depth)
        check_columns(self.depth, rows, self.shape_[0])
        check_columns("logits", activations.logits, self.shape_[1])
        lengths: Float64Array = np.sqrt(np.einsum("ij,ij->i", rows, rows, dtype=np.float64))
        return lengths

    def state(self) -> dict[str, AnyArray]:
        """Return the number of columns and of classes."""
        return {"shape": np.array(self.shape_, dtype=np.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted one from what `state` returned; DataError if that is none."""
        detector = cls(**settings)
        n_columns, n_classes = (int(count) for count in require(state, "shape", (2,), kind="i", low=1, high=2**31))
        detector.shape_ = (n_columns, n_classes)
        return detector
