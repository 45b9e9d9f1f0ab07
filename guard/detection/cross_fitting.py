"""Fit detectors and calibrate them on the same clean data, without any score that its own detector has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from guard.config import GuardConfig
from guard.detection.contradictions import Contradictions
from guard.detection.detectors.base import Detector, FitsParts
from guard.detection.detectors.lof import PerClassLof
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import Fusion, new_fusion
from guard.detection.heads.head_training import holds_out_enough, one_thread
from guard.detection.training_set import Examples, TrainingSet
from guard.statistics.calibration import conformal_p_values, stratified_folds
from guard.statistics.class_ranks import ClassRanks, class_groups
from guard.types import BACKUP, FEATURES, BoolArray, Float64Array, FloatArray, IntArray

#: Detectors of `calibrated` mode are cheap to fit, and those of few folds noticeably worse than the final ones, which
#: makes calibration too cautious; the more so the fewer images there are.
_FOLDS, _FEW_IMAGES, _FOLDS_OF_FEW = 10, 500, 20
#: Called with a line for a person and the share done, in [0, 1].
Progress = Callable[[str, float], None]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class EarlyFit:
    """A verdict that looks at the first few depths only, with a calibration of its own.

    Attributes
    ----------
    depth : str
        The deepest that it looks at.
    ensemble, fusion, clean_scores, realised_false_positive_rate
        As of `CrossFit`.
    clean_answers : ndarray of shape (n,), int64, or None
        The same; None in an older bundle.
    """

    depth: str
    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    clean_answers: IntArray | None
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
        Combined scores of the distinct clean rows, each under detectors and a fusion that had not seen it.
    clean_answers : ndarray of shape (n,), int64
        What the network answers to the rows of `clean_scores`, in their order.
    realised_false_positive_rate : float
        Share of distinct clean rows flagged when each fold is ranked among the others.
    contradictions : Contradictions
        Among the distinct clean rows.
    early : tuple of EarlyFit
        Where the settings ask for verdicts at several depths, one per depth before the split layer, in order.
    """

    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array
    clean_answers: IntArray
    realised_false_positive_rate: float
    contradictions: Contradictions
    early: tuple[EarlyFit, ...] = ()


def cross_fit(
    config: GuardConfig, training: TrainingSet, *, threads: int = 1, progress: Progress | None = None
) -> CrossFit:
    """Fit and calibrate the detectors of a mode.

    Parameters
    ----------
    config : GuardConfig
    training : TrainingSet
        Its clean inputs are learned from and scored, out of fold; all else is learned from in every fold, never scored.
        Copies stay in one fold, and one of them is scored.
    threads : int
        How many folds are fitted side by side, >= 1; each takes one core and a copy of its clean activations. The
        result is the same for any number.
    progress : callable, optional
        Called with a line of text and the share done.
    """
    report = progress or _silent
    activations, labels, depths = training.clean, training.labels, training.depths
    scored = np.flatnonzero(training.is_distinct)
    folds = folds_for(config, len(scored))
    part = stratified_folds(labels, folds, config.seed, training.groups)
    part_scored = part[scored]
    # With early stopping here and without it there, heads of the folds would be sure otherwise than the final ones.
    stops_early = all(holds_out_enough(labels[training.teaches & (part != fold)]) for fold in range(folds))
    wanted = Ensemble.for_mode(config, depths, with_anomalies=training.has_anomalies, stops_early=stops_early)
    raw = np.empty((len(scored), len(wanted.names)))
    layers = [depth for depth in depths if depth != BACKUP] if config.anytime else []
    early_raw = [np.empty((len(scored), len(wanted.up_to(layers[: k + 1]).names))) for k in range(len(layers))]
    examples = training.examples(training.teaches)
    fold_of = np.full(len(examples.labels), -1)  # of no fold: labelled inputs and anomalies
    of_clean = np.tile(part[training.teaches], training.copies)
    fold_of[: len(of_clean)] = of_clean
    #: Member, and the folds whose detectors are fitted at once; the last one of all is left out of nothing.
    portions = [
        (member.name, member.detector, portion)
        for member in wanted.members
        if isinstance(member.detector, FitsParts)
        for portion in member.detector.portions(folds + 1, examples.activations)
    ]
    ready: list[dict[str, Detector]] = [{} for _ in range(folds + 1)]

    def fit_portion(place: int) -> Sequence[Detector]:
        _, detector, portion = portions[place]
        learns = np.isin(examples.sources, [*detector.learns_from])
        rows = [np.flatnonzero(learns & (fold_of != fold)) for fold in portion]
        return detector.fit_parts(examples.activations, examples.labels, rows)

    def fit_part(fold: int) -> Ensemble | tuple[Float64Array, list[Float64Array]]:
        """Return the scores of one fold, or after the last fold the detectors that have seen all of them."""
        fitted = _fitted_ensemble(config, training, examples, fold_of != fold, stops_early, ready[fold])
        if fold == folds:
            return fitted
        held_out = activations[scored[part_scored == fold]]
        early = (fitted.up_to(layers[: k + 1]) for k in range(len(layers)))
        return fitted.score(held_out), [shallow.score(held_out) for shallow in early]

    n_pieces = len(portions) + folds + 1

    def report_piece(done: int) -> None:
        report(f"fitting, part {done} of {n_pieces}", 0.1 + 0.87 * done / n_pieces)

    for done, (place, detectors) in enumerate(_side_by_side(fit_portion, len(portions), threads), start=1):
        report_piece(done)
        name, _, portion = portions[place]
        for fold, detector in zip(portion, detectors, strict=True):
            ready[fold][name] = detector
    for done, (fold, result) in enumerate(_side_by_side(fit_part, folds + 1, threads), start=len(portions) + 1):
        report_piece(done)
        if isinstance(result, Ensemble):
            ensemble = result
            continue
        for scores, found in zip((raw, *early_raw), (result[0], *result[1]), strict=True):
            scores[part_scored == fold] = found
    report("calibrating", 0.97)
    answers = activations.logits[scored], labels[scored]
    early = [
        EarlyFit(layers[k], early_ensemble, *_calibrated(config, early_ensemble, scores, *answers, part_scored))
        for k, scores in enumerate(early_raw)
        for early_ensemble in [ensemble.up_to(layers[: k + 1])]
    ]
    report("fitted", 1.0)
    contradictions = Contradictions.among(raw[:, wanted.names.index(f"disagreement:{FEATURES}")], *answers)
    calibrated = _calibrated(config, ensemble, raw, *answers, part_scored)
    return CrossFit(ensemble, *calibrated, contradictions, tuple(early))


def folds_for(config: GuardConfig, n_images: int) -> int:
    """Return in how many parts so many distinct clean images are cut."""
    if config.folds is not None or config.mode == "paper":
        return config.fewest_folds
    wanted = _FOLDS_OF_FEW if n_images < _FEW_IMAGES else _FOLDS
    return max(config.fewest_folds, min(wanted, n_images // 2))


def _side_by_side(work: Callable[[int], _Result], n: int, threads: int) -> Iterator[tuple[int, _Result]]:
    """Do n pieces of work, and give back number and result of each as it is done; after an error no further begins."""
    if threads == 1:
        yield from ((number, work(number)) for number in range(n))
        return
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # here: a server loads less without

    with threadpool_limits(limits=1), one_thread(), ThreadPoolExecutor(threads) as pool:
        pieces = {pool.submit(work, number): number for number in range(n)}
        try:
            for piece in as_completed(pieces):
                yield pieces.pop(piece), piece.result()
        finally:
            for piece in pieces:
                piece.cancel()


def _silent(_text: str, _share: float) -> None:
    """Report nothing."""


def _fitted_ensemble(
    config: GuardConfig,
    training: TrainingSet,
    examples: Examples,
    rows: BoolArray,
    stops_early: bool,
    ready: Mapping[str, Detector],
) -> Ensemble:
    """Fit on the chosen rows of the examples; detectors that are ready are taken as they are."""
    # As many fewer neighbours as images: with the same number among fewer, the factors of a fold would spread less than
    # the final ones do (nearly all of a class are neighbours), and its scores would calibrate too low.
    is_seen = np.isin(examples.sources, [*PerClassLof.learns_from])
    scaled = config.replace(n_neighbors=max(1, round(config.n_neighbors * is_seen[rows].sum() / is_seen.sum())))
    ensemble = Ensemble.for_mode(
        scaled, training.depths, with_anomalies=training.has_anomalies, stops_early=stops_early
    )
    return ensemble.fit(examples.activations[rows], examples.labels[rows], examples.sources[rows], ready)


def _calibrated(
    config: GuardConfig, ensemble: Ensemble, raw: Float64Array, logits: FloatArray, labels: IntArray, part: IntArray
) -> tuple[Fusion, Float64Array, IntArray, float]:
    """Return fusion, ascending combined scores, the answers in their order, and realised rate of out-of-fold scores."""
    fusion = new_fusion(config.mode).fit(raw, logits, labels, ensemble.kinds)
    # Ranking new inputs among scores whose own fusion had seen them would flag more clean inputs than asked for.
    combined = np.empty(len(raw))
    for fold in np.unique(part):
        hold = part == fold
        others = new_fusion(config.mode).fit(raw[~hold], logits[~hold], labels[~hold], ensemble.kinds)
        combined[hold] = others.combine(others.surprise(raw[hold]), logits[hold])
    answers, order = logits.argmax(axis=1), np.argsort(combined, kind="stable")
    # A fold with a class of few images may score without bound.
    ordered = np.minimum(combined[order], fusion.largest_scores(*raw.shape))
    groups = None
    if config.false_positive_rate_scope == "class":
        groups = class_groups(answers, logits.shape[1], config.false_positive_rate)
    return fusion, ordered, answers[order], _realised_rate(config, fusion, combined, part, answers, groups)


def _realised_rate(
    config: GuardConfig,
    fusion: Fusion,
    combined: Float64Array,
    part: IntArray,
    answers: IntArray,
    groups: IntArray | None,
) -> float:
    flagged = 0
    for fold in np.unique(part):
        hold = part == fold
        if groups is None:
            p_values = conformal_p_values(combined[hold], np.sort(combined[~hold]))
        else:
            others = ClassRanks.among(combined[~hold], answers[~hold], groups)
            p_values = others.p_values(combined[hold], answers[hold])
        flagged += int(fusion.decide(combined[hold], p_values, config.false_positive_rate).sum())
    return flagged / len(combined)
