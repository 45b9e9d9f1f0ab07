"""Learn from inputs that a person has labelled: a guard and the decisions in, another guard out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from guard.detection.cross_fitting import Progress, cross_fit
from guard.detection.pipeline import Guard
from guard.detection.training_set import Labelled, LabelledCounts, TrainingSet
from guard.errors import DataError
from guard.types import Activations, IntArray

__all__ = ["Labelled", "LabelledCounts", "retrain"]


def retrain(
    guard: Guard, labelled: Labelled, *, anomalies: Activations | None = None, progress: Progress | None = None
) -> Guard:
    """Return a guard that has also learned from labelled inputs; the given one is left as it was.

    Decision heads learn the true labels of the clean reference and of poisoned inputs whose true label is not what the
    network answers. Novelty detectors learn from the clean reference and the false alarms, never from poisoned inputs.
    See `Detector.learns_from`. No head learns from a false alarm: one triggered input with the attacker's
    label, called clean, would teach it the trigger (docs/retraining.md has the figures).

    Calibration, and with it the false-positive rate, rests on the clean reference alone, scored out of fold as in
    `Guard.fit`. False alarms take no part in it: they are the most suspicious clean inputs, picked by the guard itself,
    and as a sample of clean inputs they would make it too tolerant.

    Nothing adds up: the new guard holds the same clean reference and no labelled input, so give **all** labelled inputs
    each time, not the new ones only. Without any, the result is the guard as it was first fitted, but for
    the rounding of the reference (`kept_reference`).

    Of poisoned inputs with one true label, at most as many are learned from as the commonest class has clean images,
    drawn by the guard's seed: whoever sends the trigger on thousands of images of one class must not make the heads
    expect that class everywhere.

    Retraining is no promise: it helps against the attacks that were labelled, on average. Measure the result on clean
    and poisoned inputs that it has not seen before it serves.

    Parameters
    ----------
    guard : Guard
        Fitted, loaded or already retrained.
    labelled : Labelled
        All decisions so far. A wrong one teaches the guard something wrong.
    anomalies : Activations, optional
        Inputs of the traffic that are poisoned, or thought to be, whatever they show. If there are any, a demarcation
        joins the detectors of a guard in `calibrated` mode and tells them from clean inputs (RAID [2]_). It needs no
        true labels, so nobody need have looked at them.
    progress : callable, optional
        Called with a line of text and the share done.

    Returns
    -------
    guard : Guard
        With the settings, suspect model, backup, class names, input shape and preprocessing of the given one;
        `retrained_with` counts what was learned from.

    Raises
    ------
    DataError
        If the labelled inputs lack a depth, or a width differs from the guard's.

    References
    ----------
    .. [1] Fu et al. (2020), Detecting Backdoors in Neural Networks Using Novel Feature-Based Anomaly Detection,
       arXiv 2011.02526, "Retraining with Poisoned Data". There only the decision function is trained again.
    .. [2] Fu et al. (2022), A Feature-Based On-Line Detector to Remove Adversarial-Backdoors by Iterative Demarcation,
       IEEE Access 10.
    """
    _check_fits(guard, labelled.activations)
    if anomalies is not None:
        _check_fits(guard, anomalies)
    labelled = _limited(labelled, guard.reference_labels, guard.config.seed)
    training = TrainingSet(
        guard.reference, guard.reference_labels, guard.noisy_reference, labelled, anomalies, guard.reference_groups
    )
    fitted = cross_fit(guard.config, training, progress=progress)
    return replace(
        guard,
        ensemble=fitted.ensemble,
        fusion=fitted.fusion,
        clean_scores=fitted.clean_scores,
        clean_answers=fitted.clean_answers,
        reference=_copied(guard.reference),
        reference_labels=guard.reference_labels.copy(),
        noisy_reference=_copied(guard.noisy_reference) if guard.noisy_reference is not None else None,
        realised_false_positive_rate=fitted.realised_false_positive_rate,
        contradictions=fitted.contradictions,
        early=fitted.early,
        retrained_with=labelled.counts,
        digest=None,
    )


def _check_fits(guard: Guard, activations: Activations) -> None:
    given = dict(activations.items())
    for name, reference in guard.reference.items():
        if name not in given:
            raise DataError(f"labelled inputs have no depth {name!r}: the guard has {list(guard.reference.depths)}.")
        columns, wanted = given[name].shape[1], reference.shape[1]
        if columns != wanted:
            raise DataError(
                f"{name} of labelled inputs have {columns} columns, the guard's have {wanted}. "
                "Is it the same suspect model?"
            )


def _limited(labelled: Labelled, reference_labels: IntArray, seed: int) -> Labelled:
    limit = int(np.bincount(reference_labels).max())
    rng = np.random.default_rng(seed)
    keep = np.ones(len(labelled), dtype=bool)
    for label in np.unique(labelled.true_labels):
        rows = np.flatnonzero(labelled.is_poisoned & (labelled.true_labels == label))
        keep[rng.permutation(rows)[limit:]] = False
    return labelled[keep]


def _copied(activations: Activations) -> Activations:
    return activations[np.arange(len(activations))]
