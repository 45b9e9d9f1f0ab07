"""The command that compares the counts: `guard audit`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from guard.cli.options import AsJson, QueueUrl
from guard.cli.output import print_error, say, write
from guard.errors import ConfigError, DataError, ObservingError, QueueError


def audit(
    start: Annotated[
        str, typer.Option("--from", metavar="<time>", help="Begin of the window, ISO 8601; UTC if it names no zone.")
    ],
    end: Annotated[
        str | None, typer.Option("--to", metavar="<time>", help="End of the window; default is now.")
    ] = None,
    client_log: Annotated[
        Path | None, typer.Option(help="What the client noted: JSON lines or CSV; see docs/audit.md.")
    ] = None,
    queue: QueueUrl = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(metavar="<url>", help="Metrics address: totals since the server's start; may be repeated."),
    ] = None,
    prometheus: Annotated[
        str | None, typer.Option(metavar="<url>", help="A Prometheus that scrapes the server: exact for the window.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only this model; default is all.")] = None,
    slack: Annotated[int, typer.Option(help="Requests that may differ, as after a worker was killed.", min=0)] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare the counts of clients, metrics and queue.

    received = clean + poisoned + bypassed + rejected + failed, by source, and the differences. Status 0: the counts
    agree. 1: they do not. 2: they could not be compared.
    """
    from guard.observing.audit import audit as compare
    from guard.observing.client_log import read_time
    from guard.relabel.address import queue_url
    from guard.relabel.queue import Queue

    try:
        window = read_time(start), read_time(end) if end else datetime.now(UTC)
        with ExitStack() as opened:
            opened_queue = None
            if queue:
                url = queue_url(queue)
                file = Path(url.removeprefix("sqlite:///"))
                if url.startswith("sqlite:///") and not file.is_file():  # opening it would make one
                    raise ConfigError(f"there is no queue {file}. Name the server's: --queue.")
                opened_queue = opened.enter_context(Queue.open(url))
            report = compare(
                *window,
                client_log=client_log,
                queue=opened_queue,
                metrics_urls=metrics_url or (),
                prometheus=prometheus,
                model=model,
                slack=slack,
            )
    except (DataError, ObservingError, QueueError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error
    if as_json:
        write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        for line in report.lines():
            say(line)
    if not report.balances:
        raise typer.Exit(1)
