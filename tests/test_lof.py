"""Per-class LOF: against values by hand, against scikit-learn, and against the definition written out slowly."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from guard.detection.detectors.base import Detector
from guard.detection.detectors.distances import AllDistances, Preselector
from guard.detection.detectors.lof import PerClassLof
from guard.errors import ConfigError, DataError, NotFittedError
from guard.types import Activations, Float64Array, FloatArray, IntArray


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices are tiny here: on a busy machine, waiting for a second thread takes far longer than the work."""
    with threadpool_limits(1):
        yield


def activations_of(features: FloatArray, predicted: IntArray, n_classes: int) -> Activations:
    return Activations(np.eye(n_classes, dtype=np.float32)[predicted], features)


def fitted(features: FloatArray, labels: IntArray, n_classes: int, **settings: object) -> PerClassLof:
    return PerClassLof(**settings).fit(activations_of(features, labels, n_classes), labels)


def sklearn_factors(references: FloatArray, queries: FloatArray, k: int, algorithm: str = "auto") -> Float64Array:
    from sklearn.neighbors import LocalOutlierFactor  # here, as every process of a run reads this file

    k = min(k, len(references) - 1)  # what scikit-learn does itself, with a warning
    estimator = LocalOutlierFactor(n_neighbors=k, novelty=True, algorithm=algorithm)
    return -estimator.fit(references.astype(np.float64)).score_samples(queries.astype(np.float64))


def slow_factors(references: FloatArray, queries: FloatArray, k: int) -> Float64Array:
    """The definition by loops; of equally far references the first are taken."""
    references, queries = references.astype(np.float64), queries.astype(np.float64)
    k = min(k, len(references) - 1)

    def nearest(point: Float64Array, leave_out: int | None = None) -> tuple[IntArray, Float64Array]:
        squared = ((references - point) ** 2).sum(axis=1)
        if leave_out is not None:
            squared[leave_out] = np.inf
        chosen = np.argsort(squared, kind="stable")[:k]
        return chosen, np.sqrt(squared[chosen])

    found = [nearest(point, selected) for selected, point in enumerate(references)]
    k_distance = np.array([distances[-1] for _, distances in found])

    def density(chosen: IntArray, distances: Float64Array) -> float:
        return float(1.0 / (np.maximum(distances, k_distance[chosen]).mean() + 1e-10))

    densities = np.array([density(*pair) for pair in found])
    factors = []
    for query in queries:
        chosen, distances = nearest(query)
        factors.append((densities[chosen] / density(chosen, distances)).mean())
    return np.array(factors)


def assert_same_factors(actual: Float64Array, expected: Float64Array) -> None:
    assert np.max(np.abs(actual - expected) / np.maximum(1.0, np.abs(expected))) < 1e-9


def clusters(
    rng: np.random.Generator, sizes: list[int], d: int, n_queries: int = 12
) -> tuple[FloatArray, IntArray, FloatArray]:
    """Return features of Gaussian classes behind a ReLU, shuffled labels, and queries: near, far, and a reference."""
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    centres = rng.normal(size=(len(sizes), d))
    features = np.maximum(centres[labels] + 0.4 * rng.normal(size=(len(labels), d)), 0.0).astype(np.float32)
    queries = np.maximum(centres[rng.integers(0, len(sizes), n_queries)] + rng.normal(size=(n_queries, d)), 0.0)
    queries[0] *= 100.0
    queries[1] = features[0]
    return features, labels, queries.astype(np.float32)


def assert_equals_sklearn(
    features: FloatArray, labels: IntArray, queries: FloatArray, k: int, algorithm: str = "auto"
) -> None:
    """Check every class by `score_all`, and each class as the predicted one by `score`."""
    n_classes = int(labels.max()) + 1
    detector = fitted(features, labels, n_classes, n_neighbors=k)
    predicted = np.zeros(len(queries), dtype=np.int64)
    all_factors = detector.score_all(activations_of(queries, predicted, n_classes))
    for label in range(n_classes):
        expected = sklearn_factors(features[labels == label], queries, k, algorithm)
        assert_same_factors(all_factors[:, label], expected)
        assert_same_factors(detector.score(activations_of(queries, predicted + label, n_classes)), expected)


# Values


def test_lof_of_four_points_matches_values_by_hand() -> None:
    # k = 2; k-distances of 0, 1, 3, 7: 3, 2, 3, 6; densities: 1/2.5, 1/3, 1/2.5, 1/5
    references = np.array([[0.0], [1.0], [3.0], [7.0]], dtype=np.float32)
    queries = np.array([[5.0], [-2.0]], dtype=np.float32)
    labels = np.zeros(4, dtype=np.int64)
    detector = fitted(references, labels, 1, n_neighbors=2)
    # 5: neighbours 3 and 7, reach 3 and 6: (0.4 + 0.2) / 2 * 4.5; -2: neighbours 0 and 1, reach 3 and 3
    expected = [0.3 * 4.5, (0.4 + 1.0 / 3.0) / 2.0 * 3.0]
    scores = detector.score(activations_of(queries, np.zeros(2, dtype=np.int64), 1))
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    assert scores.dtype == np.float64


@pytest.mark.parametrize("d", [1, 2, 3, 8, 16, 17, 40, 128, 1000])
@pytest.mark.parametrize("k", [1, 5, 20])
def test_lof_of_random_classes_equals_sklearn(d: int, k: int) -> None:
    rng = np.random.default_rng([d, k])
    features, labels, queries = clusters(rng, [2, 3, 5, 21, 40, 65, 130, 200], d)
    if d <= 2:
        features += rng.exponential(size=features.shape).astype(np.float32)  # without ReLU's many equal zeros
    assert_equals_sklearn(features, labels, queries, k)


def test_lof_of_many_random_shapes_equals_sklearn() -> None:
    rng = np.random.default_rng(7)
    for _ in range(60):
        sizes = rng.integers(2, 90, size=rng.integers(1, 7)).tolist()
        d, k = int(rng.integers(3, 70)), int(rng.integers(1, 31))
        features = rng.normal(size=(sum(sizes), d)).astype(np.float32)
        labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        assert_equals_sklearn(features, labels, rng.normal(size=(6, d)).astype(np.float32), k)


@pytest.mark.parametrize("summary", [("l0", "l1", "l2"), ("l1", "l2", "linf"), ("l2",)])
def test_lof_of_norm_summary_equals_sklearn(summary: tuple[str, ...]) -> None:
    features, labels, queries = clusters(np.random.default_rng(3), [25, 4, 300, 90], 128)
    detector = fitted(features, labels, 4, summary=summary)
    all_factors = detector.score_all(activations_of(queries, np.zeros(len(queries), dtype=np.int64), 4))

    def norms(vectors: FloatArray) -> Float64Array:
        size = np.abs(vectors.astype(np.float64))
        known = {"l0": (size > 1e-3 * size.max(axis=1, keepdims=True)).sum(axis=1), "l1": size.sum(axis=1)}
        known |= {"l2": np.sqrt((size**2).sum(axis=1)), "linf": size.max(axis=1)}
        return np.column_stack([known[order] for order in summary]).astype(np.float64)

    for label in range(4):
        expected = sklearn_factors(norms(features[labels == label]), norms(queries), 20)
        assert_same_factors(all_factors[:, label], expected)


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("copies", [2, 8, 30])
def test_lof_of_whole_number_duplicates_equals_sklearn(d: int, copies: int) -> None:
    rng = np.random.default_rng([d, copies])  # whole numbers: scikit-learn's matrix product is exact too
    points = rng.integers(0, 4000, size=(40, d)).astype(np.float32)
    features = rng.permutation(np.concatenate([points, np.repeat(points[:6], copies, axis=0)]))
    labels = np.arange(len(features)) % 2
    queries = np.concatenate([points[:8], rng.integers(0, 4000, size=(8, d))]).astype(np.float32)
    assert_equals_sklearn(features, labels, queries, 7)


@pytest.mark.parametrize("d", [2, 24])
@pytest.mark.parametrize("size", [30, 150])
def test_lof_of_equally_far_references_takes_the_first_given(d: int, size: int) -> None:
    rng = np.random.default_rng([d, size])
    references = rng.integers(0, 3, size=(size, d)).astype(np.float32)
    queries = rng.integers(0, 3, size=(20, d)).astype(np.float32)
    labels, predicted = np.zeros(size, dtype=np.int64), np.zeros(20, dtype=np.int64)
    detector = fitted(references, labels, 1, n_neighbors=5)
    expected = slow_factors(references, queries, 5)
    assert_same_factors(detector.score(activations_of(queries, predicted, 1)), expected)
    assert_same_factors(detector.score_all(activations_of(queries, predicted, 1))[:, 0], expected)


@pytest.mark.parametrize("d", [3, 64, 400])
def test_lof_of_features_with_large_offset_equals_exact_sklearn(d: int) -> None:
    features, labels, queries = clusters(np.random.default_rng(d), [25, 120], d)
    # scikit-learn's matrix product loses digits here; its tree takes differences
    assert_equals_sklearn(features + np.float32(1e4), labels, queries + np.float32(1e4), 20, "kd_tree")


@pytest.mark.parametrize("d", [3, 64])
def test_lof_of_nearly_coinciding_points_equals_exact_sklearn(d: int) -> None:
    rng = np.random.default_rng(d)
    points = rng.normal(size=(5, d))
    labels = np.repeat([0, 1], [50, 100])
    features = points[np.arange(150) % 5] + 1e-5 * rng.normal(size=(150, d))
    queries = points[np.arange(10) % 5] + 1e-5 * rng.normal(size=(10, d))
    assert_equals_sklearn(features.astype(np.float32), labels, queries.astype(np.float32), 6, "kd_tree")


def test_lof_of_constant_and_partly_constant_features_equals_definition() -> None:
    rng = np.random.default_rng(5)
    partly = rng.normal(size=(90, 30)).astype(np.float32)
    partly[:, 4:] = 7.5
    constant = np.full((90, 30), 0.3, dtype=np.float32)
    features, labels = np.concatenate([partly, constant]), np.repeat([0, 1], 90)
    queries = np.concatenate([partly[:3] + np.float32(0.1), constant[:2]])
    detector = fitted(features, labels, 2)
    scores = detector.score_all(activations_of(queries, np.zeros(5, dtype=np.int64), 2))
    assert_same_factors(scores[:, 0], slow_factors(partly, queries, 20))
    assert_same_factors(scores[:, 1], slow_factors(constant, queries, 20))


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_lof_of_extreme_scales_ranks_without_overflow_or_underflow(scale: float) -> None:
    features, labels, queries = clusters(np.random.default_rng(9), [100], 32)
    predicted = np.zeros(len(queries), dtype=np.int64)
    features, queries = features * np.float32(scale), queries * np.float32(scale)
    queries[2] = 3e38  # so far away that float32 cannot rank the references
    scores = fitted(features, labels, 1).score(activations_of(queries, predicted, 1))
    assert_same_factors(scores, slow_factors(features, queries, 20))


def test_lof_of_float64_features_keeps_their_precision() -> None:
    rng = np.random.default_rng(11)
    features = 1.0 + 1e-9 * rng.normal(size=(120, 20))  # all equal in float32
    labels, predicted = np.zeros(120, dtype=np.int64), np.zeros(5, dtype=np.int64)
    queries = 1.0 + 1e-9 * rng.normal(size=(5, 20))
    detector = fitted(features, labels, 1)
    expected = slow_factors(features, queries, 20)
    assert_same_factors(detector.score(activations_of(queries, predicted, 1)), expected)
    assert_same_factors(detector.score_all(activations_of(queries, predicted, 1))[:, 0], expected)


def test_lof_of_far_point_exceeds_clean_points() -> None:
    features, labels, _ = clusters(np.random.default_rng(13), [200, 200], 64)
    detector = fitted(features[:200], labels[:200], 2)
    clean = detector.score(activations_of(features[200:], labels[200:], 2))
    wrong_class = detector.score(activations_of(features[200:], 1 - labels[200:], 2))
    assert clean.max() < wrong_class.min()


# Two routes to one number


@pytest.mark.parametrize("compare", ["predicted", "any"])
@pytest.mark.parametrize("d", [3, 64])
def test_lof_score_of_batch_equals_score_of_single_rows(compare: str, d: int) -> None:
    features, labels, queries = clusters(np.random.default_rng(17), [9, 40, 120, 70], d, n_queries=33)
    predicted = np.arange(33) % 4
    detector = fitted(features, labels, 4, compare=compare)
    batch = activations_of(queries, predicted, 4)
    single = np.concatenate([detector.score(batch[[row]]) for row in range(33)])
    np.testing.assert_allclose(detector.score(batch), single, rtol=1e-12)


def test_lof_score_predicted_equals_column_of_score_all() -> None:
    features, labels, queries = clusters(np.random.default_rng(19), [9, 40, 120, 70, 300], 48, n_queries=40)
    predicted = np.arange(40) % 5
    batch = activations_of(queries, predicted, 5)
    detector = fitted(features, labels, 5)
    np.testing.assert_allclose(detector.score(batch), detector.score_all(batch)[np.arange(40), predicted], rtol=1e-10)


def test_lof_score_any_equals_smallest_of_score_all() -> None:
    features, labels, queries = clusters(np.random.default_rng(23), [30, 80], 20)
    batch = activations_of(queries, np.zeros(len(queries), dtype=np.int64), 2)
    detector = fitted(features, labels, 2, compare="any")
    np.testing.assert_array_equal(detector.score(batch), detector.score_all(batch).min(axis=1))


@pytest.mark.parametrize("summary", [None, ("l0", "l1", "l2")])
def test_lof_is_novel_equals_slow_definition_of_equation_14(summary: tuple[str, ...] | None) -> None:
    features, labels, queries = clusters(np.random.default_rng(29), [30, 9, 100, 2, 1, 0, 25], 24, n_queries=60)
    detector = fitted(features, labels, 7, summary=summary)
    predicted = np.random.default_rng(31).integers(0, 7, 60)
    batch = activations_of(queries, predicted, 7)
    slow = np.array([all(lof > 1.5 for lof in row) for row in detector.score_all(batch)])
    np.testing.assert_array_equal(detector.is_novel(batch), slow)
    assert 0 < slow.sum() < 60


def test_lof_of_permuted_references_gives_the_same_scores() -> None:
    rng = np.random.default_rng(37)
    features, labels, queries = clusters(rng, [30, 90, 5], 40)
    order = rng.permutation(len(labels))
    batch = activations_of(queries, np.arange(len(queries)) % 3, 3)
    first, second = fitted(features, labels, 3), fitted(features[order], labels[order], 3)
    np.testing.assert_allclose(first.score(batch), second.score(batch), rtol=1e-12)
    np.testing.assert_allclose(first.score_all(batch), second.score_all(batch), rtol=1e-10)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("settings", [{}, {"compare": "any"}, {"summary": ("l1", "l2"), "n_neighbors": 7}])
def test_lof_state_round_trip_gives_equal_bits(dtype: type, settings: dict[str, object]) -> None:
    features, labels, queries = clusters(np.random.default_rng(41), [9, 90, 1, 0, 25], 40)
    detector = fitted(features.astype(dtype), labels, 5, **settings)
    state = detector.state()
    assert all(isinstance(array, np.ndarray) and array.dtype != object for array in state.values())
    assert state["references"].dtype == (np.float64 if "summary" in settings else dtype)
    copy = PerClassLof.from_state({name: array.copy() for name, array in state.items()}, **settings)
    batch = activations_of(queries.astype(dtype), np.arange(len(queries)) % 5, 5)
    np.testing.assert_array_equal(copy.score(batch), detector.score(batch))
    np.testing.assert_array_equal(copy.score_all(batch), detector.score_all(batch))


# Edges


def test_lof_of_class_with_fewer_than_two_images_is_infinite() -> None:
    rng = np.random.default_rng(43)
    features, labels = rng.normal(size=(11, 4)).astype(np.float32), np.array([0] * 10 + [1])
    detector = fitted(features, labels, 3)  # class 1 has one image, class 2 none
    batch = activations_of(features[:3], np.array([0, 1, 2]), 3)
    assert np.isfinite(detector.score(batch)).tolist() == [True, False, False]
    assert np.isposinf(detector.score_all(batch)[:, 1:]).all()
    assert not detector.is_novel(batch).any()  # class 0 accepts them all


def test_lof_of_empty_batch_is_empty() -> None:
    features, labels, _ = clusters(np.random.default_rng(47), [9, 90], 20)
    detector = fitted(features, labels, 2)
    empty = activations_of(features, labels, 2)[:0]
    assert detector.score(empty).shape == (0,)
    assert detector.score_all(empty).shape == (0, 2)
    assert detector.is_novel(empty).shape == (0,)


def test_lof_of_very_uneven_classes_does_not_pad_to_the_largest() -> None:
    rng = np.random.default_rng(53)
    sizes = [6000] + [25] * 400
    labels = np.repeat(np.arange(401), sizes)
    features = rng.normal(size=(len(labels), 3)).astype(np.float32)
    detector = fitted(features, labels, 401, compare="any")
    batch = activations_of(rng.normal(size=(1, 3)).astype(np.float32), np.array([0]), 401)
    tracemalloc.start()
    factors = detector.score_all(batch)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6  # padded to the largest class, one block alone would take 19 MB
    for label in (0, 1, 400):
        assert_same_factors(factors[:, label], sklearn_factors(features[labels == label], batch.features, 20))


def test_lof_at_an_earlier_depth_reads_that_depth() -> None:
    features, labels, queries = clusters(np.random.default_rng(59), [30, 30], 12)
    at_depth = Activations(np.eye(2, dtype=np.float32)[labels], np.ones((60, 2), np.float32), {"layer3": features})
    detector = PerClassLof(depth="layer3").fit(at_depth, labels)
    predicted = np.zeros(len(queries), dtype=np.int64)
    other = np.full((len(queries), 7), np.nan, dtype=np.float32)
    batch = Activations(np.eye(2, dtype=np.float32)[predicted], other, {"layer3": queries})
    expected = fitted(features, labels, 2).score(activations_of(queries, predicted, 2))
    np.testing.assert_array_equal(detector.score(batch), expected)


def test_lof_is_a_detector() -> None:
    assert isinstance(PerClassLof(), Detector)


# Distances


@pytest.mark.parametrize("d", [3, 16, 17, 500])
def test_all_distances_of_coinciding_points_keep_ten_digits(d: int) -> None:
    rng = np.random.default_rng(d)
    references = (100.0 + rng.normal(size=(200, d))).astype(np.float32)
    queries = references[:50].astype(np.float64) + 1e-6 * rng.normal(size=(50, d))
    exact = ((references.astype(np.float64)[np.newaxis] - queries[:, np.newaxis]) ** 2).sum(axis=-1)
    np.testing.assert_allclose(AllDistances(references)(queries), exact, rtol=1e-10)


@pytest.mark.parametrize("spread", [1e-3, 1.0])
def test_preselector_keeps_every_nearest_reference_and_few_others(spread: float) -> None:
    rng = np.random.default_rng(61)
    references = (50.0 + spread * rng.normal(size=(500, 100))).astype(np.float32)
    queries = 50.0 + spread * rng.normal(size=(100, 100))
    rows, columns = Preselector(references)(queries, 20)
    exact = ((references.astype(np.float64)[np.newaxis] - queries[:, np.newaxis]) ** 2).sum(axis=-1)
    kept = np.zeros(exact.shape, dtype=bool)
    kept[rows, columns] = True
    for row in range(100):
        assert kept[row, np.argsort(exact[row])[:20]].all()
    assert len(rows) < 100 * 22


# Errors


def test_lof_fit_refuses_labels_that_do_not_match() -> None:
    batch = activations_of(np.ones((4, 2), dtype=np.float32), np.zeros(4, dtype=np.int64), 3)
    with pytest.raises(DataError, match="labels must be 4 integers, got shape"):
        PerClassLof().fit(batch, np.zeros(3, dtype=np.int64))
    with pytest.raises(DataError, match="labels must be 4 integers"):
        PerClassLof().fit(batch, np.zeros(4))
    with pytest.raises(DataError, match=r"labels must be in \[0, 3\), got 0 to 3"):
        PerClassLof().fit(batch, np.array([0, 0, 1, 3]))
    with pytest.raises(DataError, match=r"labels must be in \[0, 3\), got -1 to 0"):
        PerClassLof().fit(batch, np.array([0, 0, 0, -1]))


@pytest.mark.parametrize("rows", [0, 2])
def test_lof_fit_refuses_when_no_class_has_two_images(rows: int) -> None:
    labels = np.arange(rows)
    with pytest.raises(DataError, match="no class has 2 clean images"):
        fitted(np.ones((rows, 2), dtype=np.float32), labels, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_lof_refuses_values_that_are_not_finite(value: float) -> None:
    features, labels, queries = clusters(np.random.default_rng(67), [30, 30], 5)
    predicted = np.zeros(len(queries), dtype=np.int64)
    detector = fitted(features, labels, 2)
    queries[3, 2] = features[3, 2] = value
    with pytest.raises(DataError, match="features must be finite, got 1 of 60 rows"):
        fitted(features, labels, 2)
    for method in (detector.score, detector.score_all, detector.is_novel):
        with pytest.raises(DataError, match="features must be finite, got 1 of 12 rows"):
            method(activations_of(queries, predicted, 2))


def test_lof_score_refuses_logits_that_are_not_finite() -> None:
    features, labels, _ = clusters(np.random.default_rng(71), [30, 30], 5)
    logits = np.full((60, 2), np.nan, dtype=np.float32)
    detector = fitted(features, labels, 2)
    with pytest.raises(DataError, match="logits hold values that are not finite"):
        detector.score(Activations(logits, features))


def test_lof_score_refuses_other_column_counts() -> None:
    features, labels, _ = clusters(np.random.default_rng(73), [30, 30], 5)
    detector = fitted(features, labels, 2)
    with pytest.raises(DataError, match=r"features have 4 columns, fit saw 5\. Is the split layer the same\?"):
        detector.score(activations_of(features[:, :4], labels, 2))
    with pytest.raises(DataError, match="logits have 3 columns, fit saw 2"):
        detector.score(activations_of(features, labels, 3))


def test_lof_before_fit_raises_not_fitted() -> None:
    batch = activations_of(np.ones((1, 2), dtype=np.float32), np.zeros(1, dtype=np.int64), 2)
    detector = PerClassLof()
    for method in (detector.score, detector.score_all, detector.is_novel):
        with pytest.raises(NotFittedError, match="Call fit"):
            method(batch)
    with pytest.raises(NotFittedError):
        detector.state()


@pytest.mark.parametrize(
    "settings",
    [{"n_neighbors": 0}, {"compare": "all"}, {"summary": ("l7",)}, {"summary": ("l0",), "l0_tolerance": 1.0}],
)
def test_lof_fit_refuses_settings_out_of_range(settings: dict[str, object]) -> None:
    features, labels, _ = clusters(np.random.default_rng(79), [30], 5)
    with pytest.raises(ConfigError):
        fitted(features, labels, 1, **settings)


def test_lof_from_state_refuses_another_neighbour_count() -> None:
    features, labels, _ = clusters(np.random.default_rng(83), [30], 5)
    state = fitted(features, labels, 1, n_neighbors=20).state()
    with pytest.raises(ConfigError, match="n_neighbors=10, but the state was fitted with 20"):
        PerClassLof.from_state(state, n_neighbors=10)
