"""Bundles on disk: whole or not there, never believed unverified; and the pointer to the one in use."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save as save_safetensors

from guard.errors import BundleError
from guard.storage.bundle import SCHEMA_VERSION, BundleStore, read_bundle, write_bundle

DOCUMENT = {"settings": {"seed": 0}, "class_names": None}


def arrays(value: float = 1.0) -> dict[str, np.ndarray]:
    return {
        "scores": np.full(5, value),
        "labels": np.arange(4),
        "features": np.arange(6, dtype=np.float32).reshape(2, 3)[:, ::2],  # not contiguous
        "mask": np.array([True, False]),
        "empty": np.empty((0, 3)),
    }


def reseal(folder: Path) -> Path:
    """Rewrite SHA256SUMS to fit what lies in the folder, as an attacker would, and rename the folder to match."""
    sums = "".join(
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n"
        for file in sorted(folder.iterdir())
        if file.name != "SHA256SUMS"
    ).encode()
    (folder / "SHA256SUMS").write_bytes(sums)
    target = folder.with_name(hashlib.sha256(sums).hexdigest())
    folder.rename(target)
    return target


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path, DOCUMENT, arrays())


# --- write and read ---


def test_write_bundle_then_read_gives_back_document_and_arrays(bundle):
    stored = read_bundle(bundle)
    assert stored.document == {"schema_version": SCHEMA_VERSION, **DOCUMENT}
    assert stored.arrays.keys() == arrays().keys()
    for name, array in arrays().items():
        np.testing.assert_array_equal(stored.arrays[name], array, strict=True)


def test_write_bundle_names_the_folder_by_the_digest_of_its_sums(bundle):
    sums = (bundle / "SHA256SUMS").read_bytes()
    assert bundle.name == hashlib.sha256(sums).hexdigest() == read_bundle(bundle).digest
    assert sums.decode() == "".join(
        f"{hashlib.sha256((bundle / name).read_bytes()).hexdigest()}  {name}\n"
        for name in ("arrays.safetensors", "guard.json")
    )
    assert sorted(file.name for file in bundle.iterdir()) == ["SHA256SUMS", "arrays.safetensors", "guard.json"]


def test_write_bundle_leaves_a_readable_folder_and_no_temporary_one(bundle):
    assert bundle.stat().st_mode & 0o777 == 0o755
    assert [entry.name for entry in bundle.parent.iterdir()] == [bundle.name]


def test_write_bundle_same_content_twice_is_one_folder_written_once(bundle):
    before = (bundle / "guard.json").stat()
    reordered = dict(reversed(arrays().items()))
    assert write_bundle(bundle.parent, dict(reversed(DOCUMENT.items())), reordered) == bundle
    assert (bundle / "guard.json").stat().st_mtime_ns == before.st_mtime_ns
    assert len(list(bundle.parent.iterdir())) == 1


def test_write_bundle_other_content_is_another_folder(bundle):
    assert write_bundle(bundle.parent, DOCUMENT, arrays(1.0 + 1e-15)) != bundle
    assert write_bundle(bundle.parent, {**DOCUMENT, "more": 1}, arrays()) != bundle


def test_write_bundle_over_a_damaged_one_mends_it(bundle):
    (bundle / "arrays.safetensors").write_bytes(b"")
    assert write_bundle(bundle.parent, DOCUMENT, arrays()) == bundle
    read_bundle(bundle)


def test_write_bundle_below_a_file_raises_bundle_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match=r"^bundle cannot be written to .*file: .* Is it a folder"):
        write_bundle(tmp_path / "file", DOCUMENT, arrays())


def test_write_bundle_disk_full_raises_bundle_error_and_leaves_nothing(tmp_path, monkeypatch):
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BundleError, match="No space left on device"):
        write_bundle(tmp_path, DOCUMENT, arrays())
    assert list(tmp_path.iterdir()) == []


def test_write_bundle_another_writer_comes_first_is_no_error(tmp_path, monkeypatch):
    """The other bundle appears after the check that it is not there, just before the rename."""
    other = write_bundle(tmp_path / "other", DOCUMENT, arrays())
    rename = Path.rename

    def beaten(path: Path, target: Path) -> Path:
        shutil.copytree(other, target)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", beaten)
    target = write_bundle(tmp_path / "root", DOCUMENT, arrays())
    assert read_bundle(target).digest == other.name
    assert [entry.name for entry in (tmp_path / "root").iterdir()] == [other.name]


def test_write_bundle_many_writers_at_once_agree_on_one_folder(tmp_path):
    for trial in range(5):
        root = tmp_path / str(trial)
        with ThreadPoolExecutor(8) as pool:
            written = list(pool.map(lambda _, root=root: write_bundle(root, DOCUMENT, arrays()), range(16)))
        assert len(set(written)) == 1
        read_bundle(written[0])
        assert [entry.name for entry in root.iterdir()] == [written[0].name]


_WRITE_AND_HANG = """
import os, sys, time
import numpy as np
from guard.storage.bundle import write_bundle
fsync, calls = os.fsync, []
def hang(handle):
    calls.append(handle)
    fsync(handle)
    if len(calls) == int(sys.argv[2]):
        print("hanging", flush=True)
        time.sleep(60)
os.fsync = hang
write_bundle(sys.argv[1], {"a": 1}, {"x": np.arange(3)})
"""


@pytest.mark.parametrize("call", [1, 3, 4], ids=["first file", "last file", "folder, before the rename"])
def test_write_bundle_killed_before_the_rename_leaves_nothing_visible(tmp_path, call):
    writer = subprocess.Popen(
        [sys.executable, "-c", _WRITE_AND_HANG, str(tmp_path), str(call)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    with writer.stdout:
        assert writer.stdout.readline() == "hanging\n"
        writer.send_signal(signal.SIGKILL)
        writer.wait(timeout=10)
    left = [entry.name for entry in tmp_path.iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".writing-")
    assert BundleStore(tmp_path).entries() == []
    target = write_bundle(tmp_path, {"a": 1}, {"x": np.arange(3)})  # and the next writer is not hindered
    assert [entry.digest for entry in BundleStore(tmp_path).entries()] == [target.name]


# --- what is refused ---


def truncate(folder: Path) -> None:
    data = (folder / "arrays.safetensors").read_bytes()
    (folder / "arrays.safetensors").write_bytes(data[:-1])


def flip_a_byte(folder: Path) -> None:
    data = bytearray((folder / "arrays.safetensors").read_bytes())
    data[-3] ^= 1
    (folder / "arrays.safetensors").write_bytes(data)


def edit_the_document(folder: Path) -> None:
    text = (folder / "guard.json").read_text()
    (folder / "guard.json").write_text(text.replace('"seed": 0', '"seed": 1'))


def edit_the_sums(folder: Path) -> None:
    with (folder / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  extra\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"is damaged: arrays\.safetensors \(\d+ bytes\) does not match SHA256SUMS\. Restore it"),
        (flip_a_byte, r"is damaged: arrays\.safetensors \(\d+ bytes\) does not match SHA256SUMS\. Restore it"),
        (edit_the_document, r"is damaged: guard\.json \(\d+ bytes\) does not match SHA256SUMS\."),
        (edit_the_sums, r"is damaged: its SHA256SUMS has digest [0-9a-f]{12}\. Restore it from a copy"),
        (lambda folder: (folder / "guard.json").unlink(), r": guard\.json cannot be read \(No such file"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), r" is not a bundle: SHA256SUMS cannot be read \(No such"),
    ],
)
def test_read_bundle_damaged_is_refused_with_what_is_wrong(bundle, damage: Callable[[Path], None], message):
    damage(bundle)
    with pytest.raises(BundleError, match=message) as error:
        read_bundle(bundle)
    assert "\n" not in str(error.value)


def test_read_bundle_missing_folder_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere is not a bundle: SHA256SUMS cannot be read"):
        read_bundle(tmp_path / "nowhere")


def test_read_bundle_renamed_folder_is_refused(bundle):
    renamed = bundle.rename(bundle.with_name("0" * 64))
    with pytest.raises(BundleError, match=rf"^bundle 000000000000 is damaged: .*{bundle.name[:12]}\."):
        read_bundle(renamed)


@pytest.mark.parametrize("name", ["extra.py", "../outside", "/etc/hostname", ""])
def test_read_bundle_sums_that_list_another_file_are_refused(bundle, name):
    with (bundle / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    digest = hashlib.sha256((bundle / "SHA256SUMS").read_bytes()).hexdigest()
    resealed = bundle.rename(bundle.with_name(digest))
    with pytest.raises(
        BundleError,
        match=rf"^bundle {digest[:12]} lists a file that does not belong there: '.*'\. Restore it",
    ):
        read_bundle(resealed)


def test_read_bundle_symlink_in_place_of_a_file_is_refused(bundle, tmp_path):
    outside = tmp_path / "outside.json"
    (bundle / "guard.json").rename(outside)
    (bundle / "guard.json").symlink_to(outside)
    with pytest.raises(
        BundleError, match=r"guard\.json cannot be read \(it is a symbolic link\)\. Check the file and its rights\.$"
    ):
        read_bundle(bundle)


def test_read_bundle_sums_that_leave_a_file_out_are_refused(bundle):
    (bundle / "arrays.safetensors").unlink()
    with pytest.raises(BundleError, match=r"must hold guard\.json and arrays\.safetensors, lists \['guard\.json'\]"):
        read_bundle(reseal(bundle))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("guard.json", b'{"schema_version": 1}', r"has schema version 1, this program reads 2 and 3\. Upgrade"),
        ("guard.json", b"{}", r"guard\.json has no schema_version or is no JSON\. Fit again\.$"),
        ("guard.json", b"not json", r"guard\.json has no schema_version or is no JSON\. Fit again\.$"),
        ("guard.json", b"\xff\xfe\x00", r"guard\.json has no schema_version or is no JSON\. Fit again\.$"),
        ("guard.json", b"[1]", r"guard\.json has no schema_version or is no JSON\. Fit again\.$"),
        ("arrays.safetensors", b"not tensors", r"arrays\.safetensors cannot be read \("),
        ("arrays.safetensors", b"", r"arrays\.safetensors cannot be read \("),
    ],
)
def test_read_bundle_resealed_around_bad_contents_is_refused(bundle, name, data, message):
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=message):
        read_bundle(reseal(bundle))


def test_read_bundle_resealed_with_other_arrays_reads_them_as_another_bundle(bundle):
    """Sealing is no signature: what protects a bundle is that its digest is named, so the digest must change."""
    (bundle / "arrays.safetensors").write_bytes(save_safetensors({"x": np.ones(1)}))
    resealed = reseal(bundle)
    assert resealed.name != bundle.name
    assert read_bundle(resealed).arrays.keys() == {"x"}


# --- the store ---


@pytest.fixture
def store(tmp_path: Path) -> BundleStore:
    return BundleStore(tmp_path)


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    """Digests of three bundles, oldest first."""
    digests = []
    for age, value in ((300, 1.0), (200, 2.0), (100, 3.0)):
        path = write_bundle(tmp_path, DOCUMENT, arrays(value))
        os.utime(path, (time.time() - age, time.time() - age))
        digests.append(path.name)
    return digests


def test_store_entries_are_newest_first_and_leave_out_damaged_ones(store, three):
    first, second, third = three
    store.activate(second)
    assert [(entry.digest, entry.is_active) for entry in store.entries()] == [
        (third, False),
        (second, True),
        (first, False),
    ]
    assert store.entries()[0].document["settings"] == {"seed": 0}
    flip_a_byte(store.root / third)
    assert [entry.digest for entry in store.entries()] == [second, first]


def test_store_of_a_missing_folder_is_empty(tmp_path):
    store = BundleStore(tmp_path / "nowhere")
    assert store.entries() == []
    assert store.active_digest() is None


def test_store_active_path_without_active_bundle_says_what_to_run(store):
    with pytest.raises(BundleError, match=r"^no bundle is active in .*\. Run `guard fit`, or `guard bundle activate"):
        store.active_path()


BAD_DIGESTS = (
    "../outside",
    "..",
    "",
    "0" * 63,
    "0" * 65,
    "G" * 64,
    "/etc/passwd",
    f"{'0' * 64}/..",
    "\x00" * 64,
    "٠" * 64,
)


@pytest.mark.parametrize("text", BAD_DIGESTS)
def test_store_active_that_is_no_digest_is_refused_everywhere_and_can_be_mended(store, three, text, tmp_path):
    """A folder beside the bundles that `../outside` would lead to is a whole bundle, and must not count."""
    store.activate(three[0])
    (store.root / "ACTIVE").write_text(text)
    for ask in (store.active_digest, store.active_path):
        with pytest.raises(BundleError, match=r"ACTIVE is damaged: it holds no digest\. Run `guard bundle activate"):
            ask()
    for use in (store.folder_of, store.activate):
        with pytest.raises(BundleError, match="a bundle is named by the 64 hex digits of its digest"):
            use(text)
    assert store.known_active() is None
    assert len(store.entries()) == 3
    store.activate(three[1])
    assert store.active_digest() == three[1]


@pytest.mark.parametrize("text", ["../outside\n", f"{'0' * 63}/\n", "x\n"])
def test_store_history_lines_that_are_no_digest_are_never_gone_back_to(store, three, text):
    store.activate(three[0])
    store.activate(three[1])
    (store.root / "HISTORY").write_text(f"{three[0]}\n{text}{three[1]}\n")
    assert store.previous_digest() == three[0]
    assert store.roll_back() == three[0]


STRANGE = {
    "link": lambda path: path.symlink_to("/etc/hostname"),
    "link to nothing": lambda path: path.symlink_to("nothing"),
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "huge": lambda path: (path.touch(), os.truncate(path, 2**40)),
}


@pytest.mark.parametrize("name", ["ACTIVE", "HISTORY"])
@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_store_pointer_that_is_no_small_plain_file_is_refused_and_not_waited_for(store, three, name, make):
    store.activate(three[0])
    (store.root / name).unlink()
    make(store.root / name)
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(it (is a|has more)"):
        _ = store.active_digest() if name == "ACTIVE" else store.previous_digest()


@pytest.mark.parametrize("name", ["SHA256SUMS", "guard.json", "arrays.safetensors"])
@pytest.mark.parametrize("make", STRANGE.values(), ids=STRANGE.keys())
def test_read_bundle_file_that_is_no_plain_file_is_refused_and_not_waited_for(bundle, name, make):
    (bundle / name).unlink()
    make(bundle / name)
    with pytest.raises(BundleError, match=rf"{name} cannot be read \(it (is a|has more)"):
        read_bundle(bundle)


def test_read_bundle_folder_that_is_a_link_is_refused(bundle, tmp_path):
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / bundle.name
    link.symlink_to(bundle)
    with pytest.raises(BundleError, match=r"is a symbolic link, which is not followed"):
        read_bundle(link)


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_write_bundle_is_readable_and_nobody_elses_to_write_whatever_the_umask(tmp_path, umask):
    old = os.umask(umask)
    try:
        bundle = write_bundle(tmp_path / "root", DOCUMENT, arrays())
        BundleStore(tmp_path / "root").activate(bundle.name)
    finally:
        os.umask(old)
    for path in (bundle, *bundle.iterdir(), tmp_path / "root" / "ACTIVE", tmp_path / "root" / "HISTORY"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644)
    assert (tmp_path / "root").stat().st_mode & 0o022 == 0


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("guard.json", b"[" * 200_000),
        ("guard.json", b'{"schema_version": ' + b"9" * 5000 + b"}"),
        (
            "arrays.safetensors",
            b"\x40\0\0\0\0\0\0\0" + b'{"w":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'.ljust(64) + b"\0\0",
        ),
        ("arrays.safetensors", b"\xff" * 64),
    ],
)
def test_read_bundle_resealed_around_hostile_contents_is_a_bundle_error(bundle, name, data):
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError):
        read_bundle(reseal(bundle))


def test_store_activate_writes_one_line_that_is_readable_and_leaves_no_other_file(store, three):
    store.activate(three[0])
    assert (store.root / "ACTIVE").read_text() == f"{three[0]}\n"
    assert (store.root / "ACTIVE").stat().st_mode & 0o777 == 0o644
    assert store.active_path() == store.root / three[0]
    assert {entry.name for entry in store.root.iterdir()} == {*three, "ACTIVE", "HISTORY"}


def test_store_activate_twice_is_one_line_of_history(store, three):
    store.activate(three[0])
    store.activate(three[0])
    assert (store.root / "HISTORY").read_text() == f"{three[0]}\n"


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, shutil.rmtree])
def test_store_activate_damaged_is_refused_and_changes_nothing(store, three, damage):
    store.activate(three[0])
    damage(store.root / three[1])
    with pytest.raises(BundleError):
        store.activate(three[1])
    assert store.active_digest() == three[0]
    assert (store.root / "HISTORY").read_text() == f"{three[0]}\n"


@pytest.mark.parametrize(
    ("activated", "rolled_back_to"),
    [
        ([0, 1], [0]),
        ([0, 1, 2], [1, 0]),
        ([0, 1, 0], [1, 0]),
        ([0, 0, 1, 1], [0]),
        ([0], []),
        ([0, 0], []),
        ([], []),
    ],
)
def test_store_roll_back_goes_back_step_by_step_and_then_refuses(store, three, activated, rolled_back_to):
    for index in activated:
        store.activate(three[index])
    for index in rolled_back_to:
        assert store.roll_back() == three[index]
        assert store.active_digest() == three[index]
    before = store.active_digest()
    with pytest.raises(
        BundleError,
        match=r"^nothing to roll back to: no other bundle was active in .* before\. See `guard bundle list`\.$",
    ):
        store.roll_back()
    assert store.active_digest() == before


def test_store_activate_after_a_roll_back_starts_a_new_branch(store, three):
    store.activate(three[0])
    store.activate(three[1])
    store.roll_back()
    store.activate(three[2])
    assert store.roll_back() == three[0]


def test_store_roll_back_to_a_damaged_bundle_is_refused_and_changes_nothing(store, three):
    store.activate(three[0])
    store.activate(three[1])
    truncate(store.root / three[0])
    with pytest.raises(BundleError, match="is damaged"):
        store.roll_back()
    assert store.active_digest() == three[1]


@contextmanager
def crash_at_second_write(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the power fail between the two files that `activate` and `roll_back` replace."""
    replace, calls = BundleStore._replace, []

    def once(store: BundleStore, name: str, text: str) -> None:
        calls.append(name)
        if len(calls) > 1:
            raise KeyboardInterrupt
        replace(store, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(BundleStore, "_replace", once)
        yield


def test_store_crash_in_activate_leaves_the_old_one_and_roll_back_never_goes_forward(store, three, monkeypatch):
    store.activate(three[0])
    store.activate(three[1])
    with crash_at_second_write(monkeypatch), pytest.raises(KeyboardInterrupt):
        store.activate(three[2])
    assert store.active_digest() == three[1]
    assert store.roll_back() == three[0]


def test_store_crash_in_roll_back_leaves_it_done_and_the_next_goes_further_back(store, three, monkeypatch):
    for digest in three:
        store.activate(digest)
    with crash_at_second_write(monkeypatch), pytest.raises(KeyboardInterrupt):
        store.roll_back()
    assert store.active_digest() == three[1]
    assert store.roll_back() == three[0]


def test_store_crash_in_activate_then_another_activation_forgets_the_one_that_never_was(store, three, monkeypatch):
    store.activate(three[0])
    with crash_at_second_write(monkeypatch), pytest.raises(KeyboardInterrupt):
        store.activate(three[1])
    store.activate(three[2])
    assert store.roll_back() == three[0]


def test_store_resolve_needs_six_hex_digits_of_one_bundle(store, three):
    assert store.resolve(three[0][:6]) == store.root / three[0]
    assert store.resolve(three[0]) == store.root / three[0]
    for bad in ("", three[0][:5], "xyzxyz", "../../etc", "*" * 6, three[0][:6].upper() + "G"):
        with pytest.raises(BundleError, match=r"^a bundle is named by at least 6 hex digits of its digest, got '"):
            store.resolve(bad)


def test_store_resolve_of_none_or_several_says_how_many(store, three):
    twin = three[0][:-1] + ("0" if three[0][-1] != "0" else "1")
    (store.root / twin).mkdir()
    with pytest.raises(BundleError, match=r"^2 bundles in .* start with '[0-9a-f]{8}'\. See `guard bundle list`\.$"):
        store.resolve(three[0][:8])
    missing = "0123456789ab"
    assert not any(digest.startswith(missing) for digest in three)
    with pytest.raises(BundleError, match=r"^0 bundles in "):
        store.resolve(missing)


def test_store_active_is_never_seen_half_written(store, three):
    """One thread swaps, another reads: each answer is one whole digest."""
    store.activate(three[0])
    seen = set()
    with ThreadPoolExecutor(1) as pool:
        swaps = pool.submit(lambda: [store.activate(three[step % 2]) for step in range(40)])
        while not swaps.done():
            seen.add(store.active_digest())
        swaps.result()
    assert seen <= set(three[:2])


def test_document_is_sorted_json_that_people_can_read(bundle):
    text = (bundle / "guard.json").read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
