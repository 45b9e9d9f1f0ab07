"""The commands for an archive that already runs: `guard wrap`, and `guard unwrap` to take the guard out again."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from guard.cli.model import class_list, gpu_number
from guard.cli.options import (
    ActionName,
    AllowMissingClasses,
    AuditRate,
    Check,
    Depths,
    Device,
    FailureMode,
    ImageNoise,
    LabelledImages,
    Logits,
    Mode,
    QueueUrl,
    Rate,
    RateScope,
    Seed,
    Settings,
    Split,
    Threads,
)
from guard.cli.output import print_warning, progress_bar, say, what_failed
from guard.errors import ConfigError, DataError, GuardError, SuspectModelError
from guard.files import put_in_place

if TYPE_CHECKING:
    from guard.cli.images import NamedLabelledImages
    from guard.cli.output import Report
    from guard.config import GuardConfig
    from guard.detection.pipeline import Guard
    from guard.suspect.model import SuspectModel
    from guard.torchserve.archives.wrapping import OpenedArchive
    from guard.torchserve.check import CheckReport
    from guard.torchserve.user_handler import UserHandler

_GUARDED = ".guarded"
_LARGEST_EXAMPLE = 2**20  # bytes
_AS_SENT = "Are these images what clients send (size, channels, format)?"

Archive = Annotated[Path, typer.Argument(help="The archive, a .mar file.")]
Output = Annotated[Path | None, typer.Option(help="File to write; default: beside the archive.")]
Force = Annotated[bool, typer.Option("--force", help="Replace that file if it is there.")]


def wrap(
    archive: Archive,
    images: LabelledImages,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do everything, print what would change, and write nothing.")
    ] = False,
    class_names: Annotated[
        str | None,
        typer.Option(
            help="Class list in the model's order: names with commas, or a file; default: its index_to_name.json."
        ),
    ] = None,
    allow_missing_classes: AllowMissingClasses = False,
    false_positive_rate: Rate = None,
    audit_rate: AuditRate = None,
    false_positive_rate_scope: RateScope = None,
    mode: Mode = None,
    seed: Seed = None,
    action: ActionName = None,
    failure_mode: FailureMode = None,
    image_noise_std: ImageNoise = None,
    split: Split = None,
    depth: Depths = None,
    logits: Logits = None,
    device: Device = "cpu",
    threads: Threads = None,
    bundles: Annotated[
        str | None,
        typer.Option(
            metavar="<path>",
            help="Also write the bundle to this folder or URL, and let the server follow it, as to retrain.",
        ),
    ] = None,
    queue: QueueUrl = None,
    check: Check = True,
    fit_anyway: Annotated[
        bool, typer.Option("--fit-anyway", help="Fit although the network's answers do not fit the labels.")
    ] = False,
    force: Force = False,
    settings: Settings = None,
) -> None:
    """Put a guard around an archive that already runs.

    The archive's own handler runs here on the clean images, as it does in the server. The archive itself stays as it
    is; the guarded one keeps its every file, its model's name and version, and answers old clients with the same bytes.
    """
    from guard.cli.fitting import tell_fit, warn_of_fit
    from guard.config import GuardConfig, load_settings
    from guard.relabel.address import queue_url
    from guard.storage.stores import open_store
    from guard.suspect.model import SuspectModel
    from guard.torchserve.archives.wrapping import check_output, open_archive, write_guarded

    target = output or archive.with_name(f"{_stem(archive)}{_GUARDED}.mar")
    chosen = load_settings(
        settings,
        false_positive_rate=false_positive_rate,
        audit_rate=audit_rate,
        false_positive_rate_scope=false_positive_rate_scope,
        mode=mode,
        seed=seed,
        action=action,
        failure_mode=failure_mode,
        image_noise_std=image_noise_std,
        queue_url=queue_url(queue) if queue else None,
    )
    config = GuardConfig(**chosen)
    if config.rows_per_request != 1:
        raise ConfigError("guard wrap fits on one row per request: rows_per_request must be 1. See `guard archive`.")
    gpu = gpu_number(device)
    follows = open_store(bundles) if bundles is not None else None
    if follows is not None:
        follows.digests()  # a store that cannot be reached is told of before the long work
    with open_archive(archive) as opened, tempfile.TemporaryDirectory(prefix="guard-wrap-") as scratch:
        check_output(target, archive, force or dry_run)
        with (
            contextlib.redirect_stdout(sys.stderr),
            progress_bar("reading images") as report,
            opened.running(config.model_attribute, gpu) as user,
        ):
            suspect = SuspectModel(user.module, split=split, depths=depth, output=logits, device=device)  # in eval mode
            found = _labelled(opened, user, images, class_list(class_names))
            _try_handler(user, found, config)
            guard = _fitted(suspect, user, found, config, threads, report, allow_missing_classes, fit_anyway)
            examples = _examples(found)
            batches = told_batches(user, examples, guard.input_shape, config)
        guard = replace(
            guard,
            preprocessing=f"handler {opened.handler}",
            batch_dependence=guard.batch_dependence or user.batch_dependence,
            images_from=str(images.absolute()),
        )
        writes_bundle = follows is not None and not dry_run
        bundle = guard.save(follows.root if follows is not None and writes_bundle else Path(scratch) / "bundles")
        with tempfile.TemporaryDirectory(prefix=".unchecked-", dir=None if dry_run else target.parent) as unchecked:
            written = Path(unchecked) / target.name
            write_guarded(opened, bundle, written, bundles=bundles, settings=chosen, examples=examples)
            checked = _checked(written, replace(guard, digest=bundle.name), found) if check else None
            changes = _changes(opened, written, target)
            if not dry_run:
                put_in_place(written, target)
        if follows is not None and writes_bundle:
            follows.activate(bundle.name)
        if dry_run:
            say("dry run: nothing was written; this would be")
        for line in changes:
            say(line)
        tell_fit(guard, found)
        say(f"batches         {batches}")
        _tell_next(opened.manifest.name, target, images, checked)
        warn_of_fit(guard, found)


def unwrap(archive: Archive, output: Output = None, force: Force = False) -> None:
    """Give back the archive that a guarded one was made from.

    Byte for byte.
    """
    from guard.torchserve.archives.wrapping import unwrap as unwrap_archive

    stem = _stem(archive)
    name = stem.removesuffix(_GUARDED) if stem.endswith(_GUARDED) else f"{stem}.original"
    target = output or archive.with_name(f"{name}.mar")
    digest = unwrap_archive(archive, target, force=force)
    say(f"{target}, byte for byte as it was: SHA-256 {digest}")


def _stem(archive: Path) -> str:
    return archive.name.removesuffix(".mar")


def _labelled(opened: OpenedArchive, user: UserHandler, images: Path, names: list[str] | None) -> NamedLabelledImages:
    """Find the clean images; names of sub-folders are looked up in the archive's own class list."""
    from guard.cli.bodies import find_bodies
    from guard.torchserve.archives.class_list import read_class_list

    return find_bodies(images, read_class_list(opened.folder) if names is None else names, user.rows_seen)


def _try_handler(user: UserHandler, found: NamedLabelledImages, config: GuardConfig) -> None:
    """Let the handler answer one image as a whole: a guard is of no use where it does not see the network work."""
    from guard.statistics.calibration import check_rate

    check_rate(config.false_positive_rate, len(found.names))
    name = found.names[0]
    try:
        rows = user.rows_seen(found.read(0))
    except GuardError as error:
        raise DataError(f"image {name}: {error} {_AS_SENT}") from error
    except Exception as error:
        raise DataError(f"image {name} cannot be answered by the handler: {what_failed(error)} {_AS_SENT}") from error
    if rows == 0:
        raise SuspectModelError(
            "the handler answers without calling its network as a whole, so a guard would see nothing. "
            f"Let it call self.{config.model_attribute}(images), and make the archive again."
        )
    if rows > 1:
        raise SuspectModelError(
            f"the handler makes {rows} rows of the forward pass per request, and guard wrap fits on one. "
            "Fit with `guard fit` on single images, and use `guard archive` with rows_per_request = 'any'."
        )


def _examples(found: NamedLabelledImages) -> list[bytes]:
    """Return the bodies of a few images for the archive, of classes as different as can be; none that are large."""
    firsts = {int(label): row for row, label in reversed(list(enumerate(found.labels.tolist())))}
    chosen = dict.fromkeys([*sorted(firsts.values()), *range(min(len(found.names), 4))])
    bodies = (found.read(row) for row in chosen)
    return list(islice((body for body in bodies if isinstance(body, bytes) and len(body) <= _LARGEST_EXAMPLE), 4))


def told_batches(
    user: UserHandler, examples: list[bytes], input_shape: tuple[int, ...] | None, config: GuardConfig
) -> str:
    """Try whether the handler keeps the requests of a batch apart, and say in one line how they will be answered."""
    if config.batching == "never" or config.rows_per_request == "any":
        return "one request after the other, as the settings have it"
    if user.declares_one_row or config.batching == "declared":
        return "answered together: it is declared that the handler makes one row per request"
    if why := user.why_one_by_one(examples, input_shape):
        return f"one request after the other: {why}. See docs/serving.md, Batches"
    return "images are answered together: the handler keeps them apart; other bodies one after the other"


def _fitted(
    suspect: SuspectModel,
    user: UserHandler,
    found: NamedLabelledImages,
    config: GuardConfig,
    threads: int | None,
    report: Report,
    allow_missing: bool,
    fit_anyway: bool,
) -> Guard:
    """Return a guard fitted on what the handler makes of the images."""
    from guard.cli.classes import check_classes, check_order
    from guard.cli.fitting import fit_guard
    from guard.cli.reading import read_all

    inputs = read_all(found, user.model_inputs, report, remedy=_AS_SENT)
    try:
        suspect.locate(inputs, found.labels)
        n_classes = suspect.activations(inputs[:2]).logits.shape[1]
        suspect.check_given_mode(inputs)
    except GuardError:
        raise
    except Exception as error:
        raise SuspectModelError(
            f"the network fails on images of shape {inputs.shape[1:]}: {what_failed(error)} {_AS_SENT}"
        ) from error
    found = check_classes(found, n_classes, allow_missing=allow_missing)
    names = found.class_names
    if names is not None and len(names) != n_classes:
        raise DataError(f"the model has {n_classes} classes, and the class list has {len(names)}. Give --class-names.")
    check_order(suspect, inputs, found, force=fit_anyway)
    return fit_guard(suspect, inputs, found, config, threads, report)


def _checked(archive: Path, guard: Guard, found: NamedLabelledImages) -> CheckReport:
    """Load the archive in another process, and compare its verdicts on the clean images with those of the guard."""
    from guard.torchserve.check import check_archive, chosen_rows, share_of_fit

    rows = chosen_rows(len(found.names))
    expected = guard.scores(guard.reference[np.array(rows)]).p_values
    bodies = [found.read(row) for row in rows]
    with progress_bar("loading the archive in another process", share_known=False):
        return check_archive(
            archive,
            bodies,
            guard.config.false_positive_rate,
            expected=expected,
            digest=guard.digest,
            pinned=True,
            of_fit=share_of_fit(guard, guard.config.false_positive_rate, guard.config.false_positive_rate_scope),
            names=[found.names[row] for row in rows],
        )


def _tell_next(model: str, target: Path, images: Path, checked: CheckReport | None) -> None:
    """Say what the check found, or how to make it, and how to serve the archive."""
    if checked is None:
        again = shlex.join([str(target), "--images", str(images)])
        print_warning(f"not checked: `guard check {again}` does it.")
    else:
        say(f"checked         {checked.line()}")
    served = shlex.join([f"{model}={target.name}", "--model-store", str(target.parent)])
    say(f"serve it        guard serve {served}")


def _changes(opened: OpenedArchive, written: Path, target: Path) -> list[str]:
    """Say which files of the archive stayed, changed, and came."""
    from guard.torchserve.archives.manifest import MANIFEST
    from guard.torchserve.archives.strict_zip import open_strict_zip

    before = [name for name in opened.original.members if name != MANIFEST]
    with open_strict_zip(written) as guarded:
        tops = dict.fromkeys(name.split("/")[0] for name in guarded.members if name not in {*before, MANIFEST})
        size = guarded.size
    manifest = opened.manifest
    version = f", version {manifest.version}" if manifest.version else ""
    return [
        f"archive         {target} ({size} bytes; {opened.original.path.name} has {opened.original.size})",
        f"model           {manifest.name}{version}, as before",
        f"kept            {len(before)} files, byte for byte: {_listed(before)}",
        f"changed         {MANIFEST}: handler {manifest.handler} -> guard_handler.py",
        f"added           {_listed(list(tops))}",
    ]


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")
