import numpy as np
import pytest

from guard.attacks import CORNER_PATTERN, TRIGGERS, pixel_pattern, single_pixel
from guard.datasets import load_dataset
from guard.errors import DataError


def grey(n=2, channels=1, height=6, width=5):
    return np.full((n, channels, height, width), 0.25, dtype=np.float32)


def test_single_pixel_default_place_sets_one_pixel_third_from_the_corner():
    changed = np.argwhere(single_pixel(grey(n=1)) != grey(n=1))
    assert changed.tolist() == [[0, 0, 3, 2]]
    assert single_pixel(grey(n=1))[0, 0, 3, 2] == 1.0


def test_single_pixel_given_place_and_value_sets_every_channel():
    triggered = single_pixel(grey(n=1, channels=3), row=0, column=-1, value=0.5)
    assert triggered[0, :, 0, 4].tolist() == [0.5, 0.5, 0.5]
    assert (triggered != 0.25).sum() == 3


def test_pixel_pattern_default_places_sets_a_checkerboard_of_four():
    expected = np.full((6, 5), 0.25)
    for row, column in [(4, 3), (4, 1), (3, 2), (2, 3)]:
        expected[row, column] = 1.0
    assert pixel_pattern(grey())[1, 0].tolist() == expected.tolist()


def test_single_pixel_equals_pixel_pattern_of_one_place():
    np.testing.assert_array_equal(single_pixel(grey(), row=1, column=2), pixel_pattern(grey(), places=[(1, 2)]))


@pytest.mark.parametrize("name", TRIGGERS)
@pytest.mark.parametrize(
    ("n", "channels", "height", "width"), [(0, 1, 28, 28), (1, 1, 4, 4), (3, 3, 32, 32), (2, 4, 9, 7)]
)
def test_trigger_any_size_keeps_shape_type_range_and_input(name, n, channels, height, width):
    images = np.random.default_rng(0).random((n, channels, height, width), dtype=np.float32)
    before = images.copy()
    triggered = TRIGGERS[name](images)
    np.testing.assert_array_equal(images, before)
    assert triggered.shape == images.shape
    assert triggered.dtype == np.float32
    assert not np.shares_memory(triggered, images)
    assert n == 0 or (triggered.min() >= 0.0 and triggered.max() <= 1.0)


@pytest.mark.parametrize("name", TRIGGERS)
def test_trigger_batch_equals_single(name):
    images = np.random.default_rng(1).random((4, 1, 28, 28), dtype=np.float32)
    one_by_one = np.concatenate([TRIGGERS[name](images[i : i + 1]) for i in range(4)])
    np.testing.assert_array_equal(TRIGGERS[name](images), one_by_one)


def test_trigger_places_on_clean_mnist_are_dark():
    images = load_dataset("mnist", "test").images
    assert images[:, -3, -3].max() == 68
    # In no clean image are the four pixels bright together.
    assert np.min([images[:, row, column] for row, column in CORNER_PATTERN], axis=0).max() == 0


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 6, 6)),
        np.zeros((2, 6, 6), dtype=np.float32),
        np.full((2, 1, 6, 6), 255, dtype=np.uint8),
        np.full((2, 1, 6, 6), 1.01, dtype=np.float32),
        np.full((2, 1, 6, 6), -0.01, dtype=np.float32),
        np.full((2, 1, 6, 6), np.nan, dtype=np.float32),
        [[0.0]],
    ],
    ids=["float64", "3-d", "uint8", "above", "below", "nan", "list"],
)
def test_trigger_images_out_of_rule_raises(images):
    with pytest.raises(DataError, match="images must"):
        single_pixel(images)


@pytest.mark.parametrize(("row", "column"), [(6, 0), (-7, 0), (0, 5), (0, -6)])
def test_single_pixel_outside_image_raises(row, column):
    with pytest.raises(DataError, match="outside images of 6 x 5"):
        single_pixel(grey(), row=row, column=column)


@pytest.mark.parametrize(("row", "column"), [(5, 4), (-6, -5)])
def test_single_pixel_at_the_edge_is_set(row, column):
    assert (single_pixel(grey(n=1), row=row, column=column) == 1.0).sum() == 1


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_pixel_pattern_value_out_of_range_raises(value):
    with pytest.raises(DataError, match="value must be"):
        pixel_pattern(grey(), value=value)
