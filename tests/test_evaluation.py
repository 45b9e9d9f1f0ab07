import numpy as np
import pytest

from guard.errors import DataError
from guard.statistics.evaluation import (
    attack_success_rate,
    auroc,
    clean_accuracy,
    false_positive_rate,
    recovery_accuracy,
    true_positive_rate,
    wilson_interval,
)


def ints(*values):
    return np.array(values, dtype=np.int64)


def flags(*values):
    return np.array(values, dtype=bool)


def test_clean_accuracy_hand_worked_counts_flagged_as_wrong():
    predicted, true = ints(1, 2, 3, 4), ints(1, 2, 3, 0)
    assert clean_accuracy(predicted, true) == 0.75
    # Right and flagged: lost. Wrong and flagged: still wrong.
    assert clean_accuracy(predicted, true, flags(1, 0, 0, 1)) == 0.5


def test_attack_success_rate_hand_worked_leaves_target_class_out():
    predicted, wanted, true = ints(7, 7, 7, 3, 7), ints(7, 7, 7, 7, 7), ints(1, 2, 7, 3, 4)
    assert attack_success_rate(predicted, wanted, true) == 0.75
    assert attack_success_rate(predicted, wanted, true, flags(1, 0, 0, 0, 0)) == 0.5
    assert attack_success_rate(predicted, wanted, true, flags(0, 0, 1, 1, 0)) == 0.75


def test_attack_success_rate_all_to_all_compares_row_by_row():
    assert attack_success_rate(ints(1, 2, 0, 1), ints(1, 2, 3, 0), ints(0, 1, 2, 9)) == 0.5


def test_attack_success_rate_only_target_class_raises():
    with pytest.raises(DataError, match="no attack can succeed"):
        attack_success_rate(ints(7), ints(7), ints(7))


def test_recovery_accuracy_hand_worked():
    assert recovery_accuracy(ints(1, 7, 3), ints(1, 2, 3)) == pytest.approx(2 / 3)


def test_rates_hand_worked():
    flagged, poisoned = flags(1, 1, 0, 1, 0, 0, 0), flags(1, 1, 1, 0, 0, 0, 0)
    assert true_positive_rate(flagged, poisoned) == pytest.approx(2 / 3)
    assert false_positive_rate(flagged, poisoned) == 0.25


def test_rates_one_class_only_raises():
    with pytest.raises(DataError, match="at least one poisoned"):
        true_positive_rate(flags(1, 0), flags(0, 0))
    with pytest.raises(DataError, match="at least one clean"):
        false_positive_rate(flags(1, 0), flags(1, 1))
    assert true_positive_rate(flags(1, 0), flags(1, 1)) == 0.5
    assert false_positive_rate(flags(1, 0), flags(0, 0)) == 0.5


def test_auroc_hand_worked_with_a_tie():
    # Pairs (poisoned, clean): 3>1, 3>2, 2>1 win, 2=2 is half: 3.5 of 4.
    assert auroc(np.array([1.0, 2.0, 2.0, 3.0]), flags(0, 0, 1, 1)) == 0.875


@pytest.mark.parametrize(
    ("scores", "expected"),
    [([0, 1, 2, 3], 1.0), ([3, 2, 1, 0], 0.0), ([5, 5, 5, 5], 0.5), ([-np.inf, 0, np.inf, np.inf], 1.0)],
)
def test_auroc_extremes(scores, expected):
    assert auroc(np.array(scores, dtype=float), flags(0, 0, 1, 1)) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_auroc_equals_scikit_learn_with_many_ties(dtype):
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    poisoned = rng.random(500) < 0.3
    scores = np.round(rng.normal(size=500) + poisoned, 1).astype(dtype)
    assert auroc(scores, poisoned) == pytest.approx(roc_auc_score(poisoned, scores), abs=1e-12)


@pytest.mark.parametrize(
    ("scores", "mask", "message"),
    [
        ([0.0, 1.0], [False, False], "only clean"),
        ([0.0, 1.0], [True, True], "only poisoned"),
        ([0.0, np.nan], [False, True], "NaN at row 1"),
        ([0.0], [False, True], "equally long"),
        ([[0.0, 1.0]], [False, True], "one-dimensional"),
        ([], [], "are empty"),
        ([0.0, 1.0], [0, 1], "must be bool"),
    ],
)
def test_auroc_bad_input_raises(scores, mask, message):
    with pytest.raises(DataError, match=message):
        auroc(np.array(scores), np.array(mask))


@pytest.mark.parametrize(
    "measure",
    [
        lambda: clean_accuracy([], []),
        lambda: recovery_accuracy([], []),
        lambda: attack_success_rate([], [], []),
        lambda: true_positive_rate([], []),
        lambda: false_positive_rate([], []),
    ],
)
def test_rate_of_nothing_raises(measure):
    with pytest.raises(DataError, match="are empty"):
        measure()


def test_clean_accuracy_unfit_arguments_raise():
    with pytest.raises(DataError, match="equally long"):
        clean_accuracy(ints(1, 2), ints(1))
    with pytest.raises(DataError, match="predicted_labels must be integers"):
        clean_accuracy(np.array([1.0]), ints(1))
    with pytest.raises(DataError, match=r"flagged must have shape \(1,\)"):
        clean_accuracy(ints(1), ints(1), flags(1, 0))
    with pytest.raises(DataError, match="flagged must be bool"):
        clean_accuracy(ints(1), ints(1), ints(1))


def test_wilson_interval_published_values():
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 3.
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_interval_ends_are_exact_and_mirror():
    low, high = wilson_interval(0, 50), wilson_interval(50, 50)
    assert low.lower == 0.0
    assert high.upper == 1.0
    assert high.lower == pytest.approx(1.0 - low.upper)


@pytest.mark.parametrize(
    ("successes", "trials", "confidence"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 0.0), (1, 5, 1.0)]
)
def test_wilson_interval_out_of_range_raises(successes, trials, confidence):
    with pytest.raises(DataError):
        wilson_interval(successes, trials, confidence)
