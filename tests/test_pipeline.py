"""The guard from end to end, on a network that carries a real backdoor and on real images."""

from __future__ import annotations

import copy
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch

from guard import Activations, Guard, GuardConfig, SuspectModel
from guard.errors import BundleError, ConfigError, DataError
from guard.lab.attacks import mnist_cnn
from guard.statistics.calibration import conformal_p_values
from guard.statistics.evaluation import attack_success_rate, auroc, true_positive_rate
from guard.storage.bundle import read_bundle, write_bundle


def flagged(verdicts):
    return np.array([verdict.is_poisoned for verdict in verdicts])


def column(verdicts, name):
    return np.array([getattr(verdict, name) for verdict in verdicts])


@pytest.fixture(scope="module")
def clean_verdicts(fitted_guard, clean_split):
    return fitted_guard.inspect(clean_split.test.images)


@pytest.fixture(scope="module")
def triggered_verdicts(fitted_guard, triggered):
    return fitted_guard.inspect(triggered.images)


@pytest.fixture(scope="module")
def few(clean_split):
    """300 clean images and labels, for guards that are fitted again and again."""
    images, labels = clean_split.validation
    return images[:300], labels[:300]


@pytest.fixture(scope="module")
def few_guard(suspect, few):
    """A guard of these, in two folds, with seed 0."""
    return Guard.fit(suspect, *few, GuardConfig(false_positive_rate=0.05, folds=2))


@pytest.fixture(scope="module")
def few_activations(suspect, fitted_guard, few):
    return suspect.activations(few[0])


@pytest.fixture(scope="module")
def bundle(fitted_guard, tmp_path_factory):
    return fitted_guard.save(tmp_path_factory.mktemp("bundles"))


# --- what it is for ---


def test_guard_tells_triggered_from_clean_images(clean_verdicts, triggered_verdicts):
    scores = np.concatenate([column(clean_verdicts, "score"), column(triggered_verdicts, "score")])
    is_poisoned = np.repeat([False, True], [len(clean_verdicts), len(triggered_verdicts)])
    assert auroc(scores, is_poisoned) > 0.98
    flags = np.concatenate([flagged(clean_verdicts), flagged(triggered_verdicts)])
    assert true_positive_rate(flags, is_poisoned) > 0.95


def test_guard_stops_an_attack_that_works_without_it(triggered, triggered_verdicts):
    labels = column(triggered_verdicts, "label")
    assert attack_success_rate(labels, triggered.labels, triggered.true_labels) > 0.95
    stopped = attack_success_rate(labels, triggered.labels, triggered.true_labels, flagged(triggered_verdicts))
    assert stopped <= 0.03


def test_guard_flags_the_requested_share_of_held_out_clean_images(fitted_guard, clean_verdicts):
    allowed = 4 * np.sqrt(0.05 * 0.95 * (1 / 1000 + 1 / 1000))  # of counting, and of the clean draw
    assert flagged(clean_verdicts).mean() == pytest.approx(0.05, abs=allowed)
    assert fitted_guard.realised_false_positive_rate == pytest.approx(0.05, abs=allowed)


# --- verdicts ---


def test_inspect_keeps_the_order(fitted_guard, clean_split, clean_verdicts, triggered, triggered_verdicts):
    order = np.random.default_rng(0).permutation(200)
    images = np.concatenate([clean_split.test.images[:100], triggered.images[:100]])
    expected = [*clean_verdicts[:100], *triggered_verdicts[:100]]
    shuffled = fitted_guard.inspect(images[order])
    for verdict, row in zip(shuffled, order, strict=True):
        assert verdict.label == expected[row].label
        assert verdict.score == pytest.approx(expected[row].score, rel=1e-5)


def test_inspect_one_by_one_equals_the_batch(fitted_guard, clean_split, clean_verdicts, triggered, triggered_verdicts):
    for images, batch in ((clean_split.test.images, clean_verdicts), (triggered.images, triggered_verdicts)):
        for row in range(40):
            (single,) = fitted_guard.inspect(images[row : row + 1])
            for name in ("label", "final_label", "is_poisoned", "p_value", "action"):
                assert getattr(single, name) == getattr(batch[row], name)
            assert single.score == pytest.approx(batch[row].score, rel=1e-5)


def test_inspect_from_several_threads_equals_one(fitted_guard, triggered, triggered_verdicts):
    with ThreadPoolExecutor(4) as pool:
        parts = list(
            pool.map(lambda start: fitted_guard.inspect(triggered.images[start : start + 25]), range(0, 200, 25))
        )
    threaded = [verdict for part in parts for verdict in part]
    assert [verdict.p_value for verdict in threaded] == [verdict.p_value for verdict in triggered_verdicts[:200]]


def test_inspect_nothing_returns_nothing(fitted_guard, clean_activations):
    assert fitted_guard.inspect(np.empty((0, 1, 28, 28), dtype=np.float32)) == []
    assert fitted_guard.inspect_activations(clean_activations[:0]) == []


def test_inspect_activations_equals_inspect(fitted_guard, clean_activations, clean_verdicts):
    assert fitted_guard.inspect_activations(clean_activations) == clean_verdicts


def test_verdict_holds_plain_values_that_agree_with_each_other(fitted_guard, clean_verdicts, triggered_verdicts):
    for verdict in clean_verdicts + triggered_verdicts:
        assert verdict.is_poisoned == (verdict.p_value <= 0.05)
        assert verdict.action == ("flag" if verdict.is_poisoned else "observe")
        assert verdict.final_label == verdict.label
        assert tuple(verdict.detector_scores) == fitted_guard.ensemble.names
        kinds = {type(getattr(verdict, name)) for name in ("label", "final_label", "is_poisoned", "p_value", "score")}
        assert kinds == {int, bool, float}
        assert {type(score) for score in verdict.detector_scores.values()} == {float}
    with pytest.raises(dataclasses.FrozenInstanceError):
        clean_verdicts[0].label = 3


def test_verdict_reason_names_the_share_of_clean_images_and_the_strongest_sign(triggered_verdicts, clean_verdicts):
    verdict = next(triggered_verdict for triggered_verdict in triggered_verdicts if triggered_verdict.is_poisoned)
    start, sign = verdict.reason.split("; strongest sign: ")
    assert start == f"as suspicious as {100 * verdict.p_value:.2g} % of clean images"
    name, value = sign.split(" = ")
    assert value == f"{verdict.detector_scores[name]:.3g}"
    assert "\n" not in verdict.reason
    assert {triggered_verdict.reason for triggered_verdict in clean_verdicts if not triggered_verdict.is_poisoned} == {
        "no more suspicious than clean images"
    }


def test_verdict_carries_the_surprise_of_a_flagged_input_and_none_of_a_clean_one(
    fitted_guard, clean_activations, triggered_activations
):
    both = Activations.concatenate([clean_activations[:50], triggered_activations[:50]])
    scores = fitted_guard.scores(both)
    assert 0 < scores.is_poisoned.sum() < 100
    for verdict, surprise in zip(fitted_guard.inspect_activations(both), scores.surprise, strict=True):
        names = fitted_guard.ensemble.names if verdict.is_poisoned else ()
        assert verdict.surprise == dict(zip(names, surprise.tolist(), strict=False))


def test_guard_cannot_be_changed_and_a_variant_leaves_it_as_it_was(fitted_guard):
    for name in ("config", "backup", "suspect", "digest", "anything"):
        with pytest.raises(FrozenInstanceError):
            setattr(fitted_guard, name, None)
    variant = replace(fitted_guard, class_names=("a",) * 10)
    assert fitted_guard.class_names != variant.class_names
    assert variant != fitted_guard  # each is itself, whatever it holds
    assert variant.ensemble is fitted_guard.ensemble


def test_verdict_p_value_is_the_rank_among_the_clean_scores_in_the_bundle(bundle, clean_verdicts):
    clean = read_bundle(bundle).arrays["clean_scores"]
    assert clean.shape == (1000,)
    assert (np.diff(clean) >= 0).all()
    for verdict in clean_verdicts[:200]:
        assert verdict.p_value == (1 + (clean >= verdict.score).sum()) / 1001


# --- actions and settings ---


@pytest.mark.parametrize("action", ["observe", "flag", "block"])
def test_inspect_action_is_passed_on_and_leaves_every_label(fitted_guard, triggered, triggered_verdicts, action):
    verdicts = fitted_guard.with_config(action=action).inspect(triggered.images)
    for verdict, before in zip(verdicts, triggered_verdicts, strict=True):
        assert verdict == dataclasses.replace(before, action=action if before.is_poisoned else "observe")


def test_inspect_relabel_replaces_labels_of_flagged_inputs_only(
    fitted_guard, clean_activations, triggered_activations, clean_verdicts, triggered_verdicts
):
    guard = fitted_guard.with_config(action="relabel")
    changed = 0
    for activations, before in (
        (clean_activations, clean_verdicts),
        (triggered_activations, triggered_verdicts),
    ):
        replacement = guard.ensemble.replacement_logits(activations).argmax(axis=1)
        for verdict, old, selected in zip(guard.inspect_activations(activations), before, replacement, strict=True):
            assert (verdict.label, verdict.is_poisoned) == (old.label, old.is_poisoned)
            assert verdict.final_label == (selected if old.is_poisoned else old.label)
            assert verdict.action == ("relabel" if old.is_poisoned else "observe")
            changed += verdict.final_label != verdict.label
    assert changed > 100


def test_with_config_rate_moves_the_threshold_and_nothing_else(fitted_guard, clean_activations, clean_verdicts):
    before = fitted_guard.config
    for rate in (0.001, 0.01, 0.2):
        other = fitted_guard.with_config(false_positive_rate=rate)
        assert other.ensemble is fitted_guard.ensemble
        for verdict, old in zip(other.inspect_activations(clean_activations), clean_verdicts, strict=True):
            assert (verdict.score, verdict.p_value) == (old.score, old.p_value)
            assert verdict.is_poisoned == (old.p_value <= rate)
    assert fitted_guard.config is before


@pytest.mark.parametrize("name", ["seed", "mode", "n_neighbors", "folds", "image_noise_std"])
def test_with_config_setting_fixed_by_fitting_is_refused(fitted_guard, name):
    with pytest.raises(ConfigError, match=rf"^{name} is fixed when a guard is fitted\. Fit again to change it\.$"):
        fitted_guard.with_config(**{name: getattr(fitted_guard.config, name)})


def test_with_config_unknown_or_bad_setting_is_refused(fitted_guard):
    with pytest.raises(ConfigError, match=r"^unknown setting 'actoin'\. Did you mean 'action'\?$"):
        fitted_guard.with_config(actoin="flag")
    with pytest.raises(ConfigError, match=r"^action: input should be"):
        fitted_guard.with_config(action="shout")


def test_with_config_rate_below_one_over_n_plus_1_is_refused(fitted_guard):
    fitted_guard.with_config(false_positive_rate=1 / 1001)
    with pytest.raises(DataError, match=r"needs at least 1001 clean images, got 1000\. Raise the rate or add images"):
        fitted_guard.with_config(false_positive_rate=1 / 1002)


# --- fitting ---


@pytest.mark.parametrize("settings", [{"anytime": True}, {"mode": "paper"}])
def test_fit_side_by_side_gives_the_same_guard(clean_activations, tmp_path, settings):
    rows = np.arange(150)
    activations, labels = clean_activations[rows], clean_activations.predicted_labels[rows]
    config = GuardConfig(false_positive_rate=0.05, folds=3, **settings)
    threads = torch.get_num_threads()
    seen = []
    one, three = (
        Guard.fit_activations(activations, labels, config, threads=n, progress=lambda *report: seen.append(report))
        for n in (1, 3)
    )
    assert one.save(tmp_path / "one").name == three.save(tmp_path / "three").name  # the digest of everything in it
    assert torch.get_num_threads() == threads
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    shares = [share for _, share in seen[: len(seen) // 2]]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_fit_side_by_side_ends_with_the_first_error(clean_activations, monkeypatch):
    begun = []

    def fails(*arguments):
        begun.append(arguments)
        raise DataError("this fold is broken")

    monkeypatch.setattr("guard.detection.cross_fitting._fitted_ensemble", fails)
    rows = np.arange(100)
    activations, labels = clean_activations[rows], clean_activations.predicted_labels[rows]
    with pytest.raises(DataError, match="this fold is broken"):
        Guard.fit_activations(activations, labels, GuardConfig(false_positive_rate=0.05, folds=20), threads=2)
    assert len(begun) <= 21


def test_fit_reports_progress_from_0_to_1(suspect, few):
    seen = []
    Guard.fit(
        suspect, *few, GuardConfig(false_positive_rate=0.05, folds=2), progress=lambda *report: seen.append(report)
    )
    texts, shares = zip(*seen, strict=True)
    assert shares[0] == 0.0
    assert shares[-1] == 1.0
    assert list(shares) == sorted(shares)
    assert all(texts)


def test_fit_leaves_images_labels_and_network_as_they_were(badnet, suspect, few):
    images, labels = (array.copy() for array in few)
    weights = {name: tensor.clone() for name, tensor in badnet.state_dict().items()}
    Guard.fit(suspect, images, labels, GuardConfig(false_positive_rate=0.05, folds=2))
    np.testing.assert_array_equal(images, few[0])
    np.testing.assert_array_equal(labels, few[1])
    assert all((tensor == weights[name]).all() for name, tensor in badnet.state_dict().items())


def test_fit_same_seed_gives_the_same_bundle_and_another_seed_another(suspect, few, few_guard, tmp_path):
    def digest(seed):
        config = GuardConfig(false_positive_rate=0.05, folds=2, seed=seed)
        return Guard.fit(suspect, *few, config).save(tmp_path).name

    first = few_guard.save(tmp_path).name
    assert digest(0) == first
    assert digest(1) != first


@pytest.mark.parametrize("labels_dtype", [np.uint8, np.int32])
def test_fit_takes_any_integer_labels(few, few_activations, labels_dtype):
    config = GuardConfig(false_positive_rate=0.05, folds=2, mode="paper")
    guard = Guard.fit_activations(few_activations, few[1].astype(labels_dtype), config)
    np.testing.assert_array_equal(guard.reference_labels, few[1], strict=True)


def test_fit_image_noise_doubles_what_detectors_see_and_not_the_calibration(
    suspect, few, few_guard, few_activations, tmp_path
):
    plain, noisy = few_guard, Guard.fit(suspect, *few, few_guard.config.replace(image_noise_std=0.1))
    assert len(plain.ensemble.arrays()["0.references"]) == 300
    assert len(noisy.ensemble.arrays()["0.references"]) == 600
    assert len(noisy.reference) == len(noisy.reference_labels) == 300
    stored = read_bundle(noisy.save(tmp_path))
    assert stored.arrays["clean_scores"].shape == (300,)
    assert stored.document["clean_images"] == 300
    assert (noisy.scores(few_activations).combined != plain.scores(few_activations).combined).any()


def test_fit_noisy_activations_of_another_length_are_refused(few, few_activations):
    with pytest.raises(DataError, match=r"^noisy activations must have 300 rows, one per image, got 299\.$"):
        Guard.fit_activations(
            few_activations, few[1], GuardConfig(false_positive_rate=0.05), noisy=few_activations[:299]
        )


def test_fit_paper_mode_flags_by_its_own_rule_at_any_rate(few, few_activations, clean_activations):
    config = GuardConfig(false_positive_rate=0.05, mode="paper", folds=2)
    guard = Guard.fit_activations(few_activations, few[1], config)
    verdicts = guard.inspect_activations(clean_activations)
    assert guard.ensemble.names == ("lof:norms", "disagreement:features")
    for verdict in verdicts:
        novelty, disagreement = verdict.detector_scores.values()
        assert verdict.is_poisoned == (novelty > 1.5 or disagreement > 0)
    other = guard.with_config(false_positive_rate=0.5).inspect_activations(clean_activations)
    np.testing.assert_array_equal(flagged(other), flagged(verdicts))


def test_fit_too_few_images_says_how_many_are_needed_before_the_network_runs(suspect, few, monkeypatch):
    monkeypatch.setattr(SuspectModel, "activations", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(DataError) as error:
        Guard.fit(suspect, few[0][:98], few[1][:98], GuardConfig(false_positive_rate=0.01))
    assert str(error.value) == (
        "false_positive_rate=0.01 needs at least 99 clean images, got 98. Raise the rate or add images."
    )


def test_fit_fewer_than_two_images_per_fold_is_refused(few, few_activations):
    config = GuardConfig(false_positive_rate=0.5, folds=5)
    with pytest.raises(
        DataError, match=r"^folds=5 needs at least 10 clean images, got 9\. Give more, or fewer folds\.$"
    ):
        Guard.fit_activations(few_activations[:9], few[1][:9], config)
    Guard.fit_activations(few_activations[:10], np.zeros(10, dtype=np.int64), config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels[:-1], r"^labels must have shape \(300,\), one per image, got \(299,\)\.$"),
        (lambda labels: labels[:, None], r"^labels must have shape \(300,\), one per image, got \(300, 1\)\.$"),
        (lambda labels: labels.astype(float), r"^labels must be integers, got float64\.$"),
        (lambda labels: labels > 4, r"^labels must be integers, got bool\.$"),
        (lambda labels: labels + 1, r"^labels must be in \[0, 10\), got 1 to 10\.$"),
        (lambda labels: labels - 1, r"^labels must be in \[0, 10\), got -1 to 8\.$"),
    ],
)
def test_fit_labels_that_break_a_rule_are_refused(suspect, few, change, message):
    with pytest.raises(DataError, match=message):
        Guard.fit(suspect, few[0], change(few[1]), GuardConfig(false_positive_rate=0.05))


def test_fit_wrong_number_of_class_names_is_refused(few, few_activations):
    with pytest.raises(
        DataError, match=r"^the suspect model has 10 classes, got 2 class names\. Give one name per class"
    ):
        Guard.fit_activations(few_activations, few[1], GuardConfig(false_positive_rate=0.05), class_names=["yes", "no"])


def test_fit_activations_not_finite_are_refused_with_the_row(few, few_activations):
    features = few_activations.features.copy()
    features[17, 3] = np.nan
    damaged = Activations(few_activations.logits, features, few_activations.depths)
    with pytest.raises(DataError, match=r"^activations of clean image 17 are not finite\. Is the model damaged\?$"):
        Guard.fit_activations(damaged, few[1], GuardConfig(false_positive_rate=0.05))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: images[:, :, :20], r"^images must have shape \(n, 1, 28, 28\) as in fit, got \(5, 1, 20, 28\)"),
        (lambda images: images[0], r"^images must have shape \(n, 1, 28, 28\) as in fit, got \(1, 28, 28\)\.$"),
        (lambda images: images.repeat(3, axis=1), r"^images must have shape \(n, 1, 28, 28\) as in fit"),
        (lambda images: images.astype(np.float64), r"^images must be float32, got float64\."),
        (lambda images: (255 * images).astype(np.uint8), r"^images must be float32, got uint8\."),
        (lambda images: np.where(np.arange(5)[:, None, None, None] == 3, np.float32(np.nan), images), r"image 3 holds"),
        (lambda images: np.where(np.arange(5)[:, None, None, None] == 2, np.float32(np.inf), images), r"image 2 holds"),
    ],
)
def test_inspect_images_that_break_a_rule_are_refused(fitted_guard, clean_split, change, message):
    with pytest.raises(DataError, match=message):
        fitted_guard.inspect(change(clean_split.test.images[:5]))


@pytest.mark.parametrize("where", ["logits", "features", "depth"])
def test_inspect_activations_not_finite_are_refused_never_clean(fitted_guard, clean_activations, where):
    parts = {name: array[:5].copy() for name, array in clean_activations.items()}
    name = list(parts)[2] if where == "depth" else where
    parts[name][4, 0] = np.nan
    damaged = Activations(parts.pop("logits"), parts.pop("features"), parts)
    with pytest.raises(DataError, match=r"^activations of input 4 are not finite; it cannot be scored\.$"):
        fitted_guard.inspect_activations(damaged)


def test_inspect_activations_of_another_network_are_refused(fitted_guard, clean_activations):
    logits, features, depths = clean_activations.logits, clean_activations.features, clean_activations.depths
    with pytest.raises(DataError, match=r"^features have 511 columns, fit saw 512\. Is the split layer the same\?$"):
        fitted_guard.inspect_activations(Activations(logits, features[:, :511], depths))
    with pytest.raises(DataError, match=r"^logits have 9 columns, fit saw 10\. Is it the same suspect model\?$"):
        fitted_guard.inspect_activations(Activations(logits[:, :9], features, depths))
    with pytest.raises(DataError, match=r"^there is no depth '"):
        fitted_guard.inspect_activations(Activations(logits, features))


def test_fit_class_without_images_flags_whatever_is_predicted_as_it(few, few_activations, clean_activations):
    keep = (few[1] != 3) & (few_activations.predicted_labels != 3)
    guard = Guard.fit_activations(few_activations[keep], few[1][keep], GuardConfig(false_positive_rate=0.05, folds=2))
    verdicts = guard.inspect_activations(clean_activations)
    threes = [verdict for verdict in verdicts if verdict.label == 3]
    assert len(threes) > 50
    assert all(verdict.is_poisoned for verdict in threes)
    assert {verdict.p_value for verdict in threes} == {1 / (keep.sum() + 1)}
    assert all(np.isfinite(verdict.score) for verdict in threes)
    others = [verdict.is_poisoned for verdict in verdicts if verdict.label != 3]
    assert 0 < np.mean(others) < 0.05 + 4 * np.sqrt(0.05 * 0.95 * (1 / keep.sum() + 1 / len(others)))


# --- on disk ---


def test_save_then_load_gives_the_same_verdicts(
    bundle, badnet, clean_split, triggered, clean_verdicts, triggered_verdicts
):
    loaded = Guard.load(bundle, SuspectModel(copy.deepcopy(badnet)))
    assert loaded.inspect(clean_split.test.images) == clean_verdicts
    assert loaded.inspect(triggered.images) == triggered_verdicts


def test_load_restores_what_the_guard_says_of_itself(bundle, suspect, fitted_guard):
    loaded = Guard.load(str(bundle), suspect)
    assert loaded.config == fitted_guard.config
    assert loaded.digest == bundle.name
    assert loaded.input_shape == (1, 28, 28)
    assert loaded.class_names is None
    assert loaded.realised_false_positive_rate == fitted_guard.realised_false_positive_rate
    np.testing.assert_array_equal(loaded.reference_labels, fitted_guard.reference_labels, strict=True)
    assert loaded.reference.items()[2][0] == fitted_guard.reference.items()[2][0]
    for (_, array), (_, before) in zip(loaded.reference.items(), fitted_guard.reference.items(), strict=True):
        np.testing.assert_array_equal(array, before, strict=True)


def test_load_then_save_is_the_same_bundle(bundle, suspect, tmp_path):
    loaded = Guard.load(bundle, suspect)
    assert loaded.save(tmp_path).name == bundle.name
    other = loaded.with_config(false_positive_rate=0.1).save(tmp_path)
    assert other.name != bundle.name
    assert Guard.load(other, suspect).config.false_positive_rate == 0.1


def test_save_document_tells_people_what_it_was_fitted_for(bundle, suspect):
    document = read_bundle(bundle).document
    assert document["weights_digest"] == suspect.digest
    assert (document["n_classes"], document["clean_images"], document["input_shape"]) == (10, 1000, [1, 28, 28])
    assert document["settings"]["false_positive_rate"] == 0.05
    assert "data_dir" not in document["settings"]
    assert document["split_points"]["depths"] == document["depths"]


def test_save_then_load_paper_mode_and_class_names(few, few_activations, clean_activations, tmp_path):
    names = [f"digit {digit}" for digit in range(10)]
    config = GuardConfig(false_positive_rate=0.05, mode="paper", folds=2, norm_orders=("l0", "l2"))
    guard = Guard.fit_activations(few_activations, few[1], config, class_names=names)
    loaded = Guard.load(guard.save(tmp_path))
    assert loaded.class_names == tuple(names)
    assert loaded.config == config
    assert loaded.inspect_activations(clean_activations) == guard.inspect_activations(clean_activations)


def test_load_without_suspect_inspects_activations_only(bundle, clean_split, clean_activations, clean_verdicts):
    loaded = Guard.load(bundle)
    assert loaded.inspect_activations(clean_activations) == clean_verdicts
    with pytest.raises(DataError, match=r"^this guard has no suspect model: call inspect_activations\(\), or load it"):
        loaded.inspect(clean_split.test.images)


def test_load_for_other_weights_is_refused_with_both_digests(bundle, suspect):
    other = SuspectModel(mnist_cnn(seed=1))
    with pytest.raises(BundleError) as error:
        Guard.load(bundle, other)
    assert str(error.value) == (
        f"bundle {bundle.name[:12]} was fitted for weights {suspect.digest[:12]}, the suspect model has "
        f"{other.digest[:12]}. Fit again for these weights."
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.pop("detectors"), r"lacks 'detectors'\. Fit again with this version\.$"),
        (lambda document: document["depths"].append("conv9"), r"array reference\.conv9 is missing\. Fit again"),
        (lambda document: document["settings"].update(magic=1), r"with other settings: unknown setting 'magic'"),
        (lambda document: document["detectors"][0].update(kind="oracle"), r"^unknown detector 'oracle'"),
    ],
)
def test_load_bundle_of_another_version_is_a_bundle_error(bundle, tmp_path, change, message):
    stored = read_bundle(bundle)
    change(stored.document)
    with pytest.raises(BundleError, match=message):
        Guard.load(write_bundle(tmp_path, stored.document, stored.arrays))


def test_realised_rate_is_counted_fold_by_fold(few, few_activations, tmp_path):
    """At a rate of 0.5 of exchangeable scores about half are flagged, whatever the detectors."""
    guard = Guard.fit_activations(few_activations, few[1], GuardConfig(false_positive_rate=0.5, folds=2))
    assert guard.realised_false_positive_rate == pytest.approx(0.5, abs=4 * np.sqrt(0.25 * 4 / 300))
    clean = read_bundle(guard.save(tmp_path)).arrays["clean_scores"]
    assert conformal_p_values(clean, clean).min() == 2 / 301
