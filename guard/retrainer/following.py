"""Calibration that follows the clean traffic, where somebody asks for that: reviewed inputs only, within bounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from guard.detection.pipeline import Guard
from guard.retrainer.candidate import Pair
from guard.retrainer.material import Material
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.traffic import CleanTraffic
from guard.types import Float64Array

#: Weight of the traffic beside the clean images.
_SHARE = 0.5
#: A p-value of calibration is at most so many times as large afterwards, and at least so many times smaller.
MOST = 2.0


def follow_traffic(guard: Guard, pair: Pair, material: Material, settings: RetrainerSettings) -> Pair:
    """Return the pair with a candidate whose p-values tell how its scores lie among the clean traffic, too.

    Without `follow_traffic`, or with fewer clean audits than `min_clean_audits`, it is returned as it is.

    Parameters
    ----------
    guard : Guard
        Its clean reference is read.
    pair : Pair
    material : Material
    settings : RetrainerSettings
    """
    if not settings.follow_traffic:
        return pair
    clean = CleanTraffic.of(guard, material, settings)
    if clean.n_audits < settings.min_clean_audits:
        return pair
    return pair._replace(candidate=_recalibrated(pair.candidate, clean), final=_recalibrated(pair.promoted, clean))


def _recalibrated(guard: Guard, clean: CleanTraffic) -> Guard:
    scores = guard.scores(clean.activations).combined
    return replace(guard, clean_scores=mixed_scores(guard.clean_scores, scores, clean.weights))


def mixed_scores(scores: Float64Array, traffic: Float64Array, weights: Float64Array) -> Float64Array:
    """Return the scores of as many clean inputs as before, half of them as of the images and half as of the traffic.

    Every quantile is that of both samples together; it stays between those that `scores` has at twice and at half the
    probability to be exceeded, and so the rate at any threshold changes by a factor of two at most.

    Parameters
    ----------
    scores : ndarray of shape (n,), float64, ascending
    traffic : ndarray of shape (m,), float64
    weights : ndarray of shape (m,), float64
        How many inputs each stands for, > 0.
    """
    n = len(scores)
    values = np.concatenate([scores, traffic])
    shares = np.concatenate([np.full(n, (1 - _SHARE) / n), _SHARE * weights / weights.sum()])
    descending = np.argsort(-values, kind="stable")
    exceeded = np.cumsum(shares[descending])
    wanted = np.arange(n, 0, -1) / n  # of the smallest all, of the largest 1 in n
    places = np.searchsorted(exceeded, wanted - 1e-9)
    mixed = values[descending[np.minimum(places, len(values) - 1)]]
    ranks = np.arange(n, 0, -1)
    lowest = scores[n - np.minimum(n, np.ceil(MOST * ranks).astype(np.int64))]
    highest = scores[n - np.maximum(1, np.floor(ranks / MOST).astype(np.int64))]
    bounded: Float64Array = np.clip(mixed, lowest, highest)
    return bounded
