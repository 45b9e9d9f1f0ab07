"""The commands for people who review: `guard review`, and below it users and files."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.options import Architecture, Device, MetricsPort, QueueUrl, StateKey
from guard.cli.output import plain_table, print_table, print_warning, say, tell, write
from guard.cli.review_sources import by_model, known_bundles, networks_of, open_workspace
from guard.errors import ConfigError, DataError
from guard.extras import require

if TYPE_CHECKING:
    from guard.relabel.queue import Queue
    from guard.review.status.history import MetricsSource

_AS_KEPT = "as the queue has it"
Name = Annotated[str, typer.Argument(help="Name of the reviewer.")]
Quorum = Annotated[
    int | None, typer.Option(show_default=_AS_KEPT, help="Reviewers who must agree before 'poisoned' counts.")
]
LeaseMinutes = Annotated[
    float | None, typer.Option(show_default=_AS_KEPT, help="How long an item belongs to who looks at it.")
]
MaxHeld = Annotated[
    int | None, typer.Option(show_default=_AS_KEPT, help="Items that one reviewer holds at once at most.")
]
RetentionDays = Annotated[
    float | None,
    typer.Option(
        show_default=_AS_KEPT, help="Days after which images are removed, unless answered and not yet learned from."
    ),
]

BundleFolders = Annotated[
    list[str] | None,
    typer.Option(
        "--bundles",
        metavar="<path>",
        show_default="those that --archive follows, or bundles",
        help="Folder of bundles, or their URL. MODEL=FOLDER, repeated, where models have folders of their own.",
    ),
]

review_app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Review flagged inputs in the browser. Add reviewers; take items and answers in and out.",
)


@review_app.callback()
def review(
    context: typer.Context,
    queue: QueueUrl = None,
    bundles: BundleFolders = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<path>",
            help="The clean images to compare with; default: those that the guard was fitted on, if they are there. "
            "MODEL=PATH, repeated, for several models.",
        ),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the suspect model, for maps of where it looks.")
    ] = None,
    architecture: Architecture = None,
    state_key: StateKey = None,
    archive: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<path>",
            help="Guarded archive that is served: its model, instead of --weights. NAME=FILE, repeated, for several.",
        ),
    ] = None,
    device: Device = "cpu",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 = any free one.")] = 8090,
    quorum: Quorum = None,
    lease_minutes: LeaseMinutes = None,
    max_held: MaxHeld = None,
    retention_days: RetentionDays = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="<str>", help="Name that browsers may ask for, besides the loopback's; may be repeated."),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file, to serve https.")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's key.")] = None,
    metrics_port: MetricsPort = None,
    metrics_url: Annotated[
        list[str] | None,
        typer.Option(metavar="<url>", help="Metrics address of a server, for the status page; may be repeated."),
    ] = None,
    prometheus: Annotated[
        str | None,
        typer.Option(metavar="<url>", help="A Prometheus for the status page instead: its history survives restarts."),
    ] = None,
) -> None:
    """Serve the review page until Ctrl-C."""
    if context.invoked_subcommand is not None:
        context.obj = queue
        return
    require("review")
    from guard.observing.collectors import QueueCollector
    from guard.observing.exporting import exporting
    from guard.relabel.queue import Queue
    from guard.review.server import LOOPBACK_ADDRESSES, serve_until_stopped
    from guard.review.workspace import ReviewSettings

    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key go together. Give both, or neither.")
    names = tuple(allowed_host or ())
    if host not in LOOPBACK_ADDRESSES and certificate is None:
        print_warning(f"--host {host} without --certificate: tokens cross the network in clear. Put https before it.")
    if host not in (*LOOPBACK_ADDRESSES, "0.0.0.0", "::"):
        names = (*names, host)
    changes = _changes(quorum=quorum, lease_minutes=lease_minutes, max_held=max_held, retention_days=retention_days)
    with Queue.open(_named(queue)) as opened, ExitStack() as beside:
        if changes:
            opened.change_settings(**changes)
            tell(f"{', '.join(changes)}: set for the whole queue, see guard review settings")
        known = known_bundles(bundles, archive or [])
        workspace = open_workspace(
            opened,
            known,
            {name: Path(path) for name, path in by_model("--images", images or []).items()},
            weights,
            architecture,
            device,
            ReviewSettings(allowed_hosts=names),
            metrics=_metrics_source(metrics_url or [], prometheus),
            state_key=state_key,
            served=networks_of(archive or [], known, device, beside) if weights is None else {},
        )
        if not workspace.reviewers.names():
            tell("there is no reviewer yet: guard review --queue ... add-user NAME --role admin")
        pem = {name: str(path) if path else None for name, path in (("certificate", certificate), ("key", key))}
        if metrics_port is not None:
            say(f"metrics on {beside.enter_context(exporting(metrics_port, QueueCollector(opened)))}")
        serve_until_stopped(workspace, host, port, **pem, on_ready=_say_ready)
    say("stopped")


@review_app.command()
def settings(
    context: typer.Context,
    quorum: Quorum = None,
    max_items: Annotated[
        int | None, typer.Option(show_default=_AS_KEPT, help="Items whose images are kept at most.")
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(show_default=_AS_KEPT, help="Bytes of their bodies and tensors at most.")
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(show_default=_AS_KEPT, help="Bytes of one request's body at most.")
    ] = None,
    max_held: MaxHeld = None,
    max_audits_per_hour: Annotated[
        int | None, typer.Option(show_default=_AS_KEPT, help="Audits of one model within any hour at most.")
    ] = None,
    lease_minutes: LeaseMinutes = None,
    retention_days: RetentionDays = None,
    queue: QueueUrl = None,
) -> None:
    """Show the settings of the queue, or change them.

    For servers, page, imports and retrainer, while they run.
    """
    from guard.relabel.settings import QueueSettings

    changes = _changes(
        quorum=quorum,
        max_items=max_items,
        max_bytes=max_bytes,
        max_body_bytes=max_body_bytes,
        max_held=max_held,
        max_audits_per_hour=max_audits_per_hour,
        lease_minutes=lease_minutes,
        retention_days=retention_days,
    )
    with _open(context, queue) as opened:
        now, usual = asdict(opened.change_settings(**changes) if changes else opened.settings), asdict(QueueSettings())
    table = plain_table("setting", "value", "usually")
    for name, value in now.items():
        table.add_row(name, f"{value:,}", "" if value == usual[name] else f"{usual[name]:,}")
    print_table(table)


@review_app.command("add-user")
def add_user(
    context: typer.Context,
    name: Name,
    role: Annotated[str, typer.Option(help="reviewer or admin.")] = "reviewer",
    queue: QueueUrl = None,
) -> None:
    """Add a reviewer, and print the token this once."""
    from guard.relabel.reviewers import ROLES, Reviewers

    chosen = next((known_role for known_role in ROLES if known_role == role), None)
    if chosen is None:
        raise ConfigError(f"--role must be one of {', '.join(ROLES)}, got {role!r}.")
    with _open(context, queue) as opened:
        token = Reviewers(opened).add(name, chosen)
    tell(f"{name} is {'an admin' if role == 'admin' else 'a reviewer'} now. The token, shown this once:")
    say(token)


@review_app.command("disable-user")
def disable_user(context: typer.Context, name: Name, queue: QueueUrl = None) -> None:
    """Make a reviewer's token and sessions worthless.

    Answers stay. `add-user` enables again, with a new token.
    """
    from guard.relabel.reviewers import Reviewers

    with _open(context, queue) as opened:
        Reviewers(opened).disable(name)
    say(f"disabled: {name}")


@review_app.command("users")
def users(context: typer.Context, queue: QueueUrl = None) -> None:
    """List the reviewers.

    With their role, and how they answered items whose answer is known.
    """
    from guard.relabel.reviewers import Reviewers

    with _open(context, queue) as opened:
        for reviewer in Reviewers(opened).all():
            gold = opened.gold_results(reviewer.name)
            known = f"; {gold.right} of {gold.answered} known items right" if gold.answered else ""
            say(f"{reviewer.name} ({reviewer.role}){known}")


@review_app.command("export")
def export(
    context: typer.Context,
    output: Annotated[Path | None, typer.Option(help="File to write to; default is the terminal.")] = None,
    output_format: Annotated[
        str, typer.Option("--format", help="label-studio, csv, or labelling-config (for a Label Studio project).")
    ] = "label-studio",
    items_of: Annotated[str, typer.Option("--what", help="open, answered or all.")] = "open",
    bundles: BundleFolders = None,
    queue: QueueUrl = None,
) -> None:
    """Write items to a file, to be labelled elsewhere."""
    from guard.files import open_private
    from guard.relabel import exchange
    from guard.review.admin import EXPORTS
    from guard.review.pictures import picture_of_tensor

    if items_of not in EXPORTS:
        raise ConfigError(f"--what must be one of {', '.join(EXPORTS)}, got {items_of!r}.")
    with _open(context, queue) as opened:
        workspace = open_workspace(opened, known_bundles(bundles))
        items = exchange.items_in(opened, EXPORTS[items_of])
        if output_format == "label-studio":
            parts = exchange.write_label_studio(
                items, workspace.names, lambda flagged: picture_of_tensor(flagged.inputs)
            )
        elif output_format == "csv":
            parts = exchange.write_csv(items, workspace.names)
        elif output_format == "labelling-config":
            first = next(items, None)
            if first is None:
                raise DataError("there is no item to take the classes from. Send one through the server first.")
            parts = iter([exchange.labelling_config(workspace.names(first.input))])
        else:
            raise ConfigError(f"--format must be label-studio, csv or labelling-config, got {output_format!r}.")
        if output is None:
            for part in parts:
                write(part)
            return
        with open_private(output, encoding="utf-8", newline="") as file:  # inputs and answers
            file.writelines(parts)
    say(str(output))


@review_app.command("import")
def import_file(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="Label Studio JSON, or CSV with item, verdict and true_label.")],
    reviewer: Annotated[str, typer.Option(help="In whose name the answers are saved.")],
    bundles: BundleFolders = None,
    quorum: Annotated[int | None, typer.Option(hidden=True)] = None,
    queue: QueueUrl = None,
) -> None:
    """Save the answers of a file, all or none."""
    from guard.files import decoded
    from guard.relabel.reviewers import Reviewers
    from guard.review.admin import import_text

    try:
        text = decoded(file.read_bytes())
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}. Check the path.") from error
    with _open(context, queue) as opened:
        if quorum not in (None, known := opened.settings.quorum):
            raise ConfigError(f"the queue's quorum is {known}, got --quorum {quorum}. Set it: guard review settings.")
        if reviewer not in Reviewers(opened).names():
            raise DataError(f"there is no reviewer {reviewer!r}. Add one with `guard review add-user`.")
        done = import_text(open_workspace(opened, known_bundles(bundles)), reviewer, text)
    say(f"{done.saved} answers saved, {done.known} there already, {done.unanswered} rows unanswered")


def _metrics_source(urls: list[str], prometheus: str | None) -> MetricsSource | None:
    """Return where the status page has its numbers from; a Prometheus knows more than the addresses themselves."""
    from guard.review.status.prometheus import PrometheusSource
    from guard.review.status.sampler import Sampler

    if prometheus is not None:
        return PrometheusSource(prometheus)
    return Sampler(urls) if urls else None


def _say_ready(url: str) -> None:
    say(f"review page on {url}; Ctrl-C stops it.")
    sys.stdout.flush()


def _changes(*, lease_minutes: float | None = None, **given: float | None) -> dict[str, float]:
    """Return the settings of the queue that were given, by their names."""
    given["lease_s"] = None if lease_minutes is None else 60 * lease_minutes
    return {name: value for name, value in given.items() if value is not None}


def _open(context: typer.Context, queue: str | None) -> Queue:
    from guard.relabel.queue import Queue

    return Queue.open(_named(queue or context.obj))


def _named(queue: str | None) -> str:
    from guard.relabel.address import queue_url

    if not queue:
        raise ConfigError("name the queue: --queue queue.db, or GUARD_QUEUE_URL in the environment.")
    return queue_url(queue)
