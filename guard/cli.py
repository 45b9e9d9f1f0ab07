"""The command line: `guard fit | inspect | archive | serve | bundle | demo | doctor`."""

from __future__ import annotations

import csv
import importlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from guard.errors import ConfigError, DataError, GuardError

if TYPE_CHECKING:
    from guard.pipeline import Guard
    from guard.types import Float32Array, Verdict

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Guard a suspect image classifier at inference time."
)
bundle_app = typer.Typer(no_args_is_help=True, help="Look at bundles, and choose which one serves.")
app.add_typer(bundle_app, name="bundle")
console = Console()
errors = Console(stderr=True)


class OutputFormat(StrEnum):
    """How `guard inspect` prints."""

    table = "table"
    csv = "csv"
    json = "json"


Weights = Annotated[Path, typer.Option(help="Weights of the suspect model: safetensors, or a state dict.")]
Architecture = Annotated[str, typer.Option(help="Function that builds the network, as package.module:factory.")]
Bundles = Annotated[Path, typer.Option(help="Folder of bundles.")]
Settings = Annotated[
    Path | None, typer.Option("--settings", help="Settings file; default is ./guard.toml if there is one.")
]
Rate = Annotated[float | None, typer.Option(help="Share of clean inputs that may be flagged.")]
Preprocess = Annotated[
    str | None,
    typer.Option(
        help="module:function that turns float32 images (n, channels, h, w) in [0, 1] into what the model takes."
    ),
]


def main() -> None:
    """Run the command line; every expected failure is one line on stderr and status 1."""
    sys.path.insert(0, str(Path.cwd()))  # so that --architecture finds a module of the working folder
    try:
        app(standalone_mode=True)
    except GuardError as error:
        errors.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True, highlight=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[str, float], None]]:
    """Show a bar on stderr; yields a function that takes a line of text and the share done."""
    columns = (TextColumn("[progress.description]{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda text, share: bar.update(task, description=text, completed=share)


@app.command()
def fit(
    weights: Weights,
    architecture: Architecture,
    images: Annotated[
        Path, typer.Option(help="Clean labelled images: a .npz, or a folder with one sub-folder per class.")
    ],
    bundles: Bundles = Path("bundles"),
    false_positive_rate: Rate = None,
    mode: Annotated[str | None, typer.Option(help="calibrated or paper.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of folds and training.")] = None,
    action: Annotated[str | None, typer.Option(help="observe, flag, relabel or block.")] = None,
    image_noise_std: Annotated[float | None, typer.Option(help="Also learn from copies with this much noise.")] = None,
    preprocess: Preprocess = None,
    split: Annotated[
        str | None, typer.Option(help="Layer whose input is the split; found by itself if left out.")
    ] = None,
    depth: Annotated[
        list[str] | None, typer.Option(help="Earlier layer to watch as well; may be repeated, up to 3.")
    ] = None,
    class_names: Annotated[str | None, typer.Option(help="Names of the classes, separated by commas.")] = None,
    activate: Annotated[bool, typer.Option(help="Make the new bundle the active one.")] = True,
    settings: Settings = None,
) -> None:
    """Fit a guard on clean images and write it as a bundle."""
    from guard.bundle import BundleStore
    from guard.config import load_config
    from guard.pipeline import Guard
    from guard.suspect import SuspectModel

    config = load_config(
        settings,
        false_positive_rate=false_positive_rate,
        mode=mode,
        seed=seed,
        action=action,
        image_noise_std=image_noise_std,
    )
    suspect = SuspectModel.load(weights, architecture, split=split, depths=depth or None)
    inputs, labels, _ = _read_images(images, preprocess)
    if labels is None:
        raise DataError(f"{images} has no labels: use one sub-folder per class, or a .npz with 'labels'.")
    names = [name.strip() for name in class_names.split(",")] if class_names else None
    with progress_bar("fitting") as report:
        guard = Guard.fit(suspect, inputs, labels, config, class_names=names, progress=report)
    folder = guard.save(bundles)
    if activate:
        BundleStore(bundles).activate(folder.name)
    points = suspect.split_points
    assert points is not None  # fit has located them
    accuracy = float((guard.reference.predicted_labels == labels).mean())
    console.print(f"bundle          {folder}", soft_wrap=True, highlight=False)
    console.print(f"clean images    {len(labels)}, of which the suspect model gets {100 * accuracy:.1f} % right")
    console.print(
        f"split           {points.split}; earlier depths: {', '.join(points.depths) or 'none'}", highlight=False
    )
    console.print(
        f"false positives {guard.realised_false_positive_rate:.4f} of clean images "
        f"(asked for {config.false_positive_rate:g}, measured out of fold)"
    )


@app.command()
def inspect(
    images: Annotated[Path, typer.Argument(help="A .npz, an image, or a folder of images.")],
    weights: Weights,
    architecture: Architecture,
    bundles: Bundles = Path("bundles"),
    digest: Annotated[
        str | None, typer.Option(help="Bundle to use, by the first digits of its digest; default ACTIVE.")
    ] = None,
    false_positive_rate: Rate = None,
    preprocess: Preprocess = None,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="How to print.")] = OutputFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write to; default is the terminal.")] = None,
    settings: Settings = None,
) -> None:
    """Judge images offline."""
    from guard.bundle import BundleStore
    from guard.config import SERVING_SETTINGS, load_settings
    from guard.pipeline import Guard
    from guard.suspect import SuspectModel

    store = BundleStore(bundles)
    guard = Guard.load(
        store.resolve(digest) if digest else store.active_path(), SuspectModel.load(weights, architecture)
    )
    chosen = load_settings(settings, false_positive_rate=false_positive_rate)
    guard = guard.with_config(**{name: value for name, value in chosen.items() if name in SERVING_SETTINGS})
    inputs, _, names = _read_images(images, preprocess)
    verdicts = _inspect_in_parts(guard, inputs)
    text = _formatted(verdicts, names, output_format)
    if output is not None:
        output.write_text(text)
    elif output_format is OutputFormat.table:
        console.print(_table(verdicts, names))
    else:
        sys.stdout.write(text)
    flagged = sum(verdict.is_poisoned for verdict in verdicts)
    errors.print(f"{len(verdicts)} images, {flagged} flagged", highlight=False)


def _inspect_in_parts(guard: Guard, inputs: Float32Array, size: int = 256) -> list[Verdict]:
    verdicts: list[Verdict] = []
    with progress_bar("inspecting") as report:
        for start in range(0, len(inputs), size):
            verdicts += guard.inspect(inputs[start : start + size])
            report(f"{len(verdicts)} of {len(inputs)} images", len(verdicts) / len(inputs))
    return verdicts


def _rows(verdicts: list[Verdict], names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "image": name,
            "label": verdict.label,
            "final_label": verdict.final_label,
            "is_poisoned": verdict.is_poisoned,
            "p_value": verdict.p_value,
            "score": verdict.score,
            "action": verdict.action,
            "reason": verdict.reason,
            **({f"score:{key}": value for key, value in verdict.detector_scores.items()}),
        }
        for name, verdict in zip(names, verdicts, strict=True)
    ]


def _formatted(verdicts: list[Verdict], names: list[str], output_format: OutputFormat) -> str:
    rows = _rows(verdicts, names)
    if output_format is OutputFormat.json:
        return json.dumps(rows, indent=2) + "\n"
    if output_format is OutputFormat.csv:
        import io

        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=list(rows[0]) if rows else ["image"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return buffer.getvalue()
    wide = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    wide.print(_table(verdicts, names))
    return wide.export_text()


def _table(verdicts: list[Verdict], names: list[str]) -> Table:
    table = Table()
    for heading in ("image", "label", "verdict", "p-value", "reason"):
        table.add_column(heading, overflow="fold")
    for name, verdict in zip(names, verdicts, strict=True):
        word = "[bold red]poisoned[/]" if verdict.is_poisoned else "clean"
        table.add_row(_plain(name), str(verdict.label), word, f"{verdict.p_value:.4f}", verdict.reason)
    return table


@app.command()
def archive(
    name: Annotated[str, typer.Argument(help="Name under which the model will be served.")],
    weights: Weights,
    bundles: Bundles = Path("bundles"),
    architecture: Annotated[str | None, typer.Option(help="package.module:factory; for the image handler.")] = None,
    handler: Annotated[
        str | None, typer.Option(help="Your own handler file, or a TorchServe name; default: the image handler.")
    ] = None,
    model_file: Annotated[Path | None, typer.Option(help="TorchServe's --model-file, for your own handler.")] = None,
    extra_file: Annotated[list[Path] | None, typer.Option(help="Further file or folder; may be repeated.")] = None,
    mean: Annotated[float | None, typer.Option(help="Image handler: subtracted after scaling to [0, 1].")] = None,
    std: Annotated[float | None, typer.Option(help="Image handler: divided by after that.")] = None,
    model_store: Annotated[Path, typer.Option(help="Folder that archives go to.")] = Path("model_store"),
    version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    action: Annotated[str | None, typer.Option(help="observe, flag, relabel or block.")] = None,
    false_positive_rate: Rate = None,
    failure_mode: Annotated[str | None, typer.Option(help="closed or open.")] = None,
    rows_per_request: Annotated[str | None, typer.Option(help="1 or any.")] = None,
    verdict_in_body: Annotated[bool | None, typer.Option(help="Also put the verdict into JSON answers.")] = None,
    pin: Annotated[bool, typer.Option(help="Serve the embedded bundle only; do not follow ACTIVE.")] = False,
    force: Annotated[bool, typer.Option(help="Replace an archive of that name.")] = False,
    settings: Settings = None,
) -> None:
    """Put the model and its guard into a TorchServe archive."""
    from guard.bundle import BundleStore, read_bundle
    from guard.config import load_settings
    from guard.serving.guarded import ServedModel, make_guarded_archive

    rows: Any = int(rows_per_request) if rows_per_request and rows_per_request.isdigit() else rows_per_request
    chosen = load_settings(
        settings,
        action=action,
        false_positive_rate=false_positive_rate,
        failure_mode=failure_mode,
        rows_per_request=rows,
        verdict_in_body=verdict_in_body,
    )
    bundle = BundleStore(bundles).active_path()
    document = read_bundle(bundle).document
    model = ServedModel(
        weights,
        handler=Path(handler) if handler and handler.endswith(".py") else handler,
        architecture=architecture,
        input_shape=tuple(document["input_shape"] or ()),
        image_settings={"mean": mean, "std": std, "class_names": document["class_names"]},
        model_file=model_file,
        extra_files=tuple(extra_file or ()),
        version=version,
    )
    path = make_guarded_archive(
        name,
        model,
        bundle,
        model_store=model_store,
        bundles=None if pin else bundles,
        settings=chosen,
        force=force,
    )
    console.print(str(path), soft_wrap=True, highlight=False)


@app.command()
def serve(
    models: Annotated[list[str] | None, typer.Argument(help="Archives to serve, without .mar; default all.")] = None,
    model_store: Annotated[Path, typer.Option(help="Folder of the archives.")] = Path("model_store"),
    port: Annotated[int, typer.Option(help="Inference port; management and metrics take the next two.")] = 8080,
    workers: Annotated[int, typer.Option(help="Worker processes per model.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Largest batch.")] = 8,
    max_batch_delay_ms: Annotated[int, typer.Option(help="How long to wait for a batch to fill.")] = 1,
    token: Annotated[bool, typer.Option("--token/--no-token", help="Ask callers for a key.")] = True,
    work_dir: Annotated[Path | None, typer.Option(help="Folder of logs and keys; default: a temporary one.")] = None,
    ready_timeout: Annotated[float, typer.Option(help="Seconds until the models must be ready.")] = 120.0,
) -> None:
    """Start TorchServe on loopback, wait until it answers, and stop it on Ctrl-C."""
    from guard.serving.torchserve import TorchServeInstance

    chosen: Any = {name: f"{name}.mar" for name in models} if models else "all"
    instance = TorchServeInstance(
        model_store,
        chosen,
        work_dir=work_dir,
        inference_port=port,
        management_port=port + 1,
        metrics_port=port + 2,
        workers=workers,
        batch_size=batch_size,
        max_batch_delay_ms=max_batch_delay_ms,
        token_authorization=token,
    )
    stopped = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stopped.set())
    with instance:
        with errors.status("starting TorchServe"):
            seconds = instance.wait_ready(ready_timeout)
        console.print(f"ready after {seconds:.0f} s on {instance.inference_url}; metrics on {instance.metrics_url}")
        if token:
            console.print(f"keys in {instance.work_dir / 'key_file.json'}", soft_wrap=True, highlight=False)
        for name in instance.models_served:
            console.print(curl_line(instance.inference_url, name, instance.token()), soft_wrap=True, highlight=False)
        console.print("Ctrl-C stops it.")
        while not stopped.wait(1.0):
            if not instance.is_alive():
                raise ConfigError(f"TorchServe has ended by itself. Its last lines:\n{instance.log_tail()}")
    console.print("stopped")


def curl_line(url: str, model: str, token: str | None, file: str = "image.png") -> str:
    """Return a command that asks for one prediction and shows the verdict's headers."""
    key = f' -H "Authorization: Bearer {token}"' if token else ""
    return f"curl -i{key} {url}/predictions/{model} -T {file}"


@bundle_app.command("list")
def bundle_list(bundles: Bundles = Path("bundles")) -> None:
    """List the bundles of a folder, newest first."""
    from guard.bundle import BundleStore

    table = Table()
    for heading in ("digest", "active", "mode", "rate", "realised", "clean images", "classes"):
        table.add_column(heading)
    for entry in BundleStore(bundles).entries():
        about = entry.document
        table.add_row(
            entry.digest[:12],
            "yes" if entry.is_active else "",
            about["settings"]["mode"],
            f"{about['settings']['false_positive_rate']:g}",
            f"{about['realised_false_positive_rate']:.4f}",
            str(about["clean_images"]),
            str(about["n_classes"]),
        )
    console.print(table)


@bundle_app.command("show")
def bundle_show(
    digest: Annotated[str, typer.Argument(help="First digits.")], bundles: Bundles = Path("bundles")
) -> None:
    """Verify one bundle and print what it says of itself, as JSON."""
    from guard.bundle import BundleStore, read_bundle

    stored = read_bundle(BundleStore(bundles).resolve(digest))
    sys.stdout.write(json.dumps({"digest": stored.digest, **stored.document}, indent=2) + "\n")


@bundle_app.command("activate")
def bundle_activate(
    digest: Annotated[str, typer.Argument(help="First digits.")], bundles: Bundles = Path("bundles")
) -> None:
    """Make a bundle the active one; servers take it within two seconds."""
    from guard.bundle import BundleStore

    store = BundleStore(bundles)
    folder = store.resolve(digest)
    store.activate(folder.name)
    console.print(f"active: {folder.name}", soft_wrap=True, highlight=False)


@bundle_app.command("rollback")
def bundle_rollback(bundles: Bundles = Path("bundles")) -> None:
    """Go back to the bundle that was active before."""
    from guard.bundle import BundleStore

    console.print(f"active: {BundleStore(bundles).roll_back()}", soft_wrap=True, highlight=False)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report, the picture and the artefacts.")] = Path(
        "build/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    false_positive_rate: Annotated[float, typer.Option(help="Share of clean inputs that may be flagged.")] = 0.05,
    keep_serving: Annotated[bool, typer.Option(help="Leave the server up until Ctrl-C, and print curl lines.")] = False,
) -> None:
    """Backdoor networks on real images, guard them, serve them, and print what the guard catches."""
    from guard.demo import run_demo

    run_demo(output, seed=seed, false_positive_rate=false_positive_rate, keep_serving=keep_serving, console=console)


@app.command()
def doctor() -> None:
    """Check this machine, and say how to mend what is missing."""
    from guard.doctor import checks

    bad = 0
    for check in checks():
        mark = "[green]ok  [/]" if check.ok else "[bold red]BAD [/]"
        console.print(f"{mark} {check.name}: {_plain(check.detail)}", soft_wrap=True, highlight=False)
        if not check.ok:
            bad += 1
            console.print(f"     -> {_plain(check.remedy)}", soft_wrap=True, highlight=False)
    if bad:
        raise SystemExit(1)


def _read_images(path: Path, preprocess: str | None) -> tuple[Float32Array, Any, list[str]]:
    """Return images as the model takes them, labels or None, and a name for each."""
    from guard.image_files import load_images

    images, labels, names = load_images(path)
    return images if preprocess is None else _preprocessed(images, preprocess), labels, names


def _preprocessed(images: Float32Array, name: str) -> Float32Array:
    module, _, function = name.partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--preprocess {name!r} must be module:function, and be importable: {error}.") from error
    result = np.asarray(call(images), dtype=np.float32)
    if result.ndim != 4 or len(result) != len(images):
        raise DataError(
            f"--preprocess {name!r} must return (n, channels, h, w) for {len(images)} images, got {result.shape}."
        )
    return result


if __name__ == "__main__":
    main()
