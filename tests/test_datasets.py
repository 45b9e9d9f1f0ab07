import hashlib
import io
import struct
import zipfile

import numpy as np
import pytest
from PIL import Image

from guard.data import datasets
from guard.data.datasets import (
    DATASET_NAMES,
    ImageSet,
    default_data_dir,
    load_dataset,
    read_npz,
    split_rows,
    to_tensor_images,
)
from guard.errors import DataError, DatasetError
from guard.resources import checkout_root, resource_path

#: SHA-256 of the decoded image array and the number of classes, from the data sets' manifest.
DECODED = {
    ("mnist", "test"): ("6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161", 10),
    ("cifar100", "test"): ("7c6ec2586d6e0fb5dff77829fc5872a3447fd154be01c24823fb4659859c11e6", 100),
    ("gtsrb", "test"): ("b7134a5523f72e29f8eaaf17eb0691ac90dbf75d8117920e6062767ca85a1db8", 43),
    ("yaleb", "test"): ("b96ce92f6a7417cf171ec72c716fb56cd8a0111180f8e359673450073f9572ab", 38),
}


def write_png(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def write_mnist(folder, x=None, y=None, name="mnist_train.npz", **more):
    x = np.zeros((3, 28, 28), np.uint8) if x is None else x
    np.savez(folder / name, x=x, y=np.array([0, 9, 5], np.uint8) if y is None else y, **more)


def strips(images, per_strip=2):
    parts = []
    for start in range(0, len(images), per_strip):
        buffer = io.BytesIO()
        Image.fromarray(images[start : start + per_strip].reshape(-1, 32, 3)).save(buffer, "WEBP", lossless=True)
        parts.append(np.frombuffer(buffer.getvalue(), np.uint8))
    return {"webp": np.concatenate(parts), "ends": np.cumsum([len(part) for part in parts])}


# --- image sets by name


@pytest.mark.parametrize(("name", "split"), DECODED)
def test_load_dataset_real_set_equals_manifest(name, split):
    folder = default_data_dir()
    if (name, split) != ("mnist", "test") and (folder is None or not (folder / f"{name}_{split}.npz").is_file()):
        pytest.skip(f"{name}_{split}.npz is not in the data folder; set GUARD_DATA_DIR to check it")
    digest, n_classes = DECODED[name, split]
    image_set = load_dataset(name, split)
    assert hashlib.sha256(image_set.images.tobytes()).hexdigest() == digest
    assert len(image_set.class_names) == len(set(image_set.class_names)) == n_classes
    assert np.unique(image_set.labels).tolist() == list(range(n_classes))
    assert all(len(array) == len(image_set) for array in image_set.extra.values())


def test_load_dataset_mnist_test_ships_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setenv("GUARD_DATA_DIR", str(tmp_path / "nowhere"))
    image_set = load_dataset("mnist", "test")
    assert image_set.images.shape == (10000, 28, 28)
    assert image_set.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert image_set.class_names[7] == "7"


def test_load_dataset_data_dir_comes_before_the_package(tmp_path):
    write_mnist(tmp_path, name="mnist_test.npz")
    assert len(load_dataset("mnist", "test", tmp_path)) == 3


def test_load_dataset_webp_strips_are_decoded_without_loss(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10_test.npz", y=np.arange(5, dtype=np.uint8), exact=np.ones(5, bool), **strips(images))
    image_set = load_dataset("cifar10", "test", tmp_path)
    np.testing.assert_array_equal(image_set.images, images)
    assert image_set.labels.dtype == np.int64
    assert image_set.class_names[2] == "bird"
    assert image_set.extra["exact"].tolist() == [True] * 5


@pytest.mark.parametrize(("name", "split"), [(name, split) for name in DATASET_NAMES for split in ("train", "test")])
def test_load_dataset_missing_file_says_what_where_and_how(tmp_path, name, split):
    if (name, split) == ("mnist", "test"):
        assert len(load_dataset(name, split, tmp_path)) == 10000
        return
    with pytest.raises(DatasetError) as caught:
        load_dataset(name, split, tmp_path)
    message = str(caught.value)
    assert f"{name}_{split}.npz" in message
    assert str(tmp_path) in message
    assert "GUARD_DATA_DIR" in message
    assert ("test split, which ships" in message) == (name == "mnist")


def test_load_dataset_without_any_folder_says_variable_is_not_set(monkeypatch):
    monkeypatch.delenv("GUARD_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "checkout_root", lambda: None)
    assert default_data_dir() is None
    with pytest.raises(DatasetError, match="GUARD_DATA_DIR is not set"):
        load_dataset("gtsrb", "train")


def test_load_dataset_unknown_name_or_split_raises():
    with pytest.raises(DatasetError, match="no image set 'imagenet': known are mnist, gtsrb"):
        load_dataset("imagenet", "test")
    with pytest.raises(DatasetError, match="split must be"):
        load_dataset("mnist", "validation")


def test_load_dataset_truncated_file_raises(tmp_path):
    whole = resource_path("mnist_test.npz").read_bytes()
    for size in (0, 100, len(whole) // 2):
        (tmp_path / "mnist_train.npz").write_bytes(whole[:size])
        with pytest.raises(DatasetError, match=r"mnist_train\.npz is damaged"):
            load_dataset("mnist", "train", tmp_path)


def test_load_dataset_flipped_bytes_raise(tmp_path):
    broken = bytearray(resource_path("mnist_test.npz").read_bytes())
    broken[500_000:500_100] = bytes(100)
    (tmp_path / "mnist_train.npz").write_bytes(broken)
    with pytest.raises(DatasetError, match=r"mnist_train\.npz is damaged"):
        load_dataset("mnist", "train", tmp_path)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros((3, 32, 32), np.uint8), None, r"shape \(28, 28\), got \(32, 32\)"),
        (np.zeros((3, 28, 28), np.float32), None, "must be uint8"),
        (None, np.array([0, 1, 10], np.uint8), "labels must be 0 to 9, got 0 to 10"),
        (None, np.array([0, 1], np.uint8), r"labels must be int64 of shape \(3,\)"),
        (None, np.array([0.0, 1.0, 2.0]), "labels must be integers"),
    ],
)
def test_load_dataset_wrong_content_raises(tmp_path, x, y, message):
    write_mnist(tmp_path, x, y)
    with pytest.raises(DatasetError, match=message):
        load_dataset("mnist", "train", tmp_path)


def test_load_dataset_missing_array_extra_rows_and_objects_raise(tmp_path):
    np.savez(tmp_path / "mnist_train.npz", x=np.zeros((3, 28, 28), np.uint8))
    with pytest.raises(DatasetError, match="holds no array 'y'"):
        load_dataset("mnist", "train", tmp_path)
    write_mnist(tmp_path, extra=np.zeros(2))
    with pytest.raises(DatasetError, match="'extra' must have 3 rows"):
        load_dataset("mnist", "train", tmp_path)
    np.savez(tmp_path / "mnist_train.npz", x=np.array([object()]), y=np.zeros(1, np.uint8), allow_pickle=True)
    with pytest.raises(DatasetError, match="holds Python objects"):
        load_dataset("mnist", "train", tmp_path)


HEADERS = (
    "{'descr': '<f4', 'fortran_order': False, 'shape': (9999999999999999999999,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000,), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
    "(",
    "{'descr': " + "[" * 400,
    "",
)


@pytest.mark.parametrize("header", HEADERS)
def test_read_npz_hostile_header_is_a_data_error(tmp_path, header):
    text = header.encode() + b"\n"
    with zipfile.ZipFile(tmp_path / "h.npz", "w") as packed:
        packed.writestr("x.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + bytes(64))
    with pytest.raises(DataError, match=r"cannot be read as \.npz|holds Python objects") as caught:
        read_npz(tmp_path / "h.npz")
    assert "\n" not in str(caught.value)


def test_load_dataset_broken_strip_raises(tmp_path):
    packed = strips(np.zeros((4, 32, 32, 3), np.uint8))
    packed["webp"] = packed["webp"].copy()
    packed["webp"][: packed["ends"][0]] = 0
    np.savez(tmp_path / "gtsrb_test.npz", y=np.zeros(4, np.uint8), **packed)
    with pytest.raises(DatasetError, match="strip cannot be decoded"):
        load_dataset("gtsrb", "test", tmp_path)


def test_default_data_dir_environment_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("GUARD_DATA_DIR", str(tmp_path))
    assert default_data_dir() == tmp_path


def test_image_set_rows_take_labels_and_extra_along():
    whole = ImageSet(
        np.zeros((3, 4, 5), np.uint8), np.array([0, 1, 1]), ("a", "b"), {"track": np.array([7, 8, 9], np.int16)}
    )
    part = whole[np.array([2, 0])]
    assert part.labels.tolist() == [1, 0]
    assert part.extra["track"].tolist() == [9, 7]


def test_split_rows_groups_are_disjoint_and_repeatable():
    groups = split_rows(10, (6, 2, 1), np.random.default_rng(0))
    assert [len(group) for group in groups] == [6, 2, 1]
    assert len(set(np.concatenate(groups).tolist())) == 9
    again = split_rows(10, (6, 2, 1), np.random.default_rng(0))
    assert [group.tolist() for group in groups] == [group.tolist() for group in again]
    for sizes in ((6, 5), (-1, 3)):
        with pytest.raises(DataError, match="sizes must be"):
            split_rows(10, sizes, np.random.default_rng(0))


def test_resource_path_known_and_unknown_names():
    assert resource_path("mnist_test.npz").is_file()
    assert resource_path("config.properties").is_file()
    assert checkout_root() is None or resource_path("guard_handler.py").parent == checkout_root() / "handlers"
    for name in ("nothing.bin", "", "../errors.py"):
        with pytest.raises(DatasetError):
            resource_path(name)


# --- to_tensor_images


def test_to_tensor_images_grey_gets_one_channel_in_unit_range():
    tensor = to_tensor_images(np.array([[[0, 51], [255, 102]]], np.uint8))
    assert tensor.dtype == np.float32
    np.testing.assert_allclose(tensor, [[[[0.0, 0.2], [1.0, 0.4]]]], rtol=1e-6)


def test_to_tensor_images_colour_moves_channels_first():
    images = np.arange(24, dtype=np.uint8).reshape(1, 2, 4, 3)
    tensor = to_tensor_images(images)
    assert tensor.shape == (1, 3, 2, 4)
    assert tensor.flags.c_contiguous
    np.testing.assert_array_equal(tensor[0, 1], images[0, :, :, 1].astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("images", [np.zeros((2, 4, 4), np.float32), np.zeros((4, 4), np.uint8)])
def test_to_tensor_images_out_of_rule_raises(images):
    with pytest.raises(DataError, match="images must be uint8"):
        to_tensor_images(images)
