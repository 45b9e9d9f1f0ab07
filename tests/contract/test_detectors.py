"""What `guard/detection/detectors/base.py` asks of every detector. A new one is picked up from DETECTORS."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from guard import Activations
from guard.detection.detectors import DETECTORS, Detector
from guard.errors import DataError, NotFittedError
from guard.types import FEATURES

#: Settings worth a run of their own, beside the defaults and every depth.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lof": [
        {"n_neighbors": 1},
        {"n_neighbors": 500},
        {"compare": "any"},
        {"summary": ("l0", "l1", "l2", "linf"), "compare": "any"},
        {"summary": ("l2",), "depth": "early"},
    ],
    "disagreement": [{"feature_noise_std": 0.3}, {"seed": 7}],
}


def settings_of(kind: str) -> list[str]:
    return [field.name for field in dataclasses.fields(DETECTORS[kind]) if field.init]


CASES = [
    (kind, settings)
    for kind in DETECTORS
    for settings in [{}, *([{"depth": "early"}] if "depth" in settings_of(kind) else []), *VARIANTS.get(kind, [])]
]
N_CLASSES = 3


def draw(n: int, seed: int) -> tuple[Activations, np.ndarray]:
    """Clean inputs of three classes, answered correctly."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % N_CLASSES
    features = CENTRES[labels] + rng.normal(size=(n, 8))
    logits = 5 * np.eye(N_CLASSES)[labels] + rng.normal(0, 0.1, (n, N_CLASSES))
    return make(logits, features), labels


def make(logits: np.ndarray, features: np.ndarray) -> Activations:
    early = features @ MIXING
    return Activations(*(np.float32(array) for array in (logits, features)), {"early": np.float32(early)})


CENTRES = np.random.default_rng(10).normal(0, 3, (N_CLASSES, 8))
MIXING = np.random.default_rng(11).normal(size=(8, 5))
CLEAN, LABELS = draw(150, seed=0)
NEW, _ = draw(60, seed=1)


@pytest.fixture(scope="module", params=CASES, ids=[f"{kind}-{settings}" for kind, settings in CASES])
def case(request: pytest.FixtureRequest) -> tuple[type[Detector], dict[str, Any]]:
    kind, settings = request.param
    return DETECTORS[kind], settings


@pytest.fixture(scope="module")
def fitted(case) -> Detector:
    detector_class, settings = case
    return detector_class(**settings).fit(CLEAN, LABELS)


def test_detector_variants_are_of_registered_detectors():
    assert VARIANTS.keys() <= DETECTORS.keys()


def test_detector_is_a_dataclass_whose_settings_are_its_constructor(case):
    detector_class, settings = case
    assert dataclasses.is_dataclass(detector_class)
    names = [field.name for field in dataclasses.fields(detector_class) if field.init]
    assert names == list(inspect.signature(detector_class).parameters)
    detector = detector_class(**settings)
    assert isinstance(detector, Detector)
    for name, value in settings.items():
        assert getattr(detector, name) == value


def test_detector_fit_returns_itself_keeps_settings_and_learned_names_end_in_an_underscore(case):
    detector_class, settings = case
    detector = detector_class(**settings)
    names = [field.name for field in dataclasses.fields(detector_class) if field.init]
    before = {name: getattr(detector, name) for name in names}
    assert detector.fit(CLEAN, LABELS) is detector
    assert {name: getattr(detector, name) for name in names} == before
    assert all(name.endswith("_") for name in vars(detector).keys() - set(names))


def test_detector_score_is_one_finite_float64_per_row(fitted):
    for activations in (CLEAN, NEW, NEW[:1], NEW[:0]):
        scores = fitted.score(activations)
        assert scores.shape == (len(activations),)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()


def test_detector_scores_a_far_out_input_higher_than_every_clean_one(fitted):
    """Beyond class 1 as seen from class 0, and the suspect says 0: far from both, and a lie."""
    away = CENTRES[1] - CENTRES[0]
    far = CENTRES[1] + np.array([[3.0], [6.0], [9.0]]) * away
    scores = fitted.score(make(np.tile([5.0, 0.0, 0.0], (3, 1)), far))
    assert scores.min() > fitted.score(NEW).max()


def test_detector_batch_equals_single(fitted):
    single = np.concatenate([fitted.score(NEW[row : row + 1]) for row in range(len(NEW))])
    np.testing.assert_allclose(fitted.score(NEW), single, rtol=1e-5, atol=1e-5)


def test_detector_score_does_not_depend_on_the_other_rows_or_their_order(fitted):
    order = np.random.default_rng(0).permutation(len(NEW))
    np.testing.assert_allclose(fitted.score(NEW[order]), fitted.score(NEW)[order], rtol=1e-5, atol=1e-5)


def test_detector_scoring_twice_gives_equal_scores(fitted):
    first = fitted.score(NEW)
    fitted.score(CLEAN)
    np.testing.assert_array_equal(fitted.score(NEW), first)


def test_detector_fitting_twice_gives_equal_scores(case, fitted):
    detector_class, settings = case
    again = detector_class(**settings).fit(NEW, LABELS[:60]).fit(CLEAN, LABELS)
    np.testing.assert_array_equal(again.score(NEW), fitted.score(NEW))


def test_detector_state_is_arrays_and_roundtrips_bit_by_bit_through_a_file(case, fitted):
    detector_class, settings = case
    state = fitted.state()
    assert state
    assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in state.items())
    assert all(array.dtype.kind in "fiub" for array in state.values())
    restored = detector_class.from_state(load(save({n: np.ascontiguousarray(a) for n, a in state.items()})), **settings)
    np.testing.assert_array_equal(restored.score(NEW), fitted.score(NEW), strict=True)
    for name, array in restored.state().items():
        np.testing.assert_array_equal(array, state[name], strict=True)


def test_detector_unfitted_raises_not_fitted_error(case):
    detector_class, settings = case
    with pytest.raises(NotFittedError, match=r" is not fitted\. Call fit\("):
        detector_class(**settings).score(NEW)


def test_detector_wrong_width_or_depth_raises_data_error(case, fitted):
    depth = case[1].get("depth", FEATURES)
    narrow = {name: array[:, :-1] if name == depth else array for name, array in NEW.items()}
    with pytest.raises(DataError, match=r"have \d+ columns, fit saw \d+\. Is the split layer the same\?$"):
        fitted.score(Activations(narrow.pop("logits"), narrow.pop(FEATURES), narrow))
    if depth != FEATURES:
        with pytest.raises(DataError, match=r"^there is no depth 'early'"):
            fitted.score(Activations(NEW.logits, NEW.features))


@pytest.mark.parametrize("columns", [N_CLASSES - 1, N_CLASSES + 1])
def test_detector_other_number_of_classes_raises_data_error(fitted, columns):
    logits = np.eye(columns, dtype=np.float32)[np.arange(60) % columns]
    with pytest.raises(DataError, match=rf"^logits have {columns} columns, fit saw 3\. Is it the same suspect model"):
        fitted.score(Activations(logits, NEW.features, NEW.depths))


def test_detector_leaves_its_input_alone(case):
    detector_class, settings = case
    clean, labels = draw(60, seed=3)
    arrays = [labels, *(array for _, array in clean.items())]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    detector_class(**settings).fit(clean, labels).score(clean)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)
