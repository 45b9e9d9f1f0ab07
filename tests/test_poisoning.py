import numpy as np
import pytest

from guard.attacks import AllToAll, SingleTarget, poison, poisoned_test_set, single_pixel
from guard.errors import DataError


@pytest.fixture
def images():
    return (np.random.default_rng(0).random((10, 1, 4, 4)) * 0.5).astype(np.float32)


@pytest.fixture
def labels():
    return np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2], dtype=np.int64)


def rng():
    return np.random.default_rng(3)


def test_targets_attacker_labels_are_as_defined(labels):
    assert SingleTarget(2).attacker_labels(labels).tolist() == [2] * 10
    assert AllToAll(3).attacker_labels(labels).tolist() == [1, 2, 0, 1, 2, 0, 1, 2, 0, 0]


def test_poison_add_appends_triggered_copies_and_marks_exactly_them(images, labels):
    poisoned = poison(images, labels, single_pixel, SingleTarget(2), 0.3, rng())
    assert len(poisoned) == 13
    assert poisoned.is_poisoned.tolist() == [False] * 10 + [True] * 3
    np.testing.assert_array_equal(poisoned.images[:10], images)
    np.testing.assert_array_equal(poisoned.labels[:10], labels)
    rows = poisoned.source_rows[10:]
    assert len(set(rows.tolist())) == 3
    np.testing.assert_array_equal(poisoned.images[10:], single_pixel(images[rows]))
    assert poisoned.labels[10:].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(poisoned.true_labels, labels[poisoned.source_rows])
    assert 2 not in poisoned.true_labels[10:]


def test_poison_replace_touches_exactly_the_marked_rows(images, labels):
    poisoned = poison(images, labels, single_pixel, AllToAll(3), 0.4, rng(), how="replace")
    assert len(poisoned) == 10
    assert poisoned.is_poisoned.sum() == 4
    differs = (poisoned.images != images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(differs, poisoned.is_poisoned)
    np.testing.assert_array_equal(poisoned.labels != labels, poisoned.is_poisoned)
    np.testing.assert_array_equal(poisoned.labels[differs], (labels[differs] + 1) % 3)
    np.testing.assert_array_equal(poisoned.true_labels, labels)
    assert poisoned.source_rows.tolist() == list(range(10))


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_input_is_unchanged(images, labels, how):
    before = images.copy(), labels.copy()
    poison(images, labels, single_pixel, AllToAll(3), 1.0, rng(), how=how)
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_poison_same_seed_picks_same_rows_and_other_seed_others():
    images = np.zeros((200, 1, 4, 4), dtype=np.float32)
    labels = np.zeros(200, dtype=np.int64)
    picked = [
        poison(images, labels, single_pixel, SingleTarget(1), 0.2, np.random.default_rng(seed))
        .source_rows[200:]
        .tolist()
        for seed in (0, 0, 1)
    ]
    assert picked[0] == picked[1] != picked[2]


def test_poison_rate_at_highest_possible_takes_all_and_above_raises(images, labels):
    assert poison(images, labels, single_pixel, SingleTarget(2), 0.6, rng()).is_poisoned.sum() == 6
    with pytest.raises(DataError, match=r"at most 0\.600"):
        poison(images, labels, single_pixel, SingleTarget(2), 0.7, rng())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, float("nan")])
def test_poison_rate_out_of_range_raises(images, labels, rate):
    with pytest.raises(DataError, match=r"rate must be in \(0, 1\]"):
        poison(images, labels, single_pixel, AllToAll(3), rate, rng())


def test_poison_rate_that_picks_none_raises(images, labels):
    with pytest.raises(DataError, match="poisons none of 10"):
        poison(images, labels, single_pixel, AllToAll(3), 0.01, rng())


def test_poison_unknown_how_raises(images, labels):
    with pytest.raises(DataError, match="how must be"):
        poison(images, labels, single_pixel, AllToAll(3), 0.5, rng(), how="both")


@pytest.mark.parametrize(
    "bad",
    [np.zeros(9, dtype=np.int64), np.zeros(10), np.full(10, -1), [0] * 10],
    ids=["short", "float", "negative", "list"],
)
def test_poison_labels_out_of_rule_raise(images, bad):
    with pytest.raises(DataError, match="labels must"):
        poison(images, bad, single_pixel, AllToAll(3), 0.5, rng())


def test_poison_no_images_raises():
    with pytest.raises(DataError, match="no images"):
        poison(np.zeros((0, 1, 4, 4), np.float32), np.zeros(0, np.int64), single_pixel, AllToAll(3), 0.5, rng())


def test_poisoned_test_set_single_target_leaves_target_class_out(images, labels):
    poisoned = poisoned_test_set(images, labels, single_pixel, SingleTarget(2))
    assert poisoned.source_rows.tolist() == [0, 1, 3, 4, 6, 7]
    assert poisoned.labels.tolist() == [2] * 6
    assert poisoned.true_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert poisoned.is_poisoned.all()
    np.testing.assert_array_equal(poisoned.images, single_pixel(images[poisoned.source_rows]))


def test_poisoned_test_set_all_to_all_keeps_every_image(images, labels):
    poisoned = poisoned_test_set(images, labels, single_pixel, AllToAll(3))
    assert poisoned.source_rows.tolist() == list(range(10))
    np.testing.assert_array_equal(poisoned.labels, (labels + 1) % 3)


def test_poisoned_test_set_only_target_class_raises(images):
    with pytest.raises(DataError, match="nothing can be measured"):
        poisoned_test_set(images, np.full(10, 2), single_pixel, SingleTarget(2))


def test_all_to_all_label_above_n_classes_raises(images, labels):
    with pytest.raises(DataError, match="below n_classes=2"):
        poisoned_test_set(images, labels, single_pixel, AllToAll(2))


def test_targets_out_of_range_raise():
    with pytest.raises(DataError, match="target label must be >= 0"):
        SingleTarget(-1)
    with pytest.raises(DataError, match="n_classes must be >= 2"):
        AllToAll(1)
