"""What a guard keeps of its clean activations: half precision where that does not show, and the same if kept again."""

from __future__ import annotations

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.detection.kept_reference import kept_reference
from guard.detection.training_set import TrainingSet

N = 200


def some(features: np.ndarray | None = None, logits: np.ndarray | None = None) -> Activations:
    rng = np.random.default_rng(0)
    if features is None:
        features = np.maximum(rng.normal(1.0, 1.0, (N, 8)), 0.0)
    if logits is None:
        logits = rng.normal(size=(N, 5))
    depth = rng.normal(3.0, 1.0, (N, 4))
    return Activations(*(array.astype(np.float32) for array in (logits, features)), {"depth": depth.astype(np.float32)})


def kept(activations: Activations) -> Activations:
    return kept_reference(activations, np.arange(len(activations)))


def is_half(array: np.ndarray) -> bool:
    with np.errstate(over="ignore"):
        return bool((array.astype(np.float16) == array).all())


def test_kept_values_are_halves_in_float32_and_near():
    given = some()
    for (_, array), (_, before) in zip(kept(given).items(), given.items(), strict=True):
        assert array.dtype == np.float32
        assert is_half(array)
        np.testing.assert_allclose(array, before, rtol=2**-11, atol=2**-25)


def test_kept_twice_is_kept_once():
    once = kept(some())
    for (_, array), (_, before) in zip(kept(once).items(), once.items(), strict=True):
        np.testing.assert_array_equal(array, before, strict=True)


def test_given_activations_are_left_as_they_are():
    given, untouched = some(), some()
    kept(given)
    for (_, array), (_, before) in zip(given.items(), untouched.items(), strict=True):
        np.testing.assert_array_equal(array, before, strict=True)


SPREAD = np.random.default_rng(1).normal(size=(N, 8))


@pytest.mark.parametrize(
    ("features", "is_rounded"),
    [
        (SPREAD, True),
        (SPREAD + 10.0, True),
        (SPREAD + 100.0, False),  # a mean of a hundred standard deviations
        (SPREAD * 1e-3, True),
        (SPREAD * 1e-7, False),  # half precision has no such numbers
        (SPREAD * 1e4, True),
        (SPREAD * 1e5, False),  # too large
        (np.where(np.arange(8) == 3, 0.1, SPREAD), True),  # constant
        (np.where(np.arange(8) == 3, 100.1, SPREAD), False),  # constant, and moved by a part of the others' spread
        (SPREAD * np.where(np.arange(8) == 3, 1e-9, 1.0), True),  # as good as constant beside the others
        (SPREAD * np.where(np.arange(8) == 3, 1e-7, 1e-3), False),  # varies, and would be lost
    ],
)
def test_array_that_rounding_would_change_stays_as_it_is(features, is_rounded):
    given = some(features)
    result = kept(given)
    assert is_half(result.features) == is_rounded
    assert (result.features is given.features) != is_rounded
    assert is_half(result.depths["depth"])


def test_answers_of_the_network_stay_what_they_are():
    """Two largest logits that are equal in half precision, or in float32 already."""
    logits = np.random.default_rng(2).normal(size=(N, 5)).astype(np.float32)
    near = np.float32(10.0)
    logits[:50, 1], logits[:50, 3] = near, np.nextafter(near, np.float32(11.0))
    logits[50:60, 1] = logits[50:60, 3] = near
    logits[60:70] = -near
    logits[60:70, 4] = np.nextafter(-near, np.float32(0.0))
    given = some(logits=logits)
    result = kept(given)
    assert is_half(result.logits)
    np.testing.assert_array_equal(result.predicted_labels, given.predicted_labels)
    np.testing.assert_allclose(result.logits, logits, rtol=2**-9, atol=2**-25)
    np.testing.assert_array_equal(kept(result).logits, result.logits, strict=True)


def test_answer_that_would_leave_half_precision_keeps_the_logits():
    logits = np.random.default_rng(3).normal(0.0, 1e4, (N, 5)).astype(np.float32)
    logits[0, :2] = 65504.0, 65505.0
    given = some(logits=logits)
    assert kept(given).logits is given.logits


def test_copies_are_not_rounded_apart():
    """The same image twice in a batch: other roundings of float32, on both sides of a half."""
    rng = np.random.default_rng(4)
    halves = rng.normal(1.0, 1.0, (N // 2, 8)).astype(np.float16)
    between = halves.astype(np.float64) / 2 + np.nextafter(halves, np.float16(9)).astype(np.float64) / 2
    features = np.concatenate([between * (1 - 1e-6), between * (1 + 1e-6)])
    groups = np.tile(np.arange(N // 2), 2)
    labels = np.tile(np.arange(N // 2) % 5, 2)
    given = some(features)
    training = TrainingSet(given, labels, groups=groups)
    np.testing.assert_array_equal(training.same_as, groups)
    assert training.teaches.sum() == N // 2
    apart = TrainingSet(kept(given), labels, groups=groups)
    assert apart.teaches.sum() > N // 2  # what this is for
    again = TrainingSet(kept_reference(given, training.same_as), labels, groups=groups)
    np.testing.assert_array_equal(again.same_as, groups)


def test_guard_keeps_a_reference_of_halves_and_bundles_of_half_the_size(tmp_path):
    """It scores by the arrays that were fitted, bit by bit, and its bundle is the same when saved again."""
    rng = np.random.default_rng(5)
    labels = np.repeat(np.arange(4), 100)
    centres = rng.normal(size=(4, 256))

    def drawn(labels: np.ndarray) -> Activations:
        features = np.maximum(centres[labels] + 0.5 * rng.normal(size=(len(labels), 256)), 0.0).astype(np.float32)
        logits = rng.normal(size=(len(labels), 4)).astype(np.float32)
        logits[np.arange(len(labels)), labels] += 8.0
        return Activations(logits, features, {"depth": features[:, :64] ** 2})

    guard = Guard.fit_activations(drawn(labels), labels, GuardConfig(false_positive_rate=0.05, folds=2))
    path = guard.save(tmp_path)
    assert (path / "arrays.safetensors").stat().st_size < 0.65 * sum(
        array.nbytes for array in (*(array for _, array in guard.reference.items()), *guard.ensemble.arrays().values())
    )
    loaded = Guard.load(path)
    for (_, array), (_, before) in zip(loaded.reference.items(), guard.reference.items(), strict=True):
        assert is_half(before)
        np.testing.assert_array_equal(array, before, strict=True)
    for name, array in guard.ensemble.arrays().items():
        np.testing.assert_array_equal(loaded.ensemble.arrays()[name], array, strict=True)
    odd = drawn(rng.integers(0, 4, 50))
    odd = Activations(odd.logits, odd.features * 3, {"depth": odd.depths["depth"] + 7})
    for inputs in (drawn(labels), odd):
        ours, theirs = guard.scores(inputs), loaded.scores(inputs)
        for part in ("raw", "combined", "p_values"):
            np.testing.assert_array_equal(getattr(ours, part), getattr(theirs, part))
    assert loaded.save(tmp_path / "again").name == path.name
