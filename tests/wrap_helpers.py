"""Archives as the stock torch-model-archiver makes them, and hostile ones made by hand."""

from __future__ import annotations

import json
import struct
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from serving_helpers import HANDLERS

from guard.cli import run

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # it leaves its version file open
    from model_archiver.model_archiver_config import ModelArchiverConfig
    from model_archiver.model_packaging import generate_model_archive

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def save_images(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    """Write images (n, 1, h, w), float32 in [0, 1], as an .npz of 8-bit pixels."""
    np.savez(path, images=np.rint(images[:, 0] * 255).astype(np.uint8), labels=labels)
    return path


def stock_archive(
    folder: Path, name: str, handler: str, weights: Path, extra: Sequence[Path] = (), **more: str | None
) -> Path:
    """Run the stock archiver, with its default of packing."""
    options: dict[str, object] = {"model_file": str(HANDLERS / "mnist_network.py"), "version": "1.0", **more}
    folder.mkdir(exist_ok=True)
    config = ModelArchiverConfig(
        model_name=name,
        handler=handler,
        serialized_file=str(weights),
        extra_files=",".join(map(str, extra)) or None,
        export_path=str(folder),
        force=True,
        **options,  # type: ignore[arg-type]
    )
    with tempfile.TemporaryDirectory() as scratch, patch("tempfile.tempdir", scratch):  # it deletes folders there
        generate_model_archive(config)
    return folder / f"{name}.mar"


def classifier_archive(folder: Path, module: torch.nn.Module, name: str = "digits", **more: str | None) -> Path:
    """An image classifier as TorchServe's examples have it, with its class names and requirements."""
    source = folder / "source"
    source.mkdir(parents=True, exist_ok=True)
    torch.save(module.state_dict(), source / "weights.pt")
    (source / "index_to_name.json").write_text(json.dumps({str(label): word for label, word in enumerate(NAMES)}))
    (source / "requirements.txt").write_text("pillow\n")
    return stock_archive(
        folder / "store",
        name,
        str(HANDLERS / "classifier_handler.py"),
        source / "weights.pt",
        [source / "index_to_name.json"],
        requirements_file=str(source / "requirements.txt"),
        **more,
    )


def scaled_archive(folder: Path, module: torch.nn.Module, name: str = "scaled") -> Path:
    """A handler with everything of its own: helper package, settings, YAML, headers and statuses."""
    source = folder / "scaled-source"
    package = source / "extra" / "scaling"
    package.mkdir(parents=True)
    torch.save(module.state_dict(), source / "weights.pt")
    (package / "__init__.py").write_text("")
    (package / "helper.py").write_text("def scaled(image, scale):\n    return image / scale\n")
    (package / "scale.json").write_text('{"scale": 255}')
    (source / "model-config.yaml").write_text("batchSize: 1\nhandler:\n  word: digit\n")
    return stock_archive(
        folder / "store",
        name,
        str(HANDLERS / "scaled_handler.py"),
        source / "weights.pt",
        [source / "extra"],
        config_file=str(source / "model-config.yaml"),
        version="2.3",
    )


def guard_command(capfd, *arguments: object) -> tuple[int, str, str]:  # type: ignore[no-untyped-def]
    """Run one command; return its status and what it printed to stdout and stderr."""
    capfd.readouterr()
    status = run([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def contents(archive: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as packed:
        assert packed.testzip() is None
        return {name: packed.read(name) for name in packed.namelist()}


def rewritten(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """Copy an archive with some members changed, added, or left out (None)."""
    held = {**contents(source), **changes}
    with zipfile.ZipFile(target, "w") as packed:
        for name, data in held.items():
            if data is not None:
                packed.writestr(name, data)
    return target


def raw_zip(path: Path, *members: tuple[bytes, bytes, dict[str, int]]) -> Path:
    """Write a zip by hand: name, packed bytes, and fields of its headers that lie (see the defaults)."""
    body, listed = b"", b""
    for name, data, lies in members:
        fields = {"flags": 0x800, "method": 0, "crc": zlib.crc32(data), "size": len(data), "kind": 0o100644, **lies}
        where = len(body)
        sizes = (fields["crc"], len(data), fields["size"])
        local, gap = lies.get("local_size", fields["size"]), b"?" * lies.get("gap", 0)
        body += struct.pack("<4s5H3L2H", b"PK\3\4", 20, fields["flags"], fields["method"], 0, 33,
                            sizes[0], sizes[1], local, len(name), 0) + name + data + gap  # fmt: skip
        listed += struct.pack("<4s6H3L5H2L", b"PK\1\2", 0x314, 20, fields["flags"], fields["method"], 0, 33,
                              *sizes, len(name), 0, 0, 0, 0, fields["kind"] << 16, where) + name  # fmt: skip
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, len(members), len(members), len(listed), len(body), 0)
    path.write_bytes(body + listed + end)
    return path
