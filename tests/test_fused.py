"""What is scored at all depths at once equals what the detectors score one after the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.detection.detectors import local_outlier_factor
from guard.detection.detectors.base import WHAT_IS_CLEAN, Joins, OverDepths, Reads, Shows, Source
from guard.detection.detectors.lof import PerClassLof
from guard.detection.detectors.relative_distance import RelativeDistance
from guard.detection.detectors.residual import Residual
from guard.detection.ensemble import Ensemble, Member
from guard.errors import DataError
from guard.types import FEATURES, Float64Array

#: Images of each class: none, one (no local outlier factor), fewer than neighbours, as many, more, and very many.
SIZES = (0, 1, 2, 9, 20, 21, 60, 200)
WIDTHS = {FEATURES: 90, "early": 5, "middle": 40}


def draw(labels: np.ndarray, seed: int, answers: np.ndarray | None = None) -> Activations:
    """Return inputs of these classes, answered as told, behind a ReLU."""
    rng = np.random.default_rng([seed, len(labels)])
    logits = 5.0 * np.eye(len(SIZES))[labels if answers is None else answers] + rng.normal(0, 0.1, (len(labels), 8))
    layers = {
        name: np.maximum(np.random.default_rng(width).normal(0, 2, (8, width))[labels], 0)
        + rng.normal(size=(len(labels), width))
        for name, width in WIDTHS.items()
    }
    return make(logits, layers)


def make(logits: np.ndarray, layers: Mapping[str, np.ndarray]) -> Activations:
    arrays = {name: array.astype(np.float32) for name, array in layers.items()}
    return Activations(np.float32(logits), arrays.pop(FEATURES), arrays)


LABELS = np.repeat(np.arange(len(SIZES)), SIZES)
CLEAN = draw(LABELS, seed=0)
#: Inputs of every class under every answer, those without an image among them.
NEW = draw(np.tile(np.arange(8), 30), 1, np.random.default_rng(5).integers(0, 8, 240))


@pytest.fixture(scope="module")
def ensemble() -> Ensemble:
    return Ensemble.for_mode(GuardConfig(), ("early", "middle")).fit(CLEAN, LABELS)


def assert_same(ensemble: Ensemble, activations: Activations) -> None:
    """Check that all detectors but those that read activations as they are were fused, with the same scores."""
    raw = np.full((len(activations), len(ensemble.members)), np.nan)
    assert ensemble._fused is not None
    assert ensemble._fused.score_into(raw, activations)
    expected = ensemble.score(activations)
    fused = [column for column in range(len(ensemble.members)) if column not in ensemble._fused.others]
    assert len(fused) == 3 * len(ensemble.spaces)
    np.testing.assert_allclose(raw[:, fused], expected[:, fused], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ensemble.score_fused(activations), expected, rtol=1e-9, atol=1e-12)


def test_fused_scores_of_classes_of_any_size_equal_those_of_the_detectors(ensemble: Ensemble) -> None:
    assert_same(ensemble, NEW)
    scores = dict(zip(ensemble.names, ensemble.score_fused(NEW).T, strict=True))
    answers = NEW.predicted_labels
    assert np.isinf(scores["lof:early"]).tolist() == (answers < 2).tolist()
    assert np.isinf(scores["relative_distance:early"]).tolist() == (answers < 1).tolist()


@pytest.mark.parametrize("batch", [1, 2, 7, 16])
def test_fused_scores_do_not_depend_on_the_batch(ensemble: Ensemble, batch: int) -> None:
    parts = [ensemble.score_fused(NEW[start : start + batch]) for start in range(0, len(NEW), batch)]
    together, whole = np.concatenate(parts), ensemble.score_fused(NEW)
    head = ensemble.names.index(f"disagreement:{FEATURES}")  # products in float32, as exact as their largest term
    largest = np.abs(ensemble.members[head].detector.logits(NEW)).max()
    np.testing.assert_allclose(together[:, head], whole[:, head], rtol=0, atol=1e-6 * largest)
    others = np.arange(len(ensemble.names)) != head
    np.testing.assert_allclose(together[:, others], whole[:, others], rtol=1e-6, atol=1e-6)


def test_fused_scores_of_no_row_are_none(ensemble: Ensemble) -> None:
    assert ensemble.score_fused(NEW[:0]).shape == (0, len(ensemble.names))


def test_fused_scores_of_references_and_their_copies_equal_those_of_the_detectors() -> None:
    rows = np.concatenate([np.arange(len(LABELS)), np.repeat(np.flatnonzero(LABELS == 7)[:5], 30)])
    clean, labels = CLEAN[rows], LABELS[rows]
    ensemble = Ensemble.for_mode(GuardConfig(), ("early", "middle")).fit(clean, labels)
    assert_same(ensemble, clean)  # among many equally far references the same are taken


def test_fused_scores_where_every_reference_is_a_neighbour_as_near_as_the_others() -> None:
    """Whole numbers on few places: nearly every row has more candidates than neighbours."""
    rng = np.random.default_rng(3)
    labels = np.arange(160) % 2
    layers = {name: rng.integers(0, 2, (160, 3)) + 3.0 * labels[:, np.newaxis] for name in (FEATURES, "early")}
    activations = make(np.eye(2)[labels], layers)
    ensemble = Ensemble.for_mode(GuardConfig(n_neighbors=5), ("early",)).fit(activations, labels)
    raw = ensemble.score_fused(activations)
    np.testing.assert_allclose(raw, ensemble.score(activations), rtol=1e-6, atol=1e-9)


def test_fused_scores_of_a_large_batch_are_made_in_portions(
    ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = ensemble.score_fused(NEW)
    monkeypatch.setattr("guard.detection.detectors.stacked._HELD_RANKS", 2000)
    np.testing.assert_allclose(ensemble.score_fused(NEW), expected, rtol=1e-9, atol=1e-12)


def test_fused_scores_seldom_ask_the_detectors(ensemble: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = local_outlier_factor.ClassReferences.factors_of_class

    def factors_of_class(self: Any, queries: Any, classes: Any) -> Float64Array:
        asked.append(len(queries))
        return original(self, queries, classes)

    monkeypatch.setattr(local_outlier_factor.ClassReferences, "factors_of_class", factors_of_class)
    ensemble.score_fused(NEW)
    assert sum(asked) < 0.05 * len(WIDTHS) * len(NEW)


@pytest.mark.parametrize("size", [1e6, 1e14, 1e20, 3e38])
def test_fused_scores_of_huge_features_equal_those_of_the_detectors(ensemble: Ensemble, size: float) -> None:
    features = NEW.features.copy()
    features[::3] *= np.float32(size) / 100
    huge = Activations(NEW.logits, features, NEW.depths)
    np.testing.assert_allclose(ensemble.score_fused(huge), ensemble.score(huge), rtol=1e-6, atol=1e-6)


def test_fused_scores_of_rows_that_are_not_finite_are_refused_as_by_the_detectors(ensemble: Ensemble) -> None:
    features = NEW.features.copy()
    features[4, 2] = np.nan
    words = r"^features must be finite, got 1 of 240 rows with NaN or infinity\.$"
    with np.errstate(invalid="ignore"), pytest.raises(DataError, match=words):
        ensemble.score_fused(Activations(NEW.logits, features, NEW.depths))


def test_fused_scores_of_other_shapes_are_refused_as_by_the_detectors(ensemble: Ensemble) -> None:
    with pytest.raises(DataError, match=r"^features have 89 columns, fit saw 90\. Is the split layer the same\?$"):
        ensemble.score_fused(Activations(NEW.logits, NEW.features[:, 1:], NEW.depths))
    with pytest.raises(DataError, match=r"^logits have 7 columns, fit saw 8\. Is it the same suspect model\?$"):
        ensemble.score_fused(Activations(NEW.logits[:, 1:], NEW.features, NEW.depths))
    with pytest.raises(DataError, match=r"^there is no depth 'middle'"):
        ensemble.score_fused(Activations(NEW.logits, NEW.features, {"early": NEW.depths["early"]}))


def test_fused_scores_after_another_fit_are_those_of_the_new_one() -> None:
    ensemble = Ensemble.for_mode(GuardConfig(), ("early", "middle")).fit(NEW, NEW.predicted_labels)
    before = ensemble.score_fused(NEW)
    ensemble.fit(CLEAN, LABELS)
    assert not np.allclose(ensemble.score_fused(NEW), before)
    assert_same(ensemble, NEW)


def test_fused_scores_of_early_verdicts_equal_those_of_the_detectors(ensemble: Ensemble) -> None:
    assert_same(ensemble.up_to(["early"]), NEW)
    assert_same(ensemble.up_to(["early", "middle"]), NEW)


def test_fused_scores_of_early_verdicts_look_at_no_other_depth(ensemble: Ensemble) -> None:
    early = ensemble.up_to(["early"])
    blind = Activations(
        NEW.logits, NEW.features * np.nan, {"early": NEW.depths["early"], "middle": np.full((240, 1), np.nan)}
    )
    np.testing.assert_array_equal(early.score_fused(blind), early.score_fused(NEW))


def test_fused_scores_of_a_restored_ensemble_are_equal_bit_by_bit(ensemble: Ensemble) -> None:
    restored = Ensemble.restore(ensemble.describe(), ensemble.arrays())
    np.testing.assert_array_equal(restored.score_fused(NEW), ensemble.score_fused(NEW))


def test_fused_scores_of_one_class_equal_those_of_the_detectors() -> None:
    one = LABELS == 7
    ensemble = Ensemble.for_mode(GuardConfig(), ("early", "middle")).fit(CLEAN[one], LABELS[one])
    assert_same(ensemble, NEW)
    is_it = NEW.predicted_labels == 7
    distances = ensemble.score_fused(NEW)[:, ensemble.names.index("relative_distance:features")]
    assert np.isneginf(distances[is_it]).all()
    assert np.isposinf(distances[~is_it]).all()


@pytest.mark.parametrize(
    "detectors",
    [
        [PerClassLof(), PerClassLof(depth="early")],  # one depth lacks it
        [*(PerClassLof(depth=depth, compare="any") for depth in WIDTHS)],
        [*(PerClassLof(depth=depth, n_neighbors=3 + place) for place, depth in enumerate(WIDTHS))],
        [*(PerClassLof(depth=depth, summary=("l2",)) for depth in WIDTHS)],
        [*(PerClassLof(depth=depth) for depth in (*WIDTHS, FEATURES))],
    ],
)
def test_detectors_that_cannot_be_fused_are_scored_one_after_the_other(detectors: list[PerClassLof]) -> None:
    known = [*detectors, *(Residual(depth=depth) for depth in WIDTHS)]
    members = [Member(f"{place}", "any", one) for place, one in enumerate(known)]
    ensemble = Ensemble(members, dict.fromkeys(WIDTHS)).fit(CLEAN, LABELS)
    assert ensemble._fused is not None
    assert ensemble._fused.others == (*range(len(detectors)),)
    np.testing.assert_allclose(ensemble.score_fused(NEW), ensemble.score(NEW), rtol=1e-9, atol=1e-12)


@dataclass
class Sum:
    """A detector of somebody else, which reads whitened columns."""

    joins: ClassVar[Joins] = "once_per_depth"
    learns_from: ClassVar[frozenset[Source]] = WHAT_IS_CLEAN
    reads: ClassVar[Reads] = "trailing"
    shows: ClassVar[Shows] = "novelty"
    over_depths: ClassVar[OverDepths] = "averaged"

    depth: str = FEATURES

    def fit(self, activations: Activations, labels: np.ndarray) -> Self:
        return self

    def score(self, activations: Activations) -> Float64Array:
        return activations.at(self.depth).sum(axis=1, dtype=np.float64)

    def state(self) -> dict[str, np.ndarray]:
        return {}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray], **settings: Any) -> Self:
        return cls(**settings)


def test_detector_without_a_fused_path_stands_among_fused_ones_in_any_order() -> None:
    shuffled = [RelativeDistance("middle"), Sum("early"), RelativeDistance("early"), Residual(), RelativeDistance()]
    members = [Member(f"{place}", "any", one) for place, one in enumerate(shuffled)]
    ensemble = Ensemble(members, dict.fromkeys(WIDTHS)).fit(CLEAN, LABELS)
    assert ensemble._fused is not None
    assert ensemble._fused.others == (1, 3)
    np.testing.assert_allclose(ensemble.score_fused(NEW), ensemble.score(NEW), rtol=1e-9, atol=1e-12)


def test_guard_decides_the_same_of_a_row_alone_in_a_batch_and_by_each_detector() -> None:
    labels = np.repeat(np.arange(3, 8), 60)
    guard = Guard.fit_activations(draw(labels, 7), labels, GuardConfig(false_positive_rate=0.05))
    new = draw(np.tile(np.arange(3, 8), 40), 8, np.random.default_rng(6).integers(3, 8, 200))
    together = guard.scores(new)
    alone = np.array([guard.scores(new[row : row + 1]).p_values[0] for row in range(len(new))])
    raw = guard.ensemble.score(new)
    combined = guard.fusion.combine(guard.fusion.surprise(raw), new.logits)
    np.testing.assert_allclose(together.combined, combined, rtol=1e-9)
    np.testing.assert_allclose(alone, together.p_values, rtol=0, atol=1e-6)
    n = len(guard.clean_scores)
    expected = (1 + n - np.searchsorted(guard.clean_scores, combined)) / (n + 1)
    np.testing.assert_allclose(together.p_values, expected, rtol=0, atol=1e-6)
