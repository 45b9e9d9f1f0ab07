"""The commands that need no server: `guard fit` and `guard inspect`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.model import class_list, open_model, read_labelled, read_pixels, tell_passed_over, tell_unserved
from guard.cli.options import (
    LOGITS_HELP,
    ActionName,
    AllowMissingClasses,
    Architecture,
    Bundles,
    ClassNames,
    Depths,
    Device,
    ExtraFile,
    FitAnyway,
    Handler,
    ImageNoise,
    LabelledImages,
    Mode,
    ModelFile,
    Preprocess,
    Rate,
    RateScope,
    Seed,
    ServedRate,
    ServedRateScope,
    Settings,
    Split,
    StateKey,
    Threads,
    Weights,
)
from guard.cli.output import OutputFormat, print_error, print_table, print_warning, progress_bar, say, tell, write
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.detection.pipeline import Guard
    from guard.lab.assess.backups import BackupRequest
    from guard.suspect.model import SuspectModel

_NO_BACKUP = "none"
_BACKUPS = (_NO_BACKUP, "auto", "defective", "anp", "norm-pruning")


def fit(
    weights: Weights,
    images: LabelledImages,
    architecture: Architecture = None,
    state_key: StateKey = None,
    preprocess: Preprocess = None,
    handler: Handler = None,
    model_file: ModelFile = None,
    extra_file: ExtraFile = None,
    device: Device = "cpu",
    class_names: ClassNames = None,
    allow_missing_classes: AllowMissingClasses = False,
    false_positive_rate: Rate = None,
    false_positive_rate_scope: RateScope = None,
    mode: Mode = None,
    seed: Seed = None,
    action: ActionName = None,
    image_noise_std: ImageNoise = None,
    split: Split = None,
    depth: Depths = None,
    logits: Annotated[str | None, typer.Option("--output", "--logits", help=LOGITS_HELP)] = None,
    backup: Annotated[
        str, typer.Option(help="Second opinion: defective, anp, norm-pruning, auto (the best of these), or none.")
    ] = _NO_BACKUP,
    backup_floor: Annotated[
        float, typer.Option(help="Share of planted triggers it must give their true label; else flag only.")
    ] = 0.7,
    backup_detects: Annotated[
        bool, typer.Option("--backup-detects", help="Let it detect as well; then it runs for every input.")
    ] = False,
    threads: Threads = None,
    bundles: Bundles = "bundles",
    activate: Annotated[bool, typer.Option(help="Make the new bundle the active one.")] = True,
    force: FitAnyway = False,
    settings: Settings = None,
) -> None:
    """Fit a guard on clean images and write it as a bundle."""
    from guard.cli.classes import check_classes, check_order, tell_scale
    from guard.cli.fitting import fit_guard, tell_fit, warn_of_fit
    from guard.cli.images import find_labelled
    from guard.config import load_config
    from guard.detection.pipeline import Guard
    from guard.lab.assess.backups import with_backup
    from guard.storage.stores import open_store

    config = load_config(
        settings,
        false_positive_rate=false_positive_rate,
        false_positive_rate_scope=false_positive_rate_scope,
        mode=mode,
        seed=seed,
        action=action,
        image_noise_std=image_noise_std,
    )
    request = _backup_request(backup, backup_floor, backup_detects)
    store = open_store(bundles)
    store.digests()  # a store that cannot be reached is told of before the long work
    loading = (weights, architecture, preprocess, handler, model_file, extra_file, device, config, state_key)
    model = open_model(*loading, logits, split, depth)
    with model as (suspect, convert, user), progress_bar("reading images") as report:
        names = class_list(class_names)
        found, inputs = read_labelled(suspect, images, convert, handler, names, report)
        n_classes = suspect.activations(inputs[:1]).logits.shape[1]
        found = check_classes(found, n_classes, allow_missing=allow_missing_classes)
        check_order(suspect, inputs, found, force=force)
        if handler is None:
            tell_scale(suspect, inputs, found.labels)
        guard = fit_guard(suspect, inputs, found, config, threads, report)
        guard = replace(
            guard,
            preprocessing=f"handler {handler}" if handler is not None else preprocess,
            batch_dependence=guard.batch_dependence or (user.batch_dependence if user is not None else ""),
            images_from=str(images.absolute()),
        )
        if request is not None:
            pictures = found if handler is None else find_labelled(images, class_names=names)
            pixels, prepare = read_pixels(images, pictures, convert, handler, report)
            guard = with_backup(guard, pixels, guard.reference_labels, request, preprocess=prepare, progress=report)
        folder = guard.save(store.root)
    Guard.load(folder)  # one that no server would take is not activated
    store.publish(folder.name)
    if activate:
        store.activate(folder.name)
    say(f"bundle          {store.address}/{folder.name}{' (active)' if activate else ''}")
    tell_fit(guard, found, _layers(suspect))
    if guard.recovery:
        _tell_backup(guard, backup_floor)
    say("next            guard inspect FILES judges images here; guard archive NAME makes an archive for a server")
    tell_unserved(found.files)
    warn_of_fit(guard, found)
    for content in suspect.contents:
        if content.problem:
            print_warning(f"{content.problem} (--split, --depth).")


def _backup_request(kind: str, floor: float, detects: bool) -> BackupRequest | None:
    """Return what is asked for as a second opinion; None for none."""
    from guard.lab.assess.backups import BackupRequest

    if kind not in _BACKUPS:
        raise ConfigError(f"--backup must be one of {', '.join(_BACKUPS)}, got {kind!r}.")
    if not 0.0 <= floor <= 1.0:
        raise ConfigError(f"--backup-floor must be in [0, 1], got {floor}.")
    if detects and kind == _NO_BACKUP:
        raise ConfigError("--backup-detects needs a backup. Name one with --backup.")
    return None if kind == _NO_BACKUP else BackupRequest(kind, floor, detects)


def _layers(suspect: SuspectModel) -> list[str]:
    """Return the lines that say where a guard looks."""
    points = suspect.split_points
    assert points is not None  # fit has located them
    split = f"split           {points.split}; earlier depths: {', '.join(points.depths) or 'none'}"
    return [split, *(f"                {content}" for content in suspect.contents)]


def _tell_backup(guard: Guard, floor: float) -> None:
    """Say which second opinion was chosen, what it recovers, and what it costs."""
    measured = ", ".join(f"{name} {100 * share:.0f} %" for name, share in guard.recovery.items())
    say(f"backup          {guard.backup.kind if guard.backup is not None else 'the replacement head'}")
    say(f"recovered       of planted triggers: {measured}")
    if guard.backup is not None:
        cost = guard.backup.description["cost"]
        share = cost["multiply_adds"] / max(1, cost["suspect_multiply_adds"])
        when = "for every input" if "backup" in guard.ensemble.names else "for flagged inputs alone"
        say(f"cost            {cost['multiply_adds'] / 1e6:.1f} M multiply-adds, {share:.2g} of the model's, {when}")
    if not guard.relabels:
        print_warning(f"it recovered less than {100 * floor:g} % of planted triggers: `relabel` will only flag.")


def inspect(
    images: Annotated[Path, typer.Argument(help="A .npz, an image, or a folder of images.")],
    weights: Weights,
    architecture: Architecture = None,
    state_key: StateKey = None,
    preprocess: Preprocess = None,
    handler: Handler = None,
    model_file: ModelFile = None,
    extra_file: ExtraFile = None,
    device: Device = "cpu",
    bundles: Bundles = "bundles",
    digest: Annotated[
        str | None, typer.Option(help="Bundle to use, by the first digits of its digest; default ACTIVE.")
    ] = None,
    false_positive_rate: ServedRate = None,
    false_positive_rate_scope: ServedRateScope = None,
    output_format: Annotated[OutputFormat, typer.Option("--format", help="How to print.")] = OutputFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write to; default is the terminal.")] = None,
    fail_if_poisoned: Annotated[
        bool, typer.Option("--fail-if-poisoned", help="End with status 3 if an image is poisoned, for pipelines.")
    ] = False,
    settings: Settings = None,
) -> None:
    """Judge images offline: table, CSV or JSON.

    An image that cannot be read or scored is listed as failed, the others keep their verdicts, and the status is 1,
    whatever the others are.
    """
    from guard.cli.images import find_images
    from guard.cli.judged import formatted, judge, verdict_table
    from guard.cli.reading import in_channels_taken
    from guard.config import SERVING_SETTINGS, load_config, load_settings
    from guard.detection.pipeline import Guard
    from guard.storage.stores import open_store

    if output is not None and not output.parent.is_dir():
        raise ConfigError(f"--output {output}: there is no folder {output.parent}. Make it first.")
    chosen = load_settings(
        settings, false_positive_rate=false_positive_rate, false_positive_rate_scope=false_positive_rate_scope
    )
    config = load_config(settings)
    store = open_store(bundles)
    bundle = store.resolve(digest) if digest else store.active_path()
    model = open_model(weights, architecture, preprocess, handler, model_file, extra_file, device, config, state_key)
    with model as (suspect, convert, _), progress_bar("reading images") as report:
        guard = Guard.load(bundle, suspect)
        guard = guard.with_config(**{name: value for name, value in chosen.items() if name in SERVING_SETTINGS})
        found = find_images(images, as_bytes=handler is not None)
        found = in_channels_taken(found, lambda some: guard.inspect(convert(some)))
        judged = judge(guard, found, convert, report)
    if output is not None:
        output.write_text(formatted(judged, output_format, guard.class_names), encoding="utf-8")
    elif output_format is OutputFormat.table:
        print_table(verdict_table(judged, guard.class_names))
    else:
        write(formatted(judged, output_format))
    flagged = sum(item.verdict is not None and item.verdict.is_poisoned for item in judged)
    failed = [item for item in judged if item.verdict is None]
    tell(f"{len(judged)} images: {len(judged) - flagged - len(failed)} clean, {flagged} poisoned, {len(failed)} failed")
    tell_passed_over(found.passed_over)
    if failed:
        print_error(
            f"{len(failed)} of {len(judged)} images have no verdict; the first: {failed[0].name}: {failed[0].error}"
        )
        raise typer.Exit(1)
    if fail_if_poisoned and flagged:
        raise typer.Exit(3)
