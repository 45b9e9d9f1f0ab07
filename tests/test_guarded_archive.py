"""What goes into a guarded archive, and what is refused."""

from __future__ import annotations

import json
import tomllib
import zipfile
from pathlib import Path

import pytest
from serving_helpers import HANDLERS, Workshop, served_model

from guard import Guard
from guard.errors import ArchiveError, BundleError
from guard.lab.attacks import MnistCnn
from guard.resources import resource_path
from guard.storage.bundle import read_bundle
from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive, make_plain_archive
from guard.torchserve.archives.sources import architecture_files


@pytest.fixture(scope="module")
def workshop(fitted_guard: Guard, badnet: MnistCnn, tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(fitted_guard, badnet, tmp_path_factory.mktemp("archives"))


def names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as packed:
        return set(packed.namelist())


def test_guarded_archive_holds_the_model_its_handler_the_adapter_and_a_whole_bundle(
    workshop: Workshop, tmp_path: Path
) -> None:
    archive = workshop.guarded("dropping", start=False)
    digest = workshop.bundle.name
    assert names(archive) == {
        "MAR-INF/MANIFEST.json",
        "guard_handler.py",
        "guard_archive.json",
        "guard.toml",
        "dropping_handler.py",
        "stock_handler.py",
        "mnist_network.py",
        "weights.pt",
        f"{digest}/guard.json",
        f"{digest}/arrays.safetensors",
        f"{digest}/SHA256SUMS",
    }
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(tmp_path)
    assert read_bundle(tmp_path / digest).digest == digest
    manifest = json.loads((tmp_path / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    assert (manifest["handler"], manifest["modelFile"]) == ("guard_handler.py", "mnist_network.py")
    assert (tmp_path / "guard_handler.py").read_bytes() == resource_path("guard_handler.py").read_bytes()
    assert (tmp_path / "dropping_handler.py").read_bytes() == (HANDLERS / "dropping_handler.py").read_bytes()


def test_guarded_archive_keeps_serving_settings_bundles_folder_and_example(workshop: Workshop, tmp_path: Path) -> None:
    example = tmp_path / "one.png"
    example.write_bytes(b"png")
    archive = workshop.guarded(
        "image",
        start=False,
        bundles=tmp_path / "bundles",
        example=example,
        action="block",
        rows_per_request="any",
        verdict_in_body=True,
        n_neighbors=3,  # fixed when a guard is fitted: left out
    )
    with zipfile.ZipFile(archive) as packed:
        about = json.loads(packed.read("guard_archive.json"))
        settings = tomllib.loads(packed.read("guard.toml").decode())
        assert packed.read("guard_examples/0.png") == b"png"
    assert about == {
        "handler": "image_handler.py",
        "bundles": str(tmp_path / "bundles"),
        "embedded": workshop.bundle.name,
        "example": "guard_examples/0.png",
        "examples": ["guard_examples/0.png"],
    }
    assert settings.pop("verdict_detail") == "full"
    assert settings == {"action": "block", "rows_per_request": "any", "verdict_in_body": True}


def test_plain_archive_holds_no_guard(workshop: Workshop) -> None:
    assert names(workshop.plain("image", start=False)) == {
        "MAR-INF/MANIFEST.json",
        "image_handler.py",
        "image_handler.json",
        "weights.safetensors",
    }


def test_handler_by_name_is_guarded_but_not_packed_plain(workshop: Workshop, tmp_path: Path) -> None:
    archive = workshop.guarded("base_handler", start=False)
    assert "base_handler.py" not in names(archive)
    with zipfile.ZipFile(archive) as packed:
        assert json.loads(packed.read("guard_archive.json"))["handler"] == "base_handler"
    with pytest.raises(ArchiveError, match="torch-model-archiver"):
        make_plain_archive("plain", served_model("base_handler", workshop.module, tmp_path), model_store=tmp_path)


def test_guarded_archive_refuses_a_damaged_bundle_and_a_missing_example(workshop: Workshop, tmp_path: Path) -> None:
    model = served_model("image", workshop.module, tmp_path)
    with pytest.raises(BundleError, match="is not a bundle"):
        make_guarded_archive("m", model, tmp_path, model_store=tmp_path)
    with pytest.raises(ArchiveError, match=r"nothing\.png does not exist"):
        make_guarded_archive("m", model, workshop.bundle, model_store=tmp_path, example=tmp_path / "nothing.png")
    assert not list(tmp_path.glob("*.mar"))


def test_guarded_archive_refuses_to_overwrite_unless_forced(workshop: Workshop, tmp_path: Path) -> None:
    model = served_model("image", workshop.module, tmp_path)
    first = make_guarded_archive("m", model, workshop.bundle, model_store=tmp_path)
    data = first.read_bytes()
    with pytest.raises(ArchiveError, match="exists already"):
        make_guarded_archive("m", model, workshop.bundle, model_store=tmp_path)
    make_guarded_archive("m", model, workshop.bundle, model_store=tmp_path, force=True)
    assert first.read_bytes() == data  # the same contents are the same bytes


def test_image_handler_needs_architecture_and_shape(workshop: Workshop, tmp_path: Path) -> None:
    weights = served_model("image", workshop.module, tmp_path).weights
    with pytest.raises(ArchiveError, match="needs an architecture and an input shape"):
        make_plain_archive("m", ServedModel(weights), model_store=tmp_path)


def test_architecture_of_the_users_own_is_packed_and_installed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lone_network_file.py").write_text("")
    (tmp_path / "network_package").mkdir()
    (tmp_path / "network_package" / "__init__.py").write_text("")
    assert architecture_files("lone_network_file:make") == [tmp_path / "lone_network_file.py"]
    assert architecture_files("network_package.deep:make") == [tmp_path / "network_package"]
    assert architecture_files("guard.lab.attacks.networks:mnist_cnn") == []
    assert architecture_files("torch.nn:Linear") == []
    with pytest.raises(ArchiveError, match=r"'nowhere_to_be_found' .* is not found"):
        architecture_files("nowhere_to_be_found:make")
