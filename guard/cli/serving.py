"""The command that serves archives: `guard serve`."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from guard.cli.options import QueueUrl
from guard.cli.output import print_warning, progress_bar, say, tell
from guard.errors import ConfigError, ServerError
from guard.extras import require

if TYPE_CHECKING:
    from guard.ray.server import RayServer
    from guard.torchserve.stack import Server, ServingStack


def serve(
    models: Annotated[
        list[str] | None, typer.Argument(help="Archives to serve: names, paths, or NAME=FILE; default all.")
    ] = None,
    model_store: Annotated[Path, typer.Option(help="Folder of the archives.")] = Path("model_store"),
    port: Annotated[
        int, typer.Option(help="Inference port; management and metrics take the next two. 0 = any free ones.")
    ] = 8080,
    engine: Annotated[
        Literal["torchserve", "local", "ray"],
        typer.Option(
            help="What serves: TorchServe, or, over the open inference protocol, one process or replicas of Ray Serve."
        ),
    ] = "torchserve",
    grpc_port: Annotated[
        int | None, typer.Option(help="Also speak gRPC there (--engine local; 0 = any free port).")
    ] = None,
    workers: Annotated[int, typer.Option(help="Worker processes per model (--engine torchserve).")] = 1,
    replicas: Annotated[int, typer.Option(help="Processes that answer (--engine ray).")] = 1,
    max_open_models: Annotated[
        int, typer.Option(help="Models that a replica holds in memory at once (--engine ray).")
    ] = 8,
    address: Annotated[
        str | None,
        typer.Option(
            help="Ray cluster to deploy to, such as HOST:PORT or auto (--engine ray); default: one of its own."
        ),
    ] = None,
    write_config: Annotated[
        Path | None,
        typer.Option(
            help="Write a Serve config file for `serve run` or `serve deploy`, and start nothing (--engine ray)."
        ),
    ] = None,
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
    With --engine local it starts one process without Java instead, which speaks the open inference protocol (V2); with
    --engine ray a Ray cluster on loopback, whose replicas speak it.
    With --queue, flagged inputs go to a queue; review page and retrainer run beside the server, are started again if
    they die, and stop with it. `guard observe` watches them all, with the file of targets that is named.
    """
    require("v2" if engine == "local" else engine)
    if review:
        require("review")
    from guard.cli.retrainer import retrainer
    from guard.cli.review import review_app
    from guard.local.server import LocalServer
    from guard.ray.server import RayServer
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
    _check_options(
        engine,
        {
            "--workers": ("torchserve", workers != 1),
            "--grpc-port": ("local", grpc_port is not None),
            "--replicas": ("ray", replicas != 1),
            "--max-open-models": ("ray", max_open_models != 8),
            "--address": ("ray", address is not None),
            "--write-config": ("ray", write_config is not None),
        },
    )
    if address is not None and url is not None:
        raise ConfigError(
            "--queue goes to a cluster that is started here. Leave it out, and set GUARD_QUEUE_URL where the nodes of "
            "the one named with --address start."
        )
    if write_config is not None and (address or url):
        raise ConfigError("--write-config starts nothing. Leave --address and --queue out.")
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
    elif engine == "ray":
        server = RayServer(
            *(model_store, named or "all"),
            replicas=replicas,
            max_open_models=max_open_models,
            address=address,
            tell=tell,
            **alike,
        )
        if write_config is not None:
            _write_serve_config(server, write_config)
            return
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


def _check_options(engine: str, given: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse an option that was given and goes with another engine.

    Parameters
    ----------
    engine : str
    given : mapping of str to (str, bool)
        Of every option, the engine that it goes with, and whether it was given.
    """
    for option, (its_engine, is_given) in given.items():
        if is_given and its_engine != engine:
            raise ConfigError(f"{option} goes with --engine {its_engine}. Leave it out, or take that engine.")


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
    from guard.local.engine import EngineServer
    from guard.processes.ports import LOOPBACK, is_reachable
    from guard.torchserve.client import curl_line
    from guard.torchserve.server import TorchServeInstance

    if isinstance(server, EngineServer):
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


def _write_serve_config(server: RayServer, file: Path) -> None:
    """Write a Serve config file, which must not be there, and say how it is taken."""
    text = server.config_text()
    try:
        with file.open("x", encoding="utf-8") as written:
            written.write(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be written: {error.strerror}. Name another file.") from error
    say(f"wrote {file}")
    if server.token_authorization and server.key_file is None:
        tell("callers' key: set BACKDOOR_GUARD_KEY where the nodes start")
    say(f"serve run {shlex.quote(str(file))}")


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
