"""The command that writes the suspect model for another server: `guard export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from guard.cli.model import open_model
from guard.cli.options import (
    Architecture,
    Bundles,
    ExtraFile,
    Handler,
    ModelFile,
    Preprocess,
    Settings,
    StateKey,
    Weights,
)
from guard.cli.output import progress_bar, say
from guard.errors import ConfigError, ExportError
from guard.extras import require
from guard.files import READABLE_FOLDER, put_in_place

if TYPE_CHECKING:
    from guard.cli.reading import Convert
    from guard.export.exporting import Format
    from guard.export.record import ExportRecord
    from guard.types import Float32Array

#: What servers take for a model's name; it becomes a folder.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_MOST_IMAGES = 256


def export(
    name: Annotated[str, typer.Argument(help="Name under which the other server will serve the model.")],
    weights: Weights,
    to: Annotated[Path, typer.Option(help="Folder of models, which gets one of that name.")] = Path("model_repository"),
    architecture: Architecture = None,
    state_key: StateKey = None,
    handler: Handler = None,
    model_file: ModelFile = None,
    extra_file: ExtraFile = None,
    bundles: Bundles = "bundles",
    digest: Annotated[
        str | None, typer.Option(help="Bundle whose layers are watched, by its first digits; default ACTIVE.")
    ] = None,
    output_format: Annotated[
        Literal["onnx", "torch-export", "both"], typer.Option("--format", help="What to write.")
    ] = "onnx",
    opset: Annotated[int | None, typer.Option(show_default="PyTorch's", help="ONNX opset, 18 or higher.")] = None,
    server: Annotated[
        Literal["triton", "mlserver", "none"], typer.Option(help="Also write what this server wants beside the file.")
    ] = "triton",
    images: Annotated[
        Path | None, typer.Option(help="Clean images to compare answers on; default: five that are drawn.")
    ] = None,
    preprocess: Preprocess = None,
    tolerance: Annotated[
        float, typer.Option(help="Largest difference that is taken, as a share of an output's greatest value.")
    ] = 1e-4,
    force: Annotated[bool, typer.Option("--force", help="Replace the files of that name.")] = False,
    settings: Settings = None,
) -> None:
    """Write the model for another server, features included.

    The file answers `logits` and one output per watched layer, `guard_features_0` and so on: what `guard proxy` asks
    the server for. It is run here, and compared with the network, before it gets its name.
    """
    from guard.config import load_config
    from guard.detection.pipeline import Guard
    from guard.export.exporting import FILES, new_record, write_models
    from guard.export.record import RECORD
    from guard.storage.stores import open_store

    if not _NAME.fullmatch(name):
        raise ConfigError(f"a model's name has letters, digits, dots, - and _ only, got {name!r}. Give another.")
    if not tolerance > 0:
        raise ConfigError(f"--tolerance must be above 0, got {tolerance}.")
    if opset is not None and opset < 18:
        raise ConfigError(f"--opset must be 18 or higher, got {opset}: PyTorch writes no older one.")
    kinds: list[Format] = ["onnx", "torch-export"] if output_format == "both" else [output_format]
    if server != "none" and "onnx" not in kinds:
        raise ConfigError(f"--server {server} runs the ONNX file. Add --format onnx, or take --server none.")
    if "onnx" in kinds:
        require("export")
    folder = to / name
    files = {kind: folder / "1" / FILES[kind] for kind in kinds}
    if not force and (there := [file for file in (*files.values(), folder / RECORD) if file.exists()]):
        raise ExportError(f"{there[0]} exists already. Name another, or replace it with --force.")
    config = load_config(settings)
    store = open_store(bundles)
    bundle = store.resolve(digest) if digest else store.active_path()
    model = open_model(weights, architecture, preprocess, handler, model_file, extra_file, "cpu", config, state_key)
    with model as (suspect, convert, _), progress_bar("exporting", share_known=False) as report:
        guard = Guard.load(bundle, suspect)
        record = new_record(guard, suspect, name)
        inputs = _inputs(images, convert, record.input_shape, as_bytes=handler is not None)
        folder.mkdir(mode=READABLE_FOLDER, parents=True, exist_ok=True)
        (folder / "1").mkdir(mode=READABLE_FOLDER, exist_ok=True)
        report("tracing the network", 0.0)
        found = write_models(record, suspect, files, opset=opset, images=inputs, tolerance=tolerance)
        for file, text in _server_files(folder, record, server).items():
            _write(file, text)
        _write(folder / RECORD, record.text())  # last: whoever finds it finds the rest
    for kind, (where, most) in found.items():
        compared = f"{len(inputs)} images" if inputs is not None else "inputs that were drawn"
        say(f"{files[kind]}: answers as the network does on {compared}; {where} differs most, by {most:.1g}")
    say(f"outputs         {', '.join(f'{name} ({n})' for name, n in record.outputs.items())}")
    say(f"next            serve {folder}, then: guard proxy --upstream URL --model {name} --exported {folder}")


def _inputs(path: Path | None, convert: Convert, shape: tuple[int, ...], *, as_bytes: bool) -> Float32Array | None:
    """Return clean images as the network takes them."""
    if path is None:
        return None
    from guard.cli.images import find_images
    from guard.cli.reading import in_channels_taken

    def fits(some: list[object]) -> None:
        if convert(some).shape[1:] != shape:
            raise ConfigError(f"--images {path}: the guard was fitted on inputs of shape {shape}. See --preprocess.")

    found = in_channels_taken(find_images(path, as_bytes=as_bytes), fits)
    inputs = convert([found.read(row) for row in range(min(len(found.names), _MOST_IMAGES))])
    if inputs.shape[1:] != shape:
        raise ConfigError(f"--images {path}: the guard was fitted on inputs of shape {shape}. See --preprocess.")
    return inputs


def _server_files(folder: Path, record: ExportRecord, server: str) -> dict[Path, str]:
    """Return text by file."""
    from guard.export.server_files import mlserver_settings, triton_config
    from guard.resources import resource_path

    if server == "triton":
        return {folder / "config.pbtxt": triton_config(record)}
    if server == "mlserver":
        runtime = resource_path("mlserver_onnx.py")
        settings = mlserver_settings(record, "./1/model.onnx", f"{runtime.stem}.OnnxModel")
        return {folder / "model-settings.json": settings, folder / runtime.name: runtime.read_text(encoding="utf-8")}
    return {}


def _write(file: Path, text: str) -> None:
    unfinished = file.with_name(f".unfinished-{file.name}")
    unfinished.write_text(text, encoding="utf-8")
    put_in_place(unfinished, file)
