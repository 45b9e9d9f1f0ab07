"""`guard assess`: what would the guard catch on this model?"""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.model import class_list, open_model, read_pixels, tell_passed_over, try_once
from guard.cli.options import (
    Architecture,
    ClassNames,
    Device,
    ExtraFile,
    Handler,
    LabelledImages,
    Logits,
    Mode,
    ModelFile,
    Preprocess,
    Rate,
    Settings,
    StateKey,
    Weights,
    check_output_folder,
)
from guard.cli.output import plain_table, print_table, print_warning, progress_bar, say, tell
from guard.errors import GuardError

if TYPE_CHECKING:
    from rich.table import Table

    from guard.lab.assess import AssessmentReport

_TRIGGER_HELP = (
    "Trigger to plant; may be repeated. Default: pattern, white-square, blend, sig, wanet, gotham; others: "
    "single-pixel, corner-pixels, moving-square, box-and-circle, bpp, frequency, adap-blend, all-to-all."
)


def assess(
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
    false_positive_rate: Rate = None,
    mode: Mode = None,
    trigger: Annotated[list[str] | None, typer.Option(metavar="<str>", help=_TRIGGER_HELP)] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often everything is drawn anew.")] = 3,
    seed: Annotated[int | None, typer.Option(show_default="0", help="The first seed.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, show_default="30", help="Of the first fine-tuning; two more have 3 times as many."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the report and the picture.")] = Path("build/assess"),
    settings: Settings = None,
) -> None:
    """Estimate what the guard would catch on your model.

    Plants known triggers in copies of it, fits a guard to each copy, and counts what it catches. The model itself is
    never changed. Real attackers may use other triggers: an estimate, not a promise.
    """
    from guard.cli.assess_picture import draw
    from guard.cli.images import find_labelled
    from guard.cli.reading import in_channels_taken
    from guard.config import load_config
    from guard.lab.assess import DEFAULT_ATTACKS, PlantingSettings, check_names
    from guard.lab.assess import assess as assess_model

    config = load_config(settings, false_positive_rate=false_positive_rate, mode=mode, seed=seed)
    names = tuple(trigger or DEFAULT_ATTACKS)
    check_names(names)
    check_output_folder(output)
    model = open_model(
        weights, architecture, preprocess, handler, model_file, extra_file, device, config, state_key, logits
    )
    with model as (suspect, convert, _), progress_bar("reading images") as report:
        found = find_labelled(images, class_names=class_list(class_names))
        if handler is None:
            found = in_channels_taken(found, lambda some: suspect.activations(convert(some)), at_once=2)
        pixels, prepare = read_pixels(images, found, convert, handler, report)
        few = slice(None, None, max(1, len(pixels) // 100))
        try_once(suspect, prepare(pixels[few]), found.labels[few])
        result = assess_model(
            suspect,
            pixels,
            found.labels,
            config,
            attacks=names,
            seeds=range(config.seed, config.seed + seeds),
            planting=PlantingSettings() if epochs is None else PlantingSettings(epochs=epochs),
            preprocess=prepare,
            progress=report,
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "report.json").write_text(json.dumps(result.as_dict(), indent=2, allow_nan=False) + "\n")
    (output / "report.csv").write_text(_csv(result))
    draw(result, output / "assess.png")
    _say_result(result)
    for name in ("report.json", "report.csv", "assess.png"):
        say(f"wrote {output / name}")
    tell_passed_over(found.passed_over)
    _tell_doubts(result)
    if not any(trial.planted for trial in result.trials):
        raise GuardError(
            "no trigger could be planted in any copy, so nothing is known of what the guard would catch. "
            "Raise --epochs, or give more images."
        )


def _say_result(result: AssessmentReport) -> None:
    """Print the table, and what its columns are."""
    from guard.lab.assess import CAVEAT

    print_table(_table(result))
    split, asked_for = result.split, result.requested_false_positive_rate
    say("")
    say(
        f"{result.clean_images} clean images, of which the model gets {100 * result.clean_accuracy:.1f} % right; "
        f"per seed {split.planting + split.monitoring} plant, {split.fitting} fit the guard, {split.testing} test"
    )
    say(f"caught: share of triggered images that are flagged; false alarms asked for: {asked_for:g}")
    say("odd: share of the same images flagged where no trigger was planted")
    say(CAVEAT)


def _tell_doubts(result: AssessmentReport) -> None:
    """Say which triggers were left out or could not be planted, and what else makes the figures worth less."""
    for name, why in result.skipped.items():
        tell(f"{name} left out: {why}")
    for line in result.warnings:
        print_warning(line)
    for trial in result.trials:
        if trial.why_not:
            print_warning(f"{trial.attack}, seed {trial.seed}: not planted, so it says nothing: {trial.why_not}.")


def _csv(result: AssessmentReport) -> str:
    rows = [trial.row() for trial in result.trials]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: round(v, 6) if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return buffer.getvalue()


def _table(result: AssessmentReport) -> Table:
    table = plain_table(
        "trigger", "planted", "attack success", "with guard", "caught", "AUROC", "odd", "false alarms", "clean accuracy"
    )
    for summary in result.summaries():
        table.add_row(
            "none (control)" if summary.is_control else summary.attack,
            "" if summary.is_control else f"{summary.planted} of {summary.trials}",
            _rate(summary.attack_success_unguarded),
            _rate(summary.attack_success_guarded, summary.worst_attack_success_guarded),
            _rate(summary.true_positive_rate, summary.worst_true_positive_rate),
            _rate(summary.auroc, summary.worst_auroc),
            _rate(summary.flagged_without_backdoor),
            _rate(summary.realised_false_positive_rate, summary.worst_false_positive_rate),
            f"{summary.clean_accuracy_before:.3f} -> {summary.clean_accuracy_after:.3f}",
        )
    return table


def _rate(mean: float | None, worst: float | None = None) -> str:
    if mean is None:
        return ""
    return f"{mean:.3f}" if worst is None else f"{mean:.3f} ({worst:.3f})"
