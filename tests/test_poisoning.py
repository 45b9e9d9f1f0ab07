import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks import (
    AllToAll,
    Backdoor,
    Cover,
    CropAndFlip,
    SingleTarget,
    SourceSpecific,
    pixel_pattern,
    poison,
    poisoned_test_set,
    single_pixel,
)


@pytest.fixture
def images():
    return (np.random.default_rng(0).random((10, 1, 4, 4)) * 0.5).astype(np.float32)


@pytest.fixture
def labels():
    return np.array([0, 1, 2, 0, 1, 2, 0, 1, 2, 2], dtype=np.int64)


@pytest.fixture
def many_images():
    """200 images, grey below 0.5: whatever is brighter is a trigger's."""
    return (np.random.default_rng(1).random((200, 1, 8, 8)) * 0.5).astype(np.float32)


@pytest.fixture
def many_labels():
    return np.arange(200, dtype=np.int64) % 10


def rng():
    return np.random.default_rng(3)


def dot(row, column, value=1.0):
    """A trigger of one pixel."""
    return lambda images: single_pixel(images, row=row, column=column, value=value)


def frozen(*arrays):
    """The same, read-only, as the zoo's splits are."""
    copies = tuple(array.copy() for array in arrays)
    for copy in copies:
        copy.setflags(write=False)
    return copies


def test_poison_add_appends_triggered_copies_and_marks_exactly_them(images, labels):
    poisoned = poison(images, labels, Backdoor(single_pixel, SingleTarget(2), 0.3), rng())
    assert len(poisoned) == 13
    assert poisoned.is_poisoned.tolist() == [False] * 10 + [True] * 3
    np.testing.assert_array_equal(poisoned.images[:10], images)
    np.testing.assert_array_equal(poisoned.labels[:10], labels)
    rows = poisoned.source_rows[10:]
    assert poisoned.source_rows[:10].tolist() == list(range(10))
    assert len(set(rows.tolist())) == 3
    np.testing.assert_array_equal(poisoned.images[10:], single_pixel(images[rows]))
    assert poisoned.labels[10:].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(poisoned.true_labels, labels[poisoned.source_rows])
    assert 2 not in poisoned.true_labels[10:]
    assert not poisoned.is_cover.any()


def test_poison_replace_touches_exactly_the_marked_rows(images, labels):
    poisoned = poison(images, labels, Backdoor(single_pixel, AllToAll(3), 0.4), rng(), how="replace")
    assert len(poisoned) == 10
    assert poisoned.is_poisoned.sum() == 4
    differs = (poisoned.images != images).any(axis=(1, 2, 3))
    np.testing.assert_array_equal(differs, poisoned.is_poisoned)
    np.testing.assert_array_equal(poisoned.labels != labels, poisoned.is_poisoned)
    np.testing.assert_array_equal(poisoned.labels[differs], (labels[differs] + 1) % 3)
    np.testing.assert_array_equal(poisoned.true_labels, labels)
    assert poisoned.source_rows.tolist() == list(range(10))


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_input_is_unchanged_and_result_is_its_own(images, labels, how):
    before = images.copy(), labels.copy()
    covers = [Cover(single_pixel, 0.1)]
    poisoned = poison(images, labels, Backdoor(single_pixel, AllToAll(3), 0.9), rng(), covers=covers, how=how)
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])
    poisoned.images[:] = 0.0
    poisoned.labels[:] = 0
    poisoned.true_labels[:] = 0
    np.testing.assert_array_equal(images, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_read_only_images_give_the_same_as_writable_ones(images, labels, how):
    backdoors, covers = Backdoor(single_pixel, SingleTarget(2), 0.3), [Cover(single_pixel, 0.2)]
    entry = poison(images, labels, backdoors, rng(), covers=covers, how=how)
    other = poison(*frozen(images, labels), backdoors, rng(), covers=covers, how=how)
    for name in ("images", "labels", "true_labels", "is_poisoned", "is_cover", "source_rows"):
        np.testing.assert_array_equal(getattr(entry, name), getattr(other, name))
    redrawn = [poisoned.redrawn(CropAndFlip(1), rng()) for poisoned in (entry, other)]
    np.testing.assert_array_equal(*redrawn)
    tested = poisoned_test_set(*frozen(images, labels), single_pixel, SingleTarget(2))
    np.testing.assert_array_equal(tested.redrawn(lambda now, _: now, rng()), tested.images)


def test_poison_same_seed_picks_same_rows_and_other_seed_others():
    images = np.zeros((200, 1, 4, 4), dtype=np.float32)
    labels = np.zeros(200, dtype=np.int64)
    backdoor = Backdoor(single_pixel, SingleTarget(1), 0.2)
    picked = [
        poison(images, labels, backdoor, np.random.default_rng(seed)).source_rows[200:].tolist() for seed in (0, 0, 1)
    ]
    assert picked[0] == picked[1] != picked[2]


def test_poison_rate_at_highest_possible_takes_all_and_above_raises(images, labels):
    assert poison(images, labels, Backdoor(single_pixel, SingleTarget(2), 0.6), rng()).is_poisoned.sum() == 6
    with pytest.raises(DataError, match=r"rate=0.7 needs 7 images, but only 6 are eligible.*at most 0\.600"):
        poison(images, labels, Backdoor(single_pixel, SingleTarget(2), 0.7), rng())


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.0, 1.01, float("nan")])
def test_poison_rate_out_of_range_raises(rate):
    with pytest.raises(DataError, match=r"^rate must be in \(0, 1\), got"):
        Backdoor(single_pixel, AllToAll(3), rate)
    with pytest.raises(DataError, match=r"^cover rate must be in \(0, 1\), got"):
        Cover(single_pixel, rate)


@pytest.mark.parametrize("rate", [1e-9, 1 - 1e-9])
def test_poison_rate_just_inside_the_range_is_taken(rate):
    assert Backdoor(single_pixel, AllToAll(3), rate).rate == Cover(single_pixel, rate).rate == rate


def test_poison_rate_that_picks_none_raises(images, labels):
    with pytest.raises(DataError, match=r"^rate=0.01 touches none of 10"):
        poison(images, labels, Backdoor(single_pixel, AllToAll(3), 0.01), rng())
    backdoor = Backdoor(single_pixel, AllToAll(3), 0.5)
    with pytest.raises(DataError, match=r"^cover rate=0.02 touches none of 10"):
        poison(images, labels, backdoor, rng(), covers=[Cover(single_pixel, 0.02)])


def test_poison_nothing_to_plant_raises(images, labels):
    with pytest.raises(DataError, match="no backdoor to plant"):
        poison(images, labels, [], rng())


def test_poison_unknown_how_raises(images, labels):
    with pytest.raises(DataError, match="how must be"):
        poison(images, labels, Backdoor(single_pixel, AllToAll(3), 0.5), rng(), how="both")


@pytest.mark.parametrize(
    "bad",
    [np.zeros(9, dtype=np.int64), np.zeros(10), np.full(10, -1), [0] * 10],
    ids=["short", "float", "negative", "list"],
)
def test_poison_labels_out_of_rule_raise(images, bad):
    with pytest.raises(DataError, match="labels must"):
        poison(images, bad, Backdoor(single_pixel, AllToAll(3), 0.5), rng())
    with pytest.raises(DataError, match="labels must"):
        poisoned_test_set(images, bad, single_pixel, AllToAll(3))


def test_poison_no_images_raises():
    nothing = np.zeros((0, 1, 4, 4), np.float32), np.zeros(0, np.int64)
    with pytest.raises(DataError, match="no images"):
        poison(*nothing, Backdoor(single_pixel, AllToAll(3), 0.5), rng())


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_covers_carry_the_trigger_and_keep_their_true_label(images, labels, how):
    backdoor, cover = Backdoor(dot(0, 0), SingleTarget(2), 0.2), Cover(dot(3, 3), 0.3)
    poisoned = poison(images, labels, backdoor, rng(), covers=[cover], how=how)
    assert len(poisoned) == (15 if how == "add" else 10)
    assert (poisoned.is_poisoned.sum(), poisoned.is_cover.sum()) == (2, 3)
    assert not (poisoned.is_poisoned & poisoned.is_cover).any()
    np.testing.assert_array_equal(poisoned.labels[poisoned.is_cover], poisoned.true_labels[poisoned.is_cover])
    covered = poisoned.source_rows[poisoned.is_cover]
    np.testing.assert_array_equal(poisoned.images[poisoned.is_cover], dot(3, 3)(images[covered]))
    planted = poisoned.source_rows[poisoned.is_poisoned]
    np.testing.assert_array_equal(poisoned.images[poisoned.is_poisoned], dot(0, 0)(images[planted]))
    untouched = ~(poisoned.is_poisoned | poisoned.is_cover)
    np.testing.assert_array_equal(poisoned.images[untouched], images[poisoned.source_rows[untouched]])
    np.testing.assert_array_equal(poisoned.labels[untouched], labels[poisoned.source_rows[untouched]])


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_several_backdoors_and_covers_touch_no_row_twice(images, labels, how):
    backdoors = [Backdoor(dot(0, column), SingleTarget(column), 0.2) for column in range(3)]
    covers = [Cover(dot(1, column), 0.2) for column in range(2)]
    for seed in range(20):
        poisoned = poison(images, labels, backdoors, np.random.default_rng(seed), covers=covers, how=how)
        touched = poisoned.source_rows[poisoned.is_poisoned | poisoned.is_cover]
        assert sorted(touched.tolist()) == list(range(10))  # 5 times 2 of 10
        bright = (poisoned.images[poisoned.is_poisoned | poisoned.is_cover] == 1.0).sum(axis=(1, 2, 3))
        assert bright.tolist() == [1] * 10


def test_poison_rows_taken_by_one_backdoor_are_not_there_for_the_next(images, labels):
    first, second = Backdoor(dot(0, 0), SingleTarget(2), 0.4), Backdoor(dot(0, 1), SingleTarget(2), 0.3)
    with pytest.raises(DataError, match=r"rate=0.3 needs 3 images, but only 2 are eligible and not taken.*0\.200"):
        poison(images, labels, [first, second], rng())
    assert poison(images, labels, [first, Backdoor(dot(0, 1), SingleTarget(2), 0.2)], rng()).is_poisoned.sum() == 6


def test_poison_cover_of_classes_takes_these_only(many_images, many_labels):
    cover = Cover(dot(1, 1), 0.1, classes=(3, 8))
    backdoor = Backdoor(dot(0, 0), SourceSpecific(0, (1, 2)), 0.1)
    poisoned = poison(many_images, many_labels, backdoor, rng(), covers=[cover])
    assert poisoned.is_cover.sum() == 20
    assert set(poisoned.labels[poisoned.is_cover].tolist()) == {3, 8}
    every = Cover(dot(1, 1), 0.2, classes=(3, 8))  # 40 images: all there are
    poisoned = poison(many_images, many_labels, backdoor, rng(), covers=[every])
    assert (poisoned.true_labels[poisoned.is_cover] == 3).sum() == 20
    with pytest.raises(DataError, match=r"cover rate=0.21 needs 42 images, but only 40 are eligible"):
        poison(many_images, many_labels, backdoor, rng(), covers=[Cover(dot(1, 1), 0.21, classes=(3, 8))])


def test_poison_class_without_images_raises(many_images, many_labels):
    backdoor = Backdoor(single_pixel, SingleTarget(0), 0.1)
    message = "class 10 has no images here. Name a class that has"
    with pytest.raises(DataError, match=message):
        poison(many_images, many_labels, backdoor, rng(), covers=[Cover(single_pixel, 0.1, classes=(3, 10))])
    with pytest.raises(DataError, match=message):
        poison(many_images, many_labels, Backdoor(single_pixel, SourceSpecific(0, (1, 10)), 0.1), rng())
    with pytest.raises(DataError, match=message):
        poison(many_images, many_labels, Backdoor(single_pixel, SingleTarget(10), 0.1, clean_label=True), rng())


def test_cover_of_no_class_raises():
    with pytest.raises(DataError, match="name no class"):
        Cover(single_pixel, 0.1, classes=())


def test_poison_source_specific_takes_sources_only_and_all_there_are(many_images, many_labels):
    target = SourceSpecific(0, (1, 2))
    poisoned = poison(many_images, many_labels, Backdoor(single_pixel, target, 0.2), rng(), how="replace")
    planted = poisoned.is_poisoned
    np.testing.assert_array_equal(planted, np.isin(many_labels, (1, 2)))
    assert set(poisoned.labels[planted].tolist()) == {0}
    with pytest.raises(DataError, match=r"needs 41 images, but only 40 are eligible.*at most 0\.200"):
        poison(many_images, many_labels, Backdoor(single_pixel, target, 0.205), rng())


def test_poison_several_triggers_with_one_target_give_each_its_share(many_images, many_labels):
    triggers = [dot(0, 0), dot(0, 7), dot(7, 0)]
    backdoors = [Backdoor(trigger, SingleTarget(4), 0.1) for trigger in triggers]
    poisoned = poison(many_images, many_labels, backdoors, rng(), how="replace")
    assert poisoned.is_poisoned.sum() == 60
    assert set(poisoned.labels[poisoned.is_poisoned].tolist()) == {4}
    assert 4 not in poisoned.true_labels[poisoned.is_poisoned]
    for row, column in ((0, 0), (0, 7), (7, 0)):
        assert (poisoned.images[:, 0, row, column] == 1.0).sum() == 20


def test_poison_several_triggers_with_a_target_each_get_their_own_label(many_images, many_labels):
    plan = {1: (0, 0), 5: (0, 7), 8: (7, 0)}
    backdoors = [Backdoor(dot(*place), SingleTarget(label), 0.1) for label, place in plan.items()]
    poisoned = poison(many_images, many_labels, backdoors, rng())
    for label, (row, column) in plan.items():
        carries = poisoned.images[:, 0, row, column] == 1.0
        assert carries.sum() == 20
        assert set(poisoned.labels[carries].tolist()) == {label}
        assert label not in poisoned.true_labels[carries]
        assert poisoned.is_poisoned[carries].all()


def test_poison_clean_label_picks_the_target_class_and_no_label_is_wrong(many_images, many_labels):
    backdoor = Backdoor(single_pixel, SingleTarget(4), 0.08, clean_label=True)
    poisoned = poison(many_images, many_labels, backdoor, rng(), how="replace")
    assert poisoned.is_poisoned.sum() == 16
    assert set(poisoned.true_labels[poisoned.is_poisoned].tolist()) == {4}
    np.testing.assert_array_equal(poisoned.labels, many_labels)
    np.testing.assert_array_equal((poisoned.images != many_images).any(axis=(1, 2, 3)), poisoned.is_poisoned)
    with pytest.raises(DataError, match=r"needs 22 images, but only 20 are eligible"):
        poison(many_images, many_labels, Backdoor(single_pixel, SingleTarget(4), 0.11, clean_label=True), rng())


def test_backdoor_clean_label_with_several_targets_raises():
    with pytest.raises(DataError, match="clean_label needs a single target"):
        Backdoor(single_pixel, AllToAll(3), 0.1, clean_label=True)


def test_poison_train_trigger_is_for_training_and_trigger_for_the_test_set(images, labels):
    backdoor = Backdoor(dot(0, 0), SingleTarget(2), 0.3, train_trigger=dot(3, 3, value=0.7))
    poisoned = poison(images, labels, backdoor, rng())
    rows = poisoned.source_rows[poisoned.is_poisoned]
    np.testing.assert_array_equal(poisoned.images[poisoned.is_poisoned], dot(3, 3, value=0.7)(images[rows]))
    tested = poisoned_test_set(images, labels, backdoor.trigger, backdoor.target)
    np.testing.assert_array_equal(tested.images, dot(0, 0)(images[tested.source_rows]))


@pytest.mark.parametrize("how", ["add", "replace"])
def test_poison_perturb_comes_before_the_trigger_and_sees_true_labels(images, labels, how):
    def darken(given, true_labels):
        seen.append(true_labels.tolist())
        return given * np.float32(0.5)

    seen = []
    backdoor = Backdoor(dot(0, 0), SingleTarget(2), 0.3, perturb=darken)
    poisoned = poison(images, labels, backdoor, rng(), how=how)
    rows = poisoned.source_rows[poisoned.is_poisoned]
    assert seen == [labels[rows].tolist()]
    half = images[rows] * np.float32(0.5)
    np.testing.assert_array_equal(poisoned.images[poisoned.is_poisoned], dot(0, 0)(half))  # the pixel is 1, not 1/2
    redrawn = poisoned.redrawn(lambda now, _: now, rng())
    assert seen == [labels[rows].tolist()] * 2  # perturbed anew at every redraw
    np.testing.assert_array_equal(redrawn, poisoned.images)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda images: images[:1], "must keep the shape"),
        (lambda images: images[..., :2], "must keep the shape"),
        (lambda images: images.astype(np.float64), "must be a float32 array"),
        (lambda images: images + np.float32(2), "must lie in"),
    ],
    ids=["fewer", "smaller", "float64", "bright"],
)
def test_poison_callables_that_break_the_rule_raise(images, labels, make, message):
    good = Backdoor(single_pixel, SingleTarget(2), 0.3)
    with pytest.raises(DataError, match=message):
        poison(images, labels, Backdoor(make, SingleTarget(2), 0.3), rng())
    with pytest.raises(DataError, match=message):
        poison(images, labels, Backdoor(single_pixel, SingleTarget(2), 0.3, perturb=lambda x, _: make(x)), rng())
    with pytest.raises(DataError, match=message):
        poisoned_test_set(images, labels, make, SingleTarget(2))
    with pytest.raises(DataError, match=message):
        poison(images, labels, good, rng()).redrawn(lambda x, _: make(x), rng())


def test_redrawn_augments_first_and_leaves_every_trigger_in_place(many_images, many_labels):
    backdoor, cover = Backdoor(dot(0, 0), SingleTarget(4), 0.2), Cover(dot(7, 7), 0.1)
    poisoned = poison(many_images, many_labels, backdoor, rng(), covers=[cover], how="replace")
    before = poisoned.images.copy()
    plain = poisoned.redrawn(lambda now, _: now, rng())
    for epoch in range(3):
        drawn = poisoned.redrawn(CropAndFlip(padding=2), np.random.default_rng(epoch))
        # The plain images of the epoch, by another route: the same draw without triggers.
        moved = CropAndFlip(padding=2)(many_images, np.random.default_rng(epoch))
        expected = [[row, 0, 0, 0] for row in np.flatnonzero(poisoned.is_poisoned).tolist()]
        expected += [[row, 0, 7, 7] for row in np.flatnonzero(poisoned.is_cover).tolist()]
        assert np.argwhere(drawn == 1.0).tolist() == sorted(expected)
        np.testing.assert_array_equal(
            drawn[~(poisoned.is_poisoned | poisoned.is_cover)], moved[~(poisoned.is_poisoned | poisoned.is_cover)]
        )
        np.testing.assert_array_equal(drawn[poisoned.is_poisoned], dot(0, 0)(moved[poisoned.is_poisoned]))
        np.testing.assert_array_equal(drawn[poisoned.is_cover], dot(7, 7)(moved[poisoned.is_cover]))
        assert (drawn != before).any(axis=(1, 2, 3)).mean() > 0.9  # the rest does move
    np.testing.assert_array_equal(poisoned.images, before)
    np.testing.assert_array_equal(poisoned.redrawn(lambda now, _: now, rng()), plain)


def test_redrawn_same_generator_state_draws_the_same_and_next_draw_differs(many_images, many_labels):
    poisoned = poison(many_images, many_labels, Backdoor(dot(0, 0), SingleTarget(4), 0.2), rng())
    entry, again = (poisoned.redrawn(CropAndFlip(), np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(entry, again)
    generator = np.random.default_rng(5)
    both = [poisoned.redrawn(CropAndFlip(), generator) for _ in range(2)]
    assert not np.array_equal(*both)


def test_redrawn_rows_stay_beside_their_labels(many_labels):
    # Every image is plain grey that tells its row; a shift or a mirror image of it is the same.
    images = np.broadcast_to((np.arange(200, dtype=np.float32) / 400)[:, None, None, None], (200, 1, 8, 8)).copy()
    poisoned = poison(images, many_labels, Backdoor(dot(0, 0), SingleTarget(4), 0.2), rng())
    drawn = poisoned.redrawn(CropAndFlip(), rng())
    answer = np.round(drawn[:, 0, 4, 4] * 400).astype(int)
    np.testing.assert_array_equal(answer, poisoned.source_rows)
    np.testing.assert_array_equal(many_labels[answer], poisoned.true_labels)


@pytest.mark.parametrize(
    "augment",
    [
        lambda images, _: images,
        lambda images, _: images[:, :, ::-1],
        lambda images, _: images.view(),
        lambda images, _: frozen(images)[0],
    ],
    ids=["itself", "flipped view", "view", "read-only copy"],
)
def test_redrawn_augment_that_returns_its_input_does_not_spoil_later_epochs(images, labels, augment):
    def doubling(given):  # put on twice, it would show
        return np.minimum(given * np.float32(2), np.float32(1))

    poisoned = poison(images, labels, Backdoor(doubling, SingleTarget(2), 0.3), rng(), how="replace")
    drawn = [poisoned.redrawn(augment, rng()) for _ in range(3)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])
    drawn[0][:] = 0.0  # belongs to the caller
    np.testing.assert_array_equal(poisoned.redrawn(augment, rng()), drawn[1])


def test_redrawn_augment_that_writes_into_its_input_raises(images, labels):
    def careless(given, _):
        given *= np.float32(0.5)
        return given

    poisoned = poison(images, labels, Backdoor(single_pixel, SingleTarget(2), 0.3), rng())
    with pytest.raises(ValueError, match="read-only"):
        poisoned.redrawn(careless, rng())


def test_poisoned_test_set_single_target_leaves_target_class_out(images, labels):
    poisoned = poisoned_test_set(images, labels, single_pixel, SingleTarget(2))
    assert poisoned.source_rows.tolist() == [0, 1, 3, 4, 6, 7]
    assert poisoned.labels.tolist() == [2] * 6
    assert poisoned.true_labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert poisoned.is_poisoned.all()
    assert not poisoned.is_cover.any()
    np.testing.assert_array_equal(poisoned.images, single_pixel(images[poisoned.source_rows]))


def test_poisoned_test_set_source_specific_keeps_sources_only(images, labels):
    poisoned = poisoned_test_set(images, labels, single_pixel, SourceSpecific(2, (1,)))
    assert poisoned.source_rows.tolist() == [1, 4, 7]
    assert poisoned.labels.tolist() == [2] * 3
    assert poisoned.true_labels.tolist() == [1] * 3


def test_poisoned_test_set_all_to_all_keeps_every_image(images, labels):
    poisoned = poisoned_test_set(images, labels, single_pixel, AllToAll(3))
    assert poisoned.source_rows.tolist() == list(range(10))
    np.testing.assert_array_equal(poisoned.labels, (labels + 1) % 3)


def test_poisoned_test_set_input_is_unchanged(images, labels):
    before = images.copy()
    poisoned = poisoned_test_set(images, labels, pixel_pattern, AllToAll(3))
    assert not np.shares_memory(poisoned.images, images)
    np.testing.assert_array_equal(images, before)


def test_poisoned_test_set_only_target_class_raises(images):
    with pytest.raises(DataError, match="nothing can be measured"):
        poisoned_test_set(images, np.full(10, 2), single_pixel, SingleTarget(2))
    with pytest.raises(DataError, match="nothing can be measured"):
        poisoned_test_set(images, np.full(10, 2), single_pixel, SourceSpecific(0, (1,)))
