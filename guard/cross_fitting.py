"""Fit detectors and calibrate them on the same clean data, without any score that its own detector has seen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from guard.calibration import classes_with_own_map, conformal_p_values, stratified_folds
from guard.config import GuardConfig
from guard.ensemble import Ensemble
from guard.fusion import Fusion, new_fusion
from guard.types import Activations, BoolArray, Float64Array, IntArray

#: Called with a line for a person and the share done, in [0, 1].
Progress = Callable[[str, float], None]


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
    """

    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    realised_false_positive_rate: float


def cross_fit(
    config: GuardConfig, activations: Activations, labels: IntArray, noisy: Activations | None, report: Progress
) -> CrossFit:
    """Fit and calibrate the detectors of a mode.

    Parameters
    ----------
    config : GuardConfig
    activations : Activations
        Of clean inputs, finite.
    labels : ndarray of shape (n,), int64
        True labels.
    noisy : Activations or None
        Of the same inputs with noise; learned from together with their own row, never scored.
    report : callable
        Called with a line of text and the share done.
    """
    part = stratified_folds(labels, config.folds, config.seed)
    predicted = activations.predicted_labels
    raw = np.empty((len(labels), len(Ensemble.for_mode(config, tuple(activations.depths)).names)))
    for fold in range(config.folds):
        report(f"cross-fitting, part {fold + 1} of {config.folds}", 0.1 + 0.7 * fold / config.folds)
        learn, hold = part != fold, part == fold
        raw[hold] = _fitted_ensemble(config, activations, labels, noisy, learn).score(activations[hold])
    report("fitting the detectors on all clean images", 0.8)
    ensemble = _fitted_ensemble(config, activations, labels, noisy, np.ones(len(labels), dtype=bool))
    report("calibrating", 0.97)
    own_map = classes_with_own_map(predicted, activations.logits.shape[1], config.min_images_per_class)
    fusion = new_fusion(config.mode).fit(raw, predicted, own_map)
    combined = _cross_fitted_scores(config, raw, predicted, own_map, part)
    rate = _realised_rate(config, fusion, combined, part)
    report("fitted", 1.0)
    return CrossFit(ensemble, fusion, np.sort(combined), rate)


def _fitted_ensemble(
    config: GuardConfig, activations: Activations, labels: IntArray, noisy: Activations | None, rows: BoolArray
) -> Ensemble:
    learn, learn_labels = activations[rows], labels[rows]
    if noisy is not None:
        learn = Activations.concatenate([learn, noisy[rows]])
        learn_labels = np.concatenate([learn_labels, learn_labels])
    # As many fewer neighbours as images: with the same number among fewer, the factors of a fold would spread less than
    # the final ones do (nearly all of a class are neighbours), and its scores would calibrate too low.
    scaled = config.replace(n_neighbors=max(1, round(config.n_neighbors * float(rows.mean()))))
    return Ensemble.for_mode(scaled, tuple(activations.depths)).fit(learn, learn_labels)


def _cross_fitted_scores(
    config: GuardConfig, raw: Float64Array, predicted: IntArray, own_map: BoolArray, part: IntArray
) -> Float64Array:
    """Return the combined score of every clean row under a fusion that was fitted on the other folds.

    Ranking new inputs among scores whose own fusion had seen them would flag more clean inputs than asked for.
    """
    combined = np.empty(len(raw))
    for fold in range(config.folds):
        hold = part == fold
        fusion = new_fusion(config.mode).fit(raw[~hold], predicted[~hold], own_map)
        combined[hold] = fusion.combine(fusion.surprise(raw[hold], predicted[hold]))
    return combined


def _realised_rate(config: GuardConfig, fusion: Fusion, combined: Float64Array, part: IntArray) -> float:
    flagged = 0
    for fold in range(config.folds):
        hold = part == fold
        p_values = conformal_p_values(combined[hold], np.sort(combined[~hold]))
        flagged += int(fusion.decide(combined[hold], p_values, config.false_positive_rate).sum())
    return flagged / len(combined)
