"""The detectors of one guard: made from settings, and stored as plain JSON and arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from guard import Activations, GuardConfig
from guard.detection.detectors.base import Source
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.detectors.relative_distance import RelativeDistance
from guard.detection.ensemble import Ensemble, Member
from guard.errors import BundleError, DataError, NotFittedError


@pytest.fixture(scope="module")
def clean():
    """Three classes of 40 clean inputs, seen at the split layer and one depth."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    features = rng.normal(0, 4, (3, 6))[labels] + rng.normal(size=(120, 6))
    logits = np.eye(3)[labels] * 5
    arrays = (array.astype(np.float32) for array in (logits, features))
    return Activations(*arrays, {"early": features[:, :4].astype(np.float32)}), labels


def test_ensemble_calibrated_mode_holds_one_head_and_the_other_detectors_once_per_depth():
    names = Ensemble.for_mode(GuardConfig(), ("conv1", "conv2")).names
    of_depths = {
        kind: tuple(f"{kind}:{depth}" for depth in ("features", "conv1", "conv2"))
        for kind in ("lof", "residual", "relative_distance")
    }
    head = ("disagreement:features",)
    assert names == (*of_depths["lof"], *head, *of_depths["residual"], *of_depths["relative_distance"])


def test_ensemble_calibrated_mode_takes_shared_settings_from_the_config():
    ensemble = Ensemble.for_mode(GuardConfig(n_neighbors=7, seed=5, feature_noise_std=0.3), ("conv1",))
    detectors = {member.name: member.detector for member in ensemble.members}
    assert detectors["lof:conv1"] == PerClassLof(depth="conv1", n_neighbors=7)
    assert detectors["lof:features"].depth == "features"
    head = detectors["disagreement:features"]
    assert (head.depth, head.seed, head.feature_noise_std) == ("features", 5, 0.3)


def test_ensemble_paper_mode_holds_novelty_and_head_at_the_split_layer_in_the_order_of_the_fusion():
    config = GuardConfig(mode="paper", n_neighbors=5, norm_orders=("l0", "l1"), l0_tolerance=0.1, seed=2)
    novelty, head = Ensemble.for_mode(config, ("conv1",)).members
    assert (novelty.name, head.name) == ("lof:norms", "disagreement:features")
    assert novelty.detector == PerClassLof(n_neighbors=5, summary=("l0", "l1"), l0_tolerance=0.1, compare="any")
    assert (head.detector.depth, head.detector.seed) == ("features", 2)


def test_ensemble_score_has_one_column_per_detector(clean):
    activations, labels = clean
    ensemble = Ensemble.for_mode(GuardConfig(), tuple(activations.depths))
    assert ensemble.fit(activations, labels) is ensemble
    raw = ensemble.score(activations)
    assert raw.shape == (120, len(ensemble.names))
    assert raw.dtype == np.float64
    lead, trail = ensemble.spaces["early"](activations.at("early"))
    columns = dict(zip(ensemble.names, raw.T, strict=True))
    np.testing.assert_allclose(columns["residual:early"], np.linalg.norm(trail, axis=1), rtol=1e-6)
    whitened = Activations(activations.logits, lead)
    for name, detector in (("lof:early", PerClassLof()), ("relative_distance:early", RelativeDistance())):
        np.testing.assert_allclose(columns[name], detector.fit(whitened, labels).score(whitened), rtol=1e-6, atol=1e-9)
    head = HeadDisagreement().fit(activations, labels)
    np.testing.assert_array_equal(columns["disagreement:features"], head.score(activations))


def test_ensemble_spaces_are_learned_from_clean_inputs_alone(clean):
    activations, labels = clean
    ensemble = Ensemble.for_mode(GuardConfig(), tuple(activations.depths)).fit(activations, labels)
    few = activations[:30]
    strange = Activations(few.logits, few.features + 50, few.depths)
    both = Activations.concatenate([activations, strange])
    sources = np.r_[np.full(120, Source.CLEAN), np.full(30, Source.FALSE_ALARM)]
    again = Ensemble.for_mode(GuardConfig(), tuple(activations.depths)).fit(both, np.r_[labels, labels[:30]], sources)
    for name, array in ensemble.spaces["features"].state().items():
        np.testing.assert_array_equal(again.spaces["features"].state()[name], array)


def test_ensemble_unfitted_cannot_score(clean):
    activations, _ = clean
    with pytest.raises(NotFittedError, match=r"^Ensemble is not fitted\. Call fit\("):
        Ensemble.for_mode(GuardConfig(), tuple(activations.depths)).score(activations)


def test_ensemble_of_an_older_version_reads_activations_as_they_are(clean):
    activations, labels = clean
    older = Ensemble([Member("lof:features", "lof", PerClassLof())]).fit(activations, labels)
    restored = Ensemble.restore(older.describe(), older.arrays())
    assert restored.spaces == {}
    expected = PerClassLof().fit(activations, labels).score(activations)
    np.testing.assert_array_equal(restored.score(activations)[:, 0], expected)


def test_ensemble_up_to_a_depth_projects_no_other(clean):
    activations, labels = clean
    early = Ensemble.for_mode(GuardConfig(), ("early",)).fit(activations, labels).up_to(["early"])
    assert [*early.spaces] == ["early"]
    assert early.names == ("lof:early", "residual:early", "relative_distance:early")
    assert np.isfinite(early.score(activations)).all()


@pytest.mark.parametrize("mode", ["calibrated", "paper"])
def test_ensemble_roundtrip_through_json_and_arrays_scores_equal(clean, mode):
    activations, labels = clean
    ensemble = Ensemble.for_mode(GuardConfig(mode=mode), tuple(activations.depths)).fit(activations, labels)
    description = json.loads(json.dumps(ensemble.describe()))
    restored = Ensemble.restore(description, {name: array.copy() for name, array in ensemble.arrays().items()})
    assert restored.names == ensemble.names
    assert restored.describe() == ensemble.describe()
    np.testing.assert_array_equal(restored.score(activations), ensemble.score(activations))
    np.testing.assert_array_equal(restored.replacement_logits(activations), ensemble.replacement_logits(activations))


def test_ensemble_arrays_of_more_than_ten_detectors_do_not_mix(clean):
    activations, labels = clean
    members = [Member(f"lof:{k}", "lof", PerClassLof(n_neighbors=k)) for k in range(1, 13)]  # positions 1 and 1x
    ensemble = Ensemble(members).fit(activations, labels)
    restored = Ensemble.restore(ensemble.describe(), ensemble.arrays())
    np.testing.assert_array_equal(restored.score(activations), ensemble.score(activations))


def test_ensemble_restore_unknown_kind_raises_bundle_error(clean):
    entry = {"name": "oracle", "kind": "oracle", "settings": {}}
    with pytest.raises(
        BundleError, match=r"^unknown detector 'oracle': known are \['anytime', 'backup', .*'lof'.*Upgrade"
    ):
        Ensemble.restore([entry], {})


def test_ensemble_replacement_logits_come_from_the_head_at_the_split_layer(clean):
    activations, labels = clean
    ensemble = Ensemble.for_mode(GuardConfig(), tuple(activations.depths)).fit(activations, labels)
    head = HeadDisagreement().fit(activations, labels)
    np.testing.assert_array_equal(ensemble.replacement_logits(activations), head.logits(activations))
    assert (ensemble.replacement_logits(activations).argmax(axis=1) == labels).mean() > 0.95


def test_ensemble_without_head_cannot_relabel(clean):
    activations, labels = clean
    for detector in (PerClassLof(), HeadDisagreement(depth="early")):
        ensemble = Ensemble([Member("only", "any", detector)]).fit(activations, labels)
        with pytest.raises(
            DataError, match=r"^this guard holds no replacement head, and action 'relabel' needs one\. Fit again\.$"
        ):
            ensemble.replacement_logits(activations)
