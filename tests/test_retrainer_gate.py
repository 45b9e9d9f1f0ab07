"""The gate: figures in, a verdict with reasons out."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from guard.retrainer.following import follow_traffic, mixed_scores
from guard.retrainer.gate import judge, judge_canary
from guard.retrainer.material import Agreement
from guard.retrainer.measuring import Count, Measurement
from guard.retrainer.movement import Movement, Region, sign_test
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.traffic import CleanTraffic, Compared, Traffic

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
    misses_flagged=of(0, 3),
    false_alarms_flagged=of(8, 8),
    recovered=of(30, 50),
    not_learned_flagged=of(40, 40),
    clean_audits_flagged=of(0, 30),
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


# --- the traffic that the guard serves ---


def compared(before, after, weights=None, label=3):
    """The same inputs, with one answer of the network, under both guards."""
    before, after = (np.asarray(flags, dtype=bool) for flags in (before, after))
    return Compared(np.full(len(before), label), before, after, np.ones(len(before)) if weights is None else weights)


def traffic_of(poisoned=None, is_miss=None, clean=None, n_audits=0):
    poisoned, clean = (compared([], []) if part is None else part for part in (poisoned, clean))
    return Traffic(poisoned, np.zeros(len(poisoned), dtype=bool) if is_miss is None else is_miss, clean, n_audits)


def on_traffic(**parts):
    judgement = judge(BEFORE, BEFORE, NOBODY, 0.01, SETTINGS, traffic=traffic_of(**parts))
    return {check.name: check for check in judgement.checks[-4:-1]}


KEPT = "held-out poisoned inputs, against the guard that serves"


@pytest.mark.parametrize(("lost", "passed"), [(1, True), (4, True), (5, False)])
def test_gate_refuses_what_loses_poisoned_inputs_that_the_serving_guard_flags(lost, passed):
    """On GTSRB Blend it was 28 of 151, and the guard fitted anew that it was compared with had lost 18 of them."""
    check = on_traffic(poisoned=compared(of(40, 40), of(40 - lost, 40)))[KEPT]
    assert check.passed is passed
    assert check.text.startswith(f"{lost} of 40 held-out poisoned inputs that the guard that serves flags would pass")
    assert (check.before, check.after) == (1.0, 1 - lost / 40)


def test_gate_finds_the_answer_of_the_network_that_loses_what_all_together_do_not():
    kept, lost = compared(of(90, 90), of(90, 90), label=1), compared(of(10, 10), of(7, 10), label=7)
    both = Compared(*(np.concatenate([getattr(part, name) for part in (kept, lost)]) for name in Compared.__slots__))
    check = on_traffic(poisoned=both)[KEPT]
    assert check.text.startswith("3 of 10 held-out poisoned inputs that the network calls class 7 that the guard that ")


@pytest.mark.parametrize(("n_misses", "weight", "passed"), [(0, 1, False), (1, 50, False), (2, 5, True), (2, 4, False)])
def test_gate_lets_caught_misses_make_a_loss_good_by_what_they_stand_for(n_misses, weight, passed):
    before, after = of(40, 40 + n_misses), ~of(10, 40 + n_misses)
    weights = np.where(before, 1.0, weight)
    checks = on_traffic(poisoned=compared(before, after, weights), is_miss=~before)
    assert checks[KEPT].passed is passed
    assert checks["held-out misses"].passed is (True if n_misses else None)


def test_gate_refuses_what_catches_fewer_misses():
    parts = {"poisoned": compared(of(2, 5), of(1, 5), np.full(5, 20.0)), "is_miss": of(5, 5)}
    check = on_traffic(**parts)["held-out misses"]
    assert check.text == ("1 of 5 held-out poisoned inputs of the audit sample are flagged, 2 before; no fewer may be.")


@pytest.mark.parametrize(
    ("new", "released", "passed"),
    [
        (1, 0, True),  # one may be an answer that is wrong
        (2, 0, False),
        (2, 4, False),
        (2, 25, True),  # of what is new one in fifty is seen: 2 or more, where as many are new as released, is chance
        (0, 0, True),
    ],
)
def test_gate_measures_false_alarms_of_the_traffic_by_what_audits_stand_for(new, released, passed):
    """100 false alarms, and 200 clean audits of 10,000 clean inputs."""
    before = of(100, 300)
    after = before.copy()
    after[:released] = False
    after[100 : 100 + new] = True
    clean = compared(before, after, np.where(before, 1.0, 50.0))
    check = on_traffic(clean=clean, n_audits=200)["false alarms of the traffic"]
    assert (check.before, check.after) == pytest.approx((100 / 10_100, (100 - released + 50 * new) / 10_100))
    assert check.passed is passed


def test_gate_without_audits_measures_no_false_alarms_of_the_traffic():
    assert on_traffic(clean=compared(of(8, 8), of(8, 8)))["false alarms of the traffic"].passed is None


def test_chance_of_gain_values():
    """Of two inputs that one guard flags alone both are new: as likely as not each, where all were drawn for sure."""
    assert compared(of(0, 2), of(2, 2)).chance_of_gain() == 0.25
    assert compared(of(1, 2), ~of(1, 2)).chance_of_gain() == 0.75
    assert compared(of(2, 2), of(0, 2)).chance_of_gain() == 1
    drawn = compared(of(0, 1), of(1, 1), np.array([99.0]))
    assert drawn.chance_of_gain() == pytest.approx(0.01)


@pytest.mark.parametrize(("n_flagged", "drifted"), [(150, False), (151, True)])
def test_gate_tells_drift_of_the_clean_traffic_from_an_attack(n_flagged, drifted):
    """More than one and a half times the rate, of false alarms alone: of 10,000 clean inputs."""
    before = of(n_flagged, n_flagged + 197)
    clean = compared(before, before, np.where(before, 1.0, (10_000 - n_flagged) / 197))
    check = on_traffic(clean=clean, n_audits=197)["false alarms of the traffic"]
    assert check.passed
    assert ("which is drift and no attack" in check.text) is drifted


# --- calibration that follows the traffic ---


def test_mixed_scores_of_the_same_sample_are_the_same():
    scores = np.arange(1.0, 101.0)
    np.testing.assert_array_equal(mixed_scores(scores, scores, np.full(100, 3.0)), scores)


@pytest.mark.parametrize("traffic", [np.full(50, 1e6), np.full(50, -1e6), np.linspace(60, 120, 50)])
def test_mixed_scores_change_no_rate_by_more_than_a_factor_of_two(traffic):
    scores = np.arange(1.0, 101.0)
    mixed = mixed_scores(scores, traffic, np.ones(50))
    assert (np.diff(mixed) >= 0).all()
    for threshold in (50.0, 80.0, 90.0, 98.0):
        old, new = (float((sample >= threshold).mean()) for sample in (scores, mixed))
        assert old / 2 - 0.011 <= new <= 2 * old + 0.011  # one in a hundred is one score


def test_mixed_scores_count_what_an_audit_stands_for():
    """Of the traffic 1 % lies above 99: four false alarms, and 99 audits that stand for four inputs each."""
    scores = np.arange(1.0, 101.0)
    traffic = np.concatenate([np.full(4, 99.5), np.linspace(1, 98, 99)])
    mixed = mixed_scores(scores, traffic, np.concatenate([np.ones(4), np.full(99, 4.0)]))
    assert (mixed >= 99.5).sum() == 1
    unweighted = mixed_scores(scores, traffic, np.ones(103))
    assert (unweighted >= 99.5).sum() == 2


def test_calibration_follows_only_where_asked_for_and_with_enough_audits(monkeypatch):
    pair = object()
    few = CleanTraffic(None, np.ones(120), 99, 0)
    monkeypatch.setattr(CleanTraffic, "of", lambda *_: few)
    assert follow_traffic(None, pair, None, RetrainerSettings(follow_traffic=True)) is pair
    assert follow_traffic(None, pair, None, SETTINGS) is pair
