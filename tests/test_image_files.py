from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from guard.data import image_files
from guard.data.image_files import is_picture, load_images, picture_mode, read_picture
from guard.errors import DataError


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.mark.parametrize(("image_key", "label_key"), [("images", "labels"), ("x", "y")])
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, 5, 4), (2, 1, 5, 4)),
        ((2, 5, 4, 3), (2, 3, 5, 4)),
        ((2, 5, 4, 1), (2, 1, 5, 4)),
        ((2, 3, 5, 4), (2, 3, 5, 4)),
    ],
)
def test_load_images_npz_uint8_layouts_become_nchw(tmp_path, image_key, label_key, shape, expected):
    x = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", **{image_key: x, label_key: np.array([3, 1], np.uint8)})
    images, labels, *_ = load_images(tmp_path / "a.npz")
    assert images.shape == expected
    assert labels.tolist() == [3, 1]
    assert labels.dtype == np.int64
    assert images.sum() == pytest.approx(x.sum() / 255, rel=1e-5)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64, ">i2"])
def test_load_images_npz_of_other_integers_equals_uint8(tmp_path, dtype):
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=x)
    np.savez(tmp_path / "b.npz", x=x.astype(dtype))
    np.testing.assert_array_equal(load_images(tmp_path / "b.npz").images, load_images(tmp_path / "a.npz").images)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize(
    ("stored", "axes"),
    [
        ((2, 3, 5, 4), (0, 1, 2, 3)),
        ((2, 6, 5, 4), (0, 1, 2, 3)),
        ((2, 1, 5, 3), (0, 1, 2, 3)),
        ((2, 5, 4, 3), (0, 3, 1, 2)),
        ((2, 5, 4), None),
    ],
)
def test_load_images_npz_of_floats_is_taken_as_it_is(tmp_path, dtype, stored, axes):
    x = np.random.default_rng(0).normal(size=stored).astype(dtype)
    np.savez(tmp_path / "a.npz", images=x)
    images, labels, *_ = load_images(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(images, (x[:, np.newaxis] if axes is None else x.transpose(axes)).astype(np.float32))
    assert images.dtype == np.float32
    assert labels is None


def test_load_images_npz_that_is_not_finite_is_read_where_it_is_allowed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([[[1.0]], [[np.nan]]]))
    assert np.isnan(load_images(tmp_path / "a.npz", finite=False).images).sum() == 1


@pytest.mark.parametrize(
    "labels",
    [
        np.array([[2], [0], [1]]),
        np.array([2.0, 0.0, 1.0]),
        np.eye(3)[[2, 0, 1]],
        np.eye(3, dtype=bool)[[2, 0, 1]],
        np.array([2, 0, 1], np.uint64),
    ],
)
def test_load_images_npz_labels_of_every_usual_form_are_numbers(tmp_path, labels):
    np.savez(tmp_path / "a.npz", x=np.zeros((3, 4, 4), np.uint8), y=labels)
    found = load_images(tmp_path / "a.npz").labels
    assert found.tolist() == [2, 0, 1]
    assert found.dtype == np.int64


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, "needs an array called images or x, got \\['pixels'\\]"),
        ({"x": np.zeros((2, 4, 4), np.complex64)}, "must be whole or floating numbers, got complex64"),
        ({"x": np.full((2, 4, 4), 256, np.uint16)}, r"uint16 must be in \[0, 255\], got 256 to 256. Scale"),
        ({"x": np.full((2, 4, 4), -1)}, r"int64 must be in \[0, 255\], got -1 to -1"),
        ({"x": np.full((2, 1, 4, 4), np.inf, np.float32)}, "finite"),
        ({"x": np.full((2, 1, 4, 4), 1e300)}, "finite"),
        ({"x": np.zeros((0, 4, 4), np.uint8)}, "none empty"),
        ({"x": np.zeros((2, 3, 4, 3), np.uint8)}, "exactly one of axis 1 and axis 3"),
        ({"x": np.zeros((2, 4, 4, 4), np.uint8)}, "exactly one of axis 1 and axis 3"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(3)}, r"there are 2 images and 3 labels\. Give"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0, 0.5]}, "labels must be whole numbers"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [0, np.nan]}, "labels must be whole numbers"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": ["cat", "dog"]}, "got <U3 .* Number the classes from 0"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": [[2, 1, 0], [0, 0, 1]]}, r"got int64 \(2, 3\)"),
        ({"x": np.array([None])}, "holds Python objects"),
    ],
)
def test_load_images_npz_out_of_rule_raises(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz")


def test_load_images_npz_that_unpacks_too_large_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_TOTAL_VALUES", 1000)
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros((30, 1000, 1000), np.uint8))
    with pytest.raises(DataError, match="unpacks to"):
        load_images(tmp_path / "a.npz")
    np.savez_compressed(tmp_path / "b.npz", x=np.zeros((1, 7, 143), np.uint8))
    with pytest.raises(DataError, match="1001 numbers"):
        load_images(tmp_path / "b.npz")
    np.savez_compressed(tmp_path / "c.npz", x=np.zeros((1, 10, 100), np.uint8))
    assert load_images(tmp_path / "c.npz")[0].shape == (1, 1, 10, 100)


def test_load_images_that_is_no_npz_is_named(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"a\.npz.*cannot be read as \.npz"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "webp", "gif", "ppm"])
def test_read_picture_reads_every_lossless_format_alike(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 4, (5, 4), dtype=np.uint8) * 80
    picture = Image.fromarray(np.repeat(pixels[..., np.newaxis], 3, axis=2))
    picture.save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    assert is_picture(tmp_path / f"a.{suffix.upper()}")
    np.testing.assert_allclose(read_picture(tmp_path / f"a.{suffix}", 1)[0] * 255, pixels, atol=0.01)


def test_is_picture_refuses_what_pillow_gives_to_other_programs():
    assert not any(is_picture(Path(name)) for name in ("a.eps", "a.ps", "a.pdf", "a.txt", "a.mpg", "a"))


def picture_in(mode):
    """Two pixels: one red, one half-transparent white where the mode can say so."""
    picture = Image.fromarray(np.array([[[255, 0, 0, 255], [255, 255, 255, 128]]], np.uint8), "RGBA")
    return picture if mode == "RGBA" else picture.convert("RGB").convert(mode)


@pytest.mark.parametrize(
    ("mode", "grey", "red"),
    [("RGB", 76, [255, 0, 0]), ("RGBA", 76, [255, 0, 0]), ("P", 76, [255, 0, 0]), ("L", 76, [76, 76, 76])],
)
def test_read_picture_converts_to_the_channels_that_are_asked_for(tmp_path, mode, grey, red):
    picture_in(mode).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", 1)[:, 0, 0] * 255 == pytest.approx([grey], abs=0.01)
    assert read_picture(tmp_path / "a.png", 3)[:, 0, 0] * 255 == pytest.approx(red, abs=0.01)
    assert read_picture(tmp_path / "a.png", 4)[:, 0, 0] * 255 == pytest.approx([*red, 255], abs=0.01)
    assert read_picture(tmp_path / "a.png", 4)[3, 0, 1] * 255 == pytest.approx(128 if mode == "RGBA" else 255)
    assert picture_mode(tmp_path / "a.png") == mode


def test_read_picture_that_is_no_image_is_named(tmp_path):
    (tmp_path / "b.png").write_text("GIF89a, says the file")
    with pytest.raises(DataError, match=r"b\.png is not a readable image"):
        read_picture(tmp_path / "b.png", 1)
    write_png(tmp_path / "b.png", np.random.default_rng(0).integers(0, 256, (4, 4)))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2 + 10])
    with pytest.raises(DataError, match=r"b\.png is not a readable image"):
        read_picture(tmp_path / "b.png", 1)
    assert picture_mode(tmp_path / "nowhere.png") == ""


def test_read_picture_of_sixteen_bits_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        read_picture(tmp_path / "a.png", 1)


def test_read_picture_pixel_limit_holds_on_both_sides(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((4, 5)))
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 20)
    assert read_picture(tmp_path / "a.png", 1).shape == (1, 4, 5)
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 19)
    with pytest.raises(DataError, match="5 x 4 pixels, more than 19"):
        read_picture(tmp_path / "a.png", 1)


@pytest.mark.parametrize("kind", [np.int64, np.uint8, bool, np.float32])
def test_npz_with_several_labels_per_image_is_refused_by_name(tmp_path, kind):
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([[1, 0, 1], [0, 1, 0], [1, 1, 1], [0, 0, 0]], kind)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    with pytest.raises(DataError, match=r"labels are multi-label, \(4, 3\) .* on 75 % of the images: .* by itself"):
        load_images(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((3, 4, 4), np.uint8), "labels": np.arange(4)}, "there are 3 images and 4 labels"),
        (
            {"images": np.zeros((3, 4, 4), bool), "labels": np.arange(3)},
            r"got bool\. Save pixels from 0 to 255 as uint8\.$",
        ),
    ],
)
def test_load_images_npz_that_breaks_a_rule_says_what_to_do(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "a.npz")
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-30])
    with pytest.raises(DataError, match=r"cannot be read as \.npz .* Fetch it again, or save it with numpy\.savez\.$"):
        load_images(tmp_path / "a.npz")
