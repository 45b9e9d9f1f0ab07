"""The commands for a server: `guard archive` and `guard serve`."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    ServedFailureMode,
    ServedRate,
    Settings,
    StateKey,
    Weights,
    handler_argument,
)
from guard.cli.output import print_warning, progress_bar, say, tell
from guard.errors import ConfigError, GuardError, ServerError
from guard.files import READABLE_FOLDER, put_in_place

#: Share of the range that rounding, resizing and compression may add to it.
_RANGE_ROOM = 0.02

if TYPE_CHECKING:
    from guard.config import GuardConfig
    from guard.detection.pipeline import Guard
    from guard.torchserve.archives.guarded import ServedModel
    from guard.torchserve.stack import Server, ServingStack


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
    bundles: Bundles = Path("bundles"),
    model_store: Annotated[Path, typer.Option(help="Folder that archives go to.")] = Path("model_store"),
    version: Annotated[str, typer.Option(help="Version of the model.")] = "1.0",
    action: ServedAction = None,
    false_positive_rate: ServedRate = None,
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
    from guard.storage.bundle import BundleStore, read_bundle
    from guard.torchserve.archives.archive import check_free
    from guard.torchserve.archives.guarded import ServedModel, make_guarded_archive

    rows: Any = int(rows_per_request) if rows_per_request and rows_per_request.isdigit() else rows_per_request
    chosen = load_settings(
        settings,
        action=action,
        false_positive_rate=false_positive_rate,
        failure_mode=failure_mode,
        rows_per_request=rows,
        verdict_in_body=verdict_in_body,
        queue_url=queue_url(queue) if queue else None,
    )
    image_settings = _image_settings(handler, architecture, state_key, mean, std, resize)
    bundle = BundleStore(bundles).active_path()
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
            checked = check_written(path, images, config.false_positive_rate, fitted)
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


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Archives to serve: names, paths, or NAME=FILE; default all.")
    ] = None,
    model_store: Annotated[Path, typer.Option(help="Folder of the archives.")] = Path("model_store"),
    port: Annotated[
        int, typer.Option(help="Inference port; management and metrics take the next two. 0 = any free ones.")
    ] = 8080,
    engine: Annotated[
        Literal["torchserve", "local"],
        typer.Option(help="What serves: TorchServe, or one process that speaks the open inference protocol."),
    ] = "torchserve",
    grpc_port: Annotated[
        int | None, typer.Option(help="Also speak gRPC there (--engine local; 0 = any free port).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes per model.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Largest batch.")] = 8,
    max_batch_delay_ms: Annotated[int, typer.Option(help="How long to wait for a batch to fill.")] = 1,
    token: Annotated[bool, typer.Option("--token/--no-token", help="Ask callers for a key.")] = True,
    key_file: Annotated[
        Path | None,
        typer.Option(
            help="File, for you alone, that keeps the keys for the next start; default: keys.json in --work-dir."
        ),
    ] = None,
    rotate_keys: Annotated[bool, typer.Option("--rotate-keys", help="Make new keys; the kept ones are void.")] = False,
    work_dir: Annotated[Path | None, typer.Option(help="Folder of logs and keys; default: a temporary one.")] = None,
    ready_timeout: Annotated[float, typer.Option(help="Seconds until the models must be ready.")] = 120.0,
    queue: QueueUrl = None,
    review: Annotated[bool, typer.Option("--review", help="Also start the review page (needs --queue).")] = False,
    review_port: Annotated[int, typer.Option(help="Port of the review page.")] = 8090,
    review_option: Annotated[
        list[str] | None, typer.Option(metavar="<text>", help="Passed on to `guard review`; may be repeated.")
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also start a retrainer for every guarded model (needs --queue).")
    ] = False,
    retrain_option: Annotated[
        list[str] | None, typer.Option(metavar="<text>", help="Passed on to `guard retrainer`; may be repeated.")
    ] = None,
    companion_metrics: Annotated[
        bool, typer.Option(help="Let review page and retrainers export metrics, on the next free ports.")
    ] = True,
) -> None:
    """Serve archives on loopback until Ctrl-C.

    Starts TorchServe, waits until every model answers, prints a line to try it, and stops it on Ctrl-C or SIGTERM.
    With --engine local it starts one process without Java instead, which speaks the open inference protocol (V2).
    With --queue, flagged inputs go to a queue; review page and retrainer run beside the server, are started again if
    they die, and stop with it. `guard observe` watches them all, with the file of targets that is named.
    """
    from guard.cli.retrainer import retrainer
    from guard.cli.review import review_app
    from guard.local.server import LocalServer
    from guard.relabel.address import queue_url
    from guard.torchserve.server import TorchServeInstance
    from guard.torchserve.stack import Beside, ServingStack

    model_store, named = _store_and_names(models or [], model_store)
    retrainer_app = typer.Typer()
    retrainer_app.command()(retrainer)
    url = queue_url(queue) if queue else None
    if rotate_keys and (key_file or work_dir) is None:
        raise ConfigError("--rotate-keys needs keys that are kept. Name their --key-file, or a --work-dir.")
    if (review or retrain) and url is None:
        raise ConfigError("--review and --retrain need a queue. Name one with --queue.")
    if not any(model_store.glob("*.mar")):
        raise ServerError(f"there is no archive in {model_store}. Make one with `guard archive`.")
    if engine == "local" and workers != 1:
        raise ConfigError("the local engine is one process. Leave --workers out, or take --engine torchserve.")
    if engine == "torchserve" and grpc_port is not None:
        raise ConfigError("--grpc-port goes with --engine local. Leave it out, or take that engine.")
    alike: dict[str, Any] = {
        "work_dir": work_dir,
        "inference_port": port,
        "metrics_port": port and port + 2,
        "batch_size": batch_size,
        "max_batch_delay_ms": max_batch_delay_ms,
        "token_authorization": token,
        "key_file": key_file or (work_dir and work_dir / "keys.json"),
        "rotate_keys": rotate_keys,
        "environment": {"GUARD_QUEUE_URL": url} if url else {},
    }
    server: Server
    if engine == "local":
        server = LocalServer(model_store, named or "all", tell=tell, grpc_port=grpc_port, **alike)
    else:
        management_port = port and port + 1
        server = TorchServeInstance(
            model_store, named or "all", management_port=management_port, workers=workers, **alike
        )
    beside = Beside(
        queue_url=url,
        review_port=review_port if review else None,
        retrains=retrain,
        exports_metrics=companion_metrics,
        first_metrics_port=port and port + 3,
        review_options=_passed_on("review", review_app, review_option),
        retrainer_options=_passed_on("retrainer", retrainer_app, retrain_option, "--model", "any"),
    )
    _run_until_stopped(ServingStack(server, beside, tell), ready_timeout, token)


def _run_until_stopped(serving: ServingStack, ready_timeout: float, token: bool) -> None:
    """Start a server and what runs beside it, say how to ask it, and keep all of it alive until Ctrl-C or SIGTERM."""
    is_ready = threading.Event()
    stopped = _stop_on_signal(is_ready)
    with serving as stack:
        with progress_bar("starting the server", share_known=False):
            seconds = stack.server.wait_ready(ready_timeout)
        is_ready.set()
        say(f"ready after {seconds:.0f} s on {stack.server.inference_url}; metrics on {stack.server.metrics_url}")
        _say_how_to_ask(stack.server, token)
        if stack.beside.review_port is not None:
            say(f"review page on http://127.0.0.1:{stack.beside.review_port}")
        stack.start_companions()
        say(f"to watch it: guard observe --targets {shlex.quote(str(stack.targets))}")
        say("Ctrl-C stops it.")
        sys.stdout.flush()
        while not stopped.wait(0.5):
            stack.keep_alive()
    say("stopped")


def _passed_on(name: str, app: typer.Typer, texts: list[str] | None, *needed: str) -> list[str]:
    """Return the words of options for a companion, one option a text; ConfigError if it would not start with them."""
    from typer.main import get_command

    words = []
    for text in texts or ():
        option, space, value = text.partition(" ")
        words += [option, value] if space and option.startswith("--") and "=" not in option else [text]
    try:
        get_command(app).make_context(name, [*needed, *words])
    except Exception as error:
        if not hasattr(error, "format_message"):  # no complaint of the parser
            raise
        raise ConfigError(f"guard {name} would not start with {' '.join(words)}: {error.format_message()}") from error
    return words


def _stop_on_signal(is_ready: threading.Event) -> threading.Event:
    """Return what Ctrl-C and SIGTERM set; until the server is ready they end the command at once."""
    stopped = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        is_first = not stopped.is_set()
        stopped.set()
        if is_first and not is_ready.is_set():  # a second signal does not disturb the stopping
            raise typer.Exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    return stopped


def _say_how_to_ask(server: Server, token: bool) -> None:
    """Say where the keys are, and a command per model that asks for one prediction; warn of open gRPC ports."""
    from guard.local.server import LocalServer
    from guard.processes.ports import LOOPBACK, is_reachable
    from guard.torchserve.client import curl_line
    from guard.torchserve.server import TorchServeInstance

    if isinstance(server, LocalServer):
        for name in server.models_served:
            key = f' -H "Authorization: Bearer {server.token()}"' if token else ""
            say(f"curl{key} {server.inference_url}/v2/models/{name}")
        if server.ports.grpc is not None:
            say(f"gRPC on {LOOPBACK}:{server.ports.grpc}")
        return
    assert isinstance(server, TorchServeInstance)
    if is_reachable(LOOPBACK, server.ports.grpc_inference):
        print_warning(
            "TorchServe's gRPC ports are open on loopback, and one call with the inference key ends a worker. "
            f"Close {server.ports.grpc_inference} and {server.ports.grpc_management} in a firewall."
        )
    if token:
        say(f"keys in {server.work_dir / 'key_file.json'}")
        if server.key_file is not None:
            tell(f"the next start has the same keys, kept in {server.key_file}; --rotate-keys makes new ones")
    for name in server.models_served:
        say(curl_line(server.inference_url, name, server.token()))


def _store_and_names(models: list[str], model_store: Path) -> tuple[Path, dict[str, str]]:
    """Return the folder of the archives, and each one's file by the name that it is served under.

    An archive is named by `mnist`, `mnist.mar`, `NAME=FILE`, or a path, whose folder is then the model store.
    """
    named: dict[str, str] = {}
    folders = []
    for text in models:
        name, _, file = text.rpartition("=")
        path = Path(file)
        stem = path.name.removesuffix(".mar")
        if (name or stem) in named:
            raise ConfigError(f"model {name or stem!r} is named twice. Give each its own name: NAME=FILE.")
        named[name or stem] = f"{stem}.mar"
        folders.append(path.parent if path.name != file else model_store)
    if len(set(folders)) > 1:
        raise ConfigError(
            f"all archives must lie in one folder, got {', '.join(sorted({str(folder) for folder in folders}))}. "
            "Move them together, and name the folder with --model-store."
        )
    return (folders[0] if folders else model_store), named
