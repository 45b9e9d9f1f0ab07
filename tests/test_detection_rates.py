"""What the guard lets through: values by hand, what is not known yet, and intervals that hold the truth."""

from __future__ import annotations

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import beta

from guard.errors import ConfigError
from guard.statistics.detection_rates import Estimate, NotKnown, estimate_rates
from guard.statistics.needed_reviews import WIDEST, answers_needed, audits_needed
from guard.statistics.review_sample import Stratum, Weights

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
FIGURES = ("poisoned_share", "detection_rate", "precision", "false_positive_rate", "missed")


def equal(count, probability=1.0):
    return Weights(count, count / probability, count / probability**2)


def flagged(drawn, decided, poisoned, population=None):
    return Stratum(True, equal(drawn), equal(decided), equal(poisoned), population)


def audited(drawn, decided, poisoned, probability, population=None):
    return Stratum(
        False, equal(drawn, probability), equal(decided, probability), equal(poisoned, probability), population
    )


def width(estimate):
    return estimate.upper - estimate.lower


def test_rates_where_everything_was_reviewed_are_exact():
    rates = estimate_rates([flagged(50, 50, 30), audited(150, 150, 5, 1.0), audited(800, 800, 1, 1.0, 800)])
    expected = {
        "poisoned_share": 36 / 1000,
        "detection_rate": 30 / 36,
        "precision": 30 / 50,
        "false_positive_rate": 20 / 964,
        "missed": 6.0,
    }
    assert {name: getattr(rates, name) for name in FIGURES} == {
        name: Estimate(value, value, value) for name, value in expected.items()
    }
    assert (rates.decided_flagged, rates.decided_audits) == (50, 950)


def test_rates_by_hand_with_requests_that_were_counted():
    strata = [
        flagged(60, 40, 30, 100),  # 30 + 60 * 3/4 = 75
        audited(120, 100, 2, 0.1, 1000),  # 2 + 900 * 0.02 = 20
        audited(250, 200, 1, 0.01, 20_000),  # 1 + 19800 * 0.005 = 100
    ]
    rates = estimate_rates(strata)
    assert rates.missed.value == pytest.approx(120)
    assert rates.precision.value == pytest.approx(0.75)
    assert rates.poisoned_share.value == pytest.approx(195 / 21_100)
    assert rates.false_positive_rate.value == pytest.approx(25 / (21_100 - 195))
    many = [strata[0], audited(400, 400, 8, 0.4, 1000), audited(10_000, 10_000, 50, 0.5, 20_000)]
    assert estimate_rates(many).detection_rate.value == pytest.approx(75 / (75 + 20 + 100))


def test_rates_by_hand_with_requests_that_nobody_counted():
    rates = estimate_rates([flagged(10, 10, 10), audited(200, 200, 4, 0.01)])
    assert rates.missed.value == pytest.approx(4 / 0.01)
    assert rates.poisoned_share.value == pytest.approx((10 + 400) / (10 + 20_000))


def test_unequal_weights_count_each_item_for_the_requests_it_stands_for():
    often, seldom = [0.1] * 50, [0.01] * 50
    stratum = Stratum(False, Weights.of(often + seldom), Weights.of(often + seldom), Weights.of([0.1, 0.01]))
    unequal = estimate_rates([stratum]).missed
    assert unequal.value == pytest.approx(10 + 100)
    same = estimate_rates([audited(100, 100, 2, 100 / 5500)]).missed
    assert same.value == pytest.approx(unequal.value)
    assert unequal.upper > 1.2 * same.upper  # one item alone stands for most


@pytest.mark.parametrize(("found", "decided"), [(1, 100), (5, 100), (40, 400), (90, 100)])
def test_interval_of_one_stratum_lies_between_the_limits_of_a_share(found, decided):
    population = 10_000_000
    missed = estimate_rates([audited(decided, decided, found, 0.001, population)]).missed
    limits = np.array([missed.lower, missed.upper]) / population
    halves = beta.cdf(limits, found, decided - found + 1), beta.cdf(limits, found + 1, decided - found)
    np.testing.assert_allclose(np.mean(halves, axis=0), [0.025, 0.975], atol=0.008)


def test_interval_where_nothing_was_found_obeys_the_rule_of_three():
    missed = estimate_rates([audited(300, 300, 0, 0.003, 100_000)]).missed
    assert (missed.value, missed.lower) == (0.0, 0.0)
    assert missed.upper == pytest.approx(3 / 300 * 100_000, rel=0.1)


def test_stratum_where_nothing_was_found_does_not_raise_the_lower_limit():
    near = audited(500, 500, 20, 0.1, 5000)
    alone = estimate_rates([near]).missed
    both = estimate_rates([near, audited(400, 400, 0, 0.01, 40_000)]).missed
    assert both.lower == pytest.approx(alone.lower, rel=0.15)
    assert both.upper > 1.5 * alone.upper


def test_detection_rate_without_audits_is_not_known_and_precision_is():
    rates = estimate_rates([flagged(100, 80, 60), audited(0, 0, 0, 1.0, 500), audited(0, 0, 0, 1.0, 9500)])
    for name in ("poisoned_share", "detection_rate", "false_positive_rate", "missed"):
        assert getattr(rates, name) == NotKnown(60, "audits")
    assert str(rates.detection_rate) == "not known yet, 60 more audits needed"
    assert rates.precision.value == 0.75
    assert 0.6 < rates.precision.lower < 0.75 < rates.precision.upper < 0.85


@pytest.mark.parametrize("strata", [[], [flagged(100, 80, 60)], [flagged(100, 80, 60), audited(0, 0, 0, 1.0)]])
def test_detection_rate_of_unflagged_requests_that_nobody_counted_is_not_known(strata):
    assert estimate_rates(strata).detection_rate == NotKnown(60, "audits")


def test_nothing_decided_says_how_many_answers_are_needed():
    rates = estimate_rates([flagged(100, 0, 0), audited(300, 300, 1, 0.03, 10_000)])
    assert rates.precision == rates.false_positive_rate == rates.poisoned_share == NotKnown(14, "answers")
    assert isinstance(rates.missed, Estimate)
    assert isinstance(estimate_rates([flagged(100, 13, 5)]).precision, NotKnown)
    assert width(estimate_rates([flagged(100, 14, 7)]).precision) <= WIDEST


def test_one_answer_is_asked_for_in_the_singular():
    assert str(NotKnown(1, "answers")) == "not known yet, 1 more answer needed"


@pytest.mark.parametrize(("near", "far"), [(0, 0), (3, 7), (0, 200), (50, 0)])
def test_audits_needed_are_enough_and_one_fewer_is_not(near, far):
    sizes = np.array([2000, 8000])
    needed = audits_needed([audited(near, near, 0, 0.05, 2000), audited(far, far, 0, 0.05, 8000)])
    assert needed > 0

    def unseen(more):
        decided = np.array([near, far]) + more * sizes / sizes.sum()
        return (3 * (sizes - decided) / decided).max() / sizes.sum()

    assert unseen(needed) <= 0.05 < unseen(needed - 1)


def test_band_that_nobody_answered_leaves_the_precision_unknown_if_it_is_large():
    answered = flagged(100, 100, 90)
    assert isinstance(estimate_rates([answered, flagged(10, 0, 0)]).precision, Estimate)
    told = estimate_rates([answered, flagged(100, 0, 0)]).precision
    assert told.of == "answers"
    assert 0 < told.needed <= 20
    assert answers_needed([answered, flagged(100, 5, 0)], 0.95) < told.needed


def test_detection_rate_with_a_wide_interval_says_how_many_audits_would_do():
    told = estimate_rates([flagged(100, 100, 50), audited(100, 100, 1, 0.01, 10_000)]).detection_rate
    assert told.of == "audits"
    n = 100 + told.needed
    then = estimate_rates([flagged(100, 100, 50), audited(n, n, round(n / 100), n / 10_000, 10_000)]).detection_rate
    assert isinstance(then, Estimate)
    assert width(then) == pytest.approx(WIDEST, rel=0.25)


def test_detection_rate_that_hangs_on_the_flagged_asks_for_answers():
    told = estimate_rates([flagged(1000, 16, 1), audited(5000, 5000, 20, 0.5, 10_000)]).detection_rate
    assert told.of == "answers"
    assert 0 < told.needed < 984


def test_traffic_without_poisoned_inputs_has_no_detection_rate_and_a_bound_for_what_passed():
    rates = estimate_rates([flagged(100, 100, 0), audited(600, 600, 0, 0.06, 10_000)])
    assert rates.detection_rate == NotKnown(0, "poisoned inputs")
    assert str(rates.detection_rate) == "not known: no poisoned input was found"
    assert rates.poisoned_share.lower == 0.0
    assert rates.poisoned_share.upper == pytest.approx(3 / 600, rel=0.15)


def test_no_flagged_input_has_no_precision():
    rates = estimate_rates([audited(600, 600, 3, 0.06, 10_000)])
    assert rates.precision == NotKnown(0, "flagged inputs")
    assert rates.detection_rate == Estimate(0.0, 0.0, 0.0)
    assert rates.false_positive_rate == Estimate(0.0, 0.0, 0.0)


def test_everything_poisoned_has_no_false_positive_rate():
    rates = estimate_rates([flagged(80, 80, 80), audited(20, 20, 20, 1.0, 20)])
    assert rates.false_positive_rate == NotKnown(0, "clean inputs")
    assert rates.detection_rate == Estimate(0.8, 0.8, 0.8)


SOME = [flagged(400, 300, 240), audited(400, 400, 20, 0.1, 4000), audited(1000, 1000, 30, 0.02)]


def test_stratum_split_in_two_halves_barely_changes_the_rates():
    halves = [flagged(200, 150, 120)] * 2 + [audited(200, 200, 10, 0.1, 2000)] * 2 + [audited(500, 500, 15, 0.02)] * 2
    whole, split = estimate_rates(SOME), estimate_rates(halves)
    for name in FIGURES:
        one, other = getattr(whole, name), getattr(split, name)
        assert other.value == pytest.approx(one.value)
        assert (other.lower, other.upper) == pytest.approx((one.lower, one.upper), abs=0.15 * width(one))


def test_rates_are_the_same_for_the_same_seed_and_nearly_so_for_another():
    assert estimate_rates(SOME) == estimate_rates(SOME, seed=0)
    one, other = estimate_rates(SOME).detection_rate, estimate_rates(SOME, seed=1).detection_rate
    assert one != other
    assert (other.lower, other.upper) == pytest.approx((one.lower, one.upper), abs=0.1 * width(one))


def test_intervals_grow_with_confidence_and_shrink_with_audits():
    def widths(strata, confidence=0.95):
        rates = estimate_rates(strata, confidence)
        return np.array([width(getattr(rates, name)) for name in ("poisoned_share", "detection_rate", "missed")])

    assert (widths(SOME, 0.8) < widths(SOME)).all()
    assert (widths(SOME) < widths(SOME, 0.99)).all()
    more = [SOME[0], audited(1600, 1600, 80, 0.4, 4000), audited(4000, 4000, 120, 0.08)]
    assert (widths(more) < widths(SOME)).all()


def test_requests_that_nobody_counted_make_the_share_less_certain():
    counted = [SOME[0], SOME[1], replace(SOME[2], population=50_000)]
    assert width(estimate_rates(counted).poisoned_share) < width(estimate_rates(SOME).poisoned_share)


@pytest.mark.parametrize(
    "wrong", [{"confidence": 0.0}, {"confidence": 1.0}, {"confidence": float("nan")}, {"seed": -1}]
)
def test_estimate_rates_refuses_options_out_of_range(wrong):
    with pytest.raises(ConfigError, match="must be"):
        estimate_rates(SOME, **wrong)


def test_intervals_hold_the_truth_of_simulated_weeks():
    rng = np.random.default_rng(18)
    held = defaultdict(list)
    for _ in range(400):
        strata, poisoned = [flagged(300, 300, 200)], 0
        for size, share, probability in ((3000, 0.02, 0.05), (30_000, 0.001, 0.01)):
            in_it = rng.binomial(size, share)
            found, others = rng.binomial(in_it, probability), rng.binomial(size - in_it, probability)
            strata.append(audited(found + others, found + others, found, probability, rng.choice([size, None])))
            poisoned += in_it
        rates = estimate_rates(strata)
        truth = {"missed": poisoned, "poisoned_share": (200 + poisoned) / 33_300}
        truth["false_positive_rate"] = 100 / (33_100 - poisoned)
        for name, value in truth.items():
            told = getattr(rates, name)
            held[name].append(told.lower <= value <= told.upper)
    for name in truth:
        assert 0.93 <= np.mean(held[name]) <= 0.985, name


def test_measured_intervals_hold_the_truth_in_93_to_97_percent_of_the_runs():
    with (RESULTS / "audit_estimates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "quantity", "truth", "estimate", "lower", "upper"]
    for quantity in ("detection_rate", "false_positive_rate", "poisoned_share"):
        held = [float(r["lower"]) <= float(r["truth"]) <= float(r["upper"]) for r in rows if r["quantity"] == quantity]
        assert len(held) >= 1000
        assert 0.93 <= np.mean(held) <= 0.97, quantity
