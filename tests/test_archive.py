"""Archives: what goes in, under which name, and what is refused."""

from __future__ import annotations

import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from guard.errors import ArchiveError, GuardError, ServerError
from guard.torchserve.archives.archive import Archive, find_archives, make_archive
from guard.torchserve.archives.wrapping import open_archive


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """Arguments for a small archive; tests change one of them."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("handler.py", "weights.pt", "network.py"):
        (source / name).write_text(f"content of {name}")
    return {
        "model_store": tmp_path / "store",
        "handler": source / "handler.py",
        "weights": source / "weights.pt",
        "model_file": source / "network.py",
    }


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        return {name: packed.read(name) for name in packed.namelist()}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_archive_holds_manifest_and_files(parts: dict[str, Any], tmp_path: Path) -> None:
    settings = write(tmp_path / "model-config.yaml", "batchSize: 1")
    archive = make_archive("tiny", **parts, version="2.1", config_yaml=settings)
    assert archive == tmp_path / "store" / "tiny.mar"
    held = contents(archive)
    assert set(held) == {"MAR-INF/MANIFEST.json", "handler.py", "weights.pt", "network.py", "model-config.yaml"}
    manifest = json.loads(held["MAR-INF/MANIFEST.json"])
    assert manifest["model"] == {
        "modelName": "tiny",
        "serializedFile": "weights.pt",
        "handler": "handler.py",
        "modelFile": "network.py",
        "modelVersion": "2.1",
        "configFile": "model-config.yaml",
    }


def test_archive_of_plain_files_equals_the_stock_archivers(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from model_archiver.model_archiver_config import ModelArchiverConfig
    from model_archiver.model_packaging import generate_model_archive

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # it deletes <temporary folder>/<name>
    extra = write(tmp_path / "labels.json", "[]")
    config = ModelArchiverConfig(
        model_name="stock",
        handler=str(parts["handler"]),
        version="1.0",
        serialized_file=str(parts["weights"]),
        model_file=str(parts["model_file"]),
        extra_files=str(extra),
        export_path=str(tmp_path),
    )
    generate_model_archive(config)
    stock, ours = contents(tmp_path / "stock.mar"), contents(make_archive("stock", **parts, extra_files=[extra]))
    manifests = [json.loads(held.pop("MAR-INF/MANIFEST.json")) for held in (stock, ours)]
    for manifest in manifests:
        manifest.pop("createdOn")
    assert ours == stock
    assert manifests[0] == manifests[1]


def test_archive_bytes_do_not_depend_on_time_or_order(parts: dict[str, Any], tmp_path: Path) -> None:
    extras = [write(tmp_path / "a.json", "1"), write(tmp_path / "b.json", "2")]
    first = make_archive("tiny", **parts, extra_files=extras).read_bytes()
    for path in extras:
        path.touch()
    assert make_archive("tiny", **parts, extra_files=extras[::-1], force=True).read_bytes() == first


def test_archive_keeps_folders_whole(parts: dict[str, Any], tmp_path: Path) -> None:
    bundle = tmp_path / "bundles, *"
    write(bundle / "guard.json", "{}")
    write(bundle / "backups" / "weights.pt", "another")
    write(bundle / ".hidden" / "x", "kept")
    write(bundle / "__pycache__" / "x.pyc", "left out")
    held = contents(make_archive("tiny", **parts, extra_files=[bundle]))
    below = {name: data for name, data in held.items() if name.startswith("bundles, *")}
    assert below == {
        "bundles, */guard.json": b"{}",
        "bundles, */backups/weights.pt": b"another",
        "bundles, */.hidden/x": b"kept",
    }
    assert held["weights.pt"] == b"content of weights.pt"


@pytest.mark.parametrize("name", ["", "a/b", "../up", "a b", "-a", "ä", "a\n", "a,b=c"])
def test_archive_refuses_odd_names(parts: dict[str, Any], name: str) -> None:
    with pytest.raises(ArchiveError, match="archive name must match"):
        make_archive(name, **parts)


def test_archive_refuses_to_overwrite_without_force(parts: dict[str, Any]) -> None:
    archive = make_archive("tiny", **parts)
    parts["weights"].write_text("new")
    with pytest.raises(ArchiveError, match=r"tiny\.mar exists already\. Name another model, or replace it"):
        make_archive("tiny", **parts)
    assert contents(archive)["weights.pt"] == b"content of weights.pt"
    make_archive("tiny", **parts, force=True)
    assert contents(archive)["weights.pt"] == b"new"


@pytest.mark.parametrize("part", ["handler", "weights", "model_file"])
def test_archive_refuses_missing_files(parts: dict[str, Any], part: str) -> None:
    parts[part] = parts[part].with_name("nothing.py")
    with pytest.raises(ArchiveError, match=r"nothing\.py does not exist"):
        make_archive("tiny", **parts)


def test_archive_refuses_missing_extra_file(parts: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ArchiveError, match=r"extra file .*nothing does not exist"):
        make_archive("tiny", **parts, extra_files=[tmp_path / "nothing"])


def test_archive_refuses_two_files_of_one_name(parts: dict[str, Any], tmp_path: Path) -> None:
    twins = [write(tmp_path / "a" / "labels.json", "1"), write(tmp_path / "b" / "LABELS.json", "2")]
    with pytest.raises(ArchiveError, match="two files would be"):
        make_archive("tiny", **parts, extra_files=twins)
    with pytest.raises(ArchiveError, match=r"two files would be 'weights\.pt'"):
        make_archive("tiny", **parts, extra_files=[write(tmp_path / "c" / "weights.pt", "")])


@pytest.mark.parametrize("name", ["guard.py", "json.py", "torch/__init__.py", "ts/__init__.py"])
def test_archive_refuses_files_that_hide_a_module(parts: dict[str, Any], tmp_path: Path, name: str) -> None:
    extra = write(tmp_path / "x" / name, "")
    if extra.name == "__init__.py":
        extra = extra.parent
    with pytest.raises(ArchiveError, match="would hide the Python module"):
        make_archive("tiny", **parts, extra_files=[extra])


def test_archive_refuses_links_in_folders(parts: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(ArchiveError, match="symbolic link"):
        make_archive("tiny", **parts, extra_files=[folder])


def test_archive_that_fails_leaves_nothing(parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: zipfile.ZipFile, *_: object, **__: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "writestr", full_disk)
    with pytest.raises(ArchiveError, match="cannot be written: no space left"):
        make_archive("tiny", **parts)
    assert list(parts["model_store"].iterdir()) == []


def test_find_archives_reads_names_and_versions(parts: dict[str, Any]) -> None:
    make_archive("one", **parts, version="1.5")
    make_archive("two", **parts)
    store = parts["model_store"]
    assert find_archives(store) == {"one": Archive("one.mar", "one", "1.5"), "two": Archive("two.mar", "two", "1.0")}
    assert find_archives(store, {"other": "one.mar"}) == {"other": Archive("one.mar", "one", "1.5")}


def test_find_archives_refuses_what_cannot_be_served(parts: dict[str, Any], tmp_path: Path) -> None:
    store = parts["model_store"]
    with pytest.raises(ServerError, match="is not a folder"):
        find_archives(store)
    store.mkdir()
    with pytest.raises(ServerError, match="there is no model to serve"):
        find_archives(store)
    with pytest.raises(ServerError, match=r"archive .*no\.mar does not exist"):
        find_archives(store, {"a": "no.mar"})
    archive = make_archive("tiny", **parts)
    with pytest.raises(ServerError, match="names must match"):
        find_archives(store, {"a,b": "tiny.mar"})
    archive.with_name("copy.mar").write_bytes(archive.read_bytes())
    with pytest.raises(ServerError, match=r"copy\.mar and tiny\.mar, .* name, tiny\. .* tiny=tiny\.mar\.$"):
        find_archives(store)
    archive.write_bytes(b"PK nonsense")
    with pytest.raises(ServerError, match=r"tiny\.mar is damaged"):
        find_archives(store, {"tiny": "tiny.mar"})


def zipped_on_a_mac(archive: Path, target: Path, *, below: str = "") -> Path:
    """Pack an archive's files again as a Mac does: its notes beside every file, and what its Finder leaves."""
    notes = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "
    with (
        zipfile.ZipFile(archive) as packed,
        zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as again,
    ):
        again.writestr(f"{below}.DS_Store", b"\x00\x00\x00\x01Bud1")
        for name in packed.namelist():
            folder, _, file = f"{below}{name}".rpartition("/")
            again.writestr(f"{below}{name}", packed.read(name))
            again.writestr("/".join(part for part in ("__MACOSX", folder, f"._{file}") if part), notes)
    return target


def test_archive_that_a_mac_packed_again_is_opened(parts: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, parts["weights"])
    again = zipped_on_a_mac(make_archive("mine", **parts), tmp_path / "again.mar")
    with open_archive(again) as opened:
        assert opened.manifest.name == "mine"
        assert (opened.folder / "__MACOSX" / f"._{parts['weights'].name}").is_file()


def test_archive_whose_notes_of_a_mac_are_something_else_is_refused(parts: dict[str, Any], tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, parts["weights"])
    again = zipped_on_a_mac(make_archive("mine", **parts), tmp_path / "again.mar")
    with zipfile.ZipFile(again, "a") as packed:
        packed.writestr("__MACOSX/._more.pt", pickle.dumps(print))
    with pytest.raises(GuardError, match=r"__MACOSX/\._more\.pt"), open_archive(again):
        pass


def test_archive_that_holds_the_folder_and_not_its_files_says_so(parts: dict[str, Any], tmp_path: Path) -> None:
    again = zipped_on_a_mac(make_archive("mine", **parts), tmp_path / "again.mar", below="mine/")
    with (
        pytest.raises(ArchiveError, match=r"It has mine/MAR-INF/MANIFEST\.json: pack what is in that folder"),
        open_archive(again),
    ):
        pass
