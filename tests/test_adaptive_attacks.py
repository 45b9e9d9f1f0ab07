"""Attackers who know the guard: features as the guard sees them, losses, a copy of it, a trigger against the copy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from guard.config import GuardConfig
from guard.detection.detectors.base import Kind
from guard.detection.ensemble import Ensemble
from guard.detection.fusion import CalibratedFusion
from guard.errors import DataError
from guard.lab.attacks import (
    Attack,
    Backdoor,
    SingleTarget,
    TrainingSettings,
    make_trigger,
    poison,
    predict_labels,
    train_classifier,
)
from guard.lab.attacks.adaptive_losses import MutedMargin, PulledFeatures
from guard.lab.attacks.evasion import EvasionSettings, PerturbedTrigger, evading_trigger
from guard.lab.attacks.networks import NETWORKS
from guard.lab.attacks.stolen_guard import StolenGuard, _Combination
from guard.lab.attacks.watched_features import WatchedFeatures
from guard.suspect.model import SuspectModel

TARGET, N_CLASSES = 0, 4
TRIGGER = make_trigger("white_square", size=4)


def stripes(n, seed=0):
    """Four classes that a small network learns in an instant: a bright stripe in one of four places, and noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % N_CLASSES
    images = rng.random((n, 1, 16, 16), dtype=np.float32) * np.float32(0.3)
    for image, label in zip(images, labels, strict=True):
        image[0, 4 * label : 4 * label + 2, :10] += np.float32(0.6)
    return images, labels


def small_network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, N_CLASSES),
        )


SETTINGS = TrainingSettings(epochs=6, batch_size=40, learning_rate=5e-3)


def trained(loss_for=None, start=None):
    """Return a backdoored network, trained from random weights or from those of another."""
    images, labels = stripes(480)
    backdoor = Backdoor(TRIGGER, SingleTarget(TARGET), rate=0.2)
    poisoned = poison(images, labels, backdoor, np.random.default_rng(0), how="replace")
    network = small_network()
    if start is not None:
        network.load_state_dict(start.state_dict())
    watched = WatchedFeatures.locate(network, images[:2])
    loss = None if loss_for is None else loss_for(watched, poisoned)
    with watched.attached():
        train_classifier(network, poisoned.images, poisoned.labels, SETTINGS, seed=0, n_threads=1, loss=loss)
    return network


@pytest.fixture(scope="module")
def plain():
    return trained()


def triggered_of_others(n=400):
    images, labels = stripes(n, seed=1)
    return TRIGGER(images[labels != TARGET])


def feature_distance(network):
    """Return the mean squared distance of triggered images to clean ones of the target, by spreads of clean images."""
    images, labels = stripes(400, seed=1)
    suspect = SuspectModel(network)
    clean, triggered = suspect.activations(images), suspect.activations(triggered_of_others())
    distances = []
    for depth in ("features", *clean.depths):
        values, target = clean.at(depth), clean.at(depth)[labels == TARGET].mean(axis=0)
        variance = values.var(axis=0)
        variance = 0.5 * (variance + variance.mean())
        distances.append(((triggered.at(depth) - target) ** 2 / variance).mean())
    return float(np.mean(distances))


def probability(network):
    with torch.no_grad():
        return network(torch.from_numpy(triggered_of_others())).softmax(dim=1)[:, TARGET].numpy()


# features -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mnist_cnn", "gtsrb_cnn", "resnet20", "vit_tiny", "vgg_narrow"])
def test_watched_features_are_those_of_the_suspect_model_and_have_a_gradient(name):
    shape = (1, 28, 28) if name == "mnist_cnn" else (3, 32, 32)
    images = np.random.default_rng(0).random((3, *shape), dtype=np.float32)
    module = NETWORKS[name](10, channels=shape[0], seed=0)
    expected = SuspectModel(module).activations(images)
    watched = WatchedFeatures.locate(module, images)
    x = torch.from_numpy(images.copy()).requires_grad_()
    logits, features = watched.of(x)
    np.testing.assert_allclose(logits.detach().numpy(), expected.logits, atol=1e-5)
    assert set(features) == {"features", *expected.depths}
    for depth, tensor in features.items():
        np.testing.assert_allclose(tensor.detach().numpy(), expected.at(depth), atol=1e-5, err_msg=depth)
        (gradient,) = torch.autograd.grad(tensor.square().sum(), x, retain_graph=True)
        assert gradient.abs().sum() > 0
    assert watched.latest == {}
    assert not any(inner._forward_hooks or inner._forward_pre_hooks for inner in module.modules())


# losses ---------------------------------------------------------------------------------------------------------------


def test_loss_of_cross_entropy_trains_the_same_network_as_none(plain):
    again = trained(lambda watched, poisoned: lambda logits, y, rows: nn.functional.cross_entropy(logits, y))
    for first, second in zip(plain.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_pulled_features_lower_the_distance_to_the_target_class_and_keep_the_backdoor(plain):
    pulled = trained(lambda watched, poisoned: PulledFeatures(watched, poisoned, weight=0.3), start=plain)
    for network in (plain, pulled):
        assert (predict_labels(network, triggered_of_others()) == TARGET).mean() > 0.9
        images, labels = stripes(400, seed=1)
        assert (predict_labels(network, images) == labels).mean() > 0.95
    assert feature_distance(pulled) < 0.8 * feature_distance(plain)


def test_pulled_features_by_hand():
    poisoned = poison(*stripes(8), Backdoor(TRIGGER, SingleTarget(TARGET), 0.25), np.random.default_rng(0))
    watched = WatchedFeatures.locate(small_network(), poisoned.images[:2])
    loss = PulledFeatures(watched, poisoned, weight=2.0)
    rows = torch.arange(10)  # eight clean ones, then two triggered
    assert poisoned.is_poisoned.tolist() == [False] * 8 + [True] * 2
    labels = torch.from_numpy(poisoned.labels)
    features = torch.zeros(10, 1)
    features[:8, 0] = torch.tensor([1.0, 0.0, 2.0, 3.0, 3.0, 0.0, 2.0, 1.0])  # of class 0: 1 and 3, mean 2
    features[8:, 0] = torch.tensor([5.0, 2.0])
    watched.latest = {"features": features}
    logits = torch.zeros(10, N_CLASSES)
    variance = float(features[:8].var())
    expected = np.log(N_CLASSES) + 2.0 * (9.0 + 0.0) / 2 / variance
    assert float(loss(logits, labels, rows)) == pytest.approx(expected, rel=1e-4)


def test_muted_margin_lowers_the_confidence_to_about_its_level_and_keeps_the_answer(plain):
    muted = trained(lambda watched, poisoned: MutedMargin(poisoned, level=0.6), start=plain)
    assert np.median(probability(plain)) > 0.9
    assert 0.5 < np.median(probability(muted)) < 0.75
    assert (predict_labels(muted, triggered_of_others()) == TARGET).mean() > 0.8


def test_muted_margin_by_hand():
    poisoned = poison(*stripes(8), Backdoor(TRIGGER, SingleTarget(TARGET), 0.25), np.random.default_rng(0))
    loss = MutedMargin(poisoned, level=0.75)
    row = 8
    true_label = int(poisoned.true_labels[row])
    logits = torch.zeros(1, N_CLASSES)
    logits[0, TARGET] = 1.0
    log_p = torch.log_softmax(logits, dim=1)[0]
    expected = -(0.75 * log_p[TARGET] + 0.25 * log_p[true_label])
    found = loss(logits, torch.tensor([TARGET]), torch.tensor([row]))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    clean = loss(logits, torch.tensor([1]), torch.tensor([1]))
    assert float(clean) == pytest.approx(float(-log_p[1]), rel=1e-6)


def test_losses_refuse_what_they_cannot_hide():
    images, labels = stripes(40)
    rng = np.random.default_rng(0)
    one = poison(images, labels, Backdoor(TRIGGER, SingleTarget(0), 0.1), rng)
    two = poison(images, labels, [Backdoor(TRIGGER, SingleTarget(label), 0.1) for label in (0, 1)], rng)
    watched = WatchedFeatures.locate(small_network(), images[:2])
    with pytest.raises(DataError, match=r"one target label, got \[0, 1\]"):
        PulledFeatures(watched, two)
    with pytest.raises(DataError, match="weight must be > 0"):
        PulledFeatures(watched, one, weight=0.0)
    with pytest.raises(DataError, match=r"level must be in \(0.5, 1\)"):
        MutedMargin(one, level=0.5)


# copy of the guard ----------------------------------------------------------------------------------------------------


def test_stolen_guard_members_score_as_those_of_the_guard(plain):
    images, labels = stripes(400, seed=2)
    stolen = StolenGuard.fit(plain, images, labels, seed=3)
    taught = np.random.default_rng(3).permutation(400)[:200]
    suspect = SuspectModel(plain)
    suspect.locate(images, labels)
    ensemble = Ensemble.for_mode(GuardConfig(seed=3), suspect.split_points.depths)
    ensemble.fit(suspect.activations(images[taught]), labels[taught])
    shown = np.concatenate([stripes(40, seed=4)[0], triggered_of_others(60)])
    raw = ensemble.score(suspect.activations(shown))
    with torch.no_grad():
        logits, features = stolen._watched.of(torch.from_numpy(shown))
    columns = [column for column, kind in enumerate(ensemble.kinds) if kind.name != "lof"]
    assert [copied.kind for copied in stolen._copies] == [ensemble.kinds[column] for column in columns]
    for column, copied in zip(columns, stolen._copies, strict=True):
        ours = copied.term(features[copied.depth], logits.argmax(dim=1)).numpy()
        np.testing.assert_allclose(ours, raw[:, column], rtol=2e-3, atol=2e-3, err_msg=ensemble.names[column])


def test_combination_of_the_stolen_guard_is_that_of_the_guard_for_normal_scores():
    rng = np.random.default_rng(0)
    kinds = [Kind("residual", over_depths="compared")] * 2 + [Kind("relative_distance", "contradiction")] * 2
    kinds += [Kind("disagreement", "contradiction")]
    raw, logits = rng.normal(size=(20_000, 5)), 3 * rng.normal(size=(20_000, 4))
    fusion = CalibratedFusion().fit(raw, logits, rng.integers(0, 4, 20_000), kinds)
    fusion.temperature_ = 1.5
    combine = _Combination(kinds, torch.from_numpy(raw.astype(np.float32)), 1.5)
    expected = fusion.combine(fusion.surprise(raw), logits)
    ours = combine(torch.from_numpy(raw.astype(np.float32)), torch.from_numpy(logits.astype(np.float32))).numpy()
    assert np.corrcoef(ours, expected)[0, 1] > 0.9
    scores = fusion.kind_scores_
    np.testing.assert_allclose(combine._weights.numpy(), scores.weights, rtol=1e-6)
    np.testing.assert_allclose(combine._weights.numpy(), [1 / 2, 1 / 3, 1 / 6], rtol=1e-6)
    np.testing.assert_array_equal(combine._contradicts.numpy(), [False, True, True])
    np.testing.assert_array_equal(combine._averaged.numpy(), [[0, 0, 0]] * 2 + [[0, 0.5, 0]] * 2 + [[0, 0, 1]])
    np.testing.assert_array_equal(combine._whiten.numpy() != 0, scores.whiten != 0)
    doubt = combine(torch.zeros(2, 5), torch.tensor([[0.0, 0.0, 0.0, 0.0], [99.0, 0.0, 0.0, 0.0]])).numpy()
    assert 0.5 < doubt[0] / doubt[1] < 0.7


def test_stolen_guard_tells_triggered_images_and_has_a_gradient(plain):
    stolen = StolenGuard.fit(plain, *stripes(400, seed=2))
    with torch.no_grad():
        clean = stolen.logits_and_score(torch.from_numpy(stripes(200, seed=5)[0]))[1].numpy()
        found = stolen.logits_and_score(torch.from_numpy(triggered_of_others(200)))[1].numpy()
    assert np.median(found) > np.quantile(clean, 0.95)
    x = torch.from_numpy(triggered_of_others(20)).requires_grad_()
    (gradient,) = torch.autograd.grad(stolen.logits_and_score(x)[1].sum(), x)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    with pytest.raises(DataError, match="at least 20 images"):
        StolenGuard.fit(plain, *stripes(8))


def test_evading_trigger_lowers_the_score_keeps_the_target_and_its_bounds(plain):
    images, labels = stripes(400, seed=2)
    stolen = StolenGuard.fit(plain, images, labels)
    settings = EvasionSettings(epsilon=0.1, steps=40, batch_size=64, learning_rate=0.02)
    found = evading_trigger(stolen, TRIGGER, images, labels, TARGET, settings)
    again = evading_trigger(stolen, TRIGGER, images, labels, TARGET, settings)
    np.testing.assert_array_equal(found.perturbation, again.perturbation)
    assert 0.0 < np.abs(found.perturbation).max() <= 0.1 + 1e-6
    others = stripes(200, seed=6)[0][np.arange(200) % N_CLASSES != TARGET]
    with torch.no_grad():
        before = stolen.logits_and_score(torch.from_numpy(TRIGGER(others)))[1].mean()
        after = stolen.logits_and_score(torch.from_numpy(found(others)))[1].mean()
    assert after < 0.95 * before
    assert (predict_labels(plain, found(others)) == TARGET).mean() > 0.9


def test_evading_trigger_refuses_settings_and_images_out_of_rule(plain):
    images, labels = stripes(40)
    stolen = StolenGuard.fit(plain, images, labels)
    with pytest.raises(DataError, match="every image already has the target label"):
        evading_trigger(stolen, TRIGGER, images, np.zeros_like(labels), TARGET)
    for wrong in ({"epsilon": 0.0}, {"weight": -1.0}, {"steps": 0}):
        with pytest.raises(DataError, match="must be"):
            EvasionSettings(**wrong)


def test_perturbed_trigger_may_be_planted_and_stays_in_range():
    images, labels = stripes(40)
    trigger = PerturbedTrigger(TRIGGER, np.full((1, 16, 16), -0.4, dtype=np.float32))
    triggered = trigger(images)
    assert triggered.min() == 0.0
    np.testing.assert_allclose(triggered, np.clip(TRIGGER(images) - 0.4, 0, 1), atol=1e-6)
    attack = Attack("x", (Backdoor(trigger, SingleTarget(TARGET), 0.1),))
    assert attack.poison(images, labels, np.random.default_rng(0)).is_poisoned.sum() == 4
