"""Purified twins: what each method removes, that the given network stays as it is, and that bad input is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from guard.backups.anp import AnpSettings, learn_masks
from guard.backups.augmentation import Augmentation
from guard.backups.backup_training import FitSettings, Traffic, copy_network, fit_network, predict_logits
from guard.backups.clean_set import CleanSet
from guard.backups.last_layer import LastLayerSettings
from guard.backups.pruning import FinePruningSettings, NormPruningSettings
from guard.backups.purified_twin import METHODS, Probe, purify
from guard.backups.units import find_unit_layers, silence
from guard.errors import ConfigError, DataError, SuspectModelError
from guard.suspect.digest import weights_digest
from guard.suspect.model import SuspectModel

N_CLASSES = 3
QUICK = FitSettings(epochs=2, patience=2)
QUICK_SETTINGS = {
    "anp": AnpSettings(iterations=5),
    "norm-pruning": NormPruningSettings(share=0.25, fine_tuning=QUICK),
    "fine-pruning": FinePruningSettings(fine_tuning=QUICK),
    "rtll": LastLayerSettings(epochs=5),
}


class Tiny(nn.Module):
    """Two convolutions, with batch normalisation or without, and two fully connected layers, for 8 x 8 images."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv2 = nn.Conv2d(6, 4, 3, stride=2)
        self.norm2 = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.fc1 = nn.Linear(36, 8)
        self.fc2 = nn.Linear(8, N_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm1(self.conv1(images)))
        x = torch.relu(self.norm2(self.conv2(x)))
        return self.fc2(torch.relu(self.fc1(x.flatten(1))))


def tiny(norm: bool = True) -> Tiny:
    torch.manual_seed(0)
    return Tiny(norm).eval()


def bands(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """One bright band per class on noise, (n, 1, 8, 8)."""
    labels = np.arange(n) % N_CLASSES
    images = np.random.default_rng(seed).random((n, 1, 8, 8), dtype=np.float32) * 0.5
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * label + 1 : 2 * label + 3] += 0.5
    return images, labels


@pytest.fixture(scope="module")
def trained() -> Tiny:
    network = tiny()
    clean = CleanSet.split(*bands(120), N_CLASSES, 0)
    fit_network(network, clean, FitSettings(epochs=12, learning_rate=1e-2, augmentation=None), seed=0)
    return network


# --- the contract of all methods


@pytest.mark.parametrize("method", METHODS)
def test_purify_keeps_the_network_and_repeats_itself(method, trained):
    before, mode = weights_digest(trained), trained.training
    images, labels = bands(60)
    copy_of_images = images.copy()
    first, again = (purify(trained, images, labels, method, settings=QUICK_SETTINGS[method]) for _ in range(2))
    assert weights_digest(trained) == before == first.report.suspect_digest
    assert trained.training is mode
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in trained.modules())
    np.testing.assert_array_equal(images, copy_of_images)
    assert weights_digest(first.twin) == weights_digest(again.twin) == first.report.twin_digest
    assert not first.twin.training


@pytest.mark.parametrize("method", METHODS)
def test_purify_report_is_json_and_counts(method, trained):
    images, labels = bands(60)
    probe = Probe(images, np.zeros(60, dtype=np.int64))
    report = purify(
        trained, images, labels, method, settings=QUICK_SETTINGS[method], probes={"first_class": probe}
    ).report
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["method"] == method
    assert (report.images, report.held_out) == (48, 12)
    assert len(report.per_class_before) == len(report.per_class_after) == N_CLASSES
    assert report.clean_accuracy_after == pytest.approx(np.mean(report.per_class_after))  # equally many of each
    assert set(report.probes_before) == set(report.probes_after) == {"first_class"}
    for point in report.curve:
        assert set(point.measured) == {"clean_accuracy", "first_class"}
    if report.curve:
        assert report.curve[0].pruned == 0
        assert report.curve[0].measured["clean_accuracy"] == report.clean_accuracy_before
        assert all(a.pruned <= b.pruned for a, b in zip(report.curve, report.curve[1:], strict=False))


# --- adversarial neuron pruning


def test_anp_masks_are_on_batch_norm_and_leave_the_biases(trained):
    images, labels = bands(60)
    twin = purify(trained, images, labels, "anp", settings=AnpSettings(iterations=3, threshold=1.0)).twin
    changed = {
        name for name, tensor in twin.state_dict().items() if not torch.equal(tensor, trained.state_dict()[name])
    }
    assert changed <= {"norm1.weight", "norm2.weight"}
    assert changed


def test_anp_without_batch_norm_falls_back_and_says_so():
    images, labels = bands(60)
    done = purify(tiny(norm=False), images, labels, "anp", settings=AnpSettings(iterations=3))
    assert done.report.units == 6 + 4 + 8
    assert "no batch normalisation" in done.report.notes[0]


def test_anp_masks_stay_in_range_and_first_step_follows_the_gradient():
    network = tiny(norm=False)
    images, labels = bands(60)
    clean = CleanSet.split(images, labels, N_CLASSES, 0)
    settings = AnpSettings(iterations=1, alpha=1.0, momentum=0.0, learning_rate=0.05, batch_size=8, augmentation=None)
    from guard.backups.anp import _find_neurons

    neurons, _ = _find_neurons(network, images)
    masks = learn_masks(network, neurons, clean, settings, 0, lambda _share: None)
    rows = torch.randint(len(clean.images), (8,), generator=torch.Generator().manual_seed(0))
    scale = torch.ones(6, requires_grad=True)  # by hand, for the first convolution
    x = torch.tensor(clean.images)[rows]
    weight = network.conv1.weight.detach() * scale[:, None, None, None]
    y = torch.relu(torch.nn.functional.conv2d(x, weight, network.conv1.bias, padding=1))
    logits = network.fc2(torch.relu(network.fc1(torch.relu(network.conv2(y)).flatten(1))))
    torch.nn.functional.cross_entropy(logits, torch.tensor(clean.labels)[rows]).backward()
    expected = (1 - 0.05 * scale.grad).clamp(0, 1)
    np.testing.assert_allclose(masks[0], expected.numpy(), rtol=1e-5)
    assert all(((mask >= 0) & (mask <= 1)).all() for mask in masks)


def test_anp_learns_masks_on_statistics_of_the_batch_and_leaves_the_stored_ones(trained):
    from guard.backups.anp import _find_neurons

    network, (images, labels) = copy_network(trained), bands(60)
    norm = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    with torch.no_grad():
        norm.running_mean += 1000.0  # a network that only the batch's own statistics can save
    before, seen = weights_digest(network), []
    handle = norm.register_forward_hook(lambda _layer, _args, output: seen.append(float(output.detach().abs().max())))
    neurons, _ = _find_neurons(network, images)
    settings = AnpSettings(iterations=2, batch_size=16)
    learn_masks(network, neurons, CleanSet.split(images, labels, N_CLASSES, 0), settings, 0, lambda _share: None)
    handle.remove()
    assert max(seen) < 100
    assert weights_digest(network) == before
    assert (norm.training, norm.momentum) == (False, 0.1)


def test_anp_pushes_every_neuron_from_a_random_place_and_stays_in_the_box(trained, monkeypatch):
    from guard.backups import anp

    pushes, call = [], anp.functional_call

    def watch(module, changed, args):
        fixed = dict(module.named_parameters())
        pushes.append({name: ((value / fixed[name]) - 1.0).detach() for name, value in changed.items()})
        return call(module, changed, args)

    monkeypatch.setattr(anp, "functional_call", watch)
    network, (images, labels) = copy_network(trained), bands(60)
    neurons, _ = anp._find_neurons(network, images)
    clean = CleanSet.split(images, labels, N_CLASSES, 0)
    learn_masks(network, neurons, clean, AnpSettings(iterations=1, epsilon=0.25), 0, lambda _share: None)
    start, pushed, alone = pushes
    assert len(start) == len(pushed) == 4
    for name in start:
        assert 0.0 < start[name].abs().max() <= 0.2501
        assert len(start[name].unique()) == len(start[name])
        assert pushed[name].abs().max() <= 0.2501
        moved = (pushed[name] - start[name]).abs()
        assert ((moved - 0.25).abs() < 1e-4).logical_or((pushed[name].abs() - 0.25).abs() < 1e-4).all()
    assert all(not push.any() for push in alone.values())


def test_anp_threshold_of_none_keeps_the_clean_accuracy(trained):
    images, labels = bands(60)
    settings = AnpSettings(iterations=30, threshold=None, allowed_accuracy_loss=0.0)
    report = purify(trained, images, labels, "anp", settings=settings).report
    assert report.clean_accuracy_after >= report.clean_accuracy_before
    assert report.notes[-1].startswith("The threshold was chosen")


# --- pruning by norm and by activation, and the last layer


def test_unit_layers_come_in_order_with_their_batch_norm():
    layers, last = find_unit_layers(tiny(), bands(6)[0])
    assert [(layer.name, layer.norm, layer.units) for layer in layers] == [
        ("conv1", "norm1", 6),
        ("conv2", "norm2", 4),
        ("fc1", "", 8),
    ]
    assert last.name == "fc2"


def test_silenced_unit_says_nothing_any_more():
    network = tiny()
    layers, _ = find_unit_layers(network, bands(6)[0])
    keep = silence(network, layers[0], [2])
    assert not network.norm1(network.conv1(torch.rand(2, 1, 8, 8)))[:, 2].any()
    assert set(keep) == {"conv1.weight", "conv1.bias", "norm1.weight", "norm1.bias"}


@pytest.mark.parametrize(
    ("scope", "expected"), [("layer-wise", [3, 2, 4]), ("global", [5, 0, 4]), ("last-layer", [0, 2, 0])]
)
def test_norm_pruning_takes_the_smallest_of_its_scope(scope, expected):
    network = tiny(norm=False)
    with torch.no_grad():  # by hand: all filters of conv1 are small, those of conv2 large
        for scale, layer in zip((0.01, 1.0, 0.1), (network.conv1, network.conv2, network.fc1), strict=True):
            for unit in range(len(layer.weight)):
                layer.weight[unit] = scale * (1 + unit / 100)
    images, labels = bands(60)
    settings = NormPruningSettings(scope=scope, share=0.5, fine_tuning=None)
    twin = purify(network, images, labels, "norm-pruning", settings=settings).twin
    silent = [int((layer.weight.flatten(1) == 0).all(1).sum()) for layer in (twin.conv1, twin.conv2, twin.fc1)]
    if scope == "global":
        expected = [5, 0, 3]  # 9 of 18 are asked for: all 6 of conv1, of which one stays, and 3 of fc1
    assert silent == expected


@pytest.mark.parametrize(("method", "learns"), [("norm-pruning", True), ("fine-pruning", False)])
def test_statistics_are_learned_anew_only_where_much_of_the_network_went(trained, method, learns):
    twin = purify(trained, *bands(60), method, settings=QUICK_SETTINGS[method]).twin
    same = [
        torch.equal(after, before)
        for (name, after), before in zip(twin.named_buffers(), trained.buffers(), strict=True)
        if name.endswith(("running_mean", "running_var"))
    ]
    assert len(same) == 4
    assert not any(same) if learns else all(same)


def test_pruned_units_stay_away_while_fine_tuning(trained):
    images, labels = bands(60)
    settings = NormPruningSettings(scope="last-layer", share=0.5, fine_tuning=QUICK)
    twin = purify(trained, images, labels, "norm-pruning", settings=settings).twin
    silent = (twin.conv2.weight.flatten(1) == 0).all(1)
    assert int(silent.sum()) == 2
    assert not twin.norm2.weight[silent].any()
    assert not torch.equal(twin.conv2.weight[~silent], trained.conv2.weight[~silent])  # the others did learn


def test_fine_pruning_takes_the_most_silent_first(trained):
    images, labels = bands(60)
    settings = FinePruningSettings(allowed_accuracy_loss=0.99, fine_tuning=None)
    report = purify(trained, images, labels, "fine-pruning", settings=settings).report
    assert report.pruned == 3  # one is always left
    strict = FinePruningSettings(allowed_accuracy_loss=0.0, fine_tuning=None)
    report = purify(trained, images, labels, "fine-pruning", settings=strict).report
    assert report.clean_accuracy_after >= report.clean_accuracy_before


def test_rtll_changes_the_last_layer_alone(trained):
    images, labels = bands(60)
    twin = purify(trained, images, labels, "rtll").twin
    state, before = twin.state_dict(), trained.state_dict()
    assert {name for name in state if not torch.equal(state[name], before[name])} == {"fc2.weight", "fc2.bias"}


def test_rtll_takes_the_backdoor_from_a_real_network(badnet, clean_split, triggered):
    asr = Probe(triggered.images, triggered.labels)
    settings = LastLayerSettings(epochs=30)
    report = purify(badnet, *clean_split.validation, "rtll", settings=settings, probes={"attack": asr}).report
    assert report.probes_before["attack"] > 0.9
    assert report.probes_after["attack"] < report.probes_before["attack"]
    assert report.clean_accuracy_after > report.clean_accuracy_before - 0.03


# --- training


def test_fit_network_gives_the_best_epoch_and_leaves_the_random_state():
    network, state = tiny(), torch.get_rng_state()
    clean = CleanSet.split(*bands(120), N_CLASSES, 0)
    done = fit_network(network, clean, FitSettings(epochs=30, learning_rate=1e-2, augmentation=None), seed=0)
    assert done.held_out_accuracy > 0.9
    assert 1 <= done.best_epoch <= done.epochs_run <= 30
    assert torch.equal(torch.get_rng_state(), state)
    right = predict_logits(network, clean.held_out_images).argmax(1) == clean.held_out_labels
    assert right.mean() == done.held_out_accuracy


def test_fit_network_distils_from_traffic():
    images, labels = bands(300, seed=1)
    few = CleanSet.split(*bands(15), N_CLASSES, 0)
    traffic = Traffic(images, np.eye(N_CLASSES, dtype=np.float32)[labels] * 8)
    settings = FitSettings(epochs=15, patience=15, learning_rate=1e-2, augmentation=None)
    alone, taught = tiny(), tiny()
    fit_network(alone, few, settings, seed=0)
    fit_network(taught, few, settings, seed=0, traffic=traffic)
    x, y = bands(90, seed=2)
    assert (predict_logits(taught, x).argmax(1) == y).mean() >= (predict_logits(alone, x).argmax(1) == y).mean()


def test_fit_network_that_diverges_says_so_and_leaves_finite_weights():
    network = tiny()
    clean = CleanSet.split(*bands(60), N_CLASSES, 0)
    with pytest.raises(DataError, match="diverged"):
        fit_network(network, clean, FitSettings(learning_rate=1e30, augmentation=None), seed=0)
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())


def test_augmentation_keeps_shape_repeats_itself_and_can_be_switched_off():
    images = torch.tensor(bands(12)[0])
    draws = [Augmentation(flip=True)(images, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert draws[0].shape == images.shape
    assert torch.isfinite(draws[0]).all()
    assert torch.equal(*draws)
    off = Augmentation(rotation=0, scale=0, shift=0, contrast=0, erase=0, noise=0)
    torch.testing.assert_close(off(images, torch.Generator()), images, atol=1e-5, rtol=1e-5)


def test_copy_of_a_watched_network_leaves_the_watch_behind(trained):
    suspect, seen = SuspectModel(trained), []
    suspect.locate(bands(6)[0])
    with suspect.watch(lambda activations, _inputs: seen.append(len(activations))):
        twin = copy_network(trained)
        twin(torch.zeros(2, 1, 8, 8))
        assert seen == []
        trained(torch.zeros(2, 1, 8, 8))
        assert seen == [2]


# --- bad input


def _few_of_one_class() -> tuple[np.ndarray, np.ndarray]:
    images, labels = bands(60)
    kept = np.flatnonzero((labels != 1) | (np.arange(60) < 12))
    return images[kept], labels[kept]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_few_of_one_class(), r"every one of the 3 classes needs at least 5 clean images, class 1 has 4\. Add"),
        ((bands(60)[0], bands(60)[1] + 1), r"labels must be in \[0, 3\), got 1 to 3"),
        ((bands(60)[0], bands(60)[1][:-1]), r"labels must be integers of shape \(60,\)"),
        ((bands(60)[0], bands(60)[1] * 1.0), "labels must be integers"),
        ((bands(60)[0].astype(np.float64), bands(60)[1]), "images must be float32"),
        ((bands(60)[0] * np.nan, bands(60)[1]), "image 0 holds NaN"),
    ],
)
def test_purify_refuses_images_or_labels_that_break_a_rule(data, message):
    with pytest.raises(DataError, match=message):
        purify(tiny(), *data)


def test_purify_refuses_an_unknown_method_and_settings_of_another():
    images, labels = bands(60)
    with pytest.raises(ConfigError, match=r"there is no method 'norm-prune'\. Did you mean 'norm-pruning'\?"):
        purify(tiny(), images, labels, "norm-prune")
    with pytest.raises(ConfigError, match="method 'rtll' takes LastLayerSettings as its settings, got AnpSettings"):
        purify(tiny(), images, labels, "rtll", settings=AnpSettings())
    with pytest.raises(DataError, match="no probe can be named 'clean_accuracy'"):
        purify(tiny(), images, labels, probes={"clean_accuracy": Probe(images, labels)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AnpSettings(epsilon=0), "epsilon and learning_rate must be > 0"),
        (lambda: AnpSettings(alpha=1.1), r"alpha must be in \[0, 1\]"),
        (lambda: AnpSettings(momentum=1.0), r"momentum in \[0, 1\)"),
        (lambda: AnpSettings(iterations=0), "iterations must be >= 1"),
        (lambda: AnpSettings(threshold=1.1), r"threshold must be in \[0, 1\]"),
        (lambda: NormPruningSettings(share=1.0), r"share must be in \[0, 1\), got 1.0"),
        (lambda: NormPruningSettings(norm="l3"), "norm must be one of l1, l2"),  # type: ignore[arg-type]
        (lambda: FinePruningSettings(allowed_accuracy_loss=1.0), r"allowed_accuracy_loss must be in \[0, 1\)"),
        (lambda: LastLayerSettings(epochs=0), "epochs and batch_size must be >= 1"),
        (lambda: FitSettings(epochs=0), "epochs, patience and batch_size must be >= 1"),
        (lambda: FitSettings(learning_rate=0), "learning_rate must be > 0"),
        (lambda: Augmentation(noise=-1), "noise must be >= 0"),
        (lambda: Augmentation(erase=1.5), r"erase must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(DataError, match=message):
        make()


def test_anp_that_diverges_says_so():
    network = tiny(norm=False)
    with torch.no_grad():
        network.fc2.weight.fill_(float("inf"))
    with pytest.raises(DataError, match="adversarial pruning diverged in iteration 1"):
        purify(network, *bands(60), "anp", settings=AnpSettings(iterations=2))


def test_last_layer_that_diverges_says_so_and_leaves_the_network(trained):
    before = weights_digest(trained)
    with pytest.raises(DataError, match="training diverged in epoch"):
        purify(trained, *bands(60), "rtll", settings=LastLayerSettings(learning_rate=3e37))
    assert weights_digest(trained) == before


def test_network_with_one_layer_cannot_be_pruned():
    images, labels = bands(60)
    with pytest.raises(SuspectModelError, match="two or more"):
        purify(nn.Sequential(nn.Flatten(), nn.Linear(64, N_CLASSES)), images, labels, "norm-pruning")


def test_rtll_refuses_a_network_that_ends_in_a_convolution():
    ends = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, N_CLASSES, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(SuspectModelError, match="rtll needs a fully connected last layer"):
        purify(ends, *bands(60), "rtll")


def test_purify_takes_a_network_whose_logits_are_in_a_tuple(trained):
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = trained

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, int]:
            return self.inner(images), 0

    done = purify(Pair(), *bands(60), "anp", settings=dataclasses.replace(QUICK_SETTINGS["anp"], batch_size=16))
    assert done.report.units == 10
