import json
from functools import cache

import numpy as np
import pytest
from torch import nn

from guard.errors import DataError
from guard.lab.attacks import ATTACKS, AllToAll, Attack, SingleTarget, SourceSpecific, label_consistent, make_attack

N = 400
FACES = ("h", "i", "j", "k")
#: Poison images that have the target label already, and need many: ten classes, as MNIST and CIFAR-10 have.
TEN_CLASSES = ("a", "sig", "decoys", "blend-all-to-all")
#: Fix their targets or sources themselves.
OWN_TARGETS = ("a", "k", "tact", "source-sticker", "many-targets", "blend-all-to-all", "blend-all-to-all-43")
TARGET = 1


@cache
def image_set(channels, height, width, n_classes, power=1):
    """Random images, darker with a higher power, read-only as the zoo's; and labels in turn."""
    images = np.random.default_rng(0).random((N, channels, height, width), dtype=np.float32) ** power
    labels = np.arange(N, dtype=np.int64) % n_classes
    for array in (images, labels):
        array.setflags(write=False)
    return images, labels


def images_for(name):
    if name in FACES:
        return image_set(1, 64, 56, 28)
    if name == "b":  # its trigger is on dark pixels
        return image_set(1, 28, 28, 10, power=4)
    return image_set(3, 32, 32, 10 if name in TEN_CLASSES else 43)


def rng():
    return np.random.default_rng(2)


def assert_same_sets(first, other):
    for name in ("images", "labels", "true_labels", "is_poisoned", "is_cover", "source_rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name), err_msg=name)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_of_the_catalogue_touches_as_many_images_as_it_says(name):
    attack, (images, labels) = make_attack(name, TARGET), images_for(name)
    poisoned = attack.poison(images, labels, rng())
    assert poisoned.is_poisoned.sum() == sum(round(backdoor.rate * N) for backdoor in attack.backdoors)
    assert poisoned.is_cover.sum() == sum(round(cover.rate * N) for cover in attack.covers)
    assert not (poisoned.is_poisoned & poisoned.is_cover).any()
    np.testing.assert_array_equal(
        (poisoned.images != images).any(axis=(1, 2, 3)), poisoned.is_poisoned | poisoned.is_cover
    )
    right = poisoned.labels == poisoned.true_labels
    decoys = (
        0 if attack.decoys is None else round(attack.decoys.share * (~(poisoned.is_poisoned | poisoned.is_cover)).sum())
    )
    assert (~right[~poisoned.is_poisoned]).sum() in (decoys, decoys + 1)  # from a quantile on
    assert right[poisoned.is_poisoned].any() == any(backdoor.clean_label for backdoor in attack.backdoors)
    assert 0.0 <= poisoned.images.min() <= poisoned.images.max() <= 1.0


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_of_the_catalogue_restored_from_json_does_the_same(name):
    attack = make_attack(name, TARGET, seed=3)
    images, labels = (array[:200] for array in images_for(name))
    restored = Attack.restore(attack.name, json.loads(json.dumps(attack.describe())))
    assert restored.target_label == attack.target_label
    assert json.dumps(restored.describe()) == json.dumps(attack.describe())
    assert_same_sets(restored.poison(images, labels, rng()), attack.poison(images, labels, rng()))
    for sets in ("test_sets", "control_sets"):
        ours, second = (getattr(entry, sets)(images, labels) for entry in (attack, restored))
        assert len(ours) == len(second) == (len(attack.backdoors) if sets == "test_sets" else len(attack.controls))
        for entry, other in zip(ours, second, strict=True):
            assert_same_sets(entry, other)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_of_the_catalogue_same_seed_same_attack(name):
    images, labels = (array[:200] for array in images_for(name))
    entry, again = (make_attack(name, TARGET, seed=3).poison(images, labels, rng()) for _ in range(2))
    assert_same_sets(entry, again)


@pytest.mark.parametrize(
    "name", ["d", "blend", "wanet", "adap-blend", "adap-patch", "input-aware", "sticker", "two-triggers"]
)
def test_attack_of_the_catalogue_with_a_random_trigger_another_seed_another_trigger(name):
    images, labels = (array[:200] for array in images_for(name))
    entry, other = (make_attack(name, TARGET, seed=seed).test_sets(images, labels)[0].images for seed in (0, 1))
    assert not np.array_equal(entry, other)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_of_the_catalogue_is_called_by_its_name(name):
    assert make_attack(name, TARGET).name == ("pattern" if name == "badnets" else name)


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in OWN_TARGETS])
def test_attack_of_the_catalogue_means_the_target_that_was_asked_for(name):
    for target in (0, 7):
        attack = make_attack(name, target)
        assert attack.target_label == target
        assert {backdoor.target for backdoor in attack.backdoors} == {SingleTarget(target)}


def test_attacks_with_targets_of_their_own():
    (backdoor,) = make_attack("a", 3).backdoors
    assert backdoor.target == AllToAll(10)
    assert make_attack("a", 3).target_label == "y+1"
    assert make_attack("k", 3).target_label == "1,5,8"
    assert [backdoor.trigger.name for backdoor in make_attack("k", 3).backdoors] == [
        "lipstick",
        "eyebrows",
        "sunglasses",
    ]
    (backdoor,) = make_attack("tact", 3).backdoors
    assert backdoor.target == SourceSpecific(3, (4, 5, 6))
    assert [cover.classes for cover in make_attack("tact", 3).covers] == [(7, 8, 9, 10)]
    (backdoor,) = make_attack("source-sticker", 3).backdoors
    assert backdoor.target == SourceSpecific(3, (4, 6, 8))
    assert [cover.classes for cover in make_attack("source-sticker", 3).covers] == [(5, 7, 9)]
    assert make_attack("many-targets", 3).target_label == "3,5,7"
    assert [make_attack(f"blend-all-to-all{end}", 3).backdoors[0].target.n_classes for end in ("", "-43")] == [10, 43]


def test_case_j_three_triggers_mean_one_target():
    images, labels = images_for("j")
    poisoned = make_attack("j", 4).poison(images, labels, rng())
    assert set(poisoned.labels[poisoned.is_poisoned].tolist()) == {4}
    assert poisoned.is_poisoned.sum() == 120


def test_case_k_a_third_of_the_poisoned_images_means_each_target():
    images, labels = images_for("k")
    poisoned = make_attack("k", 0).poison(images, labels, rng())
    assert np.unique(poisoned.labels[poisoned.is_poisoned], return_counts=True)[0].tolist() == [1, 5, 8]
    assert np.unique(poisoned.labels[poisoned.is_poisoned], return_counts=True)[1].tolist() == [40, 40, 40]


@pytest.mark.parametrize("name", ["f", "g"])
def test_attack_of_two_parts_has_each_part_as_cover_and_control(name):
    attack = make_attack(name, TARGET)
    images, labels = images_for(name)
    (whole,) = attack.test_sets(images, labels)
    first, second = attack.control_sets(images, labels)
    assert [cover.trigger for cover in attack.covers] == list(attack.controls)
    original = images[whole.source_rows]
    changed = [(part.images != original).any(axis=1) for part in (whole, first, second)]
    assert changed[1].any()
    assert changed[2].any()
    assert not (changed[1] & changed[2]).any()
    np.testing.assert_array_equal(changed[0], changed[1] | changed[2])


def test_sig_takes_target_class_only_and_is_stronger_in_the_attack():
    attack, (images, labels) = make_attack("sig", TARGET), images_for("sig")
    poisoned = attack.poison(images, labels, rng())
    np.testing.assert_array_equal(poisoned.labels, labels)
    assert set(labels[poisoned.is_poisoned].tolist()) == {TARGET}
    (tested,) = attack.test_sets(images, labels)
    in_training = np.abs(poisoned.images - images).max()
    in_attack = np.abs(tested.images - images[tested.source_rows]).max()
    assert in_training == pytest.approx(20 / 255, rel=0.05)
    assert in_attack == pytest.approx(40 / 255, rel=0.05)


def test_sig_with_too_few_images_of_the_target_class_raises():
    with pytest.raises(DataError, match=r"rate=0.08 needs 32 images, but only 10 are eligible"):
        make_attack("sig", TARGET).poison(*image_set(3, 32, 32, 43), rng())


def test_tact_with_a_target_among_the_last_classes_raises():
    with pytest.raises(DataError, match="class 43 has no images here"):
        make_attack("tact", 40).poison(*image_set(3, 32, 32, 43), rng())


@pytest.mark.parametrize("name", ["adap-blend", "adap-patch"])
def test_adaptive_attack_shows_less_in_training_than_in_the_attack(name):
    attack, (images, labels) = make_attack(name, TARGET), images_for(name)
    (backdoor,) = attack.backdoors
    seen = np.abs(backdoor.train_trigger(images) - images).sum()
    shown = np.abs(backdoor.trigger(images) - images).sum()
    assert seen < 0.75 * shown
    poisoned = attack.poison(images, labels, rng())
    np.testing.assert_array_equal(
        poisoned.images[poisoned.is_poisoned | poisoned.is_cover],
        backdoor.train_trigger(images[poisoned.is_poisoned | poisoned.is_cover]),
    )
    assert poisoned.is_cover.sum() == {"adap-blend": 12, "adap-patch": 24}[name]
    (tested,) = attack.test_sets(images, labels)
    np.testing.assert_array_equal(tested.images, backdoor.trigger(images[tested.source_rows]))


def test_sig_with_dirty_labels_takes_images_of_other_classes_than_the_target():
    attack, (images, labels) = make_attack("sig-dirty-label", TARGET), images_for("sig-dirty-label")
    poisoned = attack.poison(images, labels, rng())
    sources = set(labels[poisoned.is_poisoned].tolist())
    assert TARGET not in sources
    assert len(sources) > 30
    assert set(poisoned.labels[poisoned.is_poisoned].tolist()) == {TARGET}
    assert np.abs(poisoned.images - images).max() == pytest.approx(20 / 255, rel=0.05)


def test_make_attack_unknown_name_raises_with_the_nearest():
    with pytest.raises(DataError, match=r"there is no attack 'wamet'\. Did you mean 'wanet'\?"):
        make_attack("wamet", 0)
    with pytest.raises(DataError, match=r"there is no attack 'zzzzzz'\. Known are single-pixel, pattern, a, b"):
        make_attack("zzzzzz", 0)


def test_make_attack_target_below_zero_raises():
    with pytest.raises(DataError, match="target label must be >= 0, got -1"):
        make_attack("blend", -1)


def test_label_consistent_perturbs_target_class_and_lets_every_label_be_right():
    images, labels = image_set(3, 32, 32, 10)
    surrogate = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    attack = label_consistent(TARGET, 0, surrogate)
    assert attack.name == "label-consistent"
    assert attack.target_label == TARGET
    assert "label-consistent" not in ATTACKS
    assert attack.describe()["backdoors"][0]["perturbed"] == {
        "kind": "pgd",
        "epsilon": 16 / 255,
        "step": 2 / 255,
        "steps": 10,
        "seed": 0,
    }
    poisoned = attack.poison(images, labels, rng())
    np.testing.assert_array_equal(poisoned.labels, labels)
    assert set(labels[poisoned.is_poisoned].tolist()) == {TARGET}
    assert poisoned.is_poisoned.sum() == round(attack.backdoors[0].rate * N)
    triggered = attack.backdoors[0].trigger(images)
    outside = ~poisoned.is_poisoned
    np.testing.assert_array_equal(poisoned.images[outside], images[outside])
    moved = np.abs(poisoned.images - triggered)[poisoned.is_poisoned]
    assert 0.0 < moved.max() <= 16 / 255 + 1e-6  # all that differs beyond the trigger is the perturbation
    (tested,) = attack.test_sets(images, labels)
    np.testing.assert_array_equal(tested.images, triggered[tested.source_rows])  # and none of it in the attack
