"""Copies among the clean images: found, kept in one fold, counted once, and the promise made on distinct images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import CleanSplit
from scipy import ndimage

from guard import Guard, GuardConfig, SuspectModel
from guard.cli.fitting import copies_among
from guard.detection.copies import copy_groups, equal_rows
from guard.detection.retraining import Labelled, retrain
from guard.detection.training_set import TrainingSet
from guard.detection.unseen_classes import flagged_of_unseen_classes
from guard.errors import BundleError, DataError
from guard.statistics.calibration import check_rate, stratified_folds
from guard.storage.bundle import read_bundle, write_bundle
from guard.types import Float32Array

CONFIG = GuardConfig(false_positive_rate=0.05)
#: In fewer parts than so few images are cut in by default.
QUICK = CONFIG.replace(folds=5)


def turned(images: Float32Array, degrees: float) -> Float32Array:
    return ndimage.rotate(images, degrees, axes=(3, 2), reshape=False, order=1)


WAYS = {
    "moved": lambda images: np.roll(images, (2, -1), (2, 3)),
    "moved far": lambda images: np.roll(images, (-4, 3), (2, 3)),
    "mirrored": lambda images: images[:, :, :, ::-1],
    "upside down": lambda images: images[:, :, ::-1],
    "cropped": lambda images: ndimage.zoom(images[:, :, 1:27, 2:28], (1, 1, 28 / 26, 28 / 26), order=1),
    "turned": lambda images: turned(images, 5.0),
    "darker": lambda images: 0.7 * images + 0.1,
    "noisy": lambda images: images + np.random.default_rng(0).normal(0, 0.03, images.shape),
}


def test_copy_groups_of_distinct_images_are_all_different(clean_split: CleanSplit) -> None:
    groups = copy_groups(*clean_split.validation)
    assert len(np.unique(groups)) == len(groups) == 1000


@pytest.mark.parametrize("way", WAYS)
def test_copy_groups_find_near_copies(clean_split: CleanSplit, way: str) -> None:
    images, labels = (part[:200] for part in clean_split.validation)
    near = np.ascontiguousarray(WAYS[way](images), dtype=np.float32)
    groups = copy_groups(np.concatenate([images, near]), np.concatenate([labels, labels]))
    assert (groups[:200] == groups[200:]).mean() >= 0.85
    assert len(np.unique(groups[:200])) >= 185  # and joins few that only look alike


@pytest.mark.parametrize("side", [9, 12, 16, 20, 40, 70])
def test_copy_groups_of_small_and_large_images(side: int) -> None:
    images = np.random.default_rng(0).random((20, 3, side, side), dtype=np.float32)
    images = np.ascontiguousarray(ndimage.gaussian_filter(images, (0, 0, side / 20, side / 20)))
    moved = np.roll(images, 2 * max(1, side // 32), 3)
    groups = copy_groups(np.concatenate([images, moved]), np.zeros(40, int))
    assert groups.tolist() == [*range(20), *range(20)]


def test_copy_groups_of_equal_images_need_no_label_and_no_size(clean_split: CleanSplit) -> None:
    images = clean_split.validation.images[[3, 5, 3, 7, 5]]
    assert copy_groups(images, np.array([0, 1, 2, 3, 4])).tolist() == [0, 1, 0, 2, 1]
    assert copy_groups(images[:, :, 10:16, 10:16], np.zeros(5, int)).tolist() == [0, 1, 0, 2, 1]
    assert equal_rows([np.array([[1.0], [1.0], [2.0]]), np.array([[0], [1], [0]])]).tolist() == [0, 1, 2]


def test_copy_groups_of_images_without_a_contour_are_told_by_their_value() -> None:
    images = np.full((3, 1, 20, 20), 0.5, np.float32)
    images[2] = 0.25
    assert copy_groups(images, np.zeros(3, int)).tolist() == [0, 0, 1]


def test_stratified_folds_keep_groups_together_and_are_the_same_without_any() -> None:
    labels = np.repeat(np.arange(5), 40)
    alone = stratified_folds(labels, 5, 0)
    np.testing.assert_array_equal(stratified_folds(labels, 5, 0, np.arange(200)), alone)
    np.testing.assert_array_equal(stratified_folds(labels, 5, 0, np.arange(200)[::-1]), alone)
    thrice = stratified_folds(np.tile(labels, 3), 5, 0, np.tile(np.arange(200), 3))
    np.testing.assert_array_equal(thrice, np.tile(alone, 3))


def test_check_rate_says_how_many_are_copies() -> None:
    with pytest.raises(DataError, match=r"at least 19 clean images, got 10 and 90 copies of them\."):
        check_rate(0.05, 10, 90)


def test_training_set_teaches_equal_images_once_and_near_copies_all(
    suspect: SuspectModel, clean_split: CleanSplit
) -> None:
    images, labels = (part[:4] for part in clean_split.validation)
    near = np.roll(images, 1, 3)
    rows = suspect.activations(np.concatenate([images, images, near]))
    training = TrainingSet(rows, np.tile(labels, 3), groups=np.tile(np.arange(4), 3))
    assert training.is_distinct.tolist() == [True] * 4 + [False] * 8
    assert training.teaches.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    with pytest.raises(DataError, match=r"groups must have shape \(12,\)"):
        TrainingSet(rows, np.tile(labels, 3), groups=np.arange(4))


@pytest.fixture(scope="module")
def oversampled(suspect: SuspectModel, clean_split: CleanSplit) -> Guard:
    """Fitted on 300 images, each 4 times."""
    images, labels = (np.repeat(part[:300], 4, axis=0) for part in clean_split.validation)
    return Guard.fit(suspect, images, labels, QUICK)


def test_guard_of_oversampled_images_is_the_guard_of_the_images(
    oversampled: Guard, suspect: SuspectModel, clean_split: CleanSplit
) -> None:
    alone = Guard.fit(suspect, *(part[:300] for part in clean_split.validation), QUICK)
    assert alone.reference_groups is None
    assert len(oversampled.reference) == 1200
    assert len(oversampled.clean_scores) == 300
    np.testing.assert_allclose(oversampled.clean_scores, alone.clean_scores, rtol=1e-3)
    flagged = [verdict.is_poisoned for verdict in oversampled.inspect(clean_split.test.images)]
    assert np.mean(flagged) <= 0.08


def test_guard_of_oversampled_images_survives_its_bundle_and_retraining(
    oversampled: Guard, suspect: SuspectModel, tmp_path: Path
) -> None:
    loaded = Guard.load(oversampled.save(tmp_path), suspect)
    assert loaded.reference_groups is not None
    np.testing.assert_array_equal(loaded.reference_groups, oversampled.reference_groups)
    nothing = Labelled(loaded.reference[:0], np.empty(0, int), np.empty(0, bool))
    again = retrain(loaded, nothing)
    np.testing.assert_array_equal(again.clean_scores, retrain(oversampled, nothing).clean_scores)
    assert len(again.clean_scores) == 300
    # The reference is kept in half precision, and copies are still copies: each image teaches once.
    reference, labels, groups = loaded.reference, loaded.reference_labels, loaded.reference_groups
    training = TrainingSet(reference, labels, groups=groups)
    assert training.teaches.sum() == 300
    # Of the lowest scores, which no threshold comes near, a part of the whole range is compared: they are almost 0.
    spread = float(np.ptp(oversampled.clean_scores))
    np.testing.assert_allclose(again.clean_scores, oversampled.clean_scores, rtol=0.05, atol=0.005 * spread)


def test_bundle_whose_copies_leave_too_few_for_its_rate_is_refused(oversampled: Guard, tmp_path: Path) -> None:
    stored = read_bundle(oversampled.save(tmp_path))
    arrays = {**stored.arrays, "groups": np.zeros(1200, np.int64), "clean_scores": stored.arrays["clean_scores"][-1:]}
    with pytest.raises(BundleError, match="needs at least 19 clean images, got 1"):
        Guard.load(write_bundle(tmp_path, stored.document, arrays))


def test_rate_is_refused_where_only_copies_would_show_it(suspect: SuspectModel, clean_split: CleanSplit) -> None:
    images, labels = (np.repeat(part[:12], 30, axis=0) for part in clean_split.validation)
    with pytest.raises(DataError, match="got 12 and 348 copies of them"):
        Guard.fit(suspect, images, labels, CONFIG)


def test_copies_among_says_how_many_and_names_two_classes(
    oversampled: Guard, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"{row}.png" for row in range(1200)]
    assert copies_among(oversampled, names).startswith("900 of 1200 images; ")
    labels = oversampled.reference_labels.copy()
    labels[5] = (labels[5] + 1) % 10
    copies_among(replace(oversampled, reference_labels=labels), names)
    told = " ".join(capsys.readouterr().err.split())
    assert "1 clean images are copies of images of another class, the first 5.png of 4.png" in told
    assert copies_among(replace(oversampled, reference_groups=None), names) == "none found"


def test_guard_without_a_class_is_loaded_again_and_says_what_it_costs(
    suspect: SuspectModel, clean_split: CleanSplit, tmp_path: Path
) -> None:
    images, labels = clean_split.validation
    seen = labels != 9
    guard = Guard.fit(suspect, images[seen], labels[seen], CONFIG.replace(folds=2))
    loaded = Guard.load(guard.save(tmp_path), suspect)
    nines = clean_split.test.images[clean_split.test.labels == 9]
    real = np.mean([verdict.is_poisoned for verdict in loaded.inspect(nines)])
    assert flagged_of_unseen_classes(loaded) == pytest.approx(real, abs=0.05)
    assert real > 0.9
