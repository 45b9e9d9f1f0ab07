"""What one TorchServe is started with: its settings, its environment, its command line."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from guard.errors import DatasetError, ServerError
from guard.extras import require
from guard.processes.ports import LOOPBACK, Ports, grpc_address
from guard.resources import resource_path
from guard.torchserve.archives.archive import Archive
from guard.torchserve.java import find_java, java_executable


def server_settings(
    ports: Ports,
    *,
    model_store: Path,
    archives: Mapping[str, Archive],
    token_authorization: bool,
    metrics_config: Path | None,
    per_model: Mapping[str, int],
) -> dict[str, str]:
    """Return the shipped `config.properties`, filled in for one instance."""
    if metrics_config is None:
        metrics_config = _shipped_metrics()
    elif not metrics_config.is_file():
        raise ServerError(f"metrics_config {metrics_config} does not exist. Name a YAML file, or leave it out.")
    # The settings of a model count only under the version that its manifest names.
    models = {
        name: {archive.version: {"defaultVersion": True, "marName": archive.file, **per_model}}
        for name, archive in archives.items()
    }
    settings = _read_properties(resource_path("config.properties").read_text(encoding="utf-8"))
    settings |= {
        "inference_address": f"http://{LOOPBACK}:{ports.inference}",
        "management_address": f"http://{LOOPBACK}:{ports.management}",
        "metrics_address": f"http://{LOOPBACK}:{ports.metrics}",
        "grpc_inference_address": grpc_address(),
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_address": grpc_address(),
        "grpc_management_port": str(ports.grpc_management),
        "disable_token_authorization": str(not token_authorization).lower(),
        "model_store": str(model_store),
        "allowed_urls": f"file://{re.escape(str(model_store)).replace(',', '.')}/.*",  # a comma would start another
        "load_models": ",".join(f"{name}={archive.file}" for name, archive in archives.items()),
        "models": json.dumps(models),
    }
    if metrics_config is not None:
        settings["metrics_config"] = str(metrics_config.absolute())
    return settings


def format_properties(settings: Mapping[str, str]) -> str:
    """Return settings as the text of a Java .properties file, in ASCII."""
    return "".join(f"{key}={_escape(value)}\n" for key, value in settings.items())


def server_environment(temp_dir: Path, log_dir: Path, more: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the server and its workers: ours, less what would override the settings."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("TS_") and name not in ("LOG_LOCATION", "METRICS_LOCATION")
    }
    return {
        **kept,
        "JAVA_HOME": str(find_java()),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)]),
        "TEMP": str(temp_dir),
        "TMPDIR": str(temp_dir),
        "LOG_LOCATION": str(log_dir),
        "METRICS_LOCATION": str(log_dir),
        # One thread per worker: two were slower, at three times the CPU.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        **more,
    }


def java_command(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Return the command line of the server; its workers run on this process's Python.

    Raises
    ------
    ServerError
        If there is no Java, or no TorchServe.
    """
    home = torchserve_home()
    command = [str(java_executable(find_java())), f"-Dmodel_server_home={home}"]
    command += ["-XX:-UsePerfData"]  # or a file per server stays in the shared temporary folder
    command += [*options, "-cp", str(home / "ts" / "frontend" / "*"), "org.pytorch.serve.ModelServer"]
    return [*command, "--python", sys.executable, *arguments]


def torchserve_home() -> Path:
    """Return the folder that holds TorchServe's `ts` package; it is located, not imported, for that loads torch.

    Raises
    ------
    MissingExtraError
        If TorchServe is not installed.
    ServerError
        If what is installed under its name has no server.
    """
    require("torchserve")
    spec = importlib.util.find_spec("ts")
    if spec is None or spec.origin is None or not (Path(spec.origin).parent / "frontend").is_dir():
        raise ServerError("the module 'ts' is no TorchServe. Install the torchserve package, version 0.12.")
    return Path(spec.origin).resolve().parent.parent


def _shipped_metrics() -> Path | None:
    try:
        return resource_path("metrics.yaml")
    except DatasetError:
        return None  # TorchServe then takes its own


def _read_properties(text: str) -> dict[str, str]:
    settings = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            settings[key.strip()] = value.strip()
    return settings


def _escape(value: str) -> str:
    """Escape what Java's reader of .properties files would change: backslashes, and all that is not ASCII."""
    units = value.replace("\\", "\\\\").encode("utf-16-be", "surrogatepass")
    codes = [int.from_bytes(units[i : i + 2], "big") for i in range(0, len(units), 2)]
    return "".join(chr(code) if 32 <= code < 127 else f"\\u{code:04x}" for code in codes)
