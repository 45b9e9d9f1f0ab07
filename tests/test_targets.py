import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks import AllToAll, SingleTarget, SourceSpecific, poisoned_test_set, single_pixel

LABELS = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2], dtype=np.int64)


def test_targets_attacker_labels_are_as_defined():
    assert SingleTarget(2).attacker_labels(LABELS).tolist() == [2] * 10
    assert AllToAll(3).attacker_labels(LABELS).tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 0]
    assert SourceSpecific(2, sources=(0,)).attacker_labels(LABELS).tolist() == [2, 1, 2, 2, 1, 2, 2, 1, 2, 2]


@pytest.mark.parametrize("target", [SingleTarget(2), AllToAll(3), SourceSpecific(2, (0, 1))], ids=repr)
def test_targets_attacker_labels_are_new_int64_and_input_is_unchanged(target):
    labels = LABELS.copy()
    labels.setflags(write=False)
    wanted = target.attacker_labels(labels)
    assert wanted.dtype == np.int64
    assert not np.shares_memory(wanted, labels)
    assert target.attacker_labels(labels[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("target", "is_one_label", "target_labels", "sources"),
    [
        (SingleTarget(7), True, (7,), None),
        (AllToAll(3), False, (0, 1, 2), None),
        (SourceSpecific(0, (4, 2)), True, (0,), (4, 2)),
    ],
    ids=repr,
)
def test_targets_say_which_labels_they_attack(target, is_one_label, target_labels, sources):
    assert target.is_one_label is is_one_label
    assert target.target_labels == target_labels
    assert target.sources == sources


def test_all_to_all_label_at_the_edge_is_taken_and_above_raises():
    images = np.zeros((10, 1, 4, 4), dtype=np.float32)
    assert AllToAll(3).attacker_labels(np.array([2])).tolist() == [0]
    with pytest.raises(DataError, match=r"below n_classes=2, got 2\."):
        AllToAll(2).attacker_labels(LABELS)
    with pytest.raises(DataError, match="below n_classes=2"):
        poisoned_test_set(images, LABELS, single_pixel, AllToAll(2))


def test_targets_at_the_edge_of_the_range_are_taken():
    assert SingleTarget(0).target_labels == (0,)
    assert AllToAll(2).attacker_labels(np.array([0, 1])).tolist() == [1, 0]
    assert SourceSpecific(0, (1,)).attacker_labels(np.array([1, 0])).tolist() == [0, 0]


def test_targets_out_of_range_raise():
    with pytest.raises(DataError, match=r"target label must be >= 0, got -1\."):
        SingleTarget(-1)
    with pytest.raises(DataError, match=r"n_classes must be >= 2, got 1\."):
        AllToAll(1)
    with pytest.raises(DataError, match=r"target label must be >= 0, got -1\."):
        SourceSpecific(-1, (1,))
    with pytest.raises(DataError, match=r"source label must be >= 0, got -2\."):
        SourceSpecific(0, (1, -2))


def test_source_specific_without_sources_or_with_its_target_among_them_raises():
    with pytest.raises(DataError, match="sources names no class"):
        SourceSpecific(0, ())
    with pytest.raises(DataError, match="must not hold the target label 3"):
        SourceSpecific(3, (1, 3))
