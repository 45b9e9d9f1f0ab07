from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from guard.errors import DataError
from guard.lab.attacks import Backdoor, SingleTarget, mnist_cnn, poison, single_pixel
from guard.lab.attacks.perturbation import PgdPerturbation


def linear(*rows):
    """A network of one layer without bias, with these weights; images are 1 x 1 x columns."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(len(rows[0]), len(rows), bias=False))
    with torch.no_grad():
        module[1].weight.copy_(torch.tensor(rows))
    return module


def grey(n, columns=3, value=0.5):
    return np.full((n, 1, 1, columns), value, dtype=np.float32)


def noisy(shape, seed=0):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def cross_entropy(network, images, labels):
    with torch.no_grad():
        return nn.functional.cross_entropy(
            network(torch.from_numpy(images)), torch.from_numpy(labels), reduction="none"
        ).numpy()


def test_pgd_linear_network_moves_to_the_corner_worked_out_by_hand():
    # Two classes: the gradient of the cross-entropy by the image is p(other) * (w_other - w_true), so its sign is that
    # of w_other - w_true = (-2, +3, 0) for label 0, and the opposite for label 1. One step of 2 epsilon reaches the
    # side of the box from anywhere in it; where the weights are the same, the random start stays.
    network = linear([1.0, -1.0, 4.0], [-1.0, 2.0, 4.0])
    perturb = PgdPerturbation(network, epsilon=0.1, step=0.2, steps=1)
    moved = perturb(grey(2), np.array([0, 1]))
    np.testing.assert_allclose(moved[:, 0, 0, :2], [[0.4, 0.6], [0.6, 0.4]], atol=1e-6)
    assert np.abs(moved[:, 0, 0, 2] - 0.5).max() < 0.1


def test_pgd_each_step_adds_the_sign_of_the_gradient():
    network = linear([1.0, -1.0], [-1.0, 2.0])
    arguments = {"epsilon": 0.5, "step": 0.01}
    images, labels = grey(20, columns=2), np.zeros(20, dtype=np.int64)
    after = [PgdPerturbation(network, **arguments, steps=steps)(images, labels) for steps in (1, 2, 3)]
    inside = (np.abs(after[2] - 0.5) < 0.499).all(axis=(1, 2, 3)) & (after[2] > 0).all(axis=(1, 2, 3))
    assert inside.sum() > 15
    for entry, other in pairwise(after):
        np.testing.assert_allclose((other - entry)[inside, 0, 0], np.tile([-0.01, 0.01], (inside.sum(), 1)), atol=1e-6)


def test_pgd_start_is_uniform_in_the_box():
    # Equal weights: no gradient, no step. What is left is the start.
    perturb = PgdPerturbation(linear([1.0] * 4, [1.0] * 4), epsilon=0.1, step=0.05, steps=3)
    away = perturb(grey(2000, columns=4), np.zeros(2000, dtype=np.int64)) - 0.5
    assert np.abs(away).max() <= 0.1 + 1e-6
    assert abs(away.mean()) < 5 * 0.1 / 3**0.5 / 8000**0.5
    assert away.std() == pytest.approx(0.1 / 3**0.5, rel=0.05)


def test_pgd_stays_within_epsilon_and_the_unit_interval():
    network = linear([1.0, -1.0], [-1.0, 1.0])
    images = np.array([[[[0.0, 1.0]]], [[[0.02, 0.97]]], [[[0.5, 0.5]]]], dtype=np.float32)
    moved = PgdPerturbation(network, epsilon=0.1, step=0.03, steps=10)(images, np.zeros(3, dtype=np.int64))
    np.testing.assert_allclose(moved[:, 0, 0], [[0.0, 1.0], [0.0, 1.0], [0.4, 0.6]], atol=1e-6)


def test_pgd_raises_the_cross_entropy_of_a_deep_network_more_with_more_epsilon():
    network = mnist_cnn(seed=0)
    images = noisy((12, 1, 28, 28))
    with torch.no_grad():
        labels = network.eval()(torch.from_numpy(images)).argmax(dim=1).numpy()
    losses = [cross_entropy(network, images, labels)]
    for epsilon in (0.02, 0.1):
        moved = PgdPerturbation(network, epsilon=epsilon, step=epsilon / 4)(images, labels)
        assert np.abs(moved - images).max() <= epsilon + 1e-6
        assert 0.0 <= moved.min() <= moved.max() <= 1.0
        losses.append(cross_entropy(network, moved, labels))
    assert (losses[1] > losses[0]).all()
    assert (losses[2] > losses[1]).all()


def test_pgd_result_is_float32_new_and_repeatable_and_input_is_unchanged():
    network = mnist_cnn(seed=0)
    images, labels = noisy((5, 1, 28, 28)), np.arange(5)
    images.setflags(write=False)
    labels.setflags(write=False)
    before = images.copy()
    perturb = PgdPerturbation(network, steps=2)
    entry, again = perturb(images, labels), perturb(images, labels)
    other = PgdPerturbation(network, steps=2, seed=1)(images, labels)
    assert entry.dtype == np.float32
    assert not np.shares_memory(entry, images)
    np.testing.assert_array_equal(entry, again)
    assert not np.array_equal(entry, other)
    np.testing.assert_array_equal(images, before)
    assert perturb(images[:0], labels[:0]).shape == (0, 1, 28, 28)


def test_pgd_batches_give_the_same_as_one_pass():
    network = linear([1.0, -1.0, 0.5], [-1.0, 2.0, 0.1])
    images, labels = noisy((11, 1, 1, 3)), np.arange(11) % 2
    whole, parts = (PgdPerturbation(network, steps=3, batch_size=size)(images, labels) for size in (250, 4))
    np.testing.assert_allclose(whole, parts, atol=1e-6)


def test_pgd_leaves_network_and_global_random_state_as_they_were():
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(3 * 26 * 26, 4)
    )
    network[1].eval()  # a mixture of modes
    network[4].bias.grad = torch.ones(4)
    seen = []
    network[2].register_forward_hook(lambda module, *_: seen.append(module.training))
    state = {name: value.clone() for name, value in network.state_dict().items()}
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    PgdPerturbation(network, steps=2)(noisy((3, 1, 28, 28)), np.arange(3))
    assert seen == [False, False]
    assert [module.training for module in network] == [True, False, True, True, True]
    assert network.training
    assert network[4].bias.grad.tolist() == [1.0] * 4
    assert network[0].weight.grad is None
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), torch_before)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_before)


def test_pgd_works_without_gradients_switched_on_and_with_frozen_weights():
    network = linear([1.0, -1.0], [-1.0, 1.0]).requires_grad_(False)
    with torch.no_grad():
        moved = PgdPerturbation(network, epsilon=0.1, step=0.2, steps=1)(grey(1, columns=2), np.array([0]))
    np.testing.assert_allclose(moved[0, 0, 0], [0.4, 0.6], atol=1e-6)


def test_pgd_label_that_the_network_does_not_have_raises_and_modes_are_restored():
    network = linear([1.0, -1.0], [-1.0, 1.0]).train()
    with pytest.raises(DataError, match=r"labels must be below 2, as the network has it, got 2\."):
        PgdPerturbation(network)(grey(2, columns=2), np.array([0, 2]))
    assert network[1].training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon must be in \(0, 1\]"),
        ({"epsilon": 1.01}, r"epsilon must be in \(0, 1\]"),
        ({"epsilon": float("nan")}, r"epsilon must be in \(0, 1\]"),
        ({"step": 0.0}, "step > 0"),
        ({"step": float("nan")}, "step > 0"),
        ({"steps": 0}, "steps and batch_size must be >= 1"),
        ({"batch_size": 0}, "steps and batch_size must be >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_pgd_parameter_out_of_range_raises(changes, message):
    with pytest.raises(DataError, match=message):
        PgdPerturbation(linear([1.0], [2.0]), **changes)


def test_pgd_parameters_at_the_edge_are_taken():
    perturb = PgdPerturbation(linear([1.0], [2.0]), epsilon=1.0, step=2.0, steps=1, batch_size=1, seed=0)
    assert perturb(grey(2, columns=1), np.array([0, 1])).ravel().tolist() == [1.0, 0.0]


def test_pgd_in_a_backdoor_perturbs_the_picked_images_before_the_trigger():
    network = mnist_cnn(seed=0)
    images, labels = noisy((40, 1, 28, 28)) * np.float32(0.5), np.arange(40) % 4
    perturb = PgdPerturbation(network, epsilon=0.05, steps=2)
    backdoor = Backdoor(single_pixel, SingleTarget(1), 0.1, clean_label=True, perturb=perturb)
    poisoned = poison(images, labels, backdoor, np.random.default_rng(0), how="replace")
    rows = poisoned.source_rows[poisoned.is_poisoned]
    assert labels[rows].tolist() == [1] * 4
    np.testing.assert_array_equal(poisoned.images[rows], single_pixel(perturb(images[rows], labels[rows])))
    assert cross_entropy(network, poisoned.images[rows], labels[rows]).mean() > (
        cross_entropy(network, single_pixel(images[rows]), labels[rows]).mean()
    )
