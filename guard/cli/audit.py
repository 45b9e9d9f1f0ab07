"""The command that compares the counts: `guard audit`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.options import AsJson, QueueUrl
from guard.cli.output import print_error, say, write
from guard.errors import ConfigError, DataError, ObservingError, QueueError

if TYPE_CHECKING:
    from guard.observing.detection import Detection


def audit(
    start: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="<time>",
            show_default="7 days before its end",
            help="Begin of the window, ISO 8601; UTC if it names no zone.",
        ),
    ] = None,
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
    by: Annotated[
        str | None,
        typer.Option(metavar="bundle|class", help="What passed, for each bundle or class that was answered."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare the counts of clients, metrics and queue.

    received = clean + poisoned + bypassed + rejected + failed, by source, and the differences. With the queue of an
    audit sample, also how many poisoned inputs were let through. Status 0: the counts agree. 1: they do not. 2: they
    could not be compared.
    """
    from guard.observing.audit import audit as compare
    from guard.observing.client_log import read_time
    from guard.observing.detection import PARTS, WEEK, detection_by, detection_of_models, models_with_audits
    from guard.relabel.address import queue_url
    from guard.relabel.queue import Queue

    try:
        last = read_time(end) if end else datetime.now(UTC)
        window = read_time(start) if start else last - WEEK, last
        detection: list[Detection] | None = None
        sampled: list[str] = []
        parts: dict[str, dict[str, Detection]] = {}
        chosen = next((part for part in PARTS if part == by), None)
        if by is not None and chosen is None:
            raise ConfigError(f"--by must be one of {', '.join(PARTS)}, got {by!r}.")
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
            if opened_queue is not None:
                detection = detection_of_models(opened_queue, *window, model)
                sampled = models_with_audits(opened_queue)
                if chosen is not None:
                    parts = {
                        each.model: detection_by(opened_queue, *window, model=each.model, by=chosen)
                        for each in detection
                    }
    except (DataError, ObservingError, QueueError) as error:
        print_error(str(error))
        raise typer.Exit(2) from error
    if as_json:
        told = {} if detection is None else {"detection": [_for_programs(each, by, parts) for each in detection]}
        write(json.dumps(report.as_dict() | told, indent=2) + "\n")
    else:
        for line in report.lines():
            say(line)
        if detection == []:
            say("")
            say(f"How many poisoned inputs were let through is not known: {_no_sample(model, sampled)}.")
        for line in _what_passed(detection or [], by, parts):
            say(line)
    if not report.balances:
        raise typer.Exit(1)


def _for_programs(found: Detection, by: str | None, parts: dict[str, dict[str, Detection]]) -> dict[str, Any]:
    if by is None:
        return found.as_dict()
    return found.as_dict() | {f"by_{by}": {name: part.as_dict() for name, part in parts[found.model].items()}}


def _no_sample(model: str | None, sampled: list[str]) -> str:
    if model is None or not sampled:
        return "the queue has no audit sample (--audit-rate)"
    return f"the queue has no audit sample of model {model!r}, but one of {', '.join(map(repr, sampled))}"


def _what_passed(detection: list[Detection], by: str | None, parts: dict[str, dict[str, Detection]]) -> list[str]:
    """Return what each guard lets through, for people."""
    found = []
    for each in detection:
        first, *others = each.lines()
        found += ["", f"{each.model}: {first}", *(f"  {line}" for line in others)]
        found += [f"  {by} {name[:12]}: {part.line()}" for name, part in parts.get(each.model, {}).items()]
    return found
