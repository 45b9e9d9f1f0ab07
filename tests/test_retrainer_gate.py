"""The gate: figures in, a verdict with reasons out."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from guard.retrainer.gate import judge, judge_canary
from guard.retrainer.material import Agreement
from guard.retrainer.measuring import Count, Measurement
from guard.retrainer.movement import Movement, Region, sign_test
from guard.retrainer.settings import RetrainerSettings

NOBODY = Agreement(0, 0)
SETTINGS = RetrainerSettings()


def of(hits, n):
    """A mask with so many hits."""
    return np.arange(n) < hits


NOTHING = of(0, 0)
BEFORE = Measurement(
    clean_right=of(190, 200),
    clean_flagged=of(2, 200),
    other_groups_flagged=of(40, 40),
    same_groups_flagged=of(10, 10),
    false_alarms_flagged=of(8, 8),
    recovered=of(30, 50),
    not_learned_flagged=of(40, 40),
    undecided_flagged=of(60, 60),
)


def judged(agreement=NOBODY, rate=0.01, settings=SETTINGS, before=BEFORE, **after):
    return judge(before, dataclasses.replace(before, **after), agreement, rate, settings)


def test_gate_passes_a_candidate_that_is_the_same():
    judgement = judged()
    assert judgement.passed
    assert judgement.reasons == ()
    assert json.loads(json.dumps(judgement.as_dicts()))[0]["name"] == "clean accuracy"


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        (
            {"clean_right": of(185, 200)},
            "clean accuracy after the guard: 92.5 % of 200 held-out images, 95.0 % before; "
            "a fall of 1 points is allowed.",
        ),
        (
            {"clean_flagged": of(9, 200)},
            "4.5 % of 200 held-out clean images are flagged (before: 1.0 %, asked for: 1 %); "
            "1.5 times the rate is allowed.",
        ),
        (
            {"other_groups_flagged": of(35, 40)},
            "87.5 % of 40 held-out poisoned inputs of other groups are flagged, 100.0 % before; "
            "a fall of 10 points is allowed.",
        ),
        (
            {"same_groups_flagged": of(8, 10)},
            "80.0 % of 10 held-out poisoned inputs of the same groups are flagged, 100.0 % before; "
            "a fall of 10 points is allowed.",
        ),
        (
            {"undecided_flagged": of(44, 60)},
            "26.7 % of 60 undecided flagged inputs would pass now; 25 % may. Inputs have changed, or somebody calls a "
            "trigger clean: let a second person look, then raise max_released_share.",
        ),
    ],
)
def test_gate_refuses_a_candidate_that_is_worse_and_says_why(after, reason):
    judgement = judged(**after)
    assert not judgement.passed
    assert judgement.reasons == (reason,)


@pytest.mark.parametrize(
    "after",
    [
        {"clean_right": of(188, 200)},
        {"clean_right": of(186, 200)},  # two points, of four images: chance may do that
        {"clean_right": np.roll(of(186, 200), 14)},  # 14 lost, 10 gained
        {"clean_flagged": of(4, 200)},  # twice the rate, but of 200 images chance alone may do that
        {"other_groups_flagged": of(36, 40)},
        {"same_groups_flagged": of(9, 10)},  # a single input is never a reason
        {"undecided_flagged": of(45, 60)},
        {"false_alarms_flagged": NOTHING, "recovered": NOTHING},
    ],
)
def test_gate_passes_a_candidate_at_the_edge(after):
    assert judged(**after).passed


def test_gate_does_not_refuse_for_a_hold_out_on_which_the_active_guard_flags_as_many():
    unlike = dataclasses.replace(BEFORE, clean_flagged=of(9, 200))
    assert judged(before=unlike).passed
    assert judged(before=unlike, clean_flagged=of(8, 200)).passed
    assert judged(before=unlike, clean_flagged=of(13, 200)).passed  # four more: chance
    assert judged(before=unlike, clean_flagged=of(14, 200)).reasons == (
        "7.0 % of 200 held-out clean images are flagged (before: 4.5 %, asked for: 1 %); "
        "1.5 times the rate is allowed.",
    )


def test_gate_refuses_on_agreement_of_enough_shared_inputs_only():
    assert judged(Agreement(0, 9)).passed
    assert judged(Agreement(8, 10)).passed
    judgement = judged(Agreement(7, 10))
    assert judgement.reasons == (
        "reviewers agree on 70.0 % of 10 inputs that several decided; at least 80 % is asked for.",
    )


def test_gate_without_poisoned_inputs_says_so_and_judges_the_rest():
    empty = dataclasses.replace(BEFORE, other_groups_flagged=NOTHING, same_groups_flagged=NOTHING)
    judgement = judged(before=empty)
    assert judgement.passed
    unmeasured = [check.text for check in judgement.checks if check.passed is None]
    assert "no poisoned input of other groups is held out: nothing to measure by." in unmeasured
    assert not judged(before=empty, clean_right=of(150, 200)).passed


def test_gate_asks_for_a_least_true_positive_rate_of_ten_or_more():
    weak = dataclasses.replace(BEFORE, other_groups_flagged=of(4, 10))
    assert judged(before=weak).reasons[0].endswith("are flagged, 40.0 % before; at least 50 % must be.")
    assert judged(before=dataclasses.replace(BEFORE, other_groups_flagged=of(3, 9))).passed


def test_gate_refuses_where_too_few_clean_images_are_held_out():
    few = dataclasses.replace(BEFORE, clean_right=of(19, 19), clean_flagged=of(0, 19))
    reason = "19 clean images are held out, 20 are needed to measure by. Raise holdout_share."
    assert judged(before=few).reasons == (reason,)


def test_canary_is_refused_when_it_lets_pass_what_was_flagged_or_what_is_poisoned():
    none = (Count(0, 0), Count(0, 0))
    assert judge_canary(none, none, SETTINGS).passed
    assert judge_canary((Count(8, 8), Count(6, 8)), none, SETTINGS).passed
    assert not judge_canary((Count(8, 8), Count(5, 8)), none, SETTINGS).passed
    assert not judge_canary(none, (Count(30, 30), Count(26, 30)), SETTINGS).passed


# --- what passes afterwards ---


def moved(lost, gained, n, label=3):
    """So many of n inputs with one answer of the network lost, and so many gained."""
    return Movement(np.full(n, label), of(lost, n), np.flip(of(gained, n)))


def test_sign_test_values():
    assert sign_test(0, 0) == 1
    assert sign_test(5, 0) == 1 / 32
    assert sign_test(2, 1) == 4 / 8


@pytest.mark.parametrize(
    ("lost", "gained", "region"),
    [
        (5, 0, None),  # 1/32, and two questions are asked: 0.025
        (6, 0, Region(None, 6, 0, 40)),
        (8, 1, Region(None, 8, 1, 40)),  # 10/512 = 0.0195
        (7, 1, None),  # 9/256 = 0.035
        (0, 20, None),
    ],
)
def test_movement_beyond_chance_values(lost, gained, region):
    assert moved(lost, gained, 40).beyond_chance() == region


def test_movement_finds_the_answer_of_the_network_where_inputs_pass():
    """All together even out; the attacker's class does not."""
    entry, other = moved(8, 0, 30, label=3), moved(0, 8, 30, label=5)
    both = Movement(*(np.concatenate(pair) for pair in zip(vars_of(entry), vars_of(other), strict=True)))
    assert both.beyond_chance() == Region(3, 8, 0, 30)  # 1/256 <= 0.05 / 3


def vars_of(movement):
    return movement.predicted, movement.lost, movement.gained


def test_gate_refuses_what_lets_more_flagged_inputs_pass_than_chance_does():
    name = "false alarms that were not learned from"
    for lost, passed in ((5, True), (6, False)):
        movements = {name: moved(lost, 0, 40)}
        judgement = judge(BEFORE, BEFORE, NOBODY, 0.01, SETTINGS, movements)
        assert judgement.passed == passed
    assert judgement.reasons == (
        "6 of 40 false alarms that were not learned from would pass although a guard without answers calls them more "
        "suspicious than any clean image, 0 the other way: more than chance explains. Somebody may call a trigger "
        "clean, or clean inputs poisoned: let another person look at these, or leave a reviewer out.",
    )
    nothing = judge(BEFORE, BEFORE, NOBODY, 0.01, SETTINGS, {name: moved(0, 0, 0)})
    assert nothing.passed
    assert f"there are no {name}: nothing to measure by." in [check.text for check in nothing.checks]
