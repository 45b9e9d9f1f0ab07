"""The command for a laptop's own monitoring: `guard observe`."""

from __future__ import annotations

import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.output import progress_bar, say
from guard.errors import ConfigError, ObservingError


def observe(
    targets: Annotated[
        Path | None, typer.Option(help="File of targets, as `guard serve` writes it; followed while it changes.")
    ] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="<host:port>", help="One metrics endpoint; may be repeated.")
    ] = None,
    port: Annotated[int, typer.Option(help="Port of Prometheus; 0 = any free one.")] = 9090,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of its data; default: a temporary one.")] = None,
    prometheus: Annotated[Path | None, typer.Option(help="The program; default is the one on PATH.")] = None,
    scrape_seconds: Annotated[float, typer.Option(help="Seconds between two scrapes.")] = 5.0,
    rules: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="File of rules instead of the package's; may be repeated."),
    ] = None,
) -> None:
    """Watch servers with an installed Prometheus until Ctrl-C.

    It listens on loopback and has this package's recording rules and alerts.
    """
    from guard.observing.targets import Target, parse_address, read_targets, write_targets
    from guard.processes.prometheus import PrometheusInstance

    if (targets is None) == (not target):
        raise ConfigError("name what to watch: --targets FILE (`guard serve` prints it), or --target HOST:PORT.")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port must be in [0, 65535], got {port}.")
    if not 0.1 <= scrape_seconds <= 120:
        raise ConfigError(f"--scrape-seconds must be in [0.1, 120], got {scrape_seconds:g}.")
    for file in rules or ():
        if not file.is_file():
            raise ConfigError(f"--rules: there is no file {file}. Check the path.")
    stopped = threading.Event()
    is_ready = threading.Event()

    def stop(number: int, _: object) -> None:
        is_first = not stopped.is_set()
        stopped.set()
        if is_first and not is_ready.is_set():
            raise typer.Exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix="guard-observe-") as scratch:
        if targets is None:
            targets = Path(scratch) / "targets.json"
            write_targets(targets, [Target("guard-server", parse_address(text)) for text in target or ()])
        if targets.suffix != ".json":
            raise ConfigError(f"--targets must be a .json file, or Prometheus does not read it, got {targets.name}.")
        found = read_targets(targets)
        if not found:
            raise ObservingError(f"there is no target in {targets}. Start `guard serve`, and name the file it prints.")
        instance = PrometheusInstance(
            targets, program=prometheus, port=port, data_dir=data_dir, scrape_seconds=scrape_seconds, rules=rules or ()
        )
        with progress_bar("starting Prometheus", share_known=False):
            instance.start()
        with instance:
            is_ready.set()
            say(f"Prometheus on {instance.url}; alerts on {instance.url}/alerts")
            say(f"watching {', '.join(found)}; Ctrl-C stops it.")
            sys.stdout.flush()
            while not stopped.wait(0.5):
                if not instance.is_alive():
                    raise ObservingError("Prometheus has ended by itself. Start it with --data-dir, and see its log.")
    say("stopped")
