"""Arrays in fewer bytes: every value and type comes back, and notes that fit no arrays are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from guard.errors import BundleError
from guard.storage.bundle import read_bundle, write_bundle
from guard.storage.packing import pack, unpack

N = 3000  # values of an array that is worth packing


def arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(N, 4))
    return {
        "half": rng.normal(size=(N, 4)).astype(np.float16).astype(np.float32),
        "half of double": rng.integers(-2048, 2049, (N, 4)).astype(np.float64),
        "single": exact.astype(np.float32),
        "single of double": exact.astype(np.float32).astype(np.float64),
        "double": exact,
        "tiny labels": rng.integers(-128, 128, N),
        "labels": rng.integers(0, 1000, N),
        "large labels": rng.integers(0, 2**20, N),
        "huge labels": rng.integers(0, 2**40, N),
        "signs": np.where(rng.random(N * 4) < 0.5, 0.0, -0.0),
        "is large": rng.random(N * 4) < 0.5,
        "few": np.zeros(3),
        "empty": np.empty((0, 3)),
        "columns": np.asfortranarray(exact),
    }


KEPT = {
    "half": "float16",
    "half of double": "float16",
    "single": "float32",
    "single of double": "float32",
    "columns": "float64",  # and "double"
    "tiny labels": "int8",
    "labels": "int16",
    "large labels": "int32",
    "huge labels": "int64",
    "signs": "float16",
    "is large": "bool",
    "few": "float64",
    "empty": "float64",
}


def assert_same_bits(ours: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> None:
    assert ours.keys() == others.keys()
    for name, other in others.items():
        assert (ours[name].dtype, ours[name].shape) == (other.dtype, other.shape), name
        assert ours[name].tobytes() == other.tobytes(), name


def test_pack_keeps_each_array_in_the_narrowest_type_that_holds_it_and_equal_ones_once():
    kept, notes = pack(arrays())
    assert {name: array.dtype.name for name, array in kept.items()} == KEPT
    assert notes["same_as"] == {"double": "columns"}
    given = {name: array.dtype.name for name, array in arrays().items() if name in kept}
    assert notes["types"] == {name: given[name] for name in kept if KEPT[name] != given[name]}


def test_unpack_gives_back_every_bit_and_type():
    restored = unpack(*pack(arrays()))
    assert_same_bits(restored, arrays())
    assert restored["double"] is restored["columns"]


@pytest.mark.parametrize(
    ("value", "kept_type"),
    [
        (np.inf, "float16"),
        (65504.0, "float16"),
        (65520.0, "float32"),
        (2049.0, "float32"),
        (np.float64(np.float32(1e-9)), "float32"),
        (1e-9, "float64"),
        (-1e300, "float64"),
        (np.nan, "float64"),
    ],
)
def test_pack_looks_at_the_last_value_too(value, kept_type):
    array = np.zeros(10_000)
    array[-1] = value
    kept, notes = pack({"a": array})
    assert kept["a"].dtype == kept_type
    assert unpack(kept, notes)["a"].tobytes() == array.tobytes()


def test_pack_leaves_small_arrays_alone_and_notes_nothing():
    small = {"a": np.zeros(500), "b": np.zeros(500)}
    kept, notes = pack(small)
    assert notes == {}
    assert_same_bits(kept, small)


def test_pack_zeros_of_other_sign_are_not_the_same():
    kept, notes = pack({"a": np.zeros(N), "b": np.full(N, -0.0)})
    assert "same_as" not in notes
    assert np.signbit(unpack(kept, notes)["b"]).all()


def test_bundle_of_packed_arrays_reads_as_it_was_written_and_is_the_same_again(tmp_path):
    document = {"settings": {"seed": 0}}
    path = write_bundle(tmp_path, document, arrays())
    stored = read_bundle(path)
    assert_same_bits(stored.arrays, arrays())
    assert stored.document == {"schema_version": 3, **document}
    assert write_bundle(tmp_path / "again", stored.document, stored.arrays).name == path.name
    on_disk = load_file(path / "arrays.safetensors")
    assert {name: array.dtype.name for name, array in on_disk.items()} == KEPT


def test_bundle_of_the_version_before_reads_as_it_is_and_is_written_packed(tmp_path):
    (tmp_path / "old").mkdir()
    save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays().items()}, tmp_path / "old" / "arrays.safetensors"
    )
    (tmp_path / "old" / "guard.json").write_text('{"schema_version": 2}')
    stored = read_bundle(sealed(tmp_path / "old"))
    assert stored.document == {"schema_version": 2}
    assert_same_bits(stored.arrays, arrays())
    again = read_bundle(write_bundle(tmp_path, stored.document, stored.arrays))
    assert again.document == {"schema_version": 3}
    assert_same_bits(again.arrays, arrays())


def sealed(folder: Path) -> Path:
    """Write the sums of what lies in a folder, and name it by them."""
    sums = "".join(
        f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("arrays.safetensors", "guard.json")
    ).encode()
    (folder / "SHA256SUMS").write_bytes(sums)
    return folder.rename(folder.with_name(hashlib.sha256(sums).hexdigest()))


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ([], "notes must be objects"),
        ({"types": []}, "notes must be objects"),
        ({"codec": {}}, "unknown notes 'codec'"),
        ({"types": {"nothing": "float64"}}, "there is no array 'nothing'"),
        ({"types": {"half": "float16"}}, "of float16 cannot stand for one of 'float16'"),
        ({"types": {"half": "int64"}}, "of float16 cannot stand for one of 'int64'"),
        ({"types": {"half": "object"}}, "of float16 cannot stand for one of 'object'"),
        ({"types": {"half": ["float64"]}}, "of float16 cannot stand for one of "),
        ({"types": {"double": "float32"}}, "there is no array 'double'"),
        ({"types": {"columns": "float32"}}, "of float64 cannot stand for one of 'float32'"),
        ({"same_as": {"half": "columns"}}, "array 'half' cannot be the same as 'columns'"),
        ({"same_as": {"double": "double"}}, "array 'double' cannot be the same as 'double'"),
        ({"same_as": {"double": "nothing"}}, "array 'double' cannot be the same as 'nothing'"),
        ({"same_as": {"double": ["columns"]}}, "array 'double' cannot be the same as "),
    ],
)
def test_read_bundle_with_notes_that_fit_no_arrays_is_refused(tmp_path, notes, message):
    path = write_bundle(tmp_path, {}, arrays())
    document = json.loads((path / "guard.json").read_text())
    (path / "guard.json").write_text(json.dumps({**document, "packing": notes}))
    with pytest.raises(BundleError, match=rf"arrays\.safetensors cannot be read \(.*{message}"):
        read_bundle(sealed(path))
