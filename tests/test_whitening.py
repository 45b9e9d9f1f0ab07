"""The whitened space: round classes, discriminant directions first, and one number for all that is left."""

from __future__ import annotations

import numpy as np
import pytest

from guard.detection.whitening import WhitenedSpace
from guard.errors import DataError


def draw(n: int, d: int, n_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Classes of one correlated shape, apart from each other in every direction."""
    shape = np.random.default_rng(99)
    mixing = shape.normal(size=(d, d)) / np.sqrt(d) + np.diag(np.linspace(0.5, 2.0, d))
    centres = shape.normal(0, 2, (n_classes, d))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    return np.float32(centres[labels] + rng.normal(size=(n, d)) @ mixing), labels


def whole(space: WhitenedSpace, features: np.ndarray) -> np.ndarray:
    return np.concatenate(space(features), axis=1)


def within(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
    centred = rows - np.stack([rows[labels == label].mean(axis=0) for label in labels])
    return centred.T @ centred / len(rows)


def test_whitened_space_squared_lengths_are_mahalanobis_distances_with_a_tenth_of_shrinkage():
    features, labels = draw(4000, 20, 5)
    rows = whole(WhitenedSpace.fit(features, labels), features).astype(np.float64)
    standard = (features.astype(np.float64) - features.mean(axis=0)) / features.std(axis=0)
    covariance = within(standard, labels)
    metric = np.linalg.inv(0.9 * covariance + 0.1 * np.diag(covariance).mean() * np.eye(20))
    for one, other in ((0, 1), (0, 3), (5, 9)):
        difference = standard[one] - standard[other]
        exact = difference @ metric @ difference
        assert np.square(rows[one] - rows[other]).sum() == pytest.approx(exact, rel=1e-4)


def test_whitened_space_puts_the_directions_that_tell_classes_apart_first():
    rng = np.random.default_rng(0)
    labels = np.arange(2000) % 2
    features = rng.normal(size=(2000, 10)) * np.linspace(1, 30, 10)  # the loudest say nothing
    features[:, 0] += 5 * labels
    lead, trail = WhitenedSpace.fit(np.float32(features), labels)(np.float32(features))
    gap = [abs(column[labels == 0].mean() - column[labels == 1].mean()) for column in np.c_[lead, trail].T]
    assert gap[0] > 3.5  # 5 without shrinkage
    assert max(gap[1:]) < 0.2


@pytest.mark.parametrize(
    ("d", "n_lead", "n_trail"), [(1, 1, 1), (5, 3, 3), (31, 16, 16), (128, 16, 113), (300, 16, 113)]
)
def test_whitened_space_splits_at_16_columns_or_half(d, n_lead, n_trail):
    features, labels = draw(512, d, 4)
    lead, trail = WhitenedSpace.fit(features, labels)(features[:7])
    assert (lead.shape, trail.shape) == ((7, n_lead), (7, n_trail))
    assert lead.dtype == trail.dtype == np.float32


def test_whitened_space_of_few_columns_leaves_nothing_out():
    features, labels = draw(200, 12, 4)
    _, trail = WhitenedSpace.fit(features, labels)(features)
    assert (trail[:, -1] == 0).all()


def test_whitened_space_of_many_columns_equals_exact_principal_components():
    rng = np.random.default_rng(0)
    labels = np.arange(900) % 3
    features = rng.normal(size=(900, 200)) + 3 * rng.normal(size=(3, 200))[labels]
    features[:, :120] += 4 * rng.normal(size=(900, 1)) * rng.normal(size=120)  # clear first components
    features += rng.normal(size=(900, 40)) @ rng.normal(size=(40, 200))
    features = np.float32(features)
    space = WhitenedSpace.fit(features, labels)
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    values = np.linalg.eigvalsh(standard.T @ standard)[::-1]
    kept = np.square(standard @ space.components).sum()
    assert kept == pytest.approx(values[:128].sum(), rel=2e-3)
    np.testing.assert_allclose(space.components.T @ space.components, np.eye(128), atol=1e-4)


def test_whitened_space_rest_is_the_length_outside_the_components_in_spreads_within_classes():
    rng = np.random.default_rng(0)
    labels = np.arange(20_000) % 4
    features = np.float32(rng.normal(size=(20_000, 256)))  # no class, no component that matters: unit spread everywhere
    _, trail = WhitenedSpace.fit(features, labels)(np.float32(rng.normal(size=(500, 256))))
    assert np.square(trail[:, -1]).mean() == pytest.approx(256 - 128, rel=0.15)


def test_whitened_space_sees_a_feature_that_is_silent_on_clean_images():
    features, labels = draw(600, 200, 4)
    features[:, 7] = 0.0
    space = WhitenedSpace.fit(features, labels)
    loud = features[:1].copy()
    loud[0, 7] = 30 * features.std()
    assert space(loud)[1][0, -1] > 3 * space(features)[1][:, -1].max()


@pytest.mark.parametrize(("n", "d"), [(2, 5), (6, 300), (40, 128), (9, 1)])
def test_whitened_space_of_fewer_images_than_columns_is_finite(n, d):
    features, labels = draw(n, d, 3)
    assert np.isfinite(whole(WhitenedSpace.fit(features, labels), draw(50, d, 3, seed=1)[0])).all()


def test_whitened_space_of_images_that_are_the_same_within_classes_is_finite():
    centres = np.float32(np.random.default_rng(0).normal(size=(3, 8)))
    labels = np.arange(30) % 3
    assert np.isfinite(whole(WhitenedSpace.fit(centres[labels], labels), centres)).all()


def test_whitened_space_of_far_and_huge_features_stays_finite():
    features, labels = draw(100, 150, 3)
    far = np.float32([[1e37] * 150, [-1e30] * 150])
    assert np.isfinite(whole(WhitenedSpace.fit(features, labels), far)).all()


def test_whitened_space_does_not_depend_on_the_unit_of_a_feature():
    features, labels = draw(500, 10, 3)
    units = np.float32(10.0 ** np.linspace(-2, 2, 10))
    rows, scaled = (whole(WhitenedSpace.fit(part, labels), part) for part in (features, features * units))
    np.testing.assert_allclose(np.square(rows).sum(axis=1), np.square(scaled).sum(axis=1), rtol=1e-3)


@pytest.mark.parametrize("unit", [1e-36, 1e-20, 1e20, 1e36])
def test_whitened_space_of_tiny_and_large_features_is_finite_and_loads_again(unit):
    features, labels = draw(100, 20, 3)
    features = features * np.float32(unit)
    space = WhitenedSpace.from_state(WhitenedSpace.fit(features, labels).state())
    assert np.isfinite(whole(space, features)).all()


def test_whitened_space_one_by_one_equals_batch():
    features, labels = draw(300, 200, 3)
    space = WhitenedSpace.fit(features, labels)
    single = np.concatenate([whole(space, features[row : row + 1]) for row in range(20)])
    np.testing.assert_allclose(single, whole(space, features[:20]), rtol=1e-3, atol=1e-3)


def test_whitened_space_of_equal_images_is_equal_wherever_they_stand_in_a_batch():
    features, labels = draw(300, 400, 3)
    space = WhitenedSpace.fit(features, labels)
    for n in (2, 9, 33):
        lead, _ = space(np.repeat(features[:1], n, axis=0))
        np.testing.assert_array_equal(lead, np.repeat(lead[:1], n, axis=0))


def test_whitened_space_refuses_other_widths_and_values_that_are_not_finite():
    features, labels = draw(60, 8, 3)
    with pytest.raises(DataError, match=r"^features have 5 columns, fit saw 8\. Is the split layer the same\?$"):
        WhitenedSpace.fit(features, labels)(features[:, :5])
    features[3, 2] = np.nan
    with pytest.raises(DataError, match=r"^features must be finite: a NaN or an infinity was found\.$"):
        WhitenedSpace.fit(features, labels)


def test_whitened_space_roundtrip_gives_equal_rows():
    features, labels = draw(200, 140, 3)
    space = WhitenedSpace.fit(features, labels)
    np.testing.assert_array_equal(whole(WhitenedSpace.from_state(space.state()), features), whole(space, features))


@pytest.mark.parametrize(
    ("name", "array", "text"),
    [
        ("mean", None, "array mean is missing"),
        ("scale", np.zeros(8, np.float32), "array scale must be >= 5e-31, got 0.0"),
        ("rest", np.zeros(1, np.float32), "array rest must be >= 1e-30, got 0.0"),
        ("rotation", np.zeros((8, 7), np.float32), r"array rotation must have shape \(8, 8\)"),
        ("rotation", np.zeros((8, 8), np.float32), "must not be zero everywhere"),
        ("components", np.full((8, 8), np.nan, np.float32), "array components must be finite"),
    ],
)
def test_whitened_space_from_unsound_arrays_raises_data_error(name, array, text):
    state = WhitenedSpace.fit(*draw(60, 8, 3)).state()
    state = {key: value for key, value in state.items() if key != name} | ({} if array is None else {name: array})
    with pytest.raises(DataError, match=text):
        WhitenedSpace.from_state(state)
