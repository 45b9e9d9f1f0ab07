"""Whether an input lies nearer to another class than to the one that the suspect model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from guard.arrays import check_range, require
from guard.detection.detectors.base import Joins, OverDepths, Reads, Shows, Source, check_columns
from guard.errors import DataError, NotFittedError
from guard.types import FEATURES, Activations, AnyArray, BoolArray, Float64Array, IntArray

LEAST_SQUARED = 1e-24  # of a distance, where a logarithm follows


@dataclass
class RelativeDistance:
    """Log-ratio of two distances: to the mean of the predicted class, and to the nearest mean of another class.

    It reads the leading columns of the whitened space, those that tell classes apart: there, below 0 the linear
    discriminant agrees with the suspect's answer, above 0 it contradicts. No false alarm moves a mean: a triggered
    input that somebody calls one would pull its class towards the trigger. Mahalanobis distances relative to another
    one are from [1]_, which compares with all classes together; the nearest other class is a choice of this project.

    Parameters
    ----------
    depth : str
        Where to look: `"features"` (the split layer) or the name of an earlier depth.

    References
    ----------
    .. [1] Ren et al. (2021), A Simple Fix to Mahalanobis Distance for Improving Near-OOD Detection, arXiv 2106.09022.
    """

    joins: ClassVar[Joins] = "once_per_depth"
    learns_from: ClassVar[frozenset[Source]] = frozenset({Source.CLEAN})
    reads: ClassVar[Reads] = "leading"
    shows: ClassVar[Shows] = "contradiction"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn the mean of each class from clean activations and true labels, shape (n,).

        Raises
        ------
        DataError
            If there is no row, a label is out of range, or a value is not finite.
        """
        rows = activations.require_finite(self.depth)
        n_classes = activations.logits.shape[1]
        if len(rows) == 0 or len(rows) != len(labels):
            raise DataError(f"{self.depth} {rows.shape} and labels {np.shape(labels)} must have one, non-zero length.")
        check_range(labels, n_classes)
        sizes = np.bincount(labels, minlength=n_classes)
        order = np.argsort(labels, kind="stable")
        lead = rows[order].astype(np.float64)
        self._learned(
            np.add.reduceat(lead, (np.cumsum(sizes) - sizes)[sizes > 0], axis=0) / sizes[sizes > 0, np.newaxis],
            sizes > 0,
        )
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return the log-ratio per row, shape (n,), float64; higher = more suspicious.

        Infinite where the predicted class had no clean image; minus infinite where it alone had some.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns or of classes differs from `fit`, or a value is not finite.
        """
        if not hasattr(self, "means_"):
            raise NotFittedError("RelativeDistance is not fitted. Call fit(activations, labels) first.")
        rows = activations.require_finite(self.depth)
        check_columns(self.depth, rows, self.means_.shape[1])
        check_columns("logits", activations.logits, len(self.is_present_))
        if not activations.is_finite and not np.isfinite(activations.logits).all():
            raise DataError("logits hold values that are not finite: such rows have no predicted class.")
        lead = rows.astype(np.float64)
        # Centred between the means, so that little cancels in |x|^2 - 2 x.y + |y|^2.
        lead -= self.centre_
        squared = lead @ self.centred_.T
        squared *= -2.0
        squared += self.norms_
        squared += np.einsum("ij,ij->i", lead, lead)[:, np.newaxis]
        np.maximum(squared, LEAST_SQUARED, out=squared)
        every, answers = np.arange(len(rows)), self.places_[activations.predicted_labels]
        own = np.where(answers >= 0, squared[every, answers], np.inf)
        squared[every[answers >= 0], answers[answers >= 0]] = np.inf
        with np.errstate(divide="ignore"):
            scores: Float64Array = 0.5 * (np.log(own) - np.log(squared.min(axis=1)))
        return scores

    def state(self) -> dict[str, AnyArray]:
        """Return the means of the classes that had images, and which these are."""
        return {"means": self.means_, "is_present": self.is_present_.astype(np.int64)}

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted one from what `state` returned; DataError if that is none."""
        detector = cls(**settings)
        is_present = require(state, "is_present", (None,), kind="i", low=0, high=1) == 1
        means = require(state, "means", (int(is_present.sum()), None))
        if not is_present.any():
            raise DataError("array is_present must name at least one class.")
        detector._learned(means, is_present)
        return detector

    def _learned(self, means: Float64Array, is_present: BoolArray) -> None:
        self.means_, self.is_present_ = means, is_present
        self.centre_: Float64Array = means.mean(axis=0)
        self.centred_: Float64Array = means - self.centre_
        self.norms_: Float64Array = np.einsum("ij,ij->i", self.centred_, self.centred_)
        self.places_: IntArray = np.where(is_present, np.cumsum(is_present) - 1, -1)
