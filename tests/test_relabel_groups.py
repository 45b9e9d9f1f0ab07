"""Groups of look-alikes: found where there are any, kept from one look to the next."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from queue_helpers import flagged

from guard import Activations
from guard.relabel.groups import cluster, refresh_groups
from guard.relabel.queue import Queue
from guard.relabel.usefulness import usefulness


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


# --- what to ask first ---


def test_usefulness_values():
    """The middle first, then the farthest from what came before; one of four look-alikes is worth more than a loner."""
    rows = np.array([[1, 0], [1, 0.2], [1, 0.1], [0, 1], [1, -0.3]], dtype=np.float32)
    root = np.sqrt(4)
    useful = usefulness(np.array([7, 7, 7, 0, 7]), rows)
    assert useful.tolist() == pytest.approx([root, root / 3, root / 4, 1, root / 2])


def test_usefulness_of_copies_and_of_nothing():
    assert sorted(usefulness(np.ones(3, dtype=np.int64), np.zeros((3, 2), np.float32))) == pytest.approx(
        [np.sqrt(3) / k for k in (3, 2, 1)]
    )
    assert usefulness(np.zeros(0, dtype=np.int64), np.zeros((0, 0), np.float32)).tolist() == []


def test_order_of_usefulness_asks_for_each_kind_before_more_of_a_flood(queue):
    rng = np.random.default_rng(0)
    flood, kind = enqueue(queue, around(0, 30, rng)), enqueue(queue, around(1, 4, rng))
    [loner] = enqueue(queue, around(5, 1, rng))
    refresh_groups(queue, "digits")
    asked = {item.id for item in queue.claim("ana", 8, order="usefulness")}
    assert len(asked & {*flood}) == 5  # 5.5, 2.7, 1.8, 1.4 and 1.1
    assert len(asked & {*kind}) == 2  # 2 and 1
    assert loner in asked
    late = enqueue(queue, around(2, 1, rng))
    assert late[0] not in {
        item.id for item in queue.claim("bob", 27, order="usefulness")
    }  # nobody has looked at it yet


def test_usefulness_does_not_tell_an_audit_from_a_flagged_input(queue):
    """Two look-alikes of a kind each time, one of them an audit: which one makes no difference."""
    orders = []
    for audited in (0, 1):
        rows = around(4 + audited, 6, np.random.default_rng(3))
        rows = np.roll(rows, -audited, axis=1)  # the same numbers, in another direction
        ids = []
        for number, row in enumerate(rows):
            activations = Activations(np.zeros((1, 10), np.float32), np.roll(row, audited)[None])
            probability = 0.1 if number % 2 == audited else None
            given = flagged(number, suspect_label=3, activations=activations, audit_probability=probability)
            ids += queue.enqueue([given]).ids
        refresh_groups(queue, "digits")
        claimed = [item.id for item in queue.claim("ana", 6, order="usefulness")]
        orders.append([ids.index(item_id) for item_id in claimed])
    assert orders[0] == orders[1]
