"""Crowds of look-alike false alarms: what a trigger that somebody calls clean would be."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from guard.pipeline import Guard
from guard.relabel.items import QueueItem
from guard.retrainer.material import fits
from guard.types import Float64Array

#: Clean images of a class that show how near its neighbours are.
_SAMPLED = 500


def find_crowds(guard: Guard, items: Iterable[QueueItem]) -> dict[int, int]:
    """Return which false alarms look alike: item -> number of its crowd, which is its oldest member.

    The queue groups what is pending, so a trigger that comes in drips gets a new group each time. Here all decided
    false alarms of one answer are looked at together. One that is as near to the founder of a crowd as a clean image
    of the class usually is to its `n_neighbors`-th neighbour joins that crowd; else it founds one. A novelty detector
    takes an input for normal where it finds so many neighbours so near, and a cap on crowds keeps them from it.
    """
    founders: dict[int, tuple[list[int], list[Float64Array]]] = {}
    radii: dict[int, float] = {}
    crowds: dict[int, int] = {}
    for item in sorted(items, key=lambda item: item.id):
        if item.decision is None or item.decision.is_poisoned or not fits(guard, item.input.activations):
            continue
        label, features = item.input.suspect_label, item.input.activations.features[0].astype(np.float64)
        if label not in radii:
            radii[label] = _usual_radius(guard, label)
        ids, places = founders.setdefault(label, ([], []))
        if places:
            distances = np.linalg.norm(np.array(places) - features, axis=1)
            nearest = int(distances.argmin())
            if distances[nearest] <= radii[label]:
                crowds[item.id] = ids[nearest]
                continue
        ids.append(item.id)
        places.append(features)
        crowds[item.id] = item.id
    return crowds


def _usual_radius(guard: Guard, label: int) -> float:
    """Return the median distance of clean images of a class to their k-th neighbour there; infinite for too few."""
    features = guard.reference.features[guard.reference_labels == label][:_SAMPLED].astype(np.float64)
    if len(features) < 2:
        return float("inf")
    squares = (features**2).sum(axis=1)
    squared = np.sort(squares[:, None] - 2 * features @ features.T + squares, axis=1)
    k = min(guard.config.n_neighbors, len(features) - 1)
    return float(np.sqrt(max(0.0, float(np.median(squared[:, k])))))
