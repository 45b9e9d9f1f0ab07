import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks import CropAndFlip


def ramps(n, height=5, width=6, channels=1):
    """Images in which every pixel tells its place: row * 10 + column, as hundredths."""
    place = np.arange(height)[:, None] * 10 + np.arange(width)
    return np.broadcast_to(place / 100, (n, channels, height, width)).astype(np.float32)


def shifted(image, down, right):
    """The image moved down and right, edges repeated."""
    height, width = image.shape[1:]
    rows = np.clip(np.arange(height) - down, 0, height - 1)
    columns = np.clip(np.arange(width) - right, 0, width - 1)
    return image[:, rows][:, :, columns]


def test_crop_and_flip_without_padding_and_flip_is_an_equal_copy():
    images = np.random.default_rng(0).random((7, 3, 5, 6), dtype=np.float32)
    augmented = CropAndFlip(padding=0, flip=False)(images, np.random.default_rng(1))
    np.testing.assert_array_equal(augmented, images)
    assert not np.shares_memory(augmented, images)


def test_crop_and_flip_gives_every_shift_and_nothing_else():
    images = ramps(3000, channels=2)
    augmented = CropAndFlip(padding=2, flip=False)(images, np.random.default_rng(0))
    expected = {shifted(images[0], down, right).tobytes() for down in range(-2, 3) for right in range(-2, 3)}
    assert len(expected) == 25
    assert {image.tobytes() for image in augmented} == expected


def test_crop_and_flip_shifts_are_equally_likely():
    augmented = CropAndFlip(padding=1, flip=False)(ramps(9000), np.random.default_rng(0))
    counts = np.unique(augmented.reshape(9000, -1), axis=0, return_counts=True)[1]
    assert len(counts) == 9
    assert np.abs(counts - 1000).max() < 5 * (9000 * (1 / 9) * (8 / 9)) ** 0.5  # five standard deviations: 149


def test_crop_and_flip_mirrors_half_of_the_images_left_and_right():
    images = ramps(1000)
    augmented = CropAndFlip(padding=0, flip=True)(images, np.random.default_rng(0))
    mirrored = (augmented == images[:, :, :, ::-1]).all(axis=(1, 2, 3))
    same = (augmented == images).all(axis=(1, 2, 3))
    assert (mirrored ^ same).all()
    assert abs(mirrored.sum() - 500) < 5 * 250**0.5


def test_crop_and_flip_same_generator_state_same_images_and_input_is_unchanged():
    images = np.random.default_rng(0).random((50, 3, 8, 7), dtype=np.float32)
    images.setflags(write=False)
    before = images.copy()
    entry, again, other = (CropAndFlip()(images, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(entry, again)
    assert not np.array_equal(entry, other)
    np.testing.assert_array_equal(images, before)
    assert entry.shape == images.shape
    assert entry.dtype == np.float32
    assert entry.flags.writeable
    assert images.min() <= entry.min() <= entry.max() <= images.max()


def test_crop_and_flip_padding_larger_than_the_image_and_no_images_work():
    assert CropAndFlip(padding=9)(ramps(4), np.random.default_rng(0)).shape == (4, 1, 5, 6)
    assert CropAndFlip()(ramps(0), np.random.default_rng(0)).shape == (0, 1, 5, 6)


def test_crop_and_flip_padding_below_zero_raises():
    with pytest.raises(DataError, match=r"padding must be >= 0, got -1\."):
        CropAndFlip(padding=-1)
