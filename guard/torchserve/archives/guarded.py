"""Put a suspect model and its guard into one archive, or the model alone, with the same handler in both."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guard.errors import ArchiveError
from guard.resources import resource_path
from guard.storage.bundle import read_bundle
from guard.storage.places import BundlePlace
from guard.torchserve.archives.archive import make_archive
from guard.torchserve.archives.contents import write_guard_files
from guard.torchserve.archives.sources import architecture_files, imported_files


@dataclass(frozen=True, slots=True)
class ServedModel:
    """How a model is served without a guard.

    Attributes
    ----------
    weights : Path
        safetensors file or state dict.
    handler : Path or str or None
        The user's own handler: a Python file with one class, or the name of one that TorchServe ships
        (`"base_handler"`). None = this package's image handler, which needs `architecture` and `input_shape`.
    architecture : str or None
        `"module:factory"`; its source goes into the archive unless it is installed in the Python that serves.
    input_shape : tuple of int or None
        (channels, height, width).
    image_settings : mapping
        More for the image handler: `mean`, `std`, `class_names`, `scale`, `resize`, `state_key`, `output`.
    model_file : Path or None
        TorchServe's `--model-file`, for a handler of the user's own.
    extra_files : sequence of Path
    version : str
    """

    weights: Path
    handler: Path | str | None = None
    architecture: str | None = None
    input_shape: tuple[int, ...] | None = None
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    model_file: Path | None = None
    extra_files: Sequence[Path] = ()
    version: str = "1.0"


def make_plain_archive(name: str, model: ServedModel, *, model_store: Path, force: bool = False) -> Path:
    """Write an archive that serves the model without a guard.

    Raises
    ------
    ArchiveError
        If something is missing, or the archive exists and `force` is not set.
    """
    with tempfile.TemporaryDirectory(prefix="guard-archive-") as scratch:
        handler, extra = _handler_and_files(model, Path(scratch))
        if isinstance(handler, str):
            raise ArchiveError(
                f"handler {handler!r} is TorchServe's own: pack the plain model with torch-model-archiver."
            )
        return make_archive(
            name,
            model_store=model_store,
            handler=handler,
            weights=model.weights,
            model_file=model.model_file,
            extra_files=extra,
            version=model.version,
            force=force,
        )


def make_guarded_archive(
    name: str,
    model: ServedModel,
    bundle: Path,
    *,
    model_store: Path,
    bundles: BundlePlace | None = None,
    settings: Mapping[str, Any] | None = None,
    example: Path | None = None,
    examples: Sequence[Path] = (),
    force: bool = False,
) -> Path:
    """Write an archive that serves the model behind its guard.

    Parameters
    ----------
    name : str
        Name under which it is served.
    model : ServedModel
    bundle : Path
        Folder of the bundle to start with; a copy goes into the archive.
    model_store : Path
    bundles : path-like, optional
        Folder or URL whose ACTIVE the server follows. Where the server cannot reach it, the copy serves.
    settings : mapping, optional
        Serving settings that override those of the bundle; others are left out, and the queue's URL above all.
    example : Path, optional
        The body of one request. Every worker sends it through the handler when it starts, and does not start if it gets
        no verdict, as when its forward pass makes several rows and `rows_per_request` is 1. Without an example that is
        found out by the first request, which fails.
    examples : sequence of Path, optional
        Bodies of further requests. With the example they are what a worker tries whether its handler keeps the requests
        of a batch apart; only those that hold one image each are of use. Without any, noise of the network's size is.
    force : bool
        Replace an archive of the same name.

    Raises
    ------
    ArchiveError, BundleError
        If something is missing or damaged, or the archive exists and `force` is not set.
    """
    read_bundle(bundle)
    with tempfile.TemporaryDirectory(prefix="guard-archive-") as scratch:
        folder = Path(scratch)
        handler, extra = _handler_and_files(model, folder)
        return make_archive(
            name,
            model_store=model_store,
            handler=resource_path("guard_handler.py"),
            weights=model.weights,
            model_file=model.model_file,
            extra_files=[
                *([handler] if isinstance(handler, Path) else []),
                *extra,
                *write_guard_files(
                    handler if isinstance(handler, str) else handler.name,
                    bundle,
                    bundles,
                    settings or {},
                    example,
                    examples,
                    folder,
                ),
            ],
            version=model.version,
            force=force,
            private=True,
        )


def _handler_and_files(model: ServedModel, scratch: Path) -> tuple[Path | str, list[Path]]:
    """Return the model's own handler and the files that it needs beside it."""
    extra = list(model.extra_files)
    if model.architecture is not None:
        extra += architecture_files(model.architecture)
    if model.handler is not None:
        files = [model.handler] if isinstance(model.handler, Path) else []
        files += [model.model_file] if model.model_file is not None else []
        return model.handler, [*extra, *imported_files([*files, *extra])]
    if model.architecture is None or model.input_shape is None:
        raise ArchiveError(
            "the image handler needs an architecture and an input shape. Name a handler of your own, or both."
        )
    known = {key: value for key, value in model.image_settings.items() if value is not None}
    about = {"architecture": model.architecture, "input_shape": list(model.input_shape), **known}
    (scratch / "image_handler.json").write_text(json.dumps(about, indent=2))
    return resource_path("image_handler.py"), [*extra, scratch / "image_handler.json"]
