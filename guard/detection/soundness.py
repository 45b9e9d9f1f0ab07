"""Whether a bundle says what a fitted guard can say: its arrays keep their rules, and its calibration comes out again.

A digest proves that nothing was changed since it was made, not that what was sealed makes sense. A guard whose clean
scores are NaN or 1e30 would call everything clean; so what is loaded is checked, and scored once more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from guard.arrays import require
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import CalibratedFusion, Fusion
from guard.errors import BundleError, DataError
from guard.statistics.calibration import SurpriseMap, check_rate, conformal_p_values
from guard.storage.bundle import StoredBundle
from guard.types import FEATURES, Activations, AnyArray, BoolArray, Float64Array, IntArray

#: Rows of the clean reference that are scored again, evenly spread.
_ROWS = 256
#: Two machines round differently: so far apart may the scores of a row be, and so many rows may be farther.
_RELATIVE, _ABSOLUTE, _STRAY_ROWS = 2e-3, 2e-3, 0.02
#: In `calibrated` mode each detector's surprise at clean inputs spreads like an exponential variable of mean 1, for any
#: network. The root mean square of it, the combined score of older versions, has a median of 0.7 (all alike) to 1.4
#: (independent); that of softplus of normal scores 0.7 to 1.0, of which the factor may leave half.
_MEDIAN_SCORE = (0.2, 3.0)
#: Detectors have seen the reference, and find it a little less suspicious than calibration does: seen were median
#: p-values of 0.39 to 0.77, and 0.9 with 40 images and less. Heads know the true labels of the reference by heart, so
#: this holds of images that the network gets right: a wrong answer disagrees with them as nothing unseen would.
_LEAST_MEDIAN_P, _GREATEST_MEDIAN_P, _ENOUGH, _ENOUGH_RIGHT = 0.05, 0.97, 100, 10
#: Of fewer images whitened detectors know their own far better than any others: seen were median p-values up to 1.
_ENOUGH_WHITENED = 500
_LARGEST_COUNT = 2**31
#: Array that holds what the clean reference scored when the bundle was written, see `reproduction`.
KEPT = "reproduction"
#: Array that says which clean images are copies of each other, in a bundle of a set that has some.
GROUPS = "groups"
#: Array that says what the network answers to the images of the clean scores; a bundle of an older version has none.
ANSWERS = "clean_answers"
#: So far beyond the clean images, in units of their spread, must an input be flagged at a rate of half a percent.
_FAR, _FAR_P = 100.0, 0.005
#: Beyond this p-value must a detector or a kind find such an input, all others being as usual.
_FAR_ALONE_P = 0.05
#: Arrays of the rule that keeps reproductions.
_OF_KINDS = re.compile(r"(?:fusion|(early\.\d+))\.shows")
#: Logits of an input that any network is sure of.
_SURE = np.array([[1e30, 0.0]])
#: What helps where a stored bundle is not sound.
REMEDY = "Fit again with this version, or activate another one of `guard bundle list`."


class Calibration(NamedTuple):
    """What turns activations into p-values, for the whole guard or for an early verdict."""

    ensemble: Ensemble
    fusion: Fusion
    clean_scores: Float64Array


def rows_scored(n: int) -> IntArray:
    """Return which rows of a clean reference of n are scored again, ascending."""
    rows: IntArray = np.unique(np.linspace(0, n - 1, min(n, _ROWS)).astype(np.int64))
    return rows


def reproduction(calibration: Calibration, sample: Activations) -> Float64Array:
    """Return combined scores and p-values of the sample, shape (2, m): kept in a bundle, to be compared when loaded."""
    ensemble, fusion, clean_scores = calibration
    combined = fusion.combine(fusion.surprise(ensemble.score(sample)), sample.logits)
    return np.stack([combined, conformal_p_values(combined, clean_scores)])


def check_stored(stored: StoredBundle) -> None:
    """Check the document, the clean reference and its scores against each other; nothing is built from them.

    Raises
    ------
    BundleError
        If something is missing, or breaks its rule.
    """
    try:
        _check_document(stored.document)
        _check_reference(stored.document, stored.arrays)
    except (DataError, KeyError, TypeError, AttributeError, ValueError) as error:
        missing = f"it lacks {error}." if isinstance(error, KeyError) else str(error)
        raise BundleError(f"bundle {stored.digest[:12]} is not sound: {missing} {REMEDY}") from error


def check_varied(layers: Mapping[str, AnyArray]) -> None:
    """Refuse a layer, by its name, that is the same for all clean images, with DataError."""
    for name, rows in layers.items():
        if len(rows) > 1 and (rows == rows[:1]).all():
            raise DataError(f"{name} must tell one clean image from another: all {len(rows)} rows are the same.")


def check_calibration(
    name: str, calibration: Calibration, sample: Activations, labels: IntArray, kept: AnyArray | None = None
) -> None:
    """Score clean inputs again and see whether the calibration comes out.

    Parameters
    ----------
    name : str
        Of the verdict, for the error.
    calibration : Calibration
    sample : Activations of m inputs
        The rows of the clean reference that `rows_scored` names.
    labels : ndarray of shape (m,), int64
        Their true labels.
    kept : ndarray or None
        What `reproduction` said when the bundle was written; None for one of an older version.

    Raises
    ------
    DataError
        If it does not.
    """
    ensemble, fusion, clean_scores = calibration
    require({"clean_scores": clean_scores}, "clean_scores", (None,), ascending=True)
    if isinstance(fusion, CalibratedFusion):
        _check_map(fusion.surprise_map_, ensemble, clean_scores)
        _check_kinds(fusion, ensemble)
    with np.errstate(all="ignore"):  # what overflows is refused below
        raw = ensemble.score_fused(sample)  # as requests are scored; the first one finds everything ready
        combined = fusion.combine(fusion.surprise(raw), sample.logits)
    if bad := int((np.isnan(raw).any(axis=1) | ~np.isfinite(combined)).sum()):
        raise DataError(f"{name}: {bad} of {len(raw)} of its own clean images get scores that are not finite.")
    if isinstance(fusion, CalibratedFusion) and fusion.surprise_map_ is not None:
        knots = fusion.surprise_map_.knots
        stuck = _is_constant(raw) & (knots[:, -1] > knots[:, 0])
        if stuck.any():  # with two images in each class, every local outlier factor of a clean image is 1
            stuck &= _is_constant(np.concatenate([raw, ensemble.score_fused(_halfway(sample))]))
        if stuck.any():
            raise DataError(f"{name}: detector {ensemble.names[int(stuck.argmax())]} gives every input the same score.")
        if len(clean_scores) >= _ENOUGH:  # the tail of fewer may be anywhere
            _check_tail(name, fusion, raw, clean_scores)
            _check_each_tail(name, ensemble, fusion, raw)
    is_right = sample.predicted_labels == labels
    enough = _ENOUGH_WHITENED if ensemble.spaces else _ENOUGH
    _check_p_values(name, conformal_p_values(combined, clean_scores), is_right, len(clean_scores) >= enough)
    if kept is None:
        return
    before, p_before = require({"kept": kept}, "kept", (2, len(sample)))
    far = np.abs(combined - before) > _ABSOLUTE + _RELATIVE * np.abs(before)
    if far.mean() > _STRAY_ROWS:
        raise DataError(f"{name}: {int(far.sum())} of {len(far)} clean images get other scores than in fit.")
    if not np.allclose(conformal_p_values(before, clean_scores), p_before, rtol=0, atol=1e-9):
        raise DataError(f"{name}: its clean scores give other p-values than in fit.")


def check_same_answers(name: str, answers: IntArray | None, early: IntArray | None) -> None:
    """Refuse an early verdict whose clean scores are of inputs with other answers than those of the whole guard."""
    if (answers is None) != (early is None):
        raise DataError(f"{name}: {ANSWERS} must be there for every verdict, or for none.")
    if answers is None or early is None:
        return
    require({ANSWERS: early}, ANSWERS, answers.shape, kind="i")
    if not np.array_equal(np.sort(answers), np.sort(early)):
        raise DataError(f"{name}: {ANSWERS} must be those of the whole guard, in another order.")


def check_backup(arrays: Mapping[str, AnyArray]) -> None:
    """Refuse weights and buffers of a backup that are not finite, with DataError."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DataError(f"array {name} of the backup must be finite.")
        if name.endswith("running_var") and array.size and array.min() < 0:
            raise DataError(f"array {name} of the backup must be >= 0, got {array.min()}.")


def share_right(reference: Activations, labels: IntArray) -> float:
    """Return the share of clean images that the suspect model gets right."""
    return float((reference.predicted_labels == labels).mean())


def _is_constant(raw: Float64Array) -> BoolArray:
    constant: BoolArray = (raw == raw[:1]).all(axis=0) & (len(raw) > 1)
    return constant


def _halfway(sample: Activations) -> Activations:
    """Return inputs that lie halfway between each clean one and the next."""
    logits, features, *depths = (
        (name, (rows + np.roll(rows, 1, axis=0)) / np.float32(2)) for name, rows in sample.items()
    )
    return Activations(logits[1], features[1], dict(depths))


def _check_map(surprise_map: SurpriseMap | None, ensemble: Ensemble, clean_scores: Float64Array) -> None:
    n_detectors = 0 if surprise_map is None else len(surprise_map.knots)
    if n_detectors != len(ensemble.names):
        raise DataError(f"there are {len(ensemble.names)} detectors, and {n_detectors} are calibrated.")
    low, high = _MEDIAN_SCORE
    if not low <= (median := float(np.median(clean_scores))) <= high:
        raise DataError(f"the median of clean_scores must be in [{low:g}, {high:g}], got {median:.3g}.")


def _check_kinds(fusion: CalibratedFusion, ensemble: Ensemble) -> None:
    if fusion.kind_scores_ is not None and not fusion.kind_scores_.are_of(ensemble.kinds):
        raise DataError("arrays kinds, shows and whiten are not those of its detectors.")
    if ensemble.spaces and fusion.kind_scores_ is None:
        raise DataError("its detectors read whitened features, and the arrays of how they are combined are missing.")


def _check_tail(name: str, fusion: CalibratedFusion, raw: Float64Array, clean_scores: Float64Array) -> None:
    """Refuse a calibration whose middle is right, and beyond whose tail nothing can be; see `Fusion.largest_scores`."""
    assert fusion.surprise_map_ is not None
    knots, n = fusion.surprise_map_.knots, len(clean_scores)
    most = fusion.largest_scores(n, len(knots))
    if (clean_scores > most).any():
        row = int((clean_scores > most).argmax())
        raise DataError(
            f"{name}: {n - row} of {n} clean_scores are {clean_scores[row]:.3g} or more, and so many cannot be above "
            f"{most[row]:.3g}: too little would be flagged."
        )
    spread = np.maximum(knots[:, -1] - knots[:, 0], raw.max(axis=0) - raw.min(axis=0))
    with np.errstate(all="ignore"):
        far = fusion.combine(fusion.surprise((knots[:, -1] + _FAR * spread)[np.newaxis]), _SURE)
    if (p_value := float(conformal_p_values(far, clean_scores)[0])) > max(_FAR_P, 1.0 / (n + 1)):
        raise DataError(
            f"{name}: an input far beyond all clean images has a p-value of {p_value:.3g}: too little would be flagged."
        )


def _check_each_tail(name: str, ensemble: Ensemble, fusion: CalibratedFusion, raw: Float64Array) -> None:
    """Refuse a calibration that is blind to one detector or one kind of them, whatever the others see."""
    least = -math.log(_FAR_ALONE_P)
    finite = np.where(np.isfinite(raw), raw, 0.0)
    low, middle, high = np.quantile(finite, (0.0, 0.5, 1.0), axis=0)
    far = high + _FAR * (high - low)
    known = np.asarray(high > low, dtype=np.bool_)  # a constant one says nothing of what is far
    alone = fusion.surprise(np.where(np.eye(len(far), dtype=bool), far, middle))
    for place in np.flatnonzero(known):
        if alone[place, place] < least:
            raise DataError(f"{name}: detector {ensemble.names[place]} is not surprised far beyond all clean images.")
    if fusion.kind_scores_ is None:
        return
    # Depths that are compared show what one of them alone does, depths that are averaged what they do together.
    together = fusion.surprise(np.where(fusion.kind_scores_.is_of_kind.T, far, middle))
    of_kinds, of_all = fusion.surprise_of_kinds(alone), fusion.surprise_of_kinds(together)
    for kind, members in enumerate(fusion.kind_scores_.is_of_kind.T):
        if known[members].all() and max(of_kinds[members, kind].max(), of_all[kind, kind]) < least:
            kind_name = ensemble.members[int(members.argmax())].kind
            raise DataError(f"{name}: detectors of kind {kind_name} count for nothing far beyond all clean images.")


def _check_p_values(name: str, p_values: Float64Array, is_right: BoolArray, are_enough: bool) -> None:
    if is_right.sum() >= _ENOUGH_RIGHT and (median := float(np.median(p_values[is_right]))) < _LEAST_MEDIAN_P:
        raise DataError(
            f"{name}: the median p-value of its own clean images that the network gets right is {median:.3g}, below "
            f"{_LEAST_MEDIAN_P:g}."
        )
    if are_enough and (median := float(np.median(p_values))) > _GREATEST_MEDIAN_P:
        raise DataError(
            f"{name}: the median p-value of its own clean images is {median:.3g}, above {_GREATEST_MEDIAN_P:g}: "
            "nothing would be flagged."
        )


def _check_document(document: Mapping[str, Any]) -> None:
    n_classes = _count(document["n_classes"], "n_classes", least=1)
    _count(document["clean_images"], "clean_images", least=1)
    names = document["class_names"]
    if names is not None and not (_are(names, str) and len(names) in (0, n_classes)):
        raise DataError(f"class_names must be {n_classes} texts, or none, got {str(names)[:40]}.")
    if (shape := document["input_shape"]) is not None:
        for size in shape:
            _count(size, "input_shape", least=1)
    depths = document["depths"]
    if not _are(depths, str) or len(set(depths)) < len(depths):
        raise DataError(f"depths must be names, each once, got {str(depths)[:40]}.")
    _rate(document["realised_false_positive_rate"], "realised_false_positive_rate")
    for name, share in (document.get("recovery") or {}).items():
        _rate(share, f"recovery of {name}")
    for early in document.get("early", []):
        _rate(early["realised_false_positive_rate"], "realised_false_positive_rate")
    if about := document.get("contradictions"):
        _count(about["n"], "n of contradictions", least=max(1, _count(about["count"], "count of contradictions", 0)))
    if document.get("split_points") is not None and document.get("weights_digest") is None:
        raise DataError("split_points name layers of a network, and weights_digest does not say which.")


def _check_reference(document: Mapping[str, Any], arrays: Mapping[str, AnyArray]) -> None:
    n, n_classes = document["clean_images"], document["n_classes"]
    labels = require(arrays, "labels", (n,), kind="i", low=0, high=n_classes - 1)
    calibrated = len(require(arrays, "clean_scores", (None,), ascending=True))
    most = n
    if GROUPS in arrays:
        most = len(np.unique(require(arrays, GROUPS, (n,), kind="i", low=0, high=n - 1)))
        check_rate(float(document["settings"]["false_positive_rate"]), calibrated)
    # A round of retraining holds out up to half of each class, and keeps it in the reference for the next one.
    least = max(1, most - sum(math.ceil(size / 2) for size in np.bincount(labels).tolist()))
    if not least <= calibrated <= most:
        raise DataError(f"array clean_scores must have {least} to {most} rows, got {calibrated}.")
    layers = (FEATURES, *document["depths"])
    answered = np.bincount(require(arrays, "reference.logits", (n, n_classes)).argmax(axis=1), minlength=n_classes)
    if ANSWERS in arrays:
        answers = require(arrays, ANSWERS, (calibrated,), kind="i", low=0, high=n_classes - 1)
        if (np.bincount(answers, minlength=n_classes) > answered).any():
            raise DataError(
                f"array {ANSWERS} has a class more often than the network answers the clean images with it."
            )
    widths = {"logits": n_classes} | {
        depth: require(arrays, f"reference.{depth}", (n, None)).shape[1] for depth in layers
    }
    check_varied({f"array reference.{layer}": arrays[f"reference.{layer}"] for layer in widths})
    if any(name.startswith("noisy_reference.") for name in arrays):
        for layer, width in widths.items():
            require(arrays, f"noisy_reference.{layer}", (n, width))
    for name in arrays:
        if of_kinds := _OF_KINDS.fullmatch(name):
            verdict = f"{of_kinds[1]}." if of_kinds[1] else ""
            require(arrays, f"{verdict}{KEPT}", (2, len(rows_scored(n))))
    right = document.get("reference_accuracy")
    if right is not None:
        found = float((arrays["reference.logits"].argmax(axis=1) == labels).mean())
        if abs(_rate(right, "reference_accuracy") - found) > 1e-9:
            raise DataError(f"the model gets {found:.4f} of the clean images right, and got {right:.4f} in fit.")


def _count(value: Any, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < _LARGEST_COUNT:
        raise DataError(f"{name} must be a whole number >= {least}, got {str(value)[:40]}.")
    return value


def _rate(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and 0 <= value <= 1):
        raise DataError(f"{name} must be in [0, 1], got {str(value)[:40]}.")
    return float(value)


def _are(values: Any, kind: type) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)
