"""The command that makes a guarded archive: `guard archive`."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.check import check_written
from guard.cli.options import (
    Architecture,
    Bundles,
    Check,
    ExtraFile,
    ModelFile,
    QueueUrl,
    ServedAction,
    ServedAuditRate,
    ServedFailureMode,
    ServedRate,
    ServedRateScope,
    Settings,
    StateKey,
    Weights,
    handler_argument,
)
from guard.cli.output import print_warning, say, tell
from guard.errors import ConfigError, GuardError
from guard.files import READABLE_FOLDER, put_in_place

#: Share of the range that rounding, resizing and compression may add to it.
_RANGE_ROOM = 0.02

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.detection.pipeline import Guard
    from guard.torchserve.archives.guarded import ServedModel


def archive(
    name: Annotated[str, typer.Argument(help="Name under which the model will be served.")],
    weights: Weights,
    architecture: Architecture = None,
    state_key: StateKey = None,
    mean: Annotated[
        str | None,
        typer.Option(
            help="Image handler: subtracted after scaling to [0, 1]; one number, or one per channel; default 0."
        ),
    ] = None,
    std: Annotated[str | None, typer.Option(help="Image handler: divided by after that; likewise, default 1.")] = None,
    resize: Annotated[bool, typer.Option(help="Image handler: resize other sizes instead of refusing them.")] = False,
    handler: Annotated[
        str | None, typer.Option(help="Your own handler file, or a TorchServe name; default: the image handler.")
    ] = None,
    model_file: ModelFile = None,
    extra_file: ExtraFile = None,
    bundles: Bundles = "bundles",
    model_store: Annotated[Path, typer.Option(help="Folder that archives go to.")] = Path("model_store"),
    version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    action: ServedAction = None,
    false_positive_rate: ServedRate = None,
    audit_rate: ServedAuditRate = None,
    false_positive_rate_scope: ServedRateScope = None,
    failure_mode: ServedFailureMode = None,
    rows_per_request: Annotated[str | None, typer.Option(show_default="as fitted", help="1 or any.")] = None,
    verdict_in_body: Annotated[
        bool | None, typer.Option(show_default="as fitted", help="Also put the verdict into JSON answers.")
    ] = None,
    example: Annotated[
        list[Path] | None,
        typer.Option(
            help="Body of a request; may be repeated. A worker that gets no verdict on the first does not start; all "
            "are tried to find out whether batches can be answered together."
        ),
    ] = None,
    pin: Annotated[bool, typer.Option("--pin", help="Serve the embedded bundle only; do not follow ACTIVE.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an archive of that name.")] = False,
    images: Annotated[
        Path | None, typer.Option(help="Clean images as clients send them, to try the archive with before it is named.")
    ] = None,
    check: Check = True,
    queue: QueueUrl = None,
    settings: Settings = None,
) -> None:
    """Put the model and its guard into a TorchServe archive.

    The archive is loaded in another process, as a server would load it, before it gets its name.
    """
    from guard.config import GuardConfig, load_settings
    from guard.relabel.address import queue_url
    from guard.storage.bundle import read_bundle
    from guard.storage.stores import open_store
    from guard.torchserve.archives.archive import check_free
    from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive

    rows: Any = int(rows_per_request) if rows_per_request and rows_per_request.isdigit() else rows_per_request
    chosen = load_settings(
        settings,
        action=action,
        false_positive_rate=false_positive_rate,
        audit_rate=audit_rate,
        false_positive_rate_scope=false_positive_rate_scope,
        failure_mode=failure_mode,
        rows_per_request=rows,
        verdict_in_body=verdict_in_body,
        queue_url=queue_url(queue) if queue else None,
    )
    image_settings = _image_settings(handler, architecture, state_key, mean, std, resize)
    bundle = open_store(bundles).active_path()
    document = read_bundle(bundle).document
    if handler is None:
        _check_preprocessing(document, image_settings["mean"], image_settings["std"])
    fitted = _fitted_on(weights, architecture, state_key, bundle)
    examples = example or []
    if missing := [file for file in examples if not file.is_file()]:
        raise ConfigError(f"--example {missing[0]} does not exist. Name a file with the body of one request.")
    model = ServedModel(
        weights,
        handler=None if handler is None else handler_argument(handler),
        architecture=architecture,
        input_shape=tuple(document["input_shape"] or ()),
        image_settings={
            **image_settings,
            "class_names": document["class_names"],
            "state_key": state_key,
            "output": (document["split_points"] or {}).get("output"),
        },
        model_file=model_file,
        extra_files=tuple(extra_file or ()),
        version=version,
    )
    config = GuardConfig(**{**document["settings"], **chosen})
    batches = _told_batches(model, examples, config)
    target = model_store / f"{name}.mar"
    check_free(target, force)
    model_store.mkdir(mode=READABLE_FOLDER, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unchecked-", dir=model_store) as scratch:
        path = make_guarded_archive(
            name,
            model,
            bundle,
            model_store=Path(scratch),
            bundles=None if pin else bundles,
            settings=chosen,
            example=examples[0] if examples else None,
            examples=examples[1:],
        )
        checked = "no: it was not asked for"
        if check:
            checked = check_written(path, images, config, fitted)
        put_in_place(path, target)
    say(str(target))
    if chosen.get("queue_url"):
        tell(
            "the archive says that it wants a queue, not where: start the server with --queue, or with GUARD_QUEUE_URL"
        )
    tell(f"batches: {batches}")
    tell(f"checked: {checked}")


def _fitted_on(weights: Path, architecture: str | None, state_key: str | None, bundle: Path) -> Guard:
    """Load the guard of a bundle, with the network where it can be built: they belong together, better said now."""
    from guard.detection.pipeline import Guard
    from guard.suspect.model import SuspectModel
    from guard.suspect.weights import check_weights_file

    if architecture is None:
        check_weights_file(weights)
        return Guard.load(bundle)
    with contextlib.redirect_stdout(sys.stderr):
        return Guard.load(bundle, SuspectModel.load(weights, architecture, state_key=state_key))


def _told_batches(model: ServedModel, examples: list[Path], config: GuardConfig) -> str:
    """Say how the requests of a batch will be answered; for a handler of the user's own, after trying it here."""
    from guard.cli.wrap import told_batches
    from guard.torchserve.archives.sources import architecture_files
    from guard.torchserve.user_handler import open_user_handler

    if model.handler is None:
        if config.batching == "never" or config.rows_per_request == "any":
            return "one request after the other, as the settings have it"
        return "answered together: the image handler makes one row per request"
    files = [*model.extra_files, *(architecture_files(model.architecture) if model.architecture else [])]
    try:
        with (
            contextlib.redirect_stdout(sys.stderr),
            open_user_handler(
                model.handler,
                model.weights,
                model_file=model.model_file,
                extra_files=files,
                model_attribute=config.model_attribute,
            ) as user,
        ):
            return told_batches(user, [file.read_bytes() for file in examples], model.input_shape, config)
    except GuardError as error:
        return f"each worker finds out when it starts, and logs it. The handler cannot be tried here: {error}"


def _image_settings(
    handler: str | None, architecture: str | None, key: str | None, mean: str | None, std: str | None, resize: bool
) -> dict[str, Any]:
    """Return what the image handler does to pictures; ConfigError if options do not go together."""
    if handler is None and architecture is None:
        raise ConfigError("give --architecture (for the image handler), or --handler with your own.")
    chosen = {"mean": _numbers("--mean", mean), "std": _numbers("--std", std), "resize": resize or None}
    if architecture is None and key is not None:
        raise ConfigError("--state-key goes with --architecture: your handler loads the weights. Leave one out.")
    if handler is not None and any(value is not None for value in chosen.values()):
        raise ConfigError("--mean, --std and --resize are for the image handler. Leave them out with --handler.")
    return chosen


def _check_preprocessing(document: Mapping[str, Any], mean: Any, std: Any) -> None:
    """Compare what the guard was fitted on with what the image handler makes of pictures, channel by channel.

    Raises
    ------
    ConfigError
        If it was fitted on values that the handler cannot feed.
    """
    if document["preprocessing"] and mean is None and std is None:
        raise ConfigError(
            f"this bundle was fitted on images made by {document['preprocessing']}, and the image handler does not do "
            "that. Name a --handler that does, or give --mean and --std if they are all of it."
        )
    for channel, (low, high) in enumerate(document.get("input_range") or ()):
        shift, unit = (value[channel % len(value)] if isinstance(value, list) else value for value in (mean, std))
        least, most = sorted((pixel - (shift or 0.0)) / (unit or 1.0) for pixel in (0.0, 1.0))
        room = _RANGE_ROOM * (most - least)
        found = (
            f"channel {channel}: the guard was fitted on images from {low:g} to {high:g}, and the image handler feeds "
            f"the network {least:.4g} to {most:.4g}"
        )
        if low < least - room or high > most + room:
            raise ConfigError(
                f"{found}. If they were normalised, say how with --mean and --std; if they are pixels from 0 to 255, "
                "fit again on uint8 images, or name a --handler that does not scale."
            )
        if high - low < (most - least) / 4:
            print_warning(f"{found}. Look with `guard check` whether clean images pass.")


def _numbers(flag: str, text: str | None) -> float | list[float] | None:
    if text is None:
        return None
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{flag} must be one number, or one per channel with commas, got {text!r}.") from None
    return numbers[0] if len(numbers) == 1 else numbers
