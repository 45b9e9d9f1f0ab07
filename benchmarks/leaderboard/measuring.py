"""One model of the zoo against one detector: all figures of a record."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from guard.detection.pipeline import Guard
from guard.errors import NotApplicableError
from guard.lab.rivals import Rival
from guard.lab.zoo.collection import Zoo
from guard.lab.zoo.splits import load_split
from guard.statistics.calibration import conformal_p_values
from guard.statistics.evaluation import attack_success_rate, auroc, clean_accuracy, recovery_accuracy
from guard.suspect.model import SuspectModel
from guard.types import BoolArray, Float32Array, Float64Array, IntArray

#: Rate whose threshold is fixed on clean images, and then looked at on others.
FIXED_RATE = 0.05
#: Share of the clean images that set a rival's threshold, and teach it nothing; the guard calibrates itself.
CALIBRATION_SHARE = 0.2
#: Clean and triggered test images; fewer for detectors of many passes.
CLEAN, TRIGGERED, FEW_CLEAN, FEW_TRIGGERED, MANY_PASSES = 2000, 1000, 1000, 250, 20
TIMED = 20

Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """One model with the images that everybody is measured on."""

    name: str
    data_set: str
    attack: str
    suspect: SuspectModel
    fit_images: Float32Array
    fit_labels: IntArray
    clean: Float32Array
    clean_labels: IntArray
    triggered: Float32Array
    attacker_labels: IntArray
    true_labels: IntArray


def load_subject(zoo: Zoo, name: str, n_clean: int, n_triggered: int, n_fit: int | None = None) -> Subject:
    """Return a model with images drawn with the seed of its card; triggers of one model share the triggered images."""
    card = zoo.card(name)
    split = load_split(card.data_set)
    rng = np.random.default_rng(card.seed)
    rows = np.sort(rng.permutation(len(split.test))[:n_clean])
    fit_rows = np.arange(len(split.validation))
    if n_fit is not None:
        fit_rows = np.sort(rng.permutation(fit_rows)[:n_fit])
    images, labels = split.test.images[rows], split.test.labels[rows]
    sets = [] if card.is_benign else card.restore_attack().test_sets(images, labels)
    chosen = [np.sort(rng.permutation(len(part.images))[: n_triggered // len(sets)]) for part in sets]
    pairs = list(zip(sets, chosen, strict=True))
    empty = np.empty(0, dtype=np.int64)
    return Subject(
        name=name,
        data_set=card.data_set,
        attack=card.attack,
        suspect=SuspectModel(zoo.load(name)),
        fit_images=split.validation.images[fit_rows],
        fit_labels=split.validation.labels[fit_rows],
        clean=images,
        clean_labels=labels,
        triggered=np.concatenate([part.images[take] for part, take in pairs]) if pairs else images[:0],
        attacker_labels=np.concatenate([part.labels[take] for part, take in pairs]) if pairs else empty,
        true_labels=np.concatenate([part.true_labels[take] for part, take in pairs]) if pairs else empty,
    )


def measure(subject: Subject, rival_class: type[Rival], seed: int) -> Figures:
    """Return all figures of one detector on one model; `{"not_applicable": reason}` where it has no meaning."""
    rival = rival_class(seed=seed)
    calibrates = getattr(rival_class, "calibrates_itself", False)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(subject.fit_images))
    n_held = 0 if calibrates else max(int(CALIBRATION_SHARE * len(order)), int(1 / FIXED_RATE))
    taught, held = np.sort(order[n_held:]), np.sort(order[:n_held])
    start = time.perf_counter()
    try:
        rival.fit(subject.suspect, subject.fit_images[taught], subject.fit_labels[taught])
    except NotApplicableError as error:
        return {"not_applicable": str(error)}
    fit_seconds = time.perf_counter() - start
    rival.score(subject.clean[:1])
    few = rival.passes > MANY_PASSES
    clean_images = subject.clean[:FEW_CLEAN] if few else subject.clean
    triggered = np.arange(len(subject.triggered))
    if few:
        triggered = np.sort(rng.permutation(triggered)[:FEW_TRIGGERED])
    clean, found = rival.score(clean_images), _scores(rival, subject.triggered[triggered])
    guard = getattr(rival, "guard", None)
    if isinstance(guard, Guard):
        is_flagged = guard.fusion.decide(clean, conformal_p_values(clean, guard.clean_scores), FIXED_RATE)
    else:
        is_flagged = conformal_p_values(clean, np.sort(rival.score(subject.fit_images[held]))) <= FIXED_RATE
    figures: Figures = {
        "n_clean": len(clean),
        "n_triggered": len(found),
        "realised_false_positive_rate": float(is_flagged.mean()),
        "passes": rival.passes,
        "milliseconds": _milliseconds(rival, subject.clean),
        "fit_seconds": fit_seconds,
    }
    if len(found):
        answers = subject.suspect.activations(subject.triggered[triggered]).predicted_labels
        is_hit = answers == subject.attacker_labels[triggered]
        figures["all"] = _rates(clean, found)
        if is_hit.any():
            figures["hits"] = _rates(clean, found[is_hit])
    if isinstance(guard, Guard):
        figures["after"] = _after(guard, subject)
    return figures


def _scores(rival: Rival, images: Float32Array) -> Float64Array:
    return rival.score(images) if len(images) else np.empty(0)


def _rates(clean: Float64Array, found: Float64Array) -> dict[str, float]:
    """Return AUROC and the share caught at a share of the clean test images flagged; a tie is not caught."""
    clean, found = (np.clip(scores, -1e300, 1e300) for scores in (clean, found))  # of infinite ones no quantile
    is_poisoned: BoolArray = np.r_[np.zeros(len(clean), dtype=bool), np.ones(len(found), dtype=bool)]
    rates = {"auroc": auroc(np.r_[clean, found], is_poisoned)}
    for name, rate in (("0_01", 0.01), ("0_05", 0.05)):
        rates[f"tpr_at_fpr_{name}"] = float((found > np.quantile(clean, 1 - rate, method="higher")).mean())
    return rates


def _milliseconds(rival: Rival, images: Float32Array) -> float:
    """Return the median time of one image by itself, the suspect's own pass included where the score needs it."""
    seconds = []
    for row in range(TIMED):
        start = time.perf_counter()
        rival.score(images[row : row + 1])
        seconds.append(time.perf_counter() - start)
    return 1e3 * float(np.median(seconds))


def _after(guard: Guard, subject: Subject) -> dict[str, float]:
    """Return what clients get at the fixed rate: answers of flagged inputs are withheld, or relabelled by the head."""
    suspect = guard.suspect
    assert suspect is not None
    clean = suspect.activations(subject.clean)
    flagged = guard.scores(clean).is_poisoned
    after = {
        "clean_accuracy_before": clean_accuracy(clean.predicted_labels, subject.clean_labels),
        "clean_accuracy": clean_accuracy(clean.predicted_labels, subject.clean_labels, flagged),
    }
    if len(subject.triggered):
        triggered = suspect.activations(subject.triggered)
        labels = triggered.predicted_labels
        of_triggered = guard.scores(triggered).is_poisoned
        head = guard.ensemble.replacement_logits(triggered).argmax(axis=1)
        wanted, true = subject.attacker_labels, subject.true_labels
        after |= {
            "attack_success_before": attack_success_rate(labels, wanted, true),
            "attack_success": attack_success_rate(labels, wanted, true, of_triggered),
            "recovered": recovery_accuracy(np.where(of_triggered, head, labels), true),
        }
    return after
