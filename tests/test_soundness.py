"""Bundles with a right digest that say nonsense: none loads, none is swapped in, activated or promoted."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from retrainer_helpers import Workspace, fit_guard, world

from guard import Activations, Guard, GuardConfig, SuspectModel
from guard.cli import run
from guard.detection.detectors import DETECTORS
from guard.detection.ensemble import Ensemble
from guard.detection.fused import FusedScores
from guard.detection.fusion import CalibratedFusion
from guard.detection.soundness import Calibration, reproduction, rows_scored
from guard.errors import BundleError, DataError
from guard.retrainer.candidate import fit_candidate
from guard.retrainer.material import gather
from guard.retrainer.settings import RetrainerSettings
from guard.review.known_bundles import KnownBundles
from guard.serving.runtime import GuardRuntime
from guard.statistics.calibration import SurpriseMap
from guard.storage.bundle import BundleStore, StoredBundle, read_bundle, write_bundle

Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays], object]


def put(name: str, value: object, where: object = slice(None)) -> Change:
    """Write a value into one array, or into part of it."""

    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][where] = value

    return change


def scaled(name: str, factor: float) -> Change:
    return lambda arrays: arrays.update({name: (arrays[name] * factor).astype(arrays[name].dtype)})


def raised_tail(name: str, one_in: int, by: float) -> Change:
    """Raise the greatest of some scores, and leave their middle as it is."""

    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][-len(arrays[name]) // one_in :] += by

    return change


def first(name: str, rows: int) -> Change:
    return lambda arrays: arrays.update({name: arrays[name][:rows].copy()})


def swapped(first: str, other: str) -> Change:
    return lambda arrays: arrays.update({first: arrays[other], other: arrays[first]})


def as_type(name: str, kind: object) -> Change:
    return lambda arrays: arrays.update({name: arrays[name].astype(kind)})


def in_halves(name: str, value: float) -> Change:
    """Write a value into an array, and keep the array as halves that nothing says are to be read as anything else."""

    def change(arrays: Arrays) -> None:
        put(name, value, (3, 1))(arrays)
        as_type(name, np.float16)(arrays)

    return change


def reversed_rows(name: str) -> Change:
    return lambda arrays: arrays.update({name: arrays[name][::-1].copy()})


def put_together(ending: str, value: float) -> Change:
    """Write a value into an array of the heads of early verdicts, the only detector with such names."""

    def change(arrays: Arrays) -> None:
        (name,) = (name for name in arrays if name.startswith("detector.") and name.endswith(f".{ending}"))
        put(name, value)(arrays)

    return change


HEAD = "detector.4."  # the decision head of the guard below
#: Whatever the version of the bundle.
ABSURD: dict[str, Change] = {
    "clean scores of NaN": put("clean_scores", np.nan),
    "one clean score of NaN": put("clean_scores", np.nan, 7),
    "clean scores of 1e30": put("clean_scores", 1e30),
    "infinite clean scores": put("clean_scores", np.inf),
    "clean scores of zero": put("clean_scores", 0.0),
    "negative clean scores": scaled("clean_scores", -1.0),
    "clean scores times ten": scaled("clean_scores", 10.0),
    "clean scores by a hundred": scaled("clean_scores", 0.01),
    "one in sixteen clean scores of 1e30": raised_tail("clean_scores", 16, 1e30),
    "one in sixteen clean scores nine higher": raised_tail("clean_scores", 16, 9.0),
    "one in sixteen early clean scores of 1e30": raised_tail("early.0.clean_scores", 16, 1e30),
    "tail that nothing leaves": put("fusion.scale", 1e30),
    "early tail that nothing leaves": put("early.0.scale", 1e30),
    "reversed clean scores": reversed_rows("clean_scores"),
    "truncated clean scores": first("clean_scores", 50),
    "fewer clean scores than any hold-out leaves": first("clean_scores", 140),
    "clean scores of other inputs besides": lambda arrays: arrays.update(
        clean_scores=np.repeat(arrays["clean_scores"], 2)
    ),
    "no clean scores": first("clean_scores", 0),
    "clean scores as integers": as_type("clean_scores", np.int64),
    "clean scores as a matrix": lambda arrays: arrays.update(clean_scores=arrays["clean_scores"].reshape(2, -1)),
    "no array of clean scores": lambda arrays: arrays.pop("clean_scores"),
    "answers out of range": put("clean_answers", 10, 3),
    "answers as numbers with a point": as_type("clean_answers", np.float64),
    "truncated answers": first("clean_answers", 50),
    "answers that the network does not give": put("clean_answers", 7),
    "no array of early answers": lambda arrays: arrays.pop("early.0.clean_answers"),
    "early answers that the network does not give": put("early.0.clean_answers", 7),
    "early answers as numbers with a point": as_type("early.1.clean_answers", np.float64),
    "labels out of range": put("labels", 10, 3),
    "negative labels": put("labels", -1, 3),
    "labels as numbers with a point": as_type("labels", np.float64),
    "truncated labels": first("labels", 10),
    "reference of NaN": put("reference.features", np.nan),
    "one NaN in the reference": put("reference.logits", np.nan, (3, 1)),
    "one infinite number in the reference": put("reference.features", np.inf, (3, 1)),
    "reference of zero": put("reference.features", 0.0),
    "reference in halves, one of them NaN": in_halves("reference.features", np.nan),
    "reference in halves, one of them infinite": in_halves("reference.features", -np.inf),
    "logits in halves, one of them infinite": in_halves("reference.logits", np.inf),
    "fewer classes in the reference": lambda arrays: arrays.update(
        {"reference.logits": arrays["reference.logits"][:, :9]}
    ),
    "truncated reference": first("reference.features", 20),
    "zeroed head": put(f"{HEAD}weight_1", 0.0),
    "zeroed last layer": put(f"{HEAD}weight_3", 0.0),
    "head of NaN": put(f"{HEAD}weight_2", np.nan),
    "infinite bias": put(f"{HEAD}bias_3", np.inf, 0),
    "head of another width": lambda arrays: arrays.update({f"{HEAD}weight_2": arrays[f"{HEAD}weight_2"][:, :-1]}),
    "references of NaN": put("detector.0.references", np.nan, 0),
    "densities of zero": put("detector.0.densities", 0.0),
    "negative k-distances": put("detector.0.k_distances", -1.0),
    "references of an unknown class": put("detector.0.labels", 12, 0),
    "references in another order": reversed_rows("detector.0.labels"),
    "no neighbours": put("detector.0.counts", 0),
    "huge number of classes": put("detector.0.counts", 2**40, 0),
    "knots of NaN": put("fusion.knots", np.nan),
    "knots that descend": lambda arrays: arrays.update({"fusion.knots": arrays["fusion.knots"][:, ::-1].copy()}),
    "knots of 1e30": put("fusion.knots", 1e30),
    "levels of zero": put("fusion.levels", 0.0),
    "tail without a scale": put("fusion.scale", 0.0),
    "tail beyond all means": put("fusion.shape", 5.0),
    "one detector less in the calibration": lambda arrays: arrays.update({"fusion.knots": arrays["fusion.knots"][1:]}),
    "early clean scores of NaN": put("early.0.clean_scores", np.nan),
    "early clean scores of 1e30": put("early.1.clean_scores", 1e30),
    "truncated early clean scores": first("early.0.clean_scores", 5),
    "early knots of NaN": put("early.0.knots", np.nan),
    "heads together of zero": put_together("0.inputs", 0.0),
    "heads together of NaN": put_together("1.outputs", np.nan),
}
#: What only a bundle that keeps its reproduction can tell.
SUBTLE: dict[str, Change] = {
    "clean scores a little higher": scaled("clean_scores", 1.3),
    "clean scores a little lower": scaled("clean_scores", 0.8),
    "one detector's calibration a little wider": put("fusion.scale", 3.0),
    "weaker head": scaled(f"{HEAD}weight_3", 0.3),
    "other references": scaled("detector.0.references", 1.5),
    "reference of another layer's scale": scaled("reference.features", 2.0),
    "rows of the reference in another order": reversed_rows("reference.features"),
    "labels that are not the images'": reversed_rows("labels"),
    "early clean scores a little higher": scaled("early.0.clean_scores", 1.3),
    "hidden units in another order": reversed_rows(f"{HEAD}weight_3"),
    "k-distances and densities changed places": swapped("detector.0.k_distances", "detector.0.densities"),
}


def narrow(activations: Activations) -> Activations:
    """The first 48 columns of every layer: bundles of a fourth of the size say the same."""
    layers = {name: array[:, :48].copy() for name, array in activations.depths.items()}
    return Activations(activations.logits, activations.features[:, :48].copy(), layers)


def fit_narrow(suspect: SuspectModel, clean_split: Any) -> Guard:
    """Fit a guard with early verdicts on 300 images."""
    images, labels = (part[:300] for part in clean_split.validation)
    suspect.locate(*clean_split.validation)
    config = GuardConfig(false_positive_rate=0.05, anytime=True, folds=5)
    guard = Guard.fit_activations(narrow(suspect.activations(images)), labels, config)
    return replace(guard, suspect=suspect, input_shape=tuple(images.shape[1:]))


@pytest.fixture(scope="module")
def sound(suspect: SuspectModel, clean_split: Any, tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    return read_bundle(fit_narrow(suspect, clean_split).save(tmp_path_factory.mktemp("sound")))


def test_load_checks_the_scores_that_requests_get_and_makes_ready_what_they_need(sound, tmp_path, monkeypatch):
    path = write(tmp_path, sound)
    assert "_fused" in Guard.load(path).ensemble.__dict__  # no first request waits for it
    scored = FusedScores.score_into

    def blind(self, raw, activations):
        done = scored(self, raw, activations)
        raw[:] = 0.0
        return done

    monkeypatch.setattr(FusedScores, "score_into", blind)
    with pytest.raises(BundleError, match="is not sound"):
        Guard.load(path)


class OlderFusion(CalibratedFusion):
    """The combination of versions that kept no reproduction."""

    def fit(self, raw, logits, labels, kinds=None):
        self.surprise_map_ = SurpriseMap.fit(raw)
        return self


@pytest.fixture(scope="module")
def sound_older(suspect: SuspectModel, clean_split: Any, tmp_path_factory: pytest.TempPathFactory) -> StoredBundle:
    """The same as an older version wrote it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("guard.detection.cross_fitting.new_fusion", lambda mode: OlderFusion())
        known = {kind: DETECTORS[kind] for kind in ("lof", "disagreement", "anytime")}
        patch.setattr("guard.detection.ensemble.DETECTORS", known)
        for_mode = Ensemble.for_mode
        plain = staticmethod(lambda *settings, **more: Ensemble(for_mode(*settings, **more).members))  # not whitened
        patch.setattr(Ensemble, "for_mode", plain)
        guard = fit_narrow(suspect, clean_split)
    return older(read_bundle(guard.save(tmp_path_factory.mktemp("older"))))


def older(stored: StoredBundle) -> StoredBundle:
    """Return the bundle without what older versions did not keep."""
    arrays = {name: array for name, array in stored.arrays.items() if not name.endswith("reproduction")}
    document = {name: value for name, value in stored.document.items() if name != "reference_accuracy"}
    return StoredBundle(stored.digest, document, arrays)


def write(folder: Path, stored: StoredBundle, change: Change = dict, **document: object) -> Path:
    arrays = dict(stored.arrays)
    change(arrays)
    return write_bundle(folder, {**stored.document, **document}, arrays)


def test_sound_bundle_names_the_arrays_that_the_tests_change(sound):
    detectors = [entry["name"] for entry in sound.document["detectors"]]
    assert detectors[4] == "disagreement:features"
    assert detectors[13] == "anytime"
    assert "early.1.clean_scores" in sound.arrays


def test_sound_bundle_of_an_older_version_loads_and_decides_by_its_rule(sound_older, tmp_path, clean_activations):
    guard = Guard.load(write(tmp_path, sound_older))
    assert guard.fusion.kind_scores_ is None
    sample = narrow(clean_activations[:20])
    surprise = guard.fusion.surprise(guard.ensemble.score(sample))
    np.testing.assert_allclose(guard.scores(sample).combined, np.sqrt(np.square(surprise).mean(axis=1)), rtol=1e-12)


def test_load_reference_in_halves_without_a_note_is_calculated_with_in_single_precision(sound, tmp_path):
    guard = Guard.load(write(tmp_path, sound))
    halves = as_type("reference.features", np.float16)
    loaded = Guard.load(write(tmp_path, sound, halves))
    assert loaded.digest != guard.digest
    np.testing.assert_array_equal(loaded.reference.features, guard.reference.features, strict=True)
    assert loaded.save(tmp_path).name == guard.digest


@pytest.mark.parametrize("name", ["reproduction", "early.0.reproduction", "early.1.reproduction"])
def test_load_bundle_whose_reproduction_was_taken_out_is_refused(sound, tmp_path, name):
    def without(arrays: dict[str, Any]) -> None:
        del arrays[name]

    with pytest.raises(BundleError, match=rf"is not sound: array {name} is missing\."):
        Guard.load(write(tmp_path, sound, without))


def sealed_again(sound: StoredBundle, folder: Path, change: Change) -> Path:
    """Write the bundle changed, with the reproduction that the changed arrays give: nobody's arithmetic is off."""
    guard, arrays = Guard.load(write(folder / "sound", sound)), dict(sound.arrays)
    change(arrays)
    below = {name.removeprefix("fusion."): part for name, part in arrays.items() if name.startswith("fusion.")}
    fusion, sample = CalibratedFusion().restore(below), guard.reference[rows_scored(len(guard.reference))]
    arrays["reproduction"] = reproduction(Calibration(guard.ensemble, fusion, arrays["clean_scores"]), sample)
    return write_bundle(folder, sound.document, arrays)


@pytest.mark.parametrize("kind", range(5))
def test_load_bundle_that_is_blind_to_one_kind_is_refused(sound, tmp_path, kind):
    change = put("fusion.kind.knots", 1e6, kind)
    with pytest.raises(BundleError, match=r"detectors of kind \w+ count for nothing far beyond all clean images"):
        Guard.load(sealed_again(sound, tmp_path, change))


@pytest.mark.parametrize("place", range(14))
@pytest.mark.parametrize("where", [np.s_[:], np.s_[5:]])
def test_load_bundle_that_is_blind_to_one_detector_is_refused(sound, tmp_path, place, where):
    change = put("fusion.knots", 1e6, (place, where))
    with pytest.raises(BundleError, match=r"is not surprised far beyond all clean images|too little would be flagged"):
        Guard.load(sealed_again(sound, tmp_path, change))


def test_load_bundle_with_kinds_that_are_not_those_of_its_detectors_is_refused(sound, tmp_path):
    for change in (
        lambda arrays: arrays.update({"fusion.shows": 1 - arrays["fusion.shows"]}),
        put("fusion.whiten", 0.0),
        swapped("fusion.kinds", "fusion.kinds_reversed"),
    ):
        arrays = {**sound.arrays, "fusion.kinds_reversed": sound.arrays["fusion.kinds"][::-1].copy()}
        with pytest.raises(
            BundleError, match=r"arrays kinds, shows and whiten are not those of its detectors|array whiten"
        ):
            Guard.load(write(tmp_path, StoredBundle(sound.digest, sound.document, arrays), change))


@pytest.mark.parametrize("name", ["temperature", "kinds", "shows", "centre", "whiten", "kind.knots", "kind.shape"])
def test_load_bundle_without_a_part_of_its_combination_is_refused(sound, tmp_path, name):
    def without(arrays: Arrays) -> None:
        del arrays[f"fusion.{name}"]

    with pytest.raises(BundleError, match=r"(lacks|missing)"):
        Guard.load(write(tmp_path, sound, without))


def test_load_bundle_whose_combination_was_taken_out_is_refused(sound, tmp_path):
    def without(arrays: Arrays) -> None:
        for name in list(arrays):
            if name.rpartition(".")[2] in ("temperature", "kinds", "shows", "centre", "whiten") or ".kind." in name:
                del arrays[name]

    with pytest.raises(BundleError, match="the arrays of how they are combined are missing"):
        Guard.load(write(tmp_path, sound, without))


@pytest.mark.usefixtures("few_folds")
def test_load_bundle_of_a_network_whose_layer_is_called_shows(clean_activations, tmp_path):
    layers = {"x.shows": clean_activations.features[:100] * 2 + 1}
    activations = Activations(clean_activations.logits[:100], clean_activations.features[:100], layers)
    guard = Guard.fit_activations(activations, activations.predicted_labels, GuardConfig(false_positive_rate=0.05))
    assert Guard.load(guard.save(tmp_path)).reference.depths.keys() == {"x.shows"}


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_candidate_of_a_round_that_held_clean_images_out_loads(tmp_path, share):
    """It is calibrated on the others, and keeps all in its reference for the next round."""
    guard, workspace = fit_guard(), Workspace()
    poisoned, labels = world(30, seed=3, trigger=1)
    workspace.add(poisoned, labels, is_poisoned=True)
    material = gather(guard, workspace.items, workspace.decisions, RetrainerSettings(holdout_share=share))
    candidate = fit_candidate(guard, material).candidate
    loaded = Guard.load(candidate.save(tmp_path))
    assert len(loaded.clean_scores) == len(candidate.clean_scores) < len(guard.clean_scores)
    np.testing.assert_array_equal(loaded.scores(poisoned).p_values, candidate.scores(poisoned).p_values)


@pytest.mark.parametrize("version", ["new", "old"])
@pytest.mark.parametrize("change", ABSURD.values(), ids=ABSURD.keys())
def test_load_absurd_arrays_are_refused(sound, sound_older, tmp_path, change, version):
    path = write(tmp_path, sound if version == "new" else sound_older, change)
    with pytest.raises(BundleError, match=rf"^bundle {path.name[:12]} ") as error:
        Guard.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", SUBTLE.values(), ids=SUBTLE.keys())
def test_load_arrays_that_do_not_reproduce_are_refused(sound, tmp_path, change):
    with pytest.raises(BundleError, match=r"is not sound: .*(in fit|clean images)"):
        Guard.load(write(tmp_path, sound, change))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_classes", 9),
        ("n_classes", "ten"),
        ("n_classes", 10**30),
        ("clean_images", 299),
        ("class_names", ["one"]),
        ("class_names", [1] * 10),
        ("input_shape", [1, 28, -28]),
        ("input_shape", 7),
        ("depths", ["relu1", "relu1"]),
        ("depths", "relu1"),
        ("depths", []),
        ("realised_false_positive_rate", float("1e300")),
        ("realised_false_positive_rate", "0.01"),
        ("realised_false_positive_rate", None),
        ("recovery", {"head": 7}),
        ("recovery", [1]),
        ("reference_accuracy", 0.5),
        ("weights_digest", None),
        ("split_points", 5),
        ("detectors", []),
        ("detectors", [{"kind": "lof"}]),
        ("early", [{"depth": "nowhere", "realised_false_positive_rate": 0.1}]),
        ("settings", []),
        ("settings", {"mode": "paper"}),
        ("backup", {"kind": "defective"}),
        ("backup", 3),
        ("retrained_with", {"lies": 1}),
    ],
)
def test_load_absurd_document_is_refused(sound, tmp_path, name, value):
    with pytest.raises(BundleError):
        Guard.load(write(tmp_path, sound, **{name: value}))


def test_load_document_with_a_rate_that_is_no_number_is_refused(sound, tmp_path, monkeypatch):
    """`NaN` is no JSON, and Python reads it."""
    import json

    dumps = json.dumps
    monkeypatch.setattr(json, "dumps", lambda value, **options: dumps(value, **{**options, "allow_nan": True}))
    with pytest.raises(BundleError, match=r"realised_false_positive_rate must be in \[0, 1\], got nan"):
        Guard.load(write(tmp_path, sound, realised_false_positive_rate=float("nan")))


@pytest.mark.parametrize("mode", ["calibrated", "paper"])
def test_honest_guards_of_few_images_load_again(suspect, clean_split, tmp_path, mode):
    for n in (12, 40):
        images, labels = clean_split.validation
        guard = Guard.fit(suspect, images[:n], labels[:n], GuardConfig(false_positive_rate=0.1, mode=mode))
        path = guard.save(tmp_path)
        assert Guard.load(path).digest == path.name


def untrained(n_classes: int, each: int, seed: int) -> tuple[Activations, np.ndarray]:
    """Of random images, by a network that answers at random."""
    rng = np.random.default_rng(seed)
    features = np.abs(rng.normal(size=(n_classes * each, 16))).astype(np.float32)
    logits = features @ rng.normal(size=(16, n_classes)).astype(np.float32)
    return Activations(logits, features, {"early": features[:, :6].copy()}), np.repeat(np.arange(n_classes), each)


@pytest.mark.parametrize("mode", ["calibrated", "anytime", "paper"])
@pytest.mark.parametrize(("n_classes", "each"), [(2, 10), (3, 20), (10, 2), (10, 3), (10, 6), (43, 2), (43, 4)])
def test_guard_of_a_network_that_answers_at_random_loads_again(tmp_path, n_classes, each, mode):
    """Heads know the few true labels by heart, so its wrong answers look worse than those of any unseen image."""
    folds = 5 if n_classes * each >= 60 else None  # "calibrated" has the twenty of the default
    settings = {"anytime": {"anytime": True, "folds": folds}, "paper": {"mode": "paper"}}.get(mode, {})
    config = GuardConfig(false_positive_rate=0.1, **settings)
    guard = Guard.fit_activations(*untrained(n_classes, each, seed=2), config)
    path = guard.save(tmp_path)
    assert Guard.load(path).digest == path.name


@pytest.mark.parametrize("layer", ["logits", "features", "early"])
def test_fit_refuses_a_layer_that_is_the_same_for_every_image(layer):
    activations, labels = untrained(3, 20, seed=0)
    arrays = dict(activations.items())
    arrays[layer] = np.repeat(arrays[layer][:1], 60, axis=0)
    constant = Activations(arrays["logits"], arrays["features"], {"early": arrays["early"]})
    with pytest.raises(DataError, match=rf"^{layer} must tell one clean image from another: all 60 rows .*--split"):
        Guard.fit_activations(constant, labels, GuardConfig(false_positive_rate=0.1))


@pytest.mark.usefixtures("few_folds")
def test_fit_refuses_what_no_server_would_load(monkeypatch):
    monkeypatch.setattr("guard.detection.soundness._MEDIAN_SCORE", (5.0, 6.0))
    with pytest.raises(DataError, match=r"no server would load: the median .* Give more images of each class"):
        Guard.fit_activations(*untrained(3, 10, seed=0), GuardConfig(false_positive_rate=0.1))


def test_bundle_that_is_not_sound_says_what_to_do(sound, tmp_path):
    for change in ("truncated labels", "clean scores of 1e30"):
        with pytest.raises(BundleError, match=r" is not sound: .*\. Fit again .* or activate another .*`\.$"):
            Guard.load(write(tmp_path, sound, ABSURD[change]))


@pytest.mark.usefixtures("few_folds")
def test_candidate_that_was_calibrated_without_its_hold_outs_loads_again(suspect, clean_split, tmp_path):
    """As `fit_candidate` makes it: the reference is whole, for the rounds to come."""
    images, labels = clean_split.validation
    guard = Guard.fit(suspect, images[:100], labels[:100], GuardConfig(false_positive_rate=0.1))
    whole = suspect.activations(images[:150])
    path = replace(guard, reference=whole, reference_labels=labels[:150]).save(tmp_path)
    assert Guard.load(path).digest == path.name


def test_paper_guard_that_calls_everything_clean_is_refused(suspect, clean_split, tmp_path):
    images, labels = clean_split.validation
    guard = Guard.fit(suspect, images[:200], labels[:200], GuardConfig(false_positive_rate=0.1, mode="paper"))
    stored = read_bundle(guard.save(tmp_path))
    for entry in (stored, older(stored)):
        with pytest.raises(BundleError, match=r"nothing would be flagged|in fit"):
            Guard.load(write(tmp_path, entry, put("clean_scores", 1e30)))


@pytest.mark.parametrize(
    "how", ["clean scores of NaN", "clean scores of 1e30", "zeroed head", "clean scores a little higher"]
)
def test_absurd_bundle_is_not_swapped_in_activated_or_rolled_back_to(
    sound, badnet, tmp_path, how, capfd: pytest.CaptureFixture[str]
):
    store = BundleStore(tmp_path)
    good = write(tmp_path, sound)
    store.activate(good.name)
    absurd = write(tmp_path, sound, {**ABSURD, **SUBTLE}[how])
    assert run(["bundle", "activate", absurd.name[:12], "--bundles", str(tmp_path)]) == 1
    assert store.active_digest() == good.name
    runtime = GuardRuntime(copy.deepcopy(badnet), {}, bundles=tmp_path, embedded=None, model_name="m")
    try:
        (tmp_path / "ACTIVE").write_text(absurd.name)
        for _ in range(2):
            runtime.refresh()
        assert runtime.current.digest == good.name
        refused = [count.value for count in runtime.metrics.drain() if "refused" in count.labels]
    finally:
        runtime.close()
    assert sum(refused) == 1
    assert capfd.readouterr().err.count('"bundle_refused"') == 1
    (tmp_path / "HISTORY").write_text(f"{absurd.name}\n{good.name}\n")
    (tmp_path / "ACTIVE").write_text(good.name)
    assert run(["bundle", "rollback", "--bundles", str(tmp_path)]) == 1
    assert store.active_digest() == good.name


def test_absurd_bundle_is_unknown_to_the_review_page(sound, tmp_path):
    known = KnownBundles(tmp_path)
    assert known.find(write(tmp_path, sound).name) is not None
    for how in ("truncated reference", "labels out of range", "no array of clean scores"):
        assert known.find(write(tmp_path, sound, ABSURD[how]).name) is None
