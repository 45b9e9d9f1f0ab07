"""Fit detectors and calibrate them on the same clean data, without any score that its own detector has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from guard.config import GuardConfig
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import Fusion, new_fusion
from guard.errors import DataError
from guard.statistics.calibration import conformal_p_values, stratified_folds
from guard.types import BACKUP, Activations, AnyArray, BoolArray, Float64Array, IntArray

#: Called with a line for a person and the share done, in [0, 1].
Progress = Callable[[str, float], None]


class LabelledCounts(NamedTuple):
    """How many labelled inputs a guard has learned from."""

    poisoned: int
    false_alarms: int


@dataclass(frozen=True)
class Labelled:
    """Inputs that the guard flagged and a person has looked at, one row each; there may be none.

    Attributes
    ----------
    activations : Activations of n inputs
        Finite, of the guarded model at the guard's own depths.
    true_labels : ndarray of shape (n,), integers in [0, n_classes)
        What each input really shows, poisoned or not.
    is_poisoned : ndarray of shape (n,), bool
        False for a false alarm.

    Raises
    ------
    DataError
        If shapes, types or labels break a rule, or a value is not finite.
    """

    activations: Activations
    true_labels: IntArray
    is_poisoned: BoolArray

    def __post_init__(self) -> None:
        labels, is_poisoned = np.asarray(self.true_labels), np.asarray(self.is_poisoned)
        shape = (len(self.activations),)
        for name, array in (("true_labels", labels), ("is_poisoned", is_poisoned)):
            if array.shape != shape:
                raise DataError(f"{name} must have shape {shape}, one per labelled input, got {array.shape}.")
        if not np.issubdtype(labels.dtype, np.integer):
            raise DataError(f"true_labels must be integers, got {labels.dtype}.")
        if is_poisoned.dtype != np.bool_:
            raise DataError(f"is_poisoned must be bool, got {is_poisoned.dtype}.")
        n_classes = self.activations.logits.shape[1]
        if len(labels) and (labels.min() < 0 or labels.max() >= n_classes):
            raise DataError(f"true_labels must be in [0, {n_classes}), got {labels.min()} to {labels.max()}.")
        finite = self.activations.finite_rows()
        if not finite.all():
            raise DataError(f"activations of labelled input {int(np.argmin(finite))} are not finite. Leave it out.")
        object.__setattr__(self, "true_labels", labels.astype(np.int64))
        object.__setattr__(self, "is_poisoned", is_poisoned.copy())

    @property
    def counts(self) -> LabelledCounts:
        """How many are poisoned, and how many false alarms."""
        poisoned = int(self.is_poisoned.sum())
        return LabelledCounts(poisoned, len(self) - poisoned)

    @property
    def contradicts_the_network(self) -> BoolArray:
        """Which are poisoned and show another class than the network answers, shape (n,): what heads may learn.

        A head that is taught the network's own answer for an input learns to agree with whatever made the network give
        it, and with a trigger that takes a single input.
        """
        contradicts: BoolArray = self.is_poisoned & (self.true_labels != self.activations.predicted_labels)
        return contradicts

    def __len__(self) -> int:
        return len(self.activations)

    def __getitem__(self, rows: slice | AnyArray) -> Labelled:
        """Return the chosen rows (a slice, an index array or a boolean mask)."""
        return Labelled(self.activations[rows], self.true_labels[rows], self.is_poisoned[rows])


@dataclass(frozen=True, slots=True)
class EarlyFit:
    """A verdict that looks at the first few depths only, with a calibration of its own.

    Attributes
    ----------
    depth : str
        The deepest that it looks at.
    ensemble, fusion, clean_scores, realised_false_positive_rate
        As of `CrossFit`.
    """

    depth: str
    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    realised_false_positive_rate: float


@dataclass(frozen=True, slots=True)
class CrossFit:
    """Detectors fitted on all clean data, and their calibration from scores out of fold.

    Attributes
    ----------
    ensemble : Ensemble
        Fitted on all clean rows.
    fusion : Fusion
        Fitted on the out-of-fold scores of all clean rows.
    clean_scores : ndarray of shape (n,), float64, ascending
        Combined scores of the clean rows, each under detectors and a fusion that had not seen it.
    realised_false_positive_rate : float
        Share of clean rows flagged when each fold is ranked among the others.
    early : tuple of EarlyFit
        Where the settings ask for verdicts at several depths, one per depth before the split layer, in order.
    """

    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    realised_false_positive_rate: float
    early: tuple[EarlyFit, ...] = ()


def cross_fit(
    config: GuardConfig,
    activations: Activations,
    labels: IntArray,
    *,
    noisy: Activations | None = None,
    labelled: Labelled | None = None,
    anomalies: Activations | None = None,
    progress: Progress | None = None,
) -> CrossFit:
    """Fit and calibrate the detectors of a mode.

    Parameters
    ----------
    config : GuardConfig
    activations : Activations
        Of clean inputs, finite.
    labels : ndarray of shape (n,), int64
        True labels.
    noisy : Activations, optional
        Of the same inputs with noise; learned from together with their own row, never scored.
    labelled : Labelled, optional
        Further inputs to learn from, in every fold; never scored. See `guard.detection.retraining.retrain`.
    anomalies : Activations, optional
        If there are any, a demarcation joins the detectors of `calibrated` mode and tells them from clean inputs.
    progress : callable, optional
        Called with a line of text and the share done.
    """
    report = progress or _silent
    part = stratified_folds(labels, config.folds, config.seed)
    anomalies = anomalies if anomalies is not None and len(anomalies) else None
    depths = tuple(activations.depths)
    wanted = Ensemble.for_mode(config, depths, demarcation=anomalies is not None)
    raw = np.empty((len(labels), len(wanted.names)))
    layers = [depth for depth in depths if depth != BACKUP] if config.anytime else []
    early_raw = [np.empty((len(labels), len(wanted.up_to(layers[: k + 1]).names))) for k in range(len(layers))]
    for fold in range(config.folds):
        report(f"cross-fitting, part {fold + 1} of {config.folds}", 0.1 + 0.7 * fold / config.folds)
        learn, hold = part != fold, part == fold
        fitted = _fitted_ensemble(config, activations, labels, noisy, labelled, anomalies, learn)
        raw[hold] = fitted.score(activations[hold])
        for k, own in enumerate(early_raw):
            own[hold] = fitted.up_to(layers[: k + 1]).score(activations[hold])
    report("fitting the detectors on all clean images", 0.8)
    everything = np.ones(len(labels), dtype=bool)
    ensemble = _fitted_ensemble(config, activations, labels, noisy, labelled, anomalies, everything)
    report("calibrating", 0.97)
    early = [
        EarlyFit(layers[k], ensemble.up_to(layers[: k + 1]), *_calibrated(config, own, part))
        for k, own in enumerate(early_raw)
    ]
    report("fitted", 1.0)
    return CrossFit(ensemble, *_calibrated(config, raw, part), tuple(early))


def _silent(_text: str, _share: float) -> None:
    """Report nothing."""


def _fitted_ensemble(
    config: GuardConfig,
    activations: Activations,
    labels: IntArray,
    noisy: Activations | None,
    labelled: Labelled | None,
    anomalies: Activations | None,
    rows: BoolArray,
) -> Ensemble:
    """Fit on the chosen rows of the clean inputs, their noisy copies, and what labelled inputs may teach."""
    clean = [activations] if noisy is None else [activations, noisy]
    parts, part_labels = [one[rows] for one in clean], [labels[rows]] * len(clean)
    for_heads = for_novelty = np.ones(len(clean) * int(rows.sum()), dtype=bool)
    if labelled is not None:
        parts.append(labelled.activations)
        part_labels.append(labelled.true_labels)
        for_heads = np.concatenate([for_heads, labelled.contradicts_the_network])
        for_novelty = np.concatenate([for_novelty, ~labelled.is_poisoned])
    # As many fewer neighbours as images: with the same number among fewer, the factors of a fold would spread less than
    # the final ones do (nearly all of a class are neighbours), and its scores would calibrate too low.
    n_seen = int(for_novelty.sum())
    share = n_seen / (n_seen + len(clean) * int((~rows).sum()))
    scaled = config.replace(n_neighbors=max(1, round(config.n_neighbors * share)))
    ensemble = Ensemble.for_mode(scaled, tuple(activations.depths), demarcation=anomalies is not None)
    return ensemble.fit(Activations.concatenate(parts), np.concatenate(part_labels), for_heads, for_novelty, anomalies)


def _calibrated(config: GuardConfig, raw: Float64Array, part: IntArray) -> tuple[Fusion, Float64Array, float]:
    """Return fusion, ascending combined scores and realised rate of out-of-fold scores."""
    fusion = new_fusion(config.mode).fit(raw)
    combined = _cross_fitted_scores(config, raw, part)
    return fusion, np.sort(combined), _realised_rate(config, fusion, combined, part)


def _cross_fitted_scores(config: GuardConfig, raw: Float64Array, part: IntArray) -> Float64Array:
    """Return the combined score of every clean row under a fusion that was fitted on the other folds.

    Ranking new inputs among scores whose own fusion had seen them would flag more clean inputs than asked for.
    """
    combined = np.empty(len(raw))
    for fold in range(config.folds):
        hold = part == fold
        fusion = new_fusion(config.mode).fit(raw[~hold])
        combined[hold] = fusion.combine(fusion.surprise(raw[hold]))
    return combined


def _realised_rate(config: GuardConfig, fusion: Fusion, combined: Float64Array, part: IntArray) -> float:
    flagged = 0
    for fold in range(config.folds):
        hold = part == fold
        p_values = conformal_p_values(combined[hold], np.sort(combined[~hold]))
        flagged += int(fusion.decide(combined[hold], p_values, config.false_positive_rate).sum())
    return flagged / len(combined)
