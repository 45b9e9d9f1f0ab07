"""Per-class local outlier factor: is an input as close to the clean images of its class as they are to each other?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, get_args

import numpy as np

from guard.arrays import check_range, require
from guard.detection.detectors.base import WHAT_IS_CLEAN, Joins, OverDepths, Reads, Shows, Source, check_columns
from guard.detection.detectors.local_outlier_factor import DENSITY_FLOOR, ClassReferences, order_for_storage
from guard.detection.detectors.norms import check_orders, norm_summary
from guard.errors import ConfigError, DataError, NotFittedError
from guard.types import FEATURES, Activations, AnyArray, BoolArray, Float64Array, FloatArray, IntArray

_LEAST_DENSITY = 1e-200  # at 0, an input far from everything would pass for an ordinary one

Compare = Literal["predicted", "any"]


@dataclass
class PerClassLof:
    """One local outlier factor (LOF) per class, fitted on the clean images of that true label [1]_ [2]_.

    With k-dist(o) the distance of a reference o to its k-th nearest fellow, N(x) the k references nearest to x, and

        lrd(x) = 1 / (mean over o in N(x) of max(k-dist(o), |x - o|) + 1e-10),

    the factor is LOF(x) = mean over o in N(x) of lrd(o) / lrd(x): about 1 inside a class, larger where x lies in a
    sparser place than its neighbours. Values equal those of scikit-learn's `LocalOutlierFactor(novelty=True)`, sign
    flipped. Two references exactly as far away as the k-th neighbour are taken in the order given to `fit`
    (scikit-learn's own algorithms disagree with each other there).

    A class with fewer than two clean images cannot be compared with: its factor is infinite, never "clean". In a
    class of n images at most n - 1 neighbours are used.

    Parameters
    ----------
    depth : str
        Where to look: `"features"` (the split layer) or the name of an earlier depth.
    n_neighbors : int
        k, at least 1.
    summary : tuple of {"l0", "l1", "l2", "linf"}, optional
        Compare these norms of the features, as the paper does, instead of the features themselves.
    l0_tolerance : float
        See `norm_summary`.
    compare : {"predicted", "any"}
        `"predicted"`: `score` is the LOF against the class that the suspect model predicts. `"any"`: the smallest LOF
        against any class, as in the paper (eq. 14 of [2]_): suspicious only if every class calls it novel.
    novelty_offset : float
        LOF above which a class calls an input novel in `is_novel`; 1.5 is scikit-learn's "auto".

    Attributes
    ----------
    references_ : ClassReferences
        Clean features (or their norms) by class, with k-distance and density.
    n_features_in_ : int
        Columns of the features that `fit` saw.

    References
    ----------
    .. [1] Breunig, Kriegel, Ng, Sander (2000), LOF: identifying density-based local outliers, SIGMOD, Definitions 3-7.
    .. [2] Fu et al. (2020), Detecting Backdoors in Neural Networks Using Novel Feature-Based Anomaly Detection,
       arXiv 2011.02526.
    """

    joins: ClassVar[Joins] = "once_per_depth"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_CLEAN
    reads: ClassVar[Reads] = "leading"
    shows: ClassVar[Shows] = "novelty"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES
    n_neighbors: int = 20
    summary: tuple[str, ...] | None = None
    l0_tolerance: float = 1e-3
    compare: Compare = "predicted"
    novelty_offset: float = 1.5

    def fit(self, activations: Activations, labels: IntArray) -> Self:
        """Learn from clean activations and their true labels.

        Parameters
        ----------
        activations : Activations of n clean inputs
            Classes are numbered by the columns of the logits.
        labels : ndarray of shape (n,), integers in [0, n_classes)

        Raises
        ------
        ConfigError
            If a setting is out of range.
        DataError
            If labels do not fit, a feature is not finite, or no class has two images.
        """
        self._check_settings()
        features = activations.require_finite(self.depth)
        n_classes = activations.logits.shape[1]
        labels = _checked_labels(labels, len(activations), n_classes)
        if np.bincount(labels, minlength=1).max() < 2:
            raise DataError(
                f"no class has 2 clean images, got {len(labels)} images of {len(set(labels.tolist()))} classes. "
                "Give more images of each."
            )
        self.n_features_in_ = features.shape[1]
        self._learned(ClassReferences.fit(self._summarise(features), labels, n_classes, self.n_neighbors))
        return self

    def score(self, activations: Activations) -> Float64Array:
        """Return one factor per row, by the setting `compare`; higher = more suspicious.

        Returns
        -------
        scores : ndarray of shape (n,), float64
            Local outlier factor, no unit; about 1 for clean inputs, no upper bound; infinite where there is no class to
            compare with.

        Raises
        ------
        NotFittedError
            If `fit` has not been called.
        DataError
            If the number of columns differs from `fit`, or a value is not finite.
        """
        if self.compare == "any":
            smallest: Float64Array = self.score_all(activations).min(axis=1)
            return smallest
        vectors = self._vectors(activations)
        return self.references_.factors_of_class(vectors, self._predicted_labels(activations))

    def score_all(self, activations: Activations) -> Float64Array:
        """Return the factor of every row against every class, shape (n, n_classes), float64.

        Raises the same errors as `score`. The suspect model's answer is not read.
        """
        vectors = self._vectors(activations)
        return self.references_.factors_of_all(vectors)

    def is_novel(self, activations: Activations) -> BoolArray:
        """Return which rows every class calls novel (eq. 14 of the paper), shape (n,), whatever `compare` says.

        The predicted class is asked first, and the others only where it says novel; the answer is the same as that of
        `score_all(activations).min(axis=1) > novelty_offset`. Raises the same errors as `score`.
        """
        vectors = self._vectors(activations)
        predicted = self.references_.factors_of_class(vectors, self._predicted_labels(activations))
        novel = predicted > self.novelty_offset
        doubtful = np.flatnonzero(novel)
        if len(doubtful):
            novel[doubtful] = self.references_.factors_of_all(vectors[doubtful]).min(axis=1) > self.novelty_offset
        return novel

    def state(self) -> dict[str, AnyArray]:
        """Return the references (float32 if the features were), labels, k-distances, densities and counts."""
        self._check_fitted()
        references = self.references_
        counts = [references.n_classes, references.n_neighbors, self.n_features_in_]
        return {
            "references": references.vectors,
            "labels": references.labels,
            "k_distances": references.k_distances,
            "densities": references.densities,
            "counts": np.array(counts, dtype=np.int64),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, AnyArray], **settings: Any) -> Self:
        """Return a fitted detector; its scores equal those of the one that `state` came from, bit by bit.

        Raises
        ------
        ConfigError
            If a setting is out of range, or `n_neighbors` is not the one that was fitted.
        DataError
            If the arrays do not fit together, or could not have been fitted.
        """
        detector = cls(**settings)
        detector._check_settings()
        counts = require(state, "counts", (3,), kind="i", low=1, high=2**31)
        n_classes, n_neighbors, detector.n_features_in_ = (int(count) for count in counts)
        detector._check_state(state, n_classes)
        if detector.n_neighbors != n_neighbors:
            raise ConfigError(f"n_neighbors={detector.n_neighbors}, but the state was fitted with {n_neighbors}.")
        detector._learned(
            ClassReferences(
                state["references"],
                state["labels"],
                state["k_distances"],
                state["densities"],
                n_classes,
                n_neighbors,
            )
        )
        return detector

    def _check_state(self, state: Mapping[str, AnyArray], n_classes: int) -> None:
        width = self.n_features_in_ if self.summary is None else len(self.summary)
        n = len(require(state, "references", (None, width)))
        labels = require(state, "labels", (n,), kind="i", low=0, high=n_classes - 1)
        require(state, "k_distances", (n,), low=0.0)
        require(state, "densities", (n,), low=_LEAST_DENSITY, high=(1.0 + 1e-6) / DENSITY_FLOOR)
        if n < 2 or not np.array_equal(order_for_storage(labels, n_classes), np.arange(n)):
            raise DataError("array labels must hold at least 2 references of a class, and classes in the stored order.")

    def _learned(self, references: ClassReferences) -> None:
        self.references_ = references
        references.warm_up(every_class=self.compare == "any")

    def _vectors(self, activations: Activations) -> FloatArray:
        self._check_fitted()
        features = activations.require_finite(self.depth)
        check_columns(self.depth, features, self.n_features_in_)
        check_columns("logits", activations.logits, self.references_.n_classes)
        return self._summarise(features)

    def _predicted_labels(self, activations: Activations) -> IntArray:
        if not activations.is_finite and not np.isfinite(activations.logits).all():
            raise DataError("logits hold values that are not finite: such rows have no predicted class.")
        return activations.predicted_labels

    def _summarise(self, features: FloatArray) -> FloatArray:
        if self.summary is None:
            return features
        return norm_summary(features, self.summary, self.l0_tolerance)

    def _check_fitted(self) -> None:
        if not hasattr(self, "references_"):
            raise NotFittedError("PerClassLof is not fitted. Call fit(activations, labels) first.")

    def _check_settings(self) -> None:
        if self.n_neighbors < 1:
            raise ConfigError(f"n_neighbors must be at least 1, got {self.n_neighbors}.")
        if self.compare not in get_args(Compare):
            raise ConfigError(f"compare must be one of {list(get_args(Compare))}, got {self.compare!r}.")
        if self.summary is not None:
            check_orders(self.summary, self.l0_tolerance)


def _checked_labels(labels: IntArray, n_rows: int, n_classes: int) -> IntArray:
    labels = np.asarray(labels)
    if labels.shape != (n_rows,) or labels.dtype.kind not in "iu":
        raise DataError(f"labels must be {n_rows} integers, got shape {labels.shape} of {labels.dtype}.")
    labels = labels.astype(np.int64)
    check_range(labels, n_classes)
    return labels
