"""What `guard/detection/detectors/base.py` asks of every detector. A new one is picked up from DETECTORS."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pytest
from safetensors.numpy import load, save

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors import DETECTORS, Detector
from guard.detection.detectors.base import NO_LABEL, WHAT_IS_CLEAN, Joins, OverDepths, Reads, Shows, Source
from guard.detection.detectors.demarcation import Demarcation
from guard.errors import DataError, NotFittedError
from guard.types import BACKUP, FEATURES

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
    "demarcation": [{"softness": 0.1}],
    "anytime": [{"depths": ("early", FEATURES)}, {"seed": 7}],
}
#: What a detector reads that has no setting for it.
READS = {"backup": BACKUP}


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
    early, backup = features @ MIXING, -np.linalg.norm(features[:, np.newaxis] - CENTRES, axis=2)
    depths = {"early": np.float32(early), BACKUP: np.float32(backup)}
    return Activations(np.float32(logits), np.float32(features), depths)


CENTRES = np.random.default_rng(10).normal(0, 3, (N_CLASSES, 8))
MIXING = np.random.default_rng(11).normal(size=(8, 5))
CLEAN, LABELS = draw(150, seed=0)
#: Anomalies that lie where the far-out inputs of the tests lie, answered as class 0.
AWAY = CENTRES[1] - CENTRES[0]
ANOMALIES = make(
    np.tile([5.0, 0.0, 0.0], (30, 1)),
    CENTRES[1]
    + np.random.default_rng(2).uniform(2, 10, (30, 1)) * AWAY
    + np.random.default_rng(3).normal(size=(30, 8)),
)
NEW, _ = draw(60, seed=1)


@pytest.fixture(scope="module", params=CASES, ids=[f"{kind}-{settings}" for kind, settings in CASES])
def case(request: pytest.FixtureRequest) -> tuple[type[Detector], dict[str, Any]]:
    kind, settings = request.param
    return DETECTORS[kind], settings


@pytest.fixture(scope="module")
def fitted(case) -> Detector:
    detector_class, settings = case
    return detector_class(**settings).fit(*taught(detector_class))


def taught(detector_class: type[Detector], clean: Activations | None = None) -> tuple[Activations, np.ndarray]:
    """What a detector is given to learn from: clean inputs, and anomalies if it asks for them."""
    activations = CLEAN if clean is None else clean
    labels = LABELS[: len(activations)]
    if Source.ANOMALY not in detector_class.learns_from:
        return activations, labels
    both = Activations.concatenate([activations, ANOMALIES])
    return both, np.r_[labels, np.full(len(ANOMALIES), NO_LABEL)]


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
    assert detector.fit(*taught(detector_class)) is detector
    assert {name: getattr(detector, name) for name in names} == before
    assert all(name.endswith("_") for name in vars(detector).keys() - set(names))


def test_detector_score_is_one_finite_float64_per_row(fitted):
    for activations in (CLEAN, NEW, NEW[:1], NEW[:0]):
        scores = fitted.score(activations)
        assert scores.shape == (len(activations),)
        assert scores.dtype == np.float64
        assert np.isfinite(scores).all()


def test_detector_scores_a_lie_or_what_lies_far_out_higher_than_every_clean_input(fitted):
    """The suspect says 0. The lie shows class 1; far out, beyond class 1, it shows none. One of them each must see."""
    lie, far = (CENTRES[1] + np.array(places)[:, np.newaxis] * AWAY for places in ([0.0, 0.1, 0.2], [3.0, 6.0, 9.0]))
    least = [fitted.score(make(np.tile([5.0, 0.0, 0.0], (3, 1)), inputs)).min() for inputs in (lie, far)]
    assert max(least) > fitted.score(NEW).max()


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
    again = detector_class(**settings).fit(*taught(detector_class, NEW)).fit(*taught(detector_class))
    np.testing.assert_array_equal(again.score(NEW), fitted.score(NEW))


def test_detector_state_is_arrays_and_roundtrips_bit_by_bit_through_a_file(case, fitted):
    detector_class, settings = case
    state = fitted.state()
    assert state or detector_class is DETECTORS["backup"]  # which has nothing to learn
    assert all(isinstance(name, str) and isinstance(array, np.ndarray) for name, array in state.items())
    assert all(array.dtype.kind in "fiub" for array in state.values())
    restored = detector_class.from_state(load(save({n: np.ascontiguousarray(a) for n, a in state.items()})), **settings)
    np.testing.assert_array_equal(restored.score(NEW), fitted.score(NEW), strict=True)
    for name, array in restored.state().items():
        np.testing.assert_array_equal(array, state[name], strict=True)


def test_detector_unfitted_raises_not_fitted_error(case):
    detector_class, settings = case
    if detector_class is DETECTORS["backup"]:
        return  # there is nothing to fit
    with pytest.raises(NotFittedError, match=r" is not fitted\. Call fit\("):
        detector_class(**settings).score(NEW)


def test_detector_wrong_width_or_depth_raises_data_error(case, fitted):
    kind = next(name for name, known in DETECTORS.items() if known is case[0])
    depth = READS.get(kind, case[1].get("depth", FEATURES))
    narrow = {name: array[:, :-1] if name == depth else array for name, array in NEW.items()}
    with pytest.raises(
        DataError, match=r"have \d+ columns, fit saw \d+\. Is (the split layer the same|it the same .*)\?$"
    ):
        fitted.score(Activations(narrow.pop("logits"), narrow.pop(FEATURES), narrow))
    if depth != FEATURES:
        with pytest.raises(DataError, match=rf"^there is no depth '{depth}'"):
            fitted.score(Activations(NEW.logits, NEW.features))


@pytest.mark.parametrize("columns", [N_CLASSES - 1, N_CLASSES + 1])
def test_detector_other_number_of_classes_raises_data_error(fitted, columns):
    logits = np.eye(columns, dtype=np.float32)[np.arange(60) % columns]
    if isinstance(fitted, Demarcation):  # looks at no logits
        np.testing.assert_array_equal(
            fitted.score(Activations(logits, NEW.features, NEW.depths)), fitted.score(NEW), strict=True
        )
        return
    with pytest.raises(DataError, match=rf"^logits have {columns} columns, fit saw 3\. Is it the same suspect model"):
        fitted.score(Activations(logits, NEW.features, NEW.depths))


def test_detector_leaves_its_input_alone(case):
    detector_class, settings = case
    clean, labels = draw(60, seed=3)
    arrays = [labels, *(array for _, array in clean.items())]
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.setflags(write=False)
    given, given_labels = taught(detector_class, clean)
    for array in (given_labels, *(array for _, array in given.items())):
        array.setflags(write=False)
    detector_class(**settings).fit(given, given_labels).score(clean)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


@dataclass
class FarFromTheMiddle:
    """As somebody would write it who adds a detector: one file and one line."""

    joins: ClassVar[Joins] = "once_per_depth"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_CLEAN
    reads: ClassVar[Reads] = "activations"
    shows: ClassVar[Shows] = "novelty"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES

    def fit(self, activations: Activations, labels: np.ndarray) -> Self:
        self.middle_ = activations.at(self.depth).mean(axis=0)
        return self

    def score(self, activations: Activations) -> np.ndarray:
        return np.linalg.norm(activations.at(self.depth) - self.middle_, axis=1).astype(np.float64)

    def state(self) -> dict[str, np.ndarray]:
        return {"middle": self.middle_}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], **settings: Any) -> Self:
        detector = cls(**settings)
        detector.middle_ = state["middle"]
        return detector


def test_detector_that_is_added_by_one_line_is_fitted_saved_loaded_and_asked(monkeypatch, tmp_path):
    monkeypatch.setitem(DETECTORS, "far", FarFromTheMiddle)
    clean = Activations(CLEAN.logits, CLEAN.features, {"early": CLEAN.depths["early"]})
    guard = Guard.fit_activations(clean, LABELS, GuardConfig(false_positive_rate=0.05))
    assert [name for name in guard.ensemble.names if name.startswith("far")] == ["far:features", "far:early"]
    loaded = Guard.load(guard.save(tmp_path))
    new = Activations(NEW.logits, NEW.features, {"early": NEW.depths["early"]})
    verdicts = loaded.inspect_activations(new)
    assert verdicts == guard.inspect_activations(new)
    assert {"far:features", "far:early"} < verdicts[0].detector_scores.keys()
