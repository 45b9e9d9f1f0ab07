"""A trigger as a value: names, parameters, equality, JSON."""

import copy
import json
import pickle

import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks.triggers import TRIGGERS, NamedTrigger, make_trigger, white_square

IMAGES = np.random.default_rng(0).random((3, 3, 32, 32), dtype=np.float32)

WITH_PARAMETERS = [
    *(make_trigger(name) for name in TRIGGERS),
    make_trigger("pixel_pattern", places=[(0, 1), (2, 3)], value=0.5),
    make_trigger("box_and_circle", parts=("circle",)),
    make_trigger("dct", places=((3, 3),), magnitude=0.5),
    make_trigger("wanet", noise=True, seed=3),
    make_trigger("adaptive_patch", opacities=(0.1, 0.2, 0.3, 0.4), kept=2),
    make_trigger("input_aware", other=True, seed=2),
]


def test_trigger_names_are_the_functions_names():
    assert {name: function.__name__ for name, function in TRIGGERS.items()} == {name: name for name in TRIGGERS}
    assert len(TRIGGERS) == 22


def test_make_trigger_call_equals_function():
    np.testing.assert_array_equal(make_trigger("white_square", size=3)(IMAGES), white_square(IMAGES, size=3))


def test_full_parameters_fill_in_defaults():
    assert make_trigger("white_square", size=3).full_parameters() == {"size": 3, "margin": 0, "value": 1.0}
    assert make_trigger("box_and_circle").full_parameters() == {"parts": ["box", "circle"]}
    assert make_trigger("white_square", size=3).parameters == {"size": 3}


@pytest.mark.parametrize("trigger", WITH_PARAMETERS, ids=lambda trigger: f"{trigger.name}-{len(trigger.parameters)}")
def test_json_round_trip_gives_an_equal_trigger(trigger):
    restored = make_trigger(trigger.name, **json.loads(json.dumps(trigger.full_parameters())))
    assert restored == trigger
    assert hash(restored) == hash(trigger)
    np.testing.assert_array_equal(restored(IMAGES), trigger(IMAGES))


def test_named_trigger_equality_and_hash_go_by_full_parameters():
    assert make_trigger("white_square") == make_trigger("white_square", size=4)
    assert make_trigger("pixel_pattern", places=[[1, 2]]) == make_trigger("pixel_pattern", places=((1, 2),))
    assert make_trigger("white_square", size=3) != make_trigger("white_square", size=4)
    assert make_trigger("sunglasses") != make_trigger("lipstick")
    assert make_trigger("sunglasses") != "sunglasses"
    triggers = {make_trigger("sig"), make_trigger("sig", periods=6), make_trigger("sig", periods=6.0)}
    assert len(triggers) == 1


def test_named_trigger_parameters_are_read_only():
    places = [[1, 2]]
    trigger = make_trigger("pixel_pattern", places=places)
    with pytest.raises(TypeError):
        trigger.parameters["value"] = 0.5
    places.append([3, 4])
    trigger.full_parameters()["places"].append([5, 6])
    assert trigger.full_parameters()["places"] == [[1, 2]]


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda trigger: pickle.loads(pickle.dumps(trigger))])
def test_named_trigger_copied_or_pickled_is_equal(duplicate):
    trigger = make_trigger("dct", places=((3, 3),))
    assert duplicate(trigger) == trigger


def test_named_trigger_numpy_parameters_become_plain():
    trigger = make_trigger("pixel_pattern", places=np.array([[1, 2]]), value=np.float64(0.5))
    assert json.dumps(trigger.full_parameters()) == '{"places": [[1, 2]], "value": 0.5}'


def test_make_trigger_unknown_name_raises_with_the_nearest():
    with pytest.raises(DataError, match=r"there is no trigger 'white_sqare'\. Did you mean 'white_square'\?"):
        make_trigger("white_sqare")
    with pytest.raises(DataError, match="Known are single_pixel, pixel_pattern"):
        make_trigger("xyz")
    with pytest.raises(DataError, match="there is no trigger"):
        NamedTrigger(["blend"])


@pytest.mark.parametrize("parameter", ["sise", "images"])
def test_make_trigger_unknown_parameter_raises_with_those_known(parameter):
    with pytest.raises(DataError, match=f"no parameter '{parameter}': known are size, margin, value"):
        make_trigger("white_square", **{parameter: 3})


def test_make_trigger_without_parameters_says_so():
    with pytest.raises(DataError, match="known are none"):
        make_trigger("lipstick", size=3)
