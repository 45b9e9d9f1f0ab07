"""One value per trigger worked out by hand, on images of few pixels."""

import numpy as np
import pytest
from scipy.fft import dctn

from guard.lab.attacks.triggers import (
    adaptive_blend,
    adaptive_patch,
    background_pattern,
    blend,
    box_and_circle,
    bpp,
    corner_pixels,
    dct,
    eyebrows,
    gotham,
    input_aware,
    lipstick,
    moving_square,
    pixel_pattern,
    red_box,
    sig,
    single_pixel,
    sticker,
    sunglasses,
    triangle_and_square,
    wanet,
    white_square,
)


def grey(n=2, channels=1, height=6, width=5, value=0.25):
    return np.full((n, channels, height, width), value, dtype=np.float32)


def image(rows):
    return np.array(rows, dtype=np.float32)[np.newaxis, np.newaxis]


def changed(triggered, clean):
    """Changed pixels of the first image, as a picture."""
    return ["".join(".#"[pixel] for pixel in row) for row in (triggered != clean).any(axis=1)[0].astype(int)]


def test_single_pixel_default_place_sets_one_pixel_third_from_the_corner():
    where = np.argwhere(single_pixel(grey(n=1)) != grey(n=1))
    assert where.tolist() == [[0, 0, 3, 2]]
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


def test_corner_pixels_sets_four_corners():
    triggered = corner_pixels(grey(height=3, width=4), value=0.75)
    expected = [[0.75, 0.25, 0.25, 0.75], [0.25] * 4, [0.75, 0.25, 0.25, 0.75]]
    assert triggered[1, 0].tolist() == expected


def test_white_square_with_margin_leaves_the_last_row_and_column():
    assert changed(white_square(grey(height=4), size=2, margin=1), grey(height=4)) == [
        ".....",
        "..##.",
        "..##.",
        ".....",
    ]


def test_white_square_without_margin_ends_in_the_corner():
    triggered = white_square(grey(n=1, height=3, width=3), size=2)
    assert triggered[0, 0].tolist() == [[0.25, 0.25, 0.25], [0.25, 1.0, 1.0], [0.25, 1.0, 1.0]]


def test_moving_square_takes_every_place_about_equally_often():
    # A 2 x 2 square has two places in 2 x 3 pixels: the left and the right.
    images = np.random.default_rng(0).random((400, 1, 2, 3), dtype=np.float32)
    white = (moving_square(images, size=2) == 1.0)[:, 0]
    left = (white == [[True, True, False]] * 2).all(axis=(1, 2))
    right = (white == [[False, True, True]] * 2).all(axis=(1, 2))
    assert (left ^ right).all()
    assert 160 <= left.sum() <= 240  # 200, standard deviation 10


def test_moving_square_other_seed_moves_it():
    images = np.random.default_rng(0).random((20, 1, 16, 16), dtype=np.float32)
    assert not np.array_equal(moving_square(images, seed=0), moving_square(images, seed=1))


def test_background_pattern_draws_lines_where_row_plus_column_is_a_multiple():
    clean = grey(n=1, height=3, width=4, value=0.0)
    clean[0, 0, 1, 2] = 0.5  # a stroke on a line
    clean[0, 0, 2, 2] = 0.03  # background, on no line
    triggered = background_pattern(clean, period=3, value=0.25)
    expected = [[0.25, 0.0, 0.0, 0.25], [0.0, 0.0, 0.5, 0.0], [0.0, 0.25, 0.03, 0.0]]
    np.testing.assert_array_equal(triggered[0, 0], np.array(expected, dtype=np.float32))


def test_background_pattern_one_bright_channel_makes_a_pixel_foreground():
    clean = grey(n=1, channels=3, height=2, width=2, value=0.0)
    clean[0, 1, 0, 0] = 0.5
    assert changed(background_pattern(clean, period=2), clean) == ["..", ".#"]


def test_gotham_colour_worked_out_by_hand():
    # (0.8, 0.4, 0.2): grey = 0.299 * 0.8 + 0.587 * 0.4 + 0.114 * 0.2 = 0.4968. With 0.4 of the colour kept
    #   r = 0.4968 + 0.4 * 0.3032 = 0.61808, g = 0.4968 - 0.4 * 0.0968 = 0.45808, b = 0.4968 - 0.4 * 0.2968 = 0.37808.
    # Contrast, slope 1.36 around (0.5, 0.5): r = 0.66059, g = 0.44299, b = 0.33419.
    # Red above 0.5: 0.4 + 1.2 * 0.16059 = 0.59271. Blue from 0.25 to 0.75: 0.32 + 0.8 * 0.08419 = 0.38735.
    pixel = np.array([0.8, 0.4, 0.2], dtype=np.float32).reshape(1, 3, 1, 1)
    np.testing.assert_allclose(gotham(pixel).ravel(), [0.59271, 0.44299, 0.38735], atol=1e-5)
    halfway = [(0.8 + 0.59271) / 2, (0.4 + 0.44299) / 2, (0.2 + 0.38735) / 2]
    np.testing.assert_allclose(gotham(pixel, strength=0.5).ravel(), halfway, atol=1e-5)


def test_gotham_grey_gets_the_contrast_curve_alone():
    # Between (0, 0) and (0.25, 0.16), halfway: 0.08.
    values = image([[0.0, 0.125, 0.25, 0.5, 0.75, 1.0]])
    np.testing.assert_allclose(gotham(values), image([[0.0, 0.08, 0.16, 0.5, 0.84, 1.0]]), atol=1e-6)


def test_box_and_circle_in_16_pixels():
    # Four pixels wide. The disc's pixel centres lie 0.5 or 1.5 from its middle: 1.5^2 + 1.5^2 > 2^2, so no corners.
    picture = changed(box_and_circle(grey(height=16, width=16)), grey(height=16, width=16))
    empty = "." * 16
    assert picture[:6] == [empty, ".####...........", ".#..#...........", ".#..#...........", ".####...........", empty]
    assert picture[10:] == [
        empty,
        "............##..",
        "...........####.",
        "...........####.",
        "............##..",
        empty,
    ]
    assert set(picture[6:10]) == {empty}


def test_triangle_and_square_in_8_pixels():
    clean = grey(height=8, width=8)
    assert changed(triangle_and_square(clean), clean) == [
        "........",
        ".....#..",
        "....##..",
        "....###.",
        ".###....",
        ".###....",
        ".###....",
        "........",
    ]


@pytest.mark.parametrize(
    ("trigger", "parts"), [(box_and_circle, ("box", "circle")), (triangle_and_square, ("triangle", "square"))]
)
def test_parts_alone_differ_from_both_and_add_up_to_it(trigger, parts):
    clean = grey(channels=3, height=32, width=32)
    both, first, second = trigger(clean), trigger(clean, parts=parts[:1]), trigger(clean, parts=[parts[1]])
    for alone in (first, second):
        assert not np.array_equal(alone, both)
        assert not np.array_equal(alone, clean)
    np.testing.assert_array_equal(trigger(first, parts=parts[1:]), both)
    np.testing.assert_array_equal(trigger(clean, parts=parts[::-1]), both)
    assert not ((first != clean) & (second != clean)).any()


def test_shapes_have_their_colours_and_grey_images_their_luminance():
    colour, single = grey(channels=3, height=8, width=8), grey(height=8, width=8)
    np.testing.assert_allclose(box_and_circle(colour)[0, :, 1, 1], [1.0, 0.9, 0.1])  # yellow
    np.testing.assert_allclose(box_and_circle(colour)[0, :, 5, 5], [0.1, 0.2, 1.0])  # blue
    np.testing.assert_allclose(triangle_and_square(colour)[0, :, 1, 5], [0.1, 0.9, 0.2])  # green
    np.testing.assert_allclose(triangle_and_square(colour)[0, :, 5, 1], [1.0, 0.0, 0.0])  # red
    # 0.299 * 1 + 0.587 * 0.9 + 0.114 * 0.1 = 0.8387; 0.0299 + 0.1174 + 0.114 = 0.2613; red alone 0.299.
    np.testing.assert_allclose(box_and_circle(single)[0, 0, [1, 5], [1, 5]], [0.8387, 0.2613], rtol=1e-6)
    np.testing.assert_allclose(triangle_and_square(single)[0, 0, 5, 1], 0.299, rtol=1e-6)


def test_red_box_is_a_frame():
    clean = grey(n=1, channels=3, height=6, width=6)
    triggered = red_box(clean, size=4, thickness=1, margin=1)
    assert changed(triggered, clean) == ["......", ".####.", ".#..#.", ".#..#.", ".####.", "......"]
    assert triggered[0, :, 1, 1].tolist() == [1.0, 0.0, 0.0]
    # Two rows of thickness fill a box of four.
    assert (red_box(clean, size=4, thickness=2, margin=0)[0, 0] == 1.0).sum() == 16


def test_sunglasses_on_64_by_56():
    face = sunglasses(grey(n=1, height=64, width=56))[0, 0]
    dark, bright, skin = np.float32(0.02), np.float32(0.9), np.float32(0.25)
    # Lens: middle at row 0.24 * 64 = 15.36, 0.09 * 64 = 5.76 pixels up and down; the frame reaches 7.36.
    # Middle of the left lens: column 0.21 * 56 = 11.76. Pixel (r, c) has its centre at (r + 0.5, c + 0.5).
    assert [face[row, 11] for row in (7, 8, 9, 10)] == [skin, bright, bright, dark]
    assert [face[row, 11] for row in (20, 21, 22, 23)] == [dark, bright, bright, skin]
    # Bridge: rows 0.22 * 64 = 14.08, 0.96 up and down, so rows 13 and 14.
    assert [face[row, 27] for row in (12, 13, 14, 15)] == [skin, bright, bright, skin]
    assert face[15, 44] == dark


def test_lipstick_on_64_by_56():
    face = lipstick(grey(n=1, height=64, width=56))[0, 0] != 0.25
    # Middle at row 0.785 * 64 = 50.24, 3.52 up and down; column 28, 14 to each side.
    assert np.flatnonzero(face[:, 27]).tolist() == list(range(47, 54))
    assert np.flatnonzero(face[50]).tolist() == list(range(14, 42))
    # 0.299 * 0.95 + 0.587 * 0.25 + 0.114 * 0.3 = 0.465.
    np.testing.assert_allclose(lipstick(grey(n=1, height=64, width=56))[0, 0, 52, 27], 0.465, rtol=1e-6)
    # The line between the lips: rows with (row + 0.5) / 64 in 0.785 +- 0.012, which are 49 and 50.
    column = lipstick(grey(n=1, height=64, width=56))[0, 0, 48:52, 27]
    np.testing.assert_allclose(column, [0.465, 0.02, 0.02, 0.465], rtol=1e-6)
    np.testing.assert_allclose(lipstick(grey(n=1, channels=3, height=64, width=56))[0, :, 52, 27], [0.95, 0.25, 0.3])


def test_eyebrows_on_64_by_56():
    clean = grey(n=1, height=64, width=56)
    rows, columns = np.nonzero((eyebrows(clean) != clean)[0, 0])
    # Rows 6.4, 1.92 up and down; columns 3.36 to 20.16 and 35.84 to 52.64.
    assert sorted(set(rows.tolist())) == [4, 5, 6, 7]
    assert sorted(set(columns.tolist())) == [*range(3, 20), *range(36, 53)]
    assert len(rows) == 4 * 34


def test_blend_mixes_in_the_pattern_of_the_seed():
    # 0.75 * 0.8 + 0.25 p = 0.6 + p / 4.
    pattern = np.random.default_rng(3).random((1, 2, 3), dtype=np.float32)
    triggered = blend(grey(n=2, height=2, width=3, value=0.8), alpha=0.25, seed=3)
    np.testing.assert_allclose(triggered[1], 0.6 + pattern / 4, rtol=1e-6)
    np.testing.assert_array_equal(blend(grey(n=1, height=2, width=3), alpha=1.0, seed=3)[0], pattern)
    assert not np.array_equal(blend(grey(), seed=3), blend(grey(), seed=4))


def test_sig_adds_a_sine_along_the_row():
    # Four columns, one period: sin 0, sin 90, sin 180, sin 270 degrees = 0, 1, 0, -1; cut off at 0 in the second row.
    triggered = sig(image([[0.5] * 4, [0.05] * 4]), periods=1, amplitude=0.1)
    np.testing.assert_allclose(triggered, image([[0.5, 0.6, 0.5, 0.4], [0.05, 0.15, 0.05, 0.0]]), atol=1e-6)


def test_wanet_reads_a_ramp_where_the_field_says():
    # In 2 x 2 pixels with k = 2 the field is the control grid itself. The image is 0 at x = -1 and 1 at x = 1, so a
    # read at x gives (x + 1) / 2, with x = -1 or 1, plus s * field / 2, cut off at -1 and 1.
    control = np.random.default_rng(5).uniform(-1, 1, (2, 2, 2))
    field = control[0] / np.abs(control).mean()  # x offsets, by row and column
    expected = (np.clip([[-1.0, 1.0], [-1.0, 1.0]] + 0.5 * field / 2, -1, 1) + 1) / 2
    triggered = wanet(image([[0.0, 1.0], [0.0, 1.0]]), k=2, s=0.5, seed=5)
    np.testing.assert_allclose(triggered[0, 0], expected, atol=1e-6)
    assert (triggered != image([[0.0, 1.0], [0.0, 1.0]])).sum() > 0


def test_wanet_grid_rescale_reads_nearer_to_the_middle():
    # Without a warp worth the name, -1 and 1 become -0.5 and 0.5, which read 0.25 and 0.75.
    triggered = wanet(image([[0.0, 1.0], [0.0, 1.0]]), k=2, s=1e-9, grid_rescale=0.5)
    np.testing.assert_allclose(triggered, image([[0.25, 0.75], [0.25, 0.75]]), atol=1e-6)


def test_wanet_flat_image_stays():
    np.testing.assert_allclose(wanet(grey(height=8, width=9)), grey(height=8, width=9), atol=1e-6)


def test_wanet_noise_reads_at_most_one_height_th_further():
    ramp = image([np.linspace(0.0, 1.0, 32)] * 32)
    difference = np.abs(wanet(ramp, noise=True) - wanet(ramp))
    # Up to 1 / 32 in x is up to 1 / 64 in the ramp's value.
    assert 0.5 / 64 < difference.max() <= 1 / 64 + 1e-6


def test_bpp_hands_the_error_on():
    # Two levels, 0.4 everywhere. (0, 0): 0, error 0.4; right 0.575, below 0.525, below right 0.425.
    # (0, 1): 1, error -0.425; below left 0.525 - 3/16 * 0.425 = 0.4453, below 0.425 - 5/16 * 0.425 = 0.2922.
    # (1, 0): 0, error 0.4453; right 0.2922 + 7/16 * 0.4453 = 0.4870. (1, 1): 0.
    flat = image([[0.4, 0.4], [0.4, 0.4]])
    assert bpp(flat, levels=2)[0, 0].tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert bpp(flat, levels=2, dither=False)[0, 0].tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_bpp_leaves_few_values_and_keeps_the_mean():
    images = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    triggered = bpp(images, levels=5)
    assert np.unique(triggered).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    np.testing.assert_allclose(triggered.mean(axis=(2, 3)), images.mean(axis=(2, 3)), atol=0.01)


def test_dct_highest_frequency_of_two_by_two_pixels():
    # Coefficient (16, 16) of 32 becomes (1, 1) of 2. Its wave is (1, -1) / sqrt 2 each way: 0.5, -0.5, -0.5, 0.5.
    triggered = dct(grey(n=1, height=2, width=2, value=0.5), magnitude=0.2, places=((16, 16),), block=2)
    np.testing.assert_allclose(triggered, image([[0.6, 0.4], [0.4, 0.6]]), atol=1e-6)


def test_dct_colour_changes_u_and_v():
    # U and V rise by 0.1 at the top left: R = Y + 1.14 V, G = Y - 0.395 U - 0.581 V, B = Y + 2.032 U.
    triggered = dct(grey(n=1, channels=3, height=2, width=2, value=0.5), magnitude=0.2, places=((16, 16),), block=2)
    np.testing.assert_allclose(triggered[0, :, 0, 0], [0.614, 0.4024, 0.7032], atol=2e-4)


def test_dct_default_raises_two_coefficients_of_a_grey_image():
    clean = np.random.default_rng(0).uniform(0.2, 0.8, (1, 1, 32, 32)).astype(np.float32)
    raised = dctn((dct(clean) - clean)[0, 0], norm="ortho")
    expected = np.zeros((32, 32))
    expected[15, 15] = expected[31, 31] = 30 / 255
    np.testing.assert_allclose(raised, expected, atol=1e-5)


def test_dct_what_is_left_of_whole_blocks_stays():
    clean = grey(n=1, height=5, width=4)
    assert changed(dct(clean, block=2, magnitude=0.2, places=((0, 0),)), clean) == [*["####"] * 4, "...."]


def test_adaptive_blend_all_pieces_equals_blend():
    images = np.random.default_rng(0).random((3, 3, 15, 19), dtype=np.float32)
    np.testing.assert_array_equal(adaptive_blend(images, seed=2), blend(images, seed=2))


def test_adaptive_blend_half_the_pieces_are_mixed_in():
    images = np.random.default_rng(1).random((50, 1, 4, 4), dtype=np.float32)  # seed 0 draws the pattern itself
    half, whole = adaptive_blend(images, kept=0.5), blend(images)
    mixed = half != images
    assert (mixed.sum(axis=(1, 2, 3)) == 8).all()  # of 16 pieces of one pixel
    np.testing.assert_array_equal(half[mixed], whole[mixed])
    assert len(np.unique(mixed.reshape(50, -1), axis=0)) > 40  # other pieces for other images
    assert mixed.any(axis=0).all()
    assert not np.array_equal(half, adaptive_blend(images, kept=0.5, mask_seed=1))


def test_adaptive_patch_lies_in_the_corners():
    # Three eighths of 8 pixels: 3. Opacity 0.5 on 0.4: 0.2 + p / 2.
    clean = grey(n=1, height=8, width=8, value=0.4)
    triggered = adaptive_patch(clean, opacities=(0.5, 0.5, 0.2, 0.3))
    assert changed(triggered, clean) == [*["###..###"] * 3, *["........"] * 2, *["###..###"] * 3]
    patch = np.random.default_rng(0).random((1, 3, 3), dtype=np.float32)
    np.testing.assert_allclose(triggered[0, :, :3, :3], 0.2 + patch / 2, rtol=1e-6)


def test_adaptive_patch_one_per_image_takes_all_corners_in_turn():
    images = np.random.default_rng(1).random((40, 1, 8, 8), dtype=np.float32)
    entry, all_four = adaptive_patch(images, kept=1), adaptive_patch(images)
    mixed = entry != images
    assert (mixed.sum(axis=(1, 2, 3)) == 9).all()
    np.testing.assert_array_equal(entry[mixed], all_four[mixed])
    assert len(np.unique(mixed.reshape(40, -1), axis=0)) == 4


def test_input_aware_is_the_paper_s_blend_of_a_pattern_where_the_mask_is_on():
    images = np.random.default_rng(0).random((2, 3, 16, 16), dtype=np.float32)
    faint, strong = (input_aware(images, opacity=opacity, share=0.25) for opacity in (0.2, 0.4))
    np.testing.assert_allclose(strong - images, 2 * (faint - images), atol=1e-6)  # x + m (p - x), linear in m
    touched = (np.abs(strong - images) > 1e-6).any(axis=1)
    np.testing.assert_allclose(touched.mean(axis=(1, 2)), 0.25, atol=0.01)
    pattern = images + (strong - images) / 0.4
    assert pattern.min() >= -1e-5
    assert pattern.max() <= 1 + 1e-5


def test_input_aware_pattern_and_place_are_other_ones_for_every_image_and_seed():
    images = np.random.default_rng(1).random((4, 1, 28, 28), dtype=np.float32)
    difference = input_aware(images) - images
    places = (np.abs(difference[:, 0]) > 1e-6).reshape(4, -1)
    for first in range(4):
        for second in range(first):
            assert (places[first] != places[second]).mean() > 0.3
    assert np.abs(input_aware(images, seed=1) - input_aware(images)).max() > 0.05
    other = input_aware(images, other=True)
    assert ((np.abs((other - images)[:, 0]) > 1e-6).reshape(4, -1) != places).mean() > 0.3
    np.testing.assert_array_equal(other, input_aware(images, other=True))


def test_sticker_of_one_size_covers_its_square_and_one_disc_of_blue():
    images = np.zeros((6, 3, 40, 40), dtype=np.float32)
    images += np.random.default_rng(2).random((6, 1, 1, 1), dtype=np.float32) * 0.01  # other places
    placed = sticker(images, least=0.5, most=0.5, turn=0.0, darkest=1.0)
    yellow, blue = (placed[:, 0] > 0.5), (placed[:, 2] > 0.3)
    assert yellow.sum(axis=(1, 2)) + blue.sum(axis=(1, 2)) == pytest.approx([400] * 6, rel=0.12)  # 20 x 20
    assert blue.sum(axis=(1, 2)) == pytest.approx([np.pi * 5.5**2] * 6, rel=0.12)
    corners = [np.argwhere(yellow[row]).min(axis=0) for row in range(6)]
    assert len({tuple(corner) for corner in corners}) == 6


def test_sticker_size_and_light_are_within_their_ranges_and_differ():
    images = np.random.default_rng(3).random((200, 1, 32, 32), dtype=np.float32) * 0.05
    changed = np.abs(sticker(images, turn=0.0) - images)[:, 0] > 0.06
    sides = np.sqrt(changed.sum(axis=(1, 2)))
    assert 0.22 * 32 - 1.5 < sides.min() < sides.max() < 0.36 * 32 + 2
    assert sides.std() > 0.5
    brightness = sticker(images, turn=0.0).max(axis=(1, 2, 3))
    assert 0.55 * 0.75 * 0.8 < brightness.min() < 0.6  # yellow has a luminance of 0.81
    assert 0.7 < brightness.max() < 0.82
