"""Where a request belongs, with which probability it is audited, and the sums over what was reviewed."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import pytest

from guard.errors import DataError
from guard.statistics.review_sample import (
    FLAGGED_BANDS,
    UNKNOWN_BAND,
    Populations,
    Stratum,
    Weights,
    strata_of_items,
)
from guard.types import UNDECIDED


def test_weights_by_hand():
    assert Weights.of([0.5, 0.25, 1.0]) == Weights(3, 7.0, 21.0)
    assert Weights.of([]) == Weights()


@pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, float("nan")])
def test_weights_refuse_what_is_no_probability(probability):
    with pytest.raises(DataError, match="in \\(0, 1\\]"):
        Weights.of([0.5, probability])


def equal(count, weight=1.0):
    return Weights(count, count * weight, count * weight**2)


@pytest.mark.parametrize(
    ("counts", "population"),
    [
        ((equal(3), equal(4), equal(1)), None),
        ((equal(4), equal(3), equal(4)), None),
        ((equal(4), equal(3, 2.0), equal(1)), None),
        ((equal(4, 0.5), equal(3, 0.5), equal(1, 0.5)), None),
        ((Weights(2, 8.0, 1.0), equal(0), equal(0)), None),
        ((equal(4), equal(3), equal(1)), 3),
    ],
)
def test_stratum_refuses_counts_that_contradict_each_other(counts, population):
    with pytest.raises(DataError):
        Stratum(False, *counts, population)


#: Three flagged, one of them at a rate that was not kept; two near; three far.
ITEMS = {
    "is_flagged": np.array([True, True, True, False, False, False, False, False]),
    "p_values": np.array([0.0001, 0.01, 0.02, 0.05, 0.1, 0.5, 0.6, 0.7]),
    "false_positive_rates": np.array([0.01, 0.01, np.nan, 0.01, 0.01, 0.01, 0.01, 0.01]),
    "probabilities": np.array([np.nan, np.nan, np.nan, 0.5, 0.25, 0.1, 0.1, 0.2]),
    "answers": np.array([1, UNDECIDED, 0, 1, 0, UNDECIDED, 0, 1]),
}


def test_strata_of_items_by_hand():
    assert strata_of_items(**ITEMS, populations=Populations(near=20)) == [
        Stratum(True, equal(1), equal(1), equal(1)),
        Stratum(True, equal(1), equal(0), equal(0)),
        Stratum(True, equal(1), equal(1), equal(0)),
        Stratum(False, Weights(2, 6.0, 20.0), Weights(2, 6.0, 20.0), Weights(1, 2.0, 4.0), 20),
        Stratum(False, Weights(3, 25.0, 225.0), Weights(2, 15.0, 125.0), Weights(1, 5.0, 25.0)),
    ]


def test_strata_of_items_put_each_flagged_item_into_the_band_that_a_single_one_gets():
    rng = np.random.default_rng(0)
    rates = rng.choice([0.003, 0.01, 0.07], 500)
    p_values = rates * rng.choice([*FLAGGED_BANDS, 0.0, 0.3, 0.9], 500)
    strata = strata_of_items(
        is_flagged=np.ones(500, dtype=bool),
        p_values=p_values,
        false_positive_rates=rates,
        probabilities=np.ones(500),
        answers=np.zeros(500, dtype=int),
    )
    shares = zip(p_values.tolist(), rates.tolist(), strict=True)
    bands = [min(bisect_left(FLAGGED_BANDS, p / rate), UNKNOWN_BAND - 1) for p, rate in shares]
    assert [stratum.drawn.count for stratum in strata] == [*np.bincount(bands), 0, 0]


@pytest.mark.parametrize("total", [3, 4, 8, 1000])
def test_strata_of_items_divide_flagged_inputs_that_the_queue_lost(total):
    flagged = strata_of_items(**ITEMS, populations=Populations(flagged=total))[:3]
    populations = [stratum.population for stratum in flagged]
    assert sum(populations) == total
    assert max(populations) - min(populations) <= 1


def test_strata_of_items_take_more_items_than_were_counted_for_a_lost_count():
    strata = strata_of_items(**ITEMS, populations=Populations(2, 1, 2))
    assert [stratum.population for stratum in strata] == [1, 1, 1, 2, 3]


def test_strata_of_no_items_keep_what_was_counted():
    nothing = {name: values[:0] for name, values in ITEMS.items()}
    strata = strata_of_items(**nothing, populations=Populations(5, 10, 20))
    assert [(stratum.is_flagged, stratum.population) for stratum in strata] == [(True, 5), (False, 10), (False, 20)]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("answers", 2, "answers must be"),
        ("p_values", 1.5, "p_values must be"),
        ("false_positive_rates", np.nan, "NaN only of flagged"),
        ("false_positive_rates", 1.0, "false_positive_rates must be"),
        ("probabilities", 0.0, "probability with which"),
    ],
)
def test_strata_of_items_refuse_values_out_of_range(name, value, match):
    values = ITEMS[name].copy()
    values[-1] = value
    with pytest.raises(DataError, match=match):
        strata_of_items(**{**ITEMS, name: values})


def test_strata_of_items_refuse_columns_of_different_length():
    with pytest.raises(DataError, match="answers has shape"):
        strata_of_items(**{**ITEMS, "answers": ITEMS["answers"][1:]})
