import numpy as np
import pytest
from PIL import Image

from guard.data import image_files
from guard.data.image_files import load_images
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
    images, labels, _ = load_images(tmp_path / "a.npz")
    assert images.shape == expected
    assert labels.tolist() == [3, 1]
    assert labels.dtype == np.int64
    assert images.sum() == pytest.approx(x.sum() / 255, rel=1e-5)


def test_load_images_npz_float32_is_taken_as_it_is(tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 5, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", images=x)
    images, labels, _ = load_images(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(images, x)
    assert labels is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pixels": np.zeros((2, 4, 4), np.uint8)}, "needs an array called images or x, got \\['pixels'\\]"),
        ({"x": np.zeros((2, 4, 4))}, "must be uint8 or float32, got float64"),
        ({"x": np.zeros((2, 4, 4), np.float32)}, "float32 images must be"),
        ({"x": np.zeros((2, 4, 4, 3), np.float32)}, "channels before height"),
        ({"x": np.full((2, 1, 4, 4), np.inf, np.float32)}, "finite"),
        ({"x": np.zeros((0, 4, 4), np.uint8)}, "none empty"),
        ({"x": np.zeros((2, 3, 4, 3), np.uint8)}, "exactly one of axis 1 and axis 3"),
        ({"x": np.zeros((2, 4, 4, 4), np.uint8)}, "exactly one of axis 1 and axis 3"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(3, np.uint8)}, r"labels must be integers of shape \(2,\)"),
        ({"x": np.zeros((2, 4, 4), np.uint8), "y": np.zeros(2)}, "labels must be integers"),
        ({"x": np.array([None])}, "allow_pickle=False"),
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


def test_load_images_flat_folder_reads_in_order_without_labels(tmp_path):
    write_png(tmp_path / "b.png", np.full((4, 6), 255))
    write_png(tmp_path / "a.PNG", np.zeros((4, 6)))
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image either")
    images, labels, _ = load_images(tmp_path)
    assert images.shape == (2, 1, 4, 6)
    assert images.max(axis=(1, 2, 3)).tolist() == [0.0, 1.0]
    assert labels is None


def test_load_images_named_sub_folders_are_classes_in_sorted_order(tmp_path):
    write_png(tmp_path / "dog" / "1.png", np.zeros((4, 4)))
    write_png(tmp_path / "cat" / "1.png", np.zeros((4, 4)))
    write_png(tmp_path / "cat" / "2.png", np.zeros((4, 4)))
    (tmp_path / "bird").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    assert load_images(tmp_path)[1].tolist() == [1, 1, 2]


def test_load_images_numbered_sub_folders_are_the_labels_themselves(tmp_path):
    for name in ("2", "10"):
        write_png(tmp_path / name / "1.png", np.full((4, 4), int(name)))
    images, labels, _ = load_images(tmp_path)
    np.testing.assert_array_equal(images[:, 0, 0, 0] * 255, labels)
    assert sorted(labels.tolist()) == [2, 10]


def test_load_images_any_colour_makes_all_rgb(tmp_path):
    write_png(tmp_path / "a.png", np.full((4, 4), 51))
    write_png(tmp_path / "b.png", np.full((4, 4, 3), [255, 0, 51]))
    images, _, _ = load_images(tmp_path)
    np.testing.assert_allclose(images[:, :, 0, 0], [[0.2, 0.2, 0.2], [1.0, 0.0, 0.2]], rtol=1e-6)


def test_load_images_single_jpeg_is_one_image(tmp_path):
    Image.fromarray(np.full((8, 8, 3), 128, np.uint8)).save(tmp_path / "a.jpg")
    images, labels, _ = load_images(tmp_path / "a.jpg")
    assert images.shape == (1, 3, 8, 8)
    assert labels is None


def test_load_images_file_that_is_no_image_is_named(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4)))
    (tmp_path / "b.png").write_text("GIF89a, says the file")
    with pytest.raises(DataError, match=r"b\.png is not a readable PNG or JPEG"):
        load_images(tmp_path)
    write_png(tmp_path / "b.png", np.random.default_rng(0).integers(0, 256, (4, 4)))
    whole = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2 + 10])
    with pytest.raises(DataError, match=r"b\.png is not a readable PNG or JPEG"):
        load_images(tmp_path)


def test_load_images_sixteen_bit_png_is_refused(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        load_images(tmp_path)


def test_load_images_differing_sizes_raise(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4)))
    write_png(tmp_path / "b.png", np.zeros((4, 5)))
    with pytest.raises(DataError, match=r"one size: .*b\.png is \(4, 5\)"):
        load_images(tmp_path)


def test_load_images_empty_folder_raises(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)


def test_load_images_files_beside_and_inside_sub_folders_raise(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((4, 4)))
    write_png(tmp_path / "cat" / "a.png", np.zeros((4, 4)))
    with pytest.raises(DataError, match="both beside and inside"):
        load_images(tmp_path)


def test_load_images_pixel_limits_hold_on_both_sides(tmp_path, monkeypatch):
    write_png(tmp_path / "a.png", np.zeros((4, 5)))
    write_png(tmp_path / "b.png", np.zeros((4, 5)))
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 20)
    assert load_images(tmp_path)[0].shape == (2, 1, 4, 5)
    monkeypatch.setattr(image_files, "MAX_IMAGE_PIXELS", 19)
    with pytest.raises(DataError, match="5 x 4 pixels, more than 19"):
        load_images(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(image_files, "MAX_TOTAL_VALUES", 119)
    with pytest.raises(DataError, match="2 images are more than 119 numbers"):
        load_images(tmp_path)


def test_load_images_missing_path_or_other_suffix_raises(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        load_images(tmp_path / "nowhere")
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DataError, match=r"must be a \.npz file"):
        load_images(tmp_path / "a.gif")
    np.save(tmp_path / "a.npy", np.zeros((2, 4, 4), np.uint8))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"cannot be read as \.npz"):
        load_images(tmp_path / "a.npz")
