"""The command of the loop's own process: `guard retrainer`."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.options import Bundles, MetricsPort, QueueUrl
from guard.cli.output import say, tell
from guard.errors import ConfigError

if TYPE_CHECKING:
    from guard.retrainer.report import Finished

#: Added to the process's niceness: serving comes first.
NICENESS = 15


def retrainer(
    model: Annotated[str, typer.Option(help="Name under which the model is served.")],
    queue: QueueUrl = None,
    bundles: Bundles = "bundles",
    once: Annotated[bool, typer.Option("--once", help="Look once, run a round if one is due, and end.")] = False,
    now: Annotated[bool, typer.Option("--now", help="With --once: run a round whether one is due or not.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.")] = 5.0,
    enough_decisions: Annotated[
        int | None, typer.Option(show_default="50", help="New decisions that start a round; 0 = never for that reason.")
    ] = None,
    every_hours: Annotated[
        float | None, typer.Option(show_default="24", help="Hours between rounds; 0 = no schedule.")
    ] = None,
    canary_inputs: Annotated[
        int | None,
        typer.Option(
            show_default="0", help="Compare both guards on this many further flagged inputs before the switch."
        ),
    ] = None,
    min_reviewers: Annotated[
        int | None,
        typer.Option(
            help="Reviewers who must call an input a false alarm before the guard learns from it; "
            "default: 2 where two or more can decide."
        ),
    ] = None,
    metrics_port: MetricsPort = None,
    settings: Annotated[
        Path | None, typer.Option("--settings", help="TOML file with the retrainer's settings.")
    ] = None,
) -> None:
    """Learn from what reviewers answered, beside the server.

    A candidate that the gate refuses is kept as an inactive bundle, and says why.
    """
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

    from guard.observing.collectors import RetrainerCollector
    from guard.observing.exporting import exporting
    from guard.relabel.address import queue_url
    from guard.relabel.queue import Queue
    from guard.retrainer.settings import load_retrainer_settings
    from guard.retrainer.worker import Retrainer

    if interval <= 0:
        raise ConfigError(f"--interval must be above 0 seconds, got {interval:g}.")
    if now and not once:
        raise ConfigError("--now goes with --once. Add --once, or press the button on the review page.")
    if once and metrics_port is not None:
        raise ConfigError("--metrics-port is for a retrainer that stays. Leave out --once.")
    chosen: dict[str, Any] = {
        "enough_decisions": enough_decisions,
        "every_hours": every_hours,
        "canary_inputs": canary_inputs,
        "min_reviewers": min_reviewers,
    }
    loaded = load_retrainer_settings(settings, **chosen)
    if not queue:
        raise ConfigError("name the queue: --queue queue.db, or GUARD_QUEUE_URL in the environment.")
    os.nice(NICENESS)
    with (
        threadpool_limits(1),
        Queue.open(queue_url(queue)) as opened,
        Retrainer(opened, bundles, model, loaded) as worker,
        ExitStack() as beside,
    ):
        if once:
            if now:
                worker.rounds.request(model, "guard retrainer --now")
            _show(worker.step())
            return
        logging.basicConfig(level=logging.INFO, format="%(asctime)s retrainer: %(message)s")
        if metrics_port is not None:
            tell(f"metrics on {beside.enter_context(exporting(metrics_port, RetrainerCollector(opened, model)))}")
        tell(f"retrainer: watching {model}; Ctrl-C ends it")
        worker.run(interval, threading.Event())


def _show(finished: Finished | None) -> None:
    if finished is None:
        say("nothing to do: no round is due")
        raise typer.Exit(0)
    say(finished.line)
    for line in finished.report.get("changes", []):
        say(f"  {line}")
    if finished.outcome == "failed":
        raise typer.Exit(1)
