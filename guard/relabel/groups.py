"""Groups of look-alike flagged inputs, by their features: probably one trigger each."""

from __future__ import annotations

from collections import Counter

import numpy as np

from guard.relabel.queue import Queue
from guard.types import Float32Array, IntArray

#: Fewer look-alikes than this are no group.
MIN_SIZE = 3
#: Largest mean distance between the halves of a group, after every row was scaled to length 1; 1.0 is an angle of 60
#: degrees. Rows of ReLU features that have nothing to do with each other are about 1.2 apart.
MAX_DISTANCE = 1.0


def cluster(features: Float32Array, *, min_size: int = MIN_SIZE, max_distance: float = MAX_DISTANCE) -> IntArray:
    """Find groups of rows that point in nearly the same direction, by average linkage up to a distance.

    Parameters
    ----------
    features : ndarray of shape (n, d), float32
        Of inputs with the same suspect label.
    min_size : int
        Smallest group.
    max_distance : float
        Clusters that are farther apart on average stay apart; in (0, 2].

    Returns
    -------
    labels : ndarray of shape (n,), int64
        Group of each row, 0, 1, ..., the largest first; -1 = like too few others.
    """
    labels = np.full(len(features), -1, dtype=np.int64)
    if len(features) < max(2, min_size):
        return labels
    from sklearn.cluster import AgglomerativeClustering  # here, as it takes seconds, and most queues need none

    rows = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    model = AgglomerativeClustering(n_clusters=None, distance_threshold=max_distance, linkage="average")
    found = model.fit_predict(rows)
    sizes = np.bincount(found)
    for number, label in enumerate(np.argsort(-sizes, kind="stable")):
        if sizes[label] >= min_size:
            labels[found == label] = number
    return labels


def refresh_groups(queue: Queue, model: str, *, limit: int = 2000, min_size: int = MIN_SIZE) -> int:
    """Group the newest pending items of a model anew, each suspect label by itself; return how many groups there are.

    A group keeps its number while most of its members stay; a new one takes the number of its oldest item.
    """
    ids, suspect_labels, old_groups, features = queue.pending_rows(model, limit)
    new_groups = np.zeros(len(ids), dtype=np.int64)
    clusters: list[IntArray] = []
    for label in np.unique(suspect_labels):
        rows = np.flatnonzero(suspect_labels == label)
        found = cluster(features[rows], min_size=min_size)
        clusters += [rows[found == number] for number in range(found.max() + 1)]
    taken: set[int] = set()
    for rows in sorted(clusters, key=len, reverse=True):
        candidates = [number for number, _ in Counter(old_groups[rows].tolist()).most_common() if number > 0]
        candidates.append(int(ids[rows].min()))
        number = next((candidate for candidate in candidates if candidate not in taken), int(ids[rows].min()))
        taken.add(number)
        new_groups[rows] = number
    changed = np.flatnonzero(new_groups != old_groups)
    queue.set_groups(dict(zip(ids[changed].tolist(), new_groups[changed].tolist(), strict=True)))
    return len(clusters)
