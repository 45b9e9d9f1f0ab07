"""Groups of look-alikes: found where there are any, kept from one look to the next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from queue_helpers import flagged

from guard import Activations
from guard.relabel.groups import cluster, refresh_groups
from guard.relabel.queue import Queue


def around(centre: int, n: int, rng: np.random.Generator, width: float = 0.1) -> np.ndarray:
    """Rows near one corner of a 16-dimensional space."""
    return (np.eye(16)[centre] + width * rng.normal(size=(n, 16))).astype(np.float32)


def test_cluster_finds_two_groups_and_leaves_loners():
    rng = np.random.default_rng(0)
    rows = np.concatenate([around(0, 8, rng), around(1, 5, rng), np.eye(16, dtype=np.float32)[5:8]])
    assert cluster(rows).tolist() == [0] * 8 + [1] * 5 + [-1] * 3


def test_cluster_of_one_group_and_of_equal_rows_is_one_group():
    assert set(cluster(around(0, 6, np.random.default_rng(0)))) == {0}
    assert set(cluster(np.ones((4, 3), np.float32))) == {0}
    assert set(cluster(np.zeros((4, 3), np.float32))) == {0}


def test_cluster_looks_at_direction_not_length():
    rows = around(0, 6, np.random.default_rng(0)) * np.array([[1], [10], [100], [1], [5], [0.1]], dtype=np.float32)
    assert set(cluster(rows)) == {0}


@pytest.mark.parametrize("n", [0, 1, 2])
def test_cluster_of_too_few_rows_is_no_group(n):
    assert cluster(np.ones((n, 3), np.float32)).tolist() == [-1] * n


@pytest.fixture
def queue(queue_url: str) -> Iterator[Queue]:
    with Queue.open(queue_url) as queue:
        yield queue


def enqueue(queue: Queue, rows: np.ndarray, label: int = 3) -> list[int]:
    inputs = [
        flagged(number, suspect_label=label, activations=Activations(np.zeros((1, 10), np.float32), row[None]))
        for number, row in enumerate(rows)
    ]
    return list(queue.enqueue(inputs).ids)


def test_refresh_groups_keeps_suspect_labels_apart_and_numbers_by_the_oldest(queue):
    rng = np.random.default_rng(0)
    first, second = enqueue(queue, around(0, 5, rng), 3), enqueue(queue, around(0, 4, rng), 4)
    assert refresh_groups(queue, "digits") == 2
    assert {group.id: group.size for group in queue.groups()} == {first[0]: 5, second[0]: 4}


def test_refresh_groups_keeps_the_number_when_members_come_and_go(queue):
    rng = np.random.default_rng(0)
    ids = enqueue(queue, around(0, 6, rng))
    refresh_groups(queue, "digits")
    queue.claim_items("ana", ids[:2])
    for item_id in ids[:2]:
        queue.decide("ana", item_id, is_poisoned=True, true_label=5)
    enqueue(queue, around(0, 3, rng))
    assert refresh_groups(queue, "digits") == 1
    [group] = queue.groups()
    assert (group.id, group.size, group.pending) == (ids[0], 9, 7)


def test_refresh_groups_of_nothing_is_nothing(queue):
    assert refresh_groups(queue, "digits") == 0
    assert queue.groups() == []
