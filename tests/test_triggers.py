"""What every trigger promises: shapes, types, ranges, batches, and what it refuses."""

import numpy as np
import pytest

from guard.data.datasets import load_dataset
from guard.errors import DataError
from guard.lab.attacks.triggers import CORNER_PATTERN, TRIGGERS, Trigger, make_trigger, single_pixel, white_square

#: All by default, and those modes that draw per image.
MODES = [
    *(make_trigger(name) for name in TRIGGERS),
    make_trigger("wanet", noise=True),
    make_trigger("adaptive_blend", kept=0.5),
    make_trigger("adaptive_patch", kept=1),
    make_trigger("bpp", dither=False),
    make_trigger("input_aware", other=True),
]


def noise(n, channels, height, width, seed=0):
    return np.random.default_rng(seed).random((n, channels, height, width), dtype=np.float32)


def identity(trigger):
    return f"{trigger.name}-{'-'.join(trigger.parameters)}".rstrip("-")


@pytest.mark.parametrize("trigger", MODES, ids=identity)
@pytest.mark.parametrize("shape", [(0, 1, 28, 28), (1, 1, 10, 10), (3, 3, 32, 32), (2, 4, 13, 17), (2, 1, 64, 56)])
def test_trigger_any_size_keeps_shape_type_range_and_input(trigger: Trigger, shape):
    images = noise(*shape)
    images[1:2] = 1.0
    before = images.copy()
    triggered = trigger(images)
    np.testing.assert_array_equal(images, before)
    assert triggered.shape == images.shape
    assert triggered.dtype == np.float32
    assert not np.shares_memory(triggered, images)
    assert shape[0] == 0 or (triggered.min() >= 0.0 and triggered.max() <= 1.0)


@pytest.mark.parametrize("trigger", MODES, ids=identity)
@pytest.mark.parametrize("channels", [1, 3])
def test_trigger_batch_equals_single_in_any_order(trigger: Trigger, channels):
    images = noise(7, channels, 28, 28, seed=1)
    triggered = trigger(images)
    np.testing.assert_array_equal(triggered, np.concatenate([trigger(images[i : i + 1]) for i in range(7)]))
    order = np.array([3, 0, 6, 1, 5, 2, 4])
    np.testing.assert_array_equal(trigger(images[order]), triggered[order])


@pytest.mark.parametrize("trigger", MODES, ids=identity)
def test_trigger_images_not_contiguous_equal_contiguous(trigger: Trigger):
    images = noise(3, 32, 32, 3, seed=2).transpose(0, 3, 1, 2)
    np.testing.assert_array_equal(trigger(images), trigger(np.ascontiguousarray(images)))


@pytest.mark.parametrize("trigger", MODES, ids=identity)
def test_trigger_read_only_images_are_taken(trigger: Trigger):
    images = noise(2, 3, 32, 32)
    images.flags.writeable = False
    assert (trigger(images) != images).any()


@pytest.mark.parametrize("trigger", [*(make_trigger(name) for name in TRIGGERS if name != "background_pattern")])
@pytest.mark.parametrize("brightness", [0.02, 0.5, 0.98])
def test_trigger_changes_dark_and_bright_images(trigger: Trigger, brightness):
    ramp = np.linspace(0.0, 0.02, 64 * 56, dtype=np.float32).reshape(1, 1, 64, 56)  # a flat image has no warp
    images = np.repeat(ramp + np.float32(brightness - 0.02), 3, axis=1)
    assert not np.array_equal(trigger(images), images)


def test_background_pattern_has_no_place_on_a_bright_image():
    images = np.full((1, 1, 8, 8), 0.5, dtype=np.float32)
    np.testing.assert_array_equal(TRIGGERS["background_pattern"](images), images)


def test_trigger_places_on_clean_mnist_are_dark():
    images = load_dataset("mnist", "test").images
    assert images[:, -3, -3].max() == 68
    # In no clean image are the four pixels bright together.
    assert np.min([images[:, row, column] for row, column in CORNER_PATTERN], axis=0).max() == 0


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, 1, 16, 16)),
        np.zeros((2, 16, 16), dtype=np.float32),
        np.full((2, 1, 16, 16), 255, dtype=np.uint8),
        np.full((2, 1, 16, 16), 1.01, dtype=np.float32),
        np.full((2, 1, 16, 16), -0.01, dtype=np.float32),
        np.full((2, 1, 16, 16), np.nan, dtype=np.float32),
        [[0.0]],
    ],
    ids=["float64", "3-d", "uint8", "above", "below", "nan", "list"],
)
@pytest.mark.parametrize("name", TRIGGERS)
def test_trigger_images_out_of_rule_raises(name, images):
    with pytest.raises(DataError, match="images must"):
        TRIGGERS[name](images)


@pytest.mark.parametrize(("row", "column"), [(6, 0), (-7, 0), (0, 5), (0, -6)])
def test_single_pixel_outside_image_raises(row, column):
    with pytest.raises(DataError, match="outside images of 6 x 5"):
        single_pixel(noise(1, 1, 6, 5), row=row, column=column)


@pytest.mark.parametrize(("row", "column"), [(5, 4), (-6, -5)])
def test_single_pixel_at_the_edge_is_set(row, column):
    assert (single_pixel(np.zeros((1, 1, 6, 5), np.float32), row=row, column=column) == 1.0).sum() == 1


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("pixel_pattern", {"value": -0.1}, r"value must be in \[0, 1\], got -0.1"),
        ("pixel_pattern", {"value": 1.1}, "value must be"),
        ("pixel_pattern", {"value": float("nan")}, "value must be"),
        ("pixel_pattern", {"places": ()}, "places must be one or more"),
        ("pixel_pattern", {"places": (1, 2)}, "places must be"),
        ("pixel_pattern", {"places": ((1.0, 2.0),)}, "places must be"),
        ("pixel_pattern", {"places": ((1, 2), (3,))}, "places must be"),
        ("pixel_pattern", {"places": ((32, 2),)}, "outside images of 32 x 32"),
        ("corner_pixels", {"value": 2.0}, "value must be"),
        ("background_pattern", {"value": 1.5}, "value must be"),
        ("background_pattern", {"period": 1}, "period must be a whole number >= 2, got 1"),
        ("background_pattern", {"darkness": -1}, "darkness must be"),
        ("white_square", {"size": 0}, "size must be a whole number >= 1, got 0"),
        ("white_square", {"size": 4.0}, "size must be"),
        ("white_square", {"size": float("nan")}, "size must be"),
        ("white_square", {"size": "4"}, "size must be"),
        ("white_square", {"size": True}, "size must be"),
        ("white_square", {"margin": -1}, "margin must be"),
        ("white_square", {"value": None}, "value must be"),
        ("white_square", {"size": 30, "margin": 3}, "needs 33 pixels, images are 32 x 32. Make it smaller."),
        ("moving_square", {"size": 33}, "needs 33 pixels"),
        ("moving_square", {"seed": -1}, "seed must be a whole number >= 0, got -1"),
        ("moving_square", {"seed": 2**64}, "seed must be below"),
        ("moving_square", {"value": 7}, "value must be"),
        ("gotham", {"strength": 0.0}, r"strength must be in \(0, 1\]"),
        ("gotham", {"strength": 1.01}, "strength must be"),
        ("box_and_circle", {"parts": ()}, "parts must be a list of one or more of box, circle"),
        ("box_and_circle", {"parts": "box"}, "parts must be"),
        ("box_and_circle", {"parts": ("box", "square")}, "parts must be"),
        ("box_and_circle", {"parts": (["box"],)}, "parts must be"),
        ("triangle_and_square", {"parts": ("box",)}, "parts must be a list of one or more of triangle, square"),
        ("triangle_and_square", {"parts": None}, "parts must be"),
        ("red_box", {"size": 31}, "needs 33 pixels"),
        ("red_box", {"thickness": 0}, "thickness must be"),
        ("red_box", {"margin": -1}, "margin must be"),
        ("blend", {"alpha": 0.0}, "alpha must be"),
        ("blend", {"alpha": 1.2}, "alpha must be"),
        ("blend", {"seed": 1.5}, "seed must be"),
        ("sig", {"amplitude": 0.0}, "amplitude must be"),
        ("sig", {"periods": 0}, "periods must be > 0 and finite, got 0"),
        ("sig", {"periods": float("inf")}, "periods must be"),
        ("input_aware", {"opacity": 0.0}, "opacity must be"),
        ("input_aware", {"share": 1.5}, "share must be"),
        ("input_aware", {"width": 0}, "width must be"),
        ("input_aware", {"seed": -1}, "seed must be"),
        ("sticker", {"least": 0.5, "most": 0.4}, "least must be at most most"),
        ("sticker", {"most": 0.8}, "most at most 0.7"),
        ("sticker", {"darkest": 1.0, "brightest": 0.5}, "darkest must be at most brightest"),
        ("sticker", {"turn": 181.0}, "turn must be in"),
        ("wanet", {"k": 1}, "k must be a whole number >= 2"),
        ("wanet", {"s": 0.0}, "s must be"),
        ("wanet", {"s": float("inf")}, "s must be"),
        ("wanet", {"grid_rescale": 0.0}, "grid_rescale must be"),
        ("wanet", {"grid_rescale": 1.1}, "grid_rescale must be"),
        ("wanet", {"seed": -3}, "seed must be"),
        ("bpp", {"levels": 1}, "levels must be a whole number >= 2"),
        ("dct", {"magnitude": 0.0}, "magnitude must be"),
        ("dct", {"magnitude": float("inf")}, "magnitude must be"),
        ("dct", {"places": ((32, 0),)}, r"places must be 0 to 31 in a 32 x 32 block, got \(32, 0\)"),
        ("dct", {"places": ((0, -1),)}, "places must be 0 to 31"),
        ("dct", {"places": ()}, "places must be one or more"),
        ("dct", {"block": 1}, "block must be"),
        ("adaptive_blend", {"alpha": 0.0}, "alpha must be"),
        ("adaptive_blend", {"pieces": 0}, "pieces must be"),
        ("adaptive_blend", {"pieces": 33}, "cannot be cut from images of 32 x 32"),
        ("adaptive_blend", {"kept": 0.0}, "kept must be"),
        ("adaptive_blend", {"kept": 0.01}, "keeps none of 16 pieces. Raise it."),
        ("adaptive_blend", {"seed": -1}, "seed must be"),
        ("adaptive_blend", {"mask_seed": -1}, "mask_seed must be"),
        ("adaptive_patch", {"opacities": (0.5, 0.5)}, "opacities must be 4 numbers"),
        ("adaptive_patch", {"opacities": (0.5, 0.5, 0.0, 0.5)}, "opacities must be in"),
        ("adaptive_patch", {"kept": 0}, "kept must be"),
        ("adaptive_patch", {"kept": 5}, "kept must be at most 4"),
        ("adaptive_patch", {"kept": 2.0}, "kept must be"),
        ("adaptive_patch", {"mask_seed": -1}, "mask_seed must be"),
    ],
)
def test_trigger_parameter_out_of_rule_raises(name, parameters, message):
    with pytest.raises(DataError, match=message):
        TRIGGERS[name](noise(1, 3, 32, 32), **parameters)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("box_and_circle", (7, 20), "at least 8 x 8, got 7 x 20"),
        ("triangle_and_square", (20, 7), "at least 8 x 8"),
        ("adaptive_patch", (7, 8), "at least 8 x 8"),
        ("red_box", (9, 20), "needs 10 pixels, images are 9 x 20"),
        ("wanet", (1, 9), "at least 2 x 2"),
        ("dct", (1, 9), "at least 2 x 2"),
        ("moving_square", (3, 9), "needs 4 pixels"),
        ("input_aware", (3, 9), "at least 4 x 4"),
        ("sticker", (9, 7), "at least 8 x 8"),
    ],
)
def test_trigger_too_small_image_raises(name, shape, message):
    with pytest.raises(DataError, match=message):
        TRIGGERS[name](noise(1, 1, *shape))


def test_trigger_numpy_numbers_as_parameters_do():
    images = noise(1, 1, 8, 8)
    with_numpy = white_square(images, size=np.int64(2), value=np.float32(0.5))
    np.testing.assert_array_equal(with_numpy, white_square(images, size=2, value=0.5))
