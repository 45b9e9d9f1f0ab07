"""P-values, folds and surprise by hand; and the product's promise: the rate of false alarms is the one asked for."""

from __future__ import annotations

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.detection.heads.head_training import holds_out_enough
from guard.errors import DataError
from guard.statistics.calibration import (
    TAIL_START,
    SurpriseMap,
    check_rate,
    conformal_p_values,
    images_needed,
    stratified_folds,
)
from guard.types import Float64Array, IntArray

TAIL_SURPRISE = -np.log(1 - TAIL_START)


def map_of(scores: Float64Array) -> SurpriseMap:
    """A map of one detector."""
    return SurpriseMap.fit(scores[:, None])


def surprise_of(surprise_map: SurpriseMap, scores: Float64Array) -> Float64Array:
    return surprise_map.surprise(np.asarray(scores, dtype=np.float64)[:, None])[:, 0]


# --- conformal p-values and rates ---


def test_conformal_p_values_by_hand():
    clean = np.array([1.0, 2.0, 2.0, 3.0])
    scores = np.array([0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5])
    expected = np.array([5, 5, 4, 4, 2, 2, 1]) / 5  # a tie counts as at least as high
    np.testing.assert_array_equal(conformal_p_values(scores, clean), expected)


def test_conformal_p_values_of_infinities_and_nan_stay_in_bounds_and_nan_is_never_clean():
    p_values = conformal_p_values(np.array([-np.inf, np.inf, np.nan]), np.array([1.0, 2.0, np.inf]))
    np.testing.assert_array_equal(p_values, [1.0, 2 / 4, 1 / 4])


def test_conformal_p_values_equal_the_definition_counted_one_by_one():
    rng = np.random.default_rng(0)
    clean, scores = np.sort(rng.integers(0, 9, 37).astype(float)), rng.integers(-1, 11, 200).astype(float)
    counted = [(1 + sum(c >= s for c in clean)) / (len(clean) + 1) for s in scores]
    np.testing.assert_array_equal(conformal_p_values(scores, clean), counted)


def p_values_of_crepes(scores: Float64Array, clean: Float64Array) -> Float64Array:
    """The oracle: p-values of another package, without its random tie-breaking."""
    crepes = pytest.importorskip("crepes", reason="crepes is not installed")
    oracle = crepes.ConformalClassifier()
    oracle.fit(clean)
    return oracle.predict_p(scores[:, None], smoothing=False)[:, 0]


@pytest.mark.parametrize("decimals", [0, 1, 12], ids=["many-ties", "some-ties", "no-ties"])
@pytest.mark.parametrize("n_clean", [1, 19, 500])
def test_conformal_p_values_equal_those_of_crepes(decimals, n_clean):
    rng = np.random.default_rng(n_clean)
    clean = np.round(rng.exponential(2.0, n_clean), decimals)
    scores = np.concatenate([np.round(rng.exponential(2.0, 300), decimals), clean, [-1.0, 0.0, 1e9]])
    ours = conformal_p_values(scores, np.sort(clean))
    np.testing.assert_allclose(ours, p_values_of_crepes(scores, clean), rtol=0, atol=1e-15)
    assert len(np.unique(ours)) > 1


def test_guard_p_values_equal_those_of_crepes_on_its_clean_scores(fitted_guard, clean_activations):
    found = fitted_guard.scores(clean_activations)
    expected = p_values_of_crepes(found.combined, fitted_guard.clean_scores)
    np.testing.assert_allclose(found.p_values, expected, rtol=0, atol=1e-15)


def test_conformal_p_values_without_clean_scores_are_one():
    np.testing.assert_array_equal(conformal_p_values(np.array([0.0, 9.0]), np.empty(0)), [1.0, 1.0])


def test_images_needed_is_exact_at_every_edge():
    for n in range(1, 3000):
        rate = 1 / (n + 1)
        assert images_needed(rate) == n
        assert images_needed(rate * (1 + 1e-6)) == n
        assert images_needed(rate * (1 - 1e-6)) == n + 1
        least = conformal_p_values(np.array([1.0]), np.zeros(n))[0]
        assert least <= rate  # so the most suspicious input of all can be flagged


@pytest.mark.parametrize(("rate", "needed"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.001, 999), (0.5, 1), (0.3, 3)])
def test_check_rate_accepts_the_number_needed_and_refuses_one_less(rate, needed):
    check_rate(rate, needed)
    with pytest.raises(DataError) as error:
        check_rate(rate, needed - 1)
    assert str(error.value) == (
        f"false_positive_rate={rate:g} needs at least {needed} clean images, got {needed - 1}. "
        "Raise the rate or add images."
    )


# --- folds ---


@pytest.mark.parametrize("counts", [(50, 50, 50), (1, 2, 3, 4, 5, 6, 7), (3,) * 40, (100, 1)])
def test_stratified_folds_spread_every_class_and_the_whole_evenly(counts):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    part = stratified_folds(labels, 5, seed=0)
    assert set(part.tolist()) <= set(range(5))
    assert np.ptp(np.bincount(part, minlength=5)) <= 1
    for label in range(len(counts)):
        assert np.ptp(np.bincount(part[labels == label], minlength=5)) <= 1


def test_stratified_folds_follow_the_seed_and_nothing_else():
    labels = np.arange(60) % 3
    np.testing.assert_array_equal(stratified_folds(labels, 5, seed=1), stratified_folds(labels, 5, seed=1))
    assert (stratified_folds(labels, 5, seed=1) != stratified_folds(labels, 5, seed=2)).any()


# --- surprise ---


def test_surprise_map_body_is_minus_log_of_the_share_above_at_every_knot():
    scores = np.random.default_rng(0).normal(size=400)
    quantiles = np.linspace(0, TAIL_START, 33)
    surprise = surprise_of(map_of(scores), np.quantile(scores, quantiles))
    np.testing.assert_allclose(surprise, -np.log(1 - quantiles), rtol=1e-12, atol=1e-12)


def test_surprise_map_body_is_linear_between_knots():
    scores = np.arange(1001.0)
    knot = np.quantile(scores, TAIL_START * np.array([10, 11]) / 32)
    surprise = surprise_of(map_of(scores), [knot[0], 0.25 * knot[1] + 0.75 * knot[0], knot[1]])
    assert surprise[1] == pytest.approx(0.75 * surprise[0] + 0.25 * surprise[2])


def test_surprise_map_tail_by_hand_is_exponential_where_few_scores_lie_in_it():
    surprise_map = map_of(np.arange(51.0))  # 90 % quantile 45, excesses 1 to 5, mean 3
    np.testing.assert_allclose(
        surprise_of(surprise_map, [45.0, 48.0, 51.0]), TAIL_SURPRISE + np.array([0.0, 1.0, 2.0]), rtol=1e-7
    )


def test_surprise_map_tail_goes_on_where_the_body_ends():
    scores = np.random.default_rng(1).exponential(size=500)
    surprise_map = map_of(scores)
    edge = np.quantile(scores, TAIL_START)
    below, at, above = surprise_of(surprise_map, [edge - 1e-9, edge, edge + 1e-9])
    assert at == pytest.approx(TAIL_SURPRISE, rel=1e-12)
    assert below == pytest.approx(at, abs=1e-6)
    assert above == pytest.approx(at, abs=1e-6)


def test_surprise_map_tail_of_exponential_scores_has_shape_0_and_tells_minus_log_of_the_truth():
    surprise_map = map_of(np.random.default_rng(0).exponential(size=20_000))
    assert surprise_map.shape.item() < 0.08  # the estimate's own deviation is 0.026
    np.testing.assert_allclose(surprise_of(surprise_map, [3.0, 5.0, 7.0]), [3.0, 5.0, 7.0], rtol=0.08)


@pytest.mark.parametrize("shape", [0.2, 0.4])
def test_surprise_map_tail_of_pareto_scores_finds_their_shape(shape):
    uniform = np.random.default_rng(0).uniform(size=40_000)
    scores = (uniform**-shape - 1) / shape  # generalised Pareto by inversion
    assert map_of(scores).shape.item() == pytest.approx(shape, abs=0.1)


def test_surprise_map_tail_of_very_heavy_scores_keeps_shape_below_one():
    scores = np.random.default_rng(0).uniform(size=2000) ** -3.0
    assert 0.5 < map_of(scores).shape.item() <= 0.9


@pytest.mark.parametrize("rounded", [False, True])
def test_surprise_map_rises_with_each_detectors_score(rounded):
    rng = np.random.default_rng(2)
    scores = rng.normal(size=(300, 2)) * [1.0, 30.0] + rng.integers(0, 3, 300)[:, None]
    if rounded:  # many ties
        scores = scores.round()
    surprise_map = SurpriseMap.fit(scores)
    for detector in range(2):
        grid = np.tile(np.median(scores, axis=0), (2000, 1))
        grid[:, detector] = np.linspace(scores[:, detector].min() - 1, 3 * scores[:, detector].max(), 2000)
        surprise = surprise_map.surprise(grid)
        assert (np.diff(surprise[:, detector]) >= 0).all()
        assert surprise[0, detector] == 0.0
        assert np.ptp(surprise[:, 1 - detector]) == 0.0
        tail = grid[:, detector] > scores[:, detector].max()
        assert (np.diff(surprise[tail, detector]) > 0).all()


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_surprise_map_huge_and_infinite_scores_are_finite_and_most_surprising(shape):
    uniform = np.random.default_rng(0).uniform(size=1000)
    scores = -np.log(uniform) if shape == 0 else (uniform**-shape - 1) / shape
    surprise = surprise_of(map_of(scores), [-np.inf, scores.max(), 1e6, 1e25, 1e30, np.inf])
    assert np.isfinite(surprise).all()
    assert surprise[0] == 0
    assert (np.diff(surprise) >= 0).all()
    assert surprise[-1] == surprise[-2] > surprise[-3] > surprise[1]


def test_surprise_map_fits_clean_scores_that_are_infinite():
    scores = np.concatenate([np.arange(30.0), [np.inf, -np.inf]])
    surprise_map = map_of(scores)
    assert all(np.isfinite(array).all() for array in surprise_map.arrays().values())
    surprise = surprise_of(surprise_map, [0.0, 10.0, 29.0, np.inf])
    assert np.isfinite(surprise).all()
    assert (np.diff(surprise) > 0).all()


@pytest.mark.parametrize("scores", [[3.0], [3.0, 4.0], [5.0] * 40])
def test_surprise_map_few_or_equal_scores_still_call_a_higher_one_most_surprising(scores):
    surprise = surprise_of(map_of(np.array(scores)), [min(scores) - 1, max(scores), max(scores) + 1])
    assert np.isfinite(surprise).all()
    assert surprise[0] == 0
    assert surprise[2] > max(surprise[1], TAIL_SURPRISE)


def test_surprise_map_without_scores_is_refused():
    with pytest.raises(DataError, match=r"^calibration needs at least one clean score, got none\.$"):
        map_of(np.empty(0))


def test_surprise_map_arrays_roundtrip_gives_equal_surprise():
    rng = np.random.default_rng(0)
    surprise_map = SurpriseMap.fit(rng.normal(size=(300, 3)))
    restored = SurpriseMap.from_arrays({name: array.copy() for name, array in surprise_map.arrays().items()})
    new = 3 * rng.normal(size=(100, 3))
    np.testing.assert_array_equal(restored.surprise(new), surprise_map.surprise(new), strict=True)


# --- the promise ---


def clean_activations(per_class: tuple[int, ...], world: int, draw: int) -> tuple[Activations, IntArray]:
    """Gaussian classes seen at two depths, and a suspect that answers with the nearest centre; about 1 % wrong."""
    n_classes = len(per_class)
    rng = np.random.default_rng(world)
    centres, mixing = rng.normal(0, 1.0, (n_classes, 16)), rng.normal(size=(16, 8))
    rng = np.random.default_rng((world, draw))
    labels = rng.permutation(np.repeat(np.arange(n_classes), per_class))
    features = centres[labels] + rng.normal(size=(len(labels), 16))
    logits = -((features[:, None] - centres) ** 2).sum(axis=2) / 2
    early = features @ mixing
    return Activations(
        *(array.astype(np.float32) for array in (logits, features)), {"early": np.float32(early)}
    ), labels


def realised_rates(per_class: tuple[int, ...], rates: tuple[float, ...], seeds: int) -> tuple[Float64Array, int]:
    """Return the share of 4,000 or so new clean inputs flagged, by seed and rate; and how many there were."""
    realised, n_new = np.empty((seeds, len(rates))), 0
    for seed in range(seeds):
        guard = Guard.fit_activations(
            *clean_activations(per_class, seed, 0), GuardConfig(false_positive_rate=max(rates), seed=seed)
        )
        times = 1 + 4000 // sum(per_class)
        new, _ = clean_activations(tuple(times * count for count in per_class), seed, 1)
        n_new = len(new)
        p_values = guard.scores(new).p_values
        for column, rate in enumerate(rates):
            realised[seed, column] = (p_values <= rate).mean()
            some = guard.with_config(false_positive_rate=rate).scores(new[:200])
            np.testing.assert_array_equal(some.is_poisoned, some.p_values <= rate)
            np.testing.assert_allclose(some.p_values, p_values[:200], rtol=0, atol=1e-9)
    return realised, n_new


def tolerance(rate: float, n_clean: int, n_new: int) -> float:
    """Return 4 standard deviations of one guard's realised rate: of counting new inputs, and of the clean draw."""
    return 4 * float(np.sqrt(rate * (1 - rate) * (1 / n_new + 1 / n_clean)))


#: How many images there are of each class.
CLASS_SIZES = {
    "100-each": (100,) * 10,
    "fifty-each": (50,) * 10,
    "few-to-many": (20, 35, 45, 49, 50, 51, 60, 70, 100, 150),
}


def test_guard_realised_false_positive_rate_is_the_requested_one():
    """Of each of nine guards, of three with the same class sizes together, and of all nine together."""
    rates, seeds = (0.01, 0.05, 0.1), 3
    off, allowed = np.empty((len(CLASS_SIZES), seeds, len(rates))), np.empty((len(CLASS_SIZES), 1, len(rates)))
    for number, per_class in enumerate(CLASS_SIZES.values()):
        n_clean = sum(per_class)
        realised, n_new = realised_rates(per_class, rates, seeds)
        for column, rate in enumerate(rates):
            exact = np.floor(rate * (n_clean + 1) + 1e-9) / (n_clean + 1)  # the highest p-value not above the rate
            off[number, :, column] = realised[:, column] - exact
            allowed[number, 0, column] = tolerance(exact, n_clean, n_new)
    assert (np.abs(off) <= allowed).all(), off / allowed
    assert (np.abs(off.mean(axis=1)) <= allowed[:, 0] / np.sqrt(seeds)).all(), off.mean(axis=1) / allowed[:, 0]
    of_all = np.sqrt(np.square(allowed).mean(axis=0)[0] / (len(CLASS_SIZES) * seeds))
    assert (np.abs(off.mean(axis=(0, 1))) <= of_all).all(), off.mean(axis=(0, 1)) / of_all


@pytest.mark.parametrize(("n_per_class", "seed"), [(25, 0), (30, 1)])
def test_guard_realised_false_positive_rate_on_real_images_with_few_per_class_is_not_above(
    fitted_guard, clean_activations, n_per_class, seed
):
    """Classes hardly larger than 20, the neighbours: detectors of 19 in 20 must still speak for the final ones."""
    clean, labels = fitted_guard.reference, fitted_guard.reference_labels
    rng = np.random.default_rng(seed)
    rows = np.concatenate([rng.permutation(np.flatnonzero(labels == label))[:n_per_class] for label in range(10)])
    guard = Guard.fit_activations(clean[rows], labels[rows], GuardConfig(false_positive_rate=0.1, seed=seed))
    p_values = guard.scores(clean_activations).p_values
    for rate in (0.02, 0.05, 0.1):
        realised = (p_values <= rate).mean()
        assert 0.1 * rate <= realised <= rate + tolerance(rate, len(rows), len(clean_activations))


def test_guard_realised_false_positive_rate_with_nine_images_per_class_is_not_above_the_requested_one():
    """Detectors of 8 images of a class calibrate those of 9, which are less easily surprised: below is expected."""
    rates, n_clean = (0.05, 0.1), 90
    realised, n_new = realised_rates((9,) * 10, rates, seeds=8)
    for column, rate in enumerate(rates):
        exact = np.floor(rate * (n_clean + 1) + 1e-9) / (n_clean + 1)
        allowed = tolerance(exact, n_clean, n_new)
        assert realised[:, column].max() <= exact + allowed
        assert 0.25 * exact <= realised[:, column].mean() <= exact + allowed / np.sqrt(len(realised))


@pytest.mark.parametrize("apart", [3.0, 10.0])
def test_heads_of_the_folds_end_training_as_the_final_ones_do(apart):
    """Of 128 images a tenth is enough to stop early, of four fifths it is not: sure otherwise, they would not agree."""
    centres = np.random.default_rng(0).normal(0, apart, (4, 256))

    def draw(n, seed):
        labels = np.arange(n) % 4
        features = centres[labels] + np.random.default_rng(seed).normal(size=(n, 256))
        logits = -((features[:, None] - centres) ** 2).sum(axis=2) / 2
        return Activations(logits.astype(np.float32), features.astype(np.float32)), labels

    clean, labels = draw(128, 1)
    part = stratified_folds(labels, 5, 0)
    assert holds_out_enough(labels)
    assert not any(holds_out_enough(labels[part != fold]) for fold in range(5))
    guard = Guard.fit_activations(clean, labels, GuardConfig(false_positive_rate=0.1, folds=5))
    realised = guard.scores(draw(2000, 2)[0]).is_poisoned.mean()
    assert realised <= 0.1 + tolerance(0.1, 128, 2000)


def test_surprise_of_a_single_row_is_that_of_the_row_in_a_batch():
    rng = np.random.default_rng(4)
    clean = rng.exponential(size=(400, 5)) ** 2
    clean[:, 1], clean[:, 2] = 3.0, np.round(clean[:, 2])  # constant, and with many equal scores
    fitted = SurpriseMap.fit(clean)
    ends = [[value] * 5 for value in (-np.inf, -1.0, 0.0, 1e29, 1e30, np.inf, np.nan)]
    scores = np.concatenate([clean[:40], 10 * clean[:40], fitted.knots.T, ends])
    single = np.concatenate([fitted.surprise(row[np.newaxis]) for row in scores])
    np.testing.assert_allclose(single, fitted.surprise(scores), rtol=1e-14, atol=1e-15)
