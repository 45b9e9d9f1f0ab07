"""The nouns that every room of the package shares: activations, scores and verdicts, and the names of arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from guard.errors import DataError

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
FloatArray = npt.NDArray[np.floating[Any]]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
AnyArray = npt.NDArray[Any]

Action = Literal["observe", "flag", "relabel", "block"]

#: In place of an answer about an item (1 poisoned, 0 clean): none counts.
UNDECIDED = -1
#: Name under which detectors ask `Activations.at` for the split layer.
FEATURES = "features"
_JOINED = "_joined"  # the array whose columns are all arrays of activations, where there is one
#: Name of the depth that holds a backup's logits, where a backup is one of the detectors; no layer is named so.
BACKUP = "backup:logits"


@dataclass(frozen=True)
class Activations:
    """What one forward pass of the suspect model left behind, one row per input, all float32.

    Attributes
    ----------
    logits : ndarray of shape (n, n_classes)
        Output of the suspect model before any softmax.
    features : ndarray of shape (n, d)
        Features at the split layer.
    depths : mapping of str to ndarray of shape (n, d_k)
        Pooled features at earlier layers, keyed by layer name, in the order of execution.
    """

    logits: Float32Array
    features: Float32Array
    depths: Mapping[str, Float32Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, array in self.items():
            if not isinstance(array, np.ndarray) or array.ndim != 2:
                raise DataError(f"activations: {name} must be a 2-D array, got shape {np.shape(array)}.")
            if len(array) != len(self.logits):
                raise DataError(f"activations: {name} has {len(array)} rows, logits have {len(self.logits)}.")
        if FEATURES in self.depths:
            raise DataError(f"activations: a depth must not be called {FEATURES!r}; that name means the split layer.")

    def items(self) -> list[tuple[str, Float32Array]]:
        """Return (name, array) of logits, features and every depth."""
        return [("logits", self.logits), (FEATURES, self.features), *self.depths.items()]

    def at(self, depth: str) -> Float32Array:
        """Return the features at one depth; `"features"` means the split layer.

        Raises
        ------
        DataError
            If there is no such depth.
        """
        if depth == FEATURES:
            return self.features
        try:
            return self.depths[depth]
        except KeyError:
            raise DataError(f"there is no depth {depth!r}: known are {[FEATURES, *self.depths]}.") from None

    @cached_property
    def predicted_labels(self) -> IntArray:
        """The suspect model's own answer per row, shape (n,), int64; computed once, as every detector asks for it."""
        labels: IntArray = self.logits.argmax(axis=1).astype(np.int64, copy=False)
        return labels

    @cached_property
    def finite_rows(self) -> BoolArray:
        """Which rows hold only finite numbers, shape (n,); looked at once, and inherited by parts and stacks."""
        finite = np.ones(len(self), dtype=bool)
        if not self._has_finite_sums():
            for _, array in self.items():
                finite &= np.isfinite(array).all(axis=1)
        return finite

    @cached_property
    def is_finite(self) -> bool:
        """Whether all rows hold only finite numbers."""
        if "finite_rows" not in self.__dict__ and self._has_finite_sums():
            return True
        return bool(self.finite_rows.all())

    def _has_finite_sums(self) -> bool:
        """Return whether the sum of every array is finite: NaN and infinity both survive a sum."""
        arrays = [self.__dict__[_JOINED]] if _JOINED in self.__dict__ else [array for _, array in self.items()]
        with np.errstate(over="ignore", invalid="ignore"):
            return all(math.isfinite(np.add.reduce(array, axis=None)) for array in arrays)

    def require_finite(self, depth: str) -> FloatArray:
        """Return the features at one depth, as `at`.

        Raises
        ------
        DataError
            If there is no such depth, or a value is not finite.
        """
        features = self.at(depth)
        n_bad = 0 if self.is_finite else int((~np.isfinite(features).all(axis=1)).sum())
        if n_bad:
            raise DataError(f"{depth} must be finite, got {n_bad} of {len(features)} rows with NaN or infinity.")
        return features

    def with_features(self, layers: Mapping[str, Float32Array]) -> Activations:
        """Return the same logits with other arrays, finite where these are, at the split layer and at every depth."""
        depths = {name: array for name, array in layers.items() if name != FEATURES}
        other = Activations(self.logits, layers[FEATURES], depths)
        for name in ("predicted_labels", "finite_rows", "is_finite"):
            if name in self.__dict__:
                other.__dict__[name] = self.__dict__[name]
        return other

    def __len__(self) -> int:
        return len(self.logits)

    def __getitem__(self, rows: slice | AnyArray) -> Activations:
        """Return the chosen rows (a slice, an index array or a boolean mask) as new activations.

        A mask that chooses every row gives these activations themselves: in a fit that saves a copy of all arrays.
        """
        if isinstance(rows, np.ndarray) and rows.dtype == np.bool_ and rows.shape == (len(self),) and rows.all():
            return self
        part = Activations(
            self.logits[rows], self.features[rows], {name: array[rows] for name, array in self.depths.items()}
        )
        if "finite_rows" in self.__dict__:
            part.__dict__["finite_rows"] = self.finite_rows[rows]
        elif self.__dict__.get("is_finite"):
            part.__dict__["is_finite"] = True
        return part

    @classmethod
    def from_columns(cls, joined: Float32Array, widths: Sequence[int], depths: Sequence[str]) -> Activations:
        """Return activations whose arrays are columns of one, and share its memory.

        Parameters
        ----------
        joined : ndarray of shape (n, sum of widths), float32
            Logits, features at the split layer, and those at the depths, side by side.
        widths : sequence of int
            Columns of each.
        depths : sequence of str
        """
        ends = list(itertools.accumulate(widths))
        logits, features, *others = (joined[:, end - width : end] for end, width in zip(ends, widths, strict=True))
        whole = cls(logits, features, dict(zip(depths, others, strict=True)))
        whole.__dict__[_JOINED] = joined  # one array to look for NaN and infinity in
        return whole

    @classmethod
    def concatenate(cls, parts: list[Activations]) -> Activations:
        """Stack several activations of the same model, in order; of one, return itself."""
        if not parts:
            raise DataError("nothing to concatenate: give at least one Activations.")
        if len(parts) == 1:
            return parts[0]
        whole = cls(
            np.concatenate([part.logits for part in parts]),
            np.concatenate([part.features for part in parts]),
            {name: np.concatenate([part.at(name) for part in parts]) for name in parts[0].depths},
        )
        if all(part.__dict__.get("is_finite") for part in parts):
            whole.__dict__["is_finite"] = True
        elif all("finite_rows" in part.__dict__ for part in parts):
            whole.__dict__["finite_rows"] = np.concatenate([part.finite_rows for part in parts])
        return whole


@dataclass(frozen=True, slots=True)
class Scores:
    """Everything the guard computed for a batch, before any action.

    Attributes
    ----------
    raw, surprise : ndarray of shape (n, n_detectors), float64
        Each detector's score, and how unusual that score is; higher = more suspicious.
    combined, p_values : ndarray of shape (n,), float64
    is_poisoned : ndarray of shape (n,), bool
    """

    raw: Float64Array
    surprise: Float64Array
    combined: Float64Array
    p_values: Float64Array
    is_poisoned: BoolArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the guard says of one input.

    Attributes
    ----------
    label : int
        The suspect model's own answer.
    final_label : int
        The answer after the guard's action; differs from `label` only under `relabel`.
    is_poisoned : bool
        True if the input is flagged.
    p_value : float
        Share of clean inputs at least as suspicious, in (0, 1]; small = suspicious. Of those with the same answer
        only, where the false-positive rate holds for each class.
    score : float
        Combined score before it became a p-value; no unit, higher = more suspicious.
    action : {"observe", "flag", "relabel", "block"}
        What is done with a flagged input; `"observe"` for one that is not flagged.
    detector_scores : mapping of str to float
        Raw score of every detector, higher = more suspicious.
    surprise : mapping of str to float
        How unusual each detector's score is, see `Scores`; empty for an input that is not flagged.
    reason : str
        One line for a person.
    second_opinion : ndarray of shape (n_classes,), float32, or None
        Logits of the guard's backup, or of its replacement head if it has none; None where nobody asked, or they are
        not finite.
    depth : str
        The deepest layer that was looked at, where time allowed no more; empty if everything was.
    """

    label: int
    final_label: int
    is_poisoned: bool
    p_value: float
    score: float
    action: Action
    detector_scores: Mapping[str, float]
    reason: str
    surprise: Mapping[str, float] = field(default_factory=dict)
    second_opinion: Float32Array | None = field(default=None, compare=False, repr=False)
    depth: str = ""
