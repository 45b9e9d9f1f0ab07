"""`guard purify`: write a copy of the model from which a backdoor was pruned or trained away."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.model import class_list, open_model, read_labelled, tell_passed_over
from guard.cli.options import (
    Architecture,
    ClassNames,
    Device,
    ExtraFile,
    Handler,
    LabelledImages,
    Logits,
    ModelFile,
    Preprocess,
    Settings,
    StateKey,
    Weights,
    check_output_folder,
)
from guard.cli.output import print_warning, progress_bar, say
from guard.errors import ConfigError, DataError, GuardError
from guard.files import READABLE_FILE, replace_file

if TYPE_CHECKING:
    from guard.backups.purified_twin import Purified, PurifyReport

WEIGHTS, CARD, PICTURE = "twin.safetensors", "twin.json", "twin.png"
#: Options, and the methods that take them.
_TAKEN_BY = {
    "iterations": ("anp",),
    "epsilon": ("anp",),
    "threshold": ("anp",),
    "norm": ("norm-pruning",),
    "scope": ("norm-pruning",),
    "share": ("norm-pruning",),
    "allowed_accuracy_loss": ("anp", "fine-pruning"),
    "epochs": ("rtll",),
}
#: A loss of clean accuracy that a person is warned of.
_LARGE_LOSS = 0.02


def purify(
    weights: Weights,
    images: LabelledImages,
    architecture: Architecture = None,
    state_key: StateKey = None,
    logits: Logits = None,
    preprocess: Preprocess = None,
    handler: Handler = None,
    model_file: ModelFile = None,
    extra_file: ExtraFile = None,
    device: Device = "cpu",
    class_names: ClassNames = None,
    method: Annotated[str, typer.Option(help="anp, norm-pruning, fine-pruning or rtll.")] = "anp",
    iterations: Annotated[int | None, typer.Option(help="anp: steps of the masks; default 2000.")] = None,
    epsilon: Annotated[
        float | None, typer.Option(help="anp: how far the adversary may push a neuron; default 0.4.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="anp: neurons with a smaller mask are pruned; default 0.2.")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="norm-pruning: l1 or l2; default l1.")] = None,
    scope: Annotated[
        str | None, typer.Option(help="norm-pruning: layer-wise, global or last-layer; default layer-wise.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(help="norm-pruning: share of the filters that goes; default 0.6.")
    ] = None,
    allowed_accuracy_loss: Annotated[
        float | None,
        typer.Option(
            help="fine-pruning, and anp: prune as much as costs at most this share of right answers; "
            "default of fine-pruning 0.04."
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="rtll: passes over the images; default 200.")] = None,
    seed: Annotated[int, typer.Option(help="Of the images held out, and of training.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder for the twin, its card and the picture.")] = Path(
        "build/purified"
    ),
    settings: Settings = None,
) -> None:
    """Write a purified twin of your model.

    Prunes or retrains a copy on clean images, and measures it on a fifth of them that was held out. The model itself
    is never changed. Whether a backdoor is gone only triggered images could tell.
    """
    from guard.backups.purified_twin import purify as purify_model
    from guard.config import load_config

    config = load_config(settings)
    given = {
        "iterations": iterations,
        "epsilon": epsilon,
        "threshold": threshold,
        "norm": norm,
        "scope": scope,
        "share": share,
        "allowed_accuracy_loss": allowed_accuracy_loss,
        "epochs": epochs,
    }
    chosen = _settings(method, {name: value for name, value in given.items() if value is not None})
    if seed < 0:
        raise ConfigError(f"--seed must be >= 0, got {seed}.")
    check_output_folder(output)
    model = open_model(
        weights, architecture, preprocess, handler, model_file, extra_file, device, config, state_key, logits
    )
    with model as (suspect, convert, _), progress_bar("reading images") as report:
        found, inputs = read_labelled(suspect, images, convert, handler, class_list(class_names), report)
        purified = purify_model(
            suspect.module,
            inputs,
            found.labels,
            method,
            settings=chosen,
            seed=seed,
            progress=lambda done: report(f"purifying by {method}", done),
        )
    _write(purified, output, architecture, found.class_names)
    _tell(purified.report, output)
    tell_passed_over(found.passed_over)
    if (loss := purified.report.clean_accuracy_before - purified.report.clean_accuracy_after) > _LARGE_LOSS:
        print_warning(
            f"the twin gets {100 * loss:.1f} points fewer right than the model. Give more images, or prune less."
        )


def _settings(method: str, given: dict[str, Any]) -> Any:
    from guard.backups.purified_twin import METHODS

    if method not in METHODS:
        raise ConfigError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    for name in given:
        if method not in _TAKEN_BY[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with --method {' or '.join(_TAKEN_BY[name])}, got {method!r}. "
                "Leave it out."
            )
    if method == "anp" and "allowed_accuracy_loss" in given:
        if "threshold" in given:
            raise ConfigError("--threshold and --allowed-accuracy-loss both say how much is pruned. Give one of them.")
        given = {**given, "threshold": None}
    try:
        return METHODS[method][0](**given)
    except DataError as error:
        raise ConfigError(f"--method {method}: {error}") from None


def _write(purified: Purified, output: Path, architecture: str | None, class_names: list[str] | None) -> None:
    """Write the three files, each as a whole."""
    from importlib.metadata import version

    from safetensors.torch import save

    from guard.cli.purify_picture import draw

    card = {
        "architecture": architecture,
        "class_names": class_names,
        **purified.report.as_dict(),
        "version": version("backdoor-guard"),
    }
    state = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in purified.twin.state_dict().items()}
    picture = io.BytesIO()
    draw(purified.report, class_names, picture)
    files = {
        WEIGHTS: save(state),
        CARD: json.dumps(card, indent=2, allow_nan=False).encode() + b"\n",
        PICTURE: picture.getvalue(),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            replace_file(output / name, data, READABLE_FILE)
    except OSError as error:
        raise GuardError(
            f"the twin cannot be written to {output}: {error.strerror or error}. Is there room, and may you write?"
        ) from error


def _tell(done: PurifyReport, output: Path) -> None:
    """Say what a method did, and which files were written."""
    say(f"method          {done.method}: {done.pruned} of {done.units} units pruned, {done.seconds:.0f} s")
    say(
        f"clean accuracy  {100 * done.clean_accuracy_before:.1f} % -> {100 * done.clean_accuracy_after:.1f} % "
        f"of {done.held_out} images held out"
    )
    for name in (WEIGHTS, CARD, PICTURE):
        say(f"wrote {output / name}")
    for note in done.notes:
        say(f"note: {note}")
