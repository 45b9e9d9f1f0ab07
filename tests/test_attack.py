import json

import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks import (
    AllToAll,
    Attack,
    Backdoor,
    Cover,
    SingleTarget,
    SourceSpecific,
    make_trigger,
    poison,
    poisoned_test_set,
)

IMAGES = (np.random.default_rng(0).random((40, 1, 6, 6)) * 0.5).astype(np.float32)
LABELS = np.arange(40, dtype=np.int64) % 4

PIXEL, PATTERN = make_trigger("single_pixel"), make_trigger("pixel_pattern")
FAINT = make_trigger("single_pixel", row=0, column=1, value=0.75)


def rng():
    return np.random.default_rng(5)


def an_attack():
    """One of everything."""
    return Attack(
        "everything",
        (
            Backdoor(PATTERN, SourceSpecific(0, (1, 2)), 0.1, train_trigger=FAINT),
            Backdoor(PIXEL, SingleTarget(3), 0.05, clean_label=True),
        ),
        (Cover(PATTERN, 0.1, classes=(3,)), Cover(FAINT, 0.05)),
        (FAINT, PIXEL),
    )


def through_json(attack):
    return json.loads(json.dumps(attack.describe()))


def assert_same_sets(first, other):
    for name in ("images", "labels", "true_labels", "is_poisoned", "is_cover", "source_rows"):
        np.testing.assert_array_equal(getattr(first, name), getattr(other, name), err_msg=name)


def test_attack_poison_is_poison_with_its_backdoors_and_covers_in_place():
    attack = an_attack()
    poisoned = attack.poison(IMAGES, LABELS, rng())
    expected = poison(IMAGES, LABELS, attack.backdoors, rng(), covers=attack.covers, how="replace")
    assert_same_sets(poisoned, expected)
    assert len(poisoned) == 40
    assert (poisoned.is_poisoned.sum(), poisoned.is_cover.sum()) == (6, 6)
    assert len(attack.poison(IMAGES, LABELS, rng(), how="add")) == 52


def test_attack_test_sets_hold_one_set_per_backdoor_with_the_trigger_of_the_attack():
    attack = an_attack()
    first, second = attack.test_sets(IMAGES, LABELS)
    assert_same_sets(first, poisoned_test_set(IMAGES, LABELS, PATTERN, SourceSpecific(0, (1, 2))))
    assert_same_sets(second, poisoned_test_set(IMAGES, LABELS, PIXEL, SingleTarget(3)))
    assert (len(first), len(second)) == (20, 30)


def test_attack_control_sets_hold_one_set_per_control_for_the_first_target():
    attack = an_attack()
    first, second = attack.control_sets(IMAGES, LABELS)
    assert_same_sets(first, poisoned_test_set(IMAGES, LABELS, FAINT, SourceSpecific(0, (1, 2))))
    assert_same_sets(second, poisoned_test_set(IMAGES, LABELS, PIXEL, SourceSpecific(0, (1, 2))))
    assert Attack("plain", attack.backdoors).control_sets(IMAGES, LABELS) == []


def test_attack_without_a_backdoor_raises():
    with pytest.raises(DataError, match="attack 'nothing' plants nothing"):
        Attack("nothing", ())


@pytest.mark.parametrize(
    ("targets", "word"),
    [
        ([SingleTarget(7)], 7),
        ([SingleTarget(0)], 0),
        ([SourceSpecific(3, (1, 2))], 3),
        ([SingleTarget(4)] * 3, 4),
        ([SingleTarget(1), SingleTarget(5), SingleTarget(8)], "1,5,8"),
        ([SingleTarget(8), SingleTarget(1), SingleTarget(8)], "8,1"),
        ([AllToAll(10)], "y+1"),
        ([SingleTarget(1), AllToAll(10)], "y+1"),
    ],
)
def test_attack_target_label_is_a_word_for_tables(targets, word):
    assert Attack("x", tuple(Backdoor(PIXEL, target, 0.1) for target in targets)).target_label == word


def test_attack_describe_names_every_parameter():
    described = through_json(an_attack())
    assert described.keys() == {"backdoors", "covers", "controls"}
    first, second = described["backdoors"]
    assert first["target"] == {"kind": "source_specific", "label": 0, "sources": [1, 2]}
    assert second["target"] == {"kind": "single", "label": 3}
    assert (first["rate"], second["rate"]) == (0.1, 0.05)
    assert (first["clean_label"], second["clean_label"]) == (False, True)
    assert first["train_trigger"] == {"name": "single_pixel", "parameters": {"row": 0, "column": 1, "value": 0.75}}
    assert second["train_trigger"] is None
    assert second["trigger"]["parameters"]["value"] == 1.0  # defaults as well
    assert [cover["classes"] for cover in described["covers"]] == [[3], None]
    assert [control["name"] for control in described["controls"]] == ["single_pixel", "single_pixel"]
    all_to_all = Attack("x", (Backdoor(PIXEL, AllToAll(10), 0.1),))
    assert through_json(all_to_all)["backdoors"][0]["target"] == {"kind": "all_to_all", "n_classes": 10}


def test_attack_restored_from_json_does_the_same():
    attack = an_attack()
    restored = Attack.restore("everything", through_json(attack))
    assert restored.name == attack.name
    assert restored.describe() == attack.describe()
    assert_same_sets(restored.poison(IMAGES, LABELS, rng()), attack.poison(IMAGES, LABELS, rng()))
    for name in ("test_sets", "control_sets"):
        ours, second = (getattr(entry, name)(IMAGES, LABELS) for entry in (attack, restored))
        assert len(ours) == len(second) == 2
        for entry, other in zip(ours, second, strict=True):
            assert_same_sets(entry, other)


def test_attack_restored_without_json_does_the_same():
    attack = an_attack()
    assert Attack.restore("everything", attack.describe()).describe() == attack.describe()


def test_attack_perturbation_is_told_and_not_restored():
    attack = Attack("x", (Backdoor(PIXEL, SingleTarget(1), 0.1, perturb=lambda images, _: images),))
    described = through_json(attack)
    assert described["backdoors"][0]["perturbed"] is True
    assert through_json(an_attack())["backdoors"][0]["perturbed"] is False
    assert Attack.restore("x", described).backdoors[0].perturb is None


def test_attack_of_a_trigger_without_a_name_cannot_be_described():
    attack = Attack("x", (Backdoor(lambda images: images, SingleTarget(1), 0.1),))
    with pytest.raises(DataError, match="only named triggers can be described"):
        attack.describe()


def test_attack_restore_leaves_the_description_alone():
    described = through_json(an_attack())
    before = json.dumps(described)
    Attack.restore("x", described)
    assert json.dumps(described) == before


PLACES = {
    "top": lambda described: described,
    "backdoor": lambda described: described["backdoors"][0],
    "trigger": lambda described: described["backdoors"][0]["trigger"],
    "train trigger": lambda described: described["backdoors"][0]["train_trigger"],
    "source-specific target": lambda described: described["backdoors"][0]["target"],
    "single target": lambda described: described["backdoors"][1]["target"],
    "cover": lambda described: described["covers"][0],
    "control": lambda described: described["controls"][0],
}
OPTIONAL = {"perturbed"}
KEYS = [(place, key) for place, find in PLACES.items() for key in find(an_attack().describe()) if key not in OPTIONAL]


@pytest.mark.parametrize(("place", "key"), KEYS)
def test_attack_restore_missing_key_raises(place, key):
    described = through_json(an_attack())
    del PLACES[place](described)[key]
    with pytest.raises(DataError, match=rf"the description of attack 'x' lacks or misuses .*{key}"):
        Attack.restore("x", described)


@pytest.mark.parametrize("place", PLACES)
def test_attack_restore_unknown_key_raises(place):
    described = through_json(an_attack())
    PLACES[place](described)["colour"] = "red"
    with pytest.raises(DataError, match="colour"):
        Attack.restore("x", described)


def test_attack_restore_unknown_trigger_parameter_raises():
    described = through_json(an_attack())
    described["controls"][0]["parameters"]["colour"] = "red"
    with pytest.raises(DataError, match="colour"):
        Attack.restore("x", described)


def test_attack_restore_unknown_trigger_or_kind_of_target_raises():
    described = through_json(an_attack())
    described["controls"][0]["name"] = "sparkles"
    with pytest.raises(DataError, match="sparkles"):
        Attack.restore("x", described)
    described = through_json(an_attack())
    described["backdoors"][0]["target"]["kind"] = "everywhere"
    with pytest.raises(DataError, match="unknown kind of target 'everywhere': known are single, all_to_all"):
        Attack.restore("x", described)


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("top", "backdoors", None),
        ("top", "covers", 3),
        ("top", "controls", [7]),
        ("backdoor", "rate", "a tenth"),
        ("backdoor", "rate", 1.0),
        ("backdoor", "target", [1, 2]),
        ("backdoor", "trigger", "single_pixel"),
        ("trigger", "parameters", 3),
        ("source-specific target", "sources", 3),
        ("source-specific target", "label", "one"),
        ("cover", "classes", 3),
        ("cover", "classes", []),
    ],
)
def test_attack_restore_value_of_a_wrong_kind_raises(place, key, value):
    described = through_json(an_attack())
    PLACES[place](described)[key] = value
    with pytest.raises(DataError, match=r"the description of attack 'x'|must be in|name no class"):
        Attack.restore("x", described)


def test_attack_restore_from_nothing_raises():
    for nothing in ({}, [], None):
        with pytest.raises(DataError, match="the description of attack 'x' lacks or misuses"):
            Attack.restore("x", nothing)
