"""Keys that outlive the server: the file that keeps them, the agent that puts them in place, and a server with both."""

from __future__ import annotations

import json
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from test_torchserve_server import NETWORK

from guard.cli import run
from guard.errors import ServerError
from guard.resources import resource_path
from guard.torchserve.archives.archive import make_archive
from guard.torchserve.client import predict
from guard.torchserve.keys import KINDS, agent_option, kept_keys
from guard.torchserve.server import TorchServeInstance


def test_keys_are_made_once_for_their_owner_alone_and_rotate_on_demand(tmp_path: Path) -> None:
    file = tmp_path / "new" / "keys.json"
    first = kept_keys(file)
    assert set(first) == set(KINDS)
    assert len(set(first.values())) == 3
    assert file.stat().st_mode & 0o777 == 0o600
    assert kept_keys(file) == first
    second = kept_keys(file, rotate=True)
    assert not set(first.values()) & set(second.values())
    assert kept_keys(file) == second
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"inference": {"key": "short"}}', "\x00"])
def test_damaged_key_file_is_named_and_replaced_on_demand(tmp_path: Path, text: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(ServerError, match=r"keys.json holds no keys .*--rotate-keys"):
        kept_keys(file)
    assert kept_keys(file, rotate=True) == kept_keys(file)


def test_key_with_a_line_break_or_what_a_properties_file_changes_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    for key in ("a" * 20 + "\nAPI=b", "a" * 20 + "\\u0041", "a" * 20 + " b"):
        file.write_text(json.dumps({kind: {"key": key} for kind in KINDS}))
        file.chmod(0o600)
        with pytest.raises(ServerError, match="a key must be 16 to 200 letters"):
            kept_keys(file)


def test_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    kept_keys(file)
    file.chmod(0o644)
    with pytest.raises(ServerError, match=r"others can read: its mode must be 600. chmod 600 it\."):
        kept_keys(file)
    with pytest.raises(ServerError, match="cannot be used: "):
        kept_keys(file / "below")


def test_agent_is_told_of_the_keys_in_a_private_file(tmp_path: Path) -> None:
    option = agent_option(dict.fromkeys(KINDS, "k" * 20), tmp_path)
    path = Path(option.rpartition("=")[2])
    assert "k" * 20 not in option  # everybody can see command lines
    assert path.stat().st_mode & 0o077 == 0


def test_agent_is_what_its_source_says(tmp_path: Path) -> None:
    if shutil.which("javac") is None:
        pytest.skip("there is no javac here")
    subprocess.run(["javac", "--release", "11", "-d", tmp_path, resource_path("SteadyKeys.java")], check=True)
    with zipfile.ZipFile(resource_path("steady_keys.jar")) as packed:
        classes = {name: packed.read(name) for name in packed.namelist() if name.endswith(".class")}
    assert classes == {path.name: path.read_bytes() for path in tmp_path.glob("*.class")}


def test_rotation_without_kept_keys_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--rotate-keys"]) == 2
    assert "--rotate-keys needs keys that are kept." in capsys.readouterr().err


@pytest.mark.torchserve
@pytest.mark.usefixtures("quick_workers")
def test_server_has_the_same_keys_at_the_next_start_until_they_are_rotated(tmp_path: Path) -> None:
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "image_handler.json").write_text('{"architecture": "network:make", "input_shape": [1, 28, 28]}')
    names: dict[str, object] = {}
    exec(NETWORK, names)
    torch.save(names["make"]().state_dict(), tmp_path / "weights.pt")  # type: ignore[operator]
    make_archive(
        "tiny",
        model_store=tmp_path,
        handler=resource_path("image_handler.py"),
        weights=tmp_path / "weights.pt",
        model_file=tmp_path / "network.py",
        extra_files=[tmp_path / "image_handler.json"],
    )
    body = json.dumps([[0] * 28] * 28).encode()
    made = kept_keys(tmp_path / "keys.json")  # as a first start makes them
    keys = [[made["inference"], made["management"]]]
    for rotate in (False, True):
        options = {"work_dir": tmp_path / "run", "key_file": tmp_path / "keys.json", "rotate_keys": rotate}
        with TorchServeInstance(tmp_path, **options) as server:  # type: ignore[arg-type]
            server.wait_ready(120)
            keys.append([server.token("inference"), server.token("management")])
            assert keys[-1] == [kept_keys(tmp_path / "keys.json")[kind] for kind in ("inference", "management")]
            assert (server.work_dir / "key_file.json").stat().st_mode & 0o077 == 0
            allowed = [predict(server.inference_url, "tiny", body, token=key).status == 200 for key, _ in keys]
            assert allowed == [key == keys[-1] for key in keys]
            assert server.worker_pids("tiny")
    assert keys[0] == keys[1]
    assert not set(keys[1]) & set(keys[2])
