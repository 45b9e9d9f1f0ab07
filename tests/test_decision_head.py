"""The replacement decision head: learns, repeats itself, disturbs nobody, and refuses what it cannot use."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from guard.detection.heads import decision_head, head_training
from guard.detection.heads.decision_head import DecisionHead
from guard.detection.heads.head_training import hidden_widths, portions_of_heads, train_heads
from guard.errors import DataError, NotFittedError


def blobs(n: int, seed: int = 0, n_classes: int = 4, width: int = 6):
    """Well separated classes, with features of very different sizes and offsets."""
    centres = np.random.default_rng(9).normal(0, 4, (n_classes, width))
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % n_classes
    features = centres[labels] + rng.normal(size=(n, width))
    return (features * 10.0 ** np.arange(-2, width - 2) + 3).astype(np.float32), labels


@pytest.fixture(scope="module")
def head() -> DecisionHead:
    return DecisionHead().fit(*blobs(400), 4)


def test_head_learns_a_separable_problem(head):
    features, labels = blobs(400, seed=1)
    logits = head.logits(features)
    assert logits.shape == (400, 4)
    assert logits.dtype == np.float32
    assert (logits.argmax(axis=1) == labels).mean() > 0.99


def test_head_fit_returns_itself():
    head = DecisionHead(max_epochs=1)
    assert head.fit(*blobs(40), 4) is head


def test_head_same_seed_gives_equal_weights_and_another_seed_others(head):
    again, other = DecisionHead().fit(*blobs(400), 4), DecisionHead(seed=1).fit(*blobs(400), 4)
    for name, array in head.state().items():
        np.testing.assert_array_equal(again.state()[name], array, strict=True)
    assert (other.state()["weight_1"] != head.state()["weight_1"]).any()


@pytest.mark.parametrize("noise_std", [0.0, 0.5])
def test_head_fit_leaves_the_global_generators_alone(noise_std):
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    DecisionHead(max_epochs=2, noise_std=noise_std).fit(*blobs(60), 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)


@pytest.mark.parametrize("settings", [{}, {"noise_std": 0.2}, {"stops_early": False}, {"batch_size": 50}], ids=str)
def test_heads_trained_together_are_those_trained_alone(settings):
    """Parts of several sizes: with other last batches, other numbers of batches, and other epochs to stop at."""
    features, labels = blobs(400)
    parts = [np.arange(400), np.arange(37, 400), np.arange(0, 400, 2), np.arange(120), np.arange(399, 99, -1)]
    labels = np.where(np.arange(400) == 36, -1, labels)  # of a row that most parts leave out
    head = DecisionHead(max_epochs=20, **settings)
    with pytest.raises(DataError, match="labels must be in"):
        head.fit_parts(features, labels, 4, parts)
    parts = [rows[rows != 36] for rows in parts]
    for rows, together in zip(parts, head.fit_parts(features, labels, 4, parts), strict=True):
        alone = DecisionHead(max_epochs=20, **settings).fit(features[rows], labels[rows], 4)
        np.testing.assert_allclose(together.logits(features), alone.logits(features), rtol=1e-3, atol=1e-3)
        assert (together.batch_size, together.noise_std) == (head.batch_size, head.noise_std)


def test_head_gradients_are_those_of_autograd(monkeypatch):
    caught = []
    gradients = head_training._gradients

    def watched(runs, weights, features, targets, batch, noise_std):
        found = gradients(runs, weights, features, targets, batch, noise_std)
        if len({len(rows) for rows in batch}) == 1:
            for place, (run, rows) in enumerate(zip(runs, batch, strict=True)):
                own = [layer[place].clone().requires_grad_() for layer in weights]
                logits = head_training._forward((features[rows] - run.mean) / run.scale, own)
                expected = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, targets[rows]), own)
                caught.append(max(float((a[place] - b).abs().max()) for a, b in zip(found, expected, strict=True)))
        return found

    monkeypatch.setattr(head_training, "_gradients", watched)
    DecisionHead(max_epochs=3).fit_parts(*blobs(300), 4, [np.arange(290), np.arange(10, 300), np.arange(298)])
    assert len(caught) == 3 * 3 * 2  # epochs, heads, batches
    assert max(caught) < 1e-6


@pytest.mark.parametrize(
    ("n_heads", "n_features", "n_classes", "sizes"),
    [(11, 512, 10, [5, 6]), (21, 16, 10, [10, 11]), (11, 2048, 43, [1] * 11), (1, 4, 2, [1])],
)
def test_portions_of_heads_fit_the_cache(n_heads, n_features, n_classes, sizes):
    portions = portions_of_heads(n_heads, n_features, n_classes)
    assert [len(portion) for portion in portions] == sizes
    assert [place for portion in portions for place in portion] == list(range(n_heads))


@pytest.mark.parametrize("fails", [False, True])
def test_head_fit_trains_on_one_thread_and_restores_the_number(monkeypatch, fails):
    before = torch.get_num_threads()
    seen = []
    train = head_training._train_in_step

    def watched(*arguments):
        seen.append(torch.get_num_threads())
        if fails:
            raise RuntimeError
        return train(*arguments)

    monkeypatch.setattr(head_training, "_train_in_step", watched)
    try:
        torch.set_num_threads(2)
        if fails:
            with pytest.raises(RuntimeError):
                DecisionHead(max_epochs=1).fit(*blobs(40), 4)
        else:
            DecisionHead(max_epochs=1).fit(*blobs(40), 4)
        assert seen == [1]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("n_features", "n_classes", "widths"),
    [
        (512, 10, (144, 72)),  # 2 sqrt(5120) = 143.1
        (512, 43, (304, 152)),  # 296.8
        (2, 2, (32, 32)),  # 4, and at least 32
        (64, 10, (48, 32)),  # 50.6
        (2048, 1283, (512, 256)),  # 3242, and at most 512
    ],
)
def test_hidden_widths_by_hand(n_features, n_classes, widths):
    assert hidden_widths(n_features, n_classes) == widths


def test_head_layers_have_the_widths(head):
    shapes = {name: array.shape for name, array in head.state().items()}
    first, second = hidden_widths(6, 4)
    assert shapes == {
        "weight_1": (6, first),
        "bias_1": (first,),
        "weight_2": (first, second),
        "bias_2": (second,),
        "weight_3": (second, 4),
        "bias_3": (4,),
    }


def test_head_with_standardisation_folded_in_equals_standardising_first(monkeypatch):
    caught = []

    def watched(*arguments):
        (weights,) = trained = train_heads(*arguments)
        caught.extend(tensor.numpy().astype(np.float64) for tensor in weights)
        return trained

    monkeypatch.setattr(decision_head, "train_heads", watched)
    features, labels = blobs(400)
    logits = DecisionHead().fit(features, labels, 4).logits(features)
    first, bias_1, second, bias_2, third, bias_3 = caught
    exact = features.astype(np.float64)
    hidden = np.maximum((exact - exact.mean(axis=0)) / exact.std(axis=0) @ first + bias_1, 0)
    expected = np.maximum(hidden @ second + bias_2, 0) @ third.T + bias_3
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-3)


def test_head_does_not_care_for_the_unit_of_a_feature():
    features, labels = blobs(200)
    unit = 2.0 ** np.array([5, -3, 0, 8, -6, 1], dtype=np.float32)  # exact in floating point
    plain = DecisionHead().fit(features, labels, 4).logits(features)
    scaled = DecisionHead().fit(features * unit, labels, 4).logits(features * unit)
    np.testing.assert_allclose(scaled, plain, rtol=1e-4, atol=1e-4)


def test_head_float64_features_equal_float32(head):
    features, labels = blobs(400)
    other = DecisionHead().fit(features.astype(np.float64), labels, 4)
    np.testing.assert_array_equal(other.logits(features.astype(np.float64)), head.logits(features))


def test_head_noise_changes_what_is_learned_and_still_learns(head):
    features, labels = blobs(400)
    noisy = DecisionHead(noise_std=0.5).fit(features, labels, 4)
    assert (noisy.state()["weight_1"] != head.state()["weight_1"]).any()
    assert (noisy.logits(features).argmax(axis=1) == labels).mean() > 0.95


def test_head_batch_equals_single(head):
    features, _ = blobs(20)
    single = np.concatenate([head.logits(features[row : row + 1]) for row in range(20)])
    np.testing.assert_allclose(head.logits(features), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("labels", [[0], [0, 1, 2], [0] * 9 + [1], [2, 2, 2, 2]])
def test_head_tiny_and_missing_classes_are_fitted(labels):
    features = np.random.default_rng(0).normal(size=(len(labels), 5)).astype(np.float32)
    logits = DecisionHead().fit(features, np.array(labels), 3).logits(features)
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits.argmax(axis=1), labels)


@pytest.mark.parametrize("value", [0.0, 7.0, -1e6, 1e-20])
def test_head_constant_features_do_no_harm(value):
    features, labels = blobs(200)
    features[:, 2] = value
    logits = DecisionHead().fit(features, labels, 4).logits(features)
    assert np.isfinite(logits).all()
    assert (logits.argmax(axis=1) == labels).mean() > 0.99


def test_head_all_features_constant_stays_finite():
    logits = DecisionHead().fit(np.full((30, 3), 5.0, dtype=np.float32), np.arange(30) % 2, 2).logits(np.ones((1, 3)))
    assert np.isfinite(logits).all()


def test_head_fit_leaves_its_input_alone():
    features, labels = blobs(60)
    before = features.copy(), labels.copy()
    DecisionHead(max_epochs=2, noise_std=0.1).fit(features, labels, 4).logits(features)
    np.testing.assert_array_equal(features, before[0])
    np.testing.assert_array_equal(labels, before[1])


def test_head_state_roundtrip_gives_equal_logits(head):
    features, _ = blobs(30)
    restored = DecisionHead.from_state({name: array.copy() for name, array in head.state().items()})
    np.testing.assert_array_equal(restored.logits(features), head.logits(features))


def test_head_unfitted_raises_not_fitted_error():
    with pytest.raises(NotFittedError, match=r"^DecisionHead is not fitted\. Call fit\(.*\) before logits\(\)\.$"):
        DecisionHead().logits(np.zeros((1, 3), dtype=np.float32))


def test_head_wrong_width_is_refused(head):
    with pytest.raises(DataError, match=r"^features have 5 columns, fit saw 6\. Is the split layer the same\?$"):
        head.logits(np.zeros((1, 5), dtype=np.float32))


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (
            np.zeros((3, 2)),
            np.zeros(2, dtype=int),
            r"^features \(3, 2\) and labels \(2,\) must have the same, non-zero",
        ),
        (np.zeros((0, 2)), np.zeros(0, dtype=int), r"must have the same, non-zero length\.$"),
        (np.zeros(3), np.zeros(3, dtype=int), r"^features \(3,\) and labels \(3,\)"),
        (np.full((3, 2), np.nan), np.zeros(3, dtype=int), r"^features must be finite: a NaN or an infinity was found"),
        (np.full((3, 2), np.inf), np.zeros(3, dtype=int), r"^features must be finite"),
        (np.zeros((3, 2)), np.array([0, 1, 2]), r"^labels must be in \[0, 2\), got 0 to 2\.$"),
        (np.zeros((3, 2)), np.array([0, 1, -1]), r"^labels must be in \[0, 2\), got -1 to 1\.$"),
    ],
)
def test_head_fit_refuses_what_breaks_a_rule(features, labels, message):
    with pytest.raises(DataError, match=message):
        DecisionHead().fit(features, labels, 2)
