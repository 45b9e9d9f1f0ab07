"""`guard check`: does a guarded archive, or the server that runs it, judge clean images as was promised?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.options import ServedRate
from guard.cli.output import progress_bar, say
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.detection.pipeline import Guard


def check(
    archive: Annotated[Path, typer.Argument(help="The guarded archive, a .mar file.")],
    images: Annotated[Path, typer.Option(help="Clean images as clients send them: a folder, or a .npz of pixels.")],
    url: Annotated[
        str | None, typer.Option(help="Ask the server that runs it instead: its inference address, on loopback.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Name under which that server serves it; default: the archive's own.")
    ] = None,
    key_file: Annotated[
        Path | None, typer.Option(help="File with that server's keys, key_file.json of its work folder.")
    ] = None,
    false_positive_rate: ServedRate = None,
) -> None:
    """Compare a guarded archive with what it promised.

    Clean images are sent through it. It is loaded in another process, as a server would load it; every image is sent
    alone and in batches, and the verdicts must agree. Status 1 says that more images are flagged than the rate
    explains, or how it fails. With --url the images go to a running server instead.
    """
    from guard.torchserve.archives.contents import promise_of
    from guard.torchserve.check import check_archive, check_server, judging_guard, share_of_fit

    promise = promise_of(archive)
    rate = promise.false_positive_rate if false_positive_rate is None else false_positive_rate
    bodies, names = _requests(images)
    of_fit = None
    if promise.images_from == str(images.absolute()):
        of_fit = share_of_fit(judging_guard(archive, promise.bundle), rate, promise.scope)
    if url is None:
        if model is not None or key_file is not None:
            raise ConfigError("--model and --key-file go with --url. Leave them out, or name the server.")
        with progress_bar("loading the archive in another process", share_known=False):
            report = check_archive(archive, bodies, rate, of_fit=of_fit, names=names)
    else:
        with progress_bar("asking the server", share_known=False):
            key = _prediction_key(key_file)
            report = check_server(url, model or promise.model, bodies, rate, token=key, of_fit=of_fit, names=names)
    say(report.line())
    say(f"judged by bundle {report.bundle}")


def check_written(archive: Path, images: Path | None, config: GuardConfig, guard: Guard) -> str:
    """Load an archive that was just written, send clean images through it if there are any, and say what was found.

    Raises
    ------
    ArchiveError
        If it does not start, or does not judge as was promised.
    """
    from guard.torchserve.check import check_archive, check_start, share_of_fit

    with progress_bar("loading the archive in another process", share_known=False):
        if images is None:
            check_start(archive)
            return "it starts; no image was sent through it: `guard check` does, with --images"
        bodies, names = _requests(images)
        rate, of_fit = config.false_positive_rate, None
        if guard.images_from == str(images.absolute()):
            of_fit = share_of_fit(guard, rate, config.false_positive_rate_scope)
        return check_archive(archive, bodies, rate, of_fit=of_fit, names=names).line()


def _requests(images: Path) -> tuple[list[Any], list[str]]:
    """Return the bodies and names of the images that are sent."""
    from guard.cli.bodies import find_requests
    from guard.torchserve.check import chosen_rows

    found = find_requests(images)
    rows = chosen_rows(len(found.names))
    return [found.read(row) for row in rows], [found.names[row] for row in rows]


def _prediction_key(key_file: Path | None) -> str | None:
    if key_file is None:
        return None
    try:
        key: str = json.loads(key_file.read_text(encoding="utf-8"))["inference"]["key"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--key-file {key_file} holds no inference key ({type(error).__name__}). Name TorchServe's key_file.json."
        ) from error
    return key
