"""`guard snapshot`: back up and restore the queue and the bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from guard.cli.options import QueueUrl
from guard.cli.output import say, tell

if TYPE_CHECKING:
    from guard.storage.snapshot import Snapshot

Folder = Annotated[Path, typer.Argument(help="Folder of the snapshot.")]
BundleFolder = Annotated[
    str | None, typer.Option("--bundles", metavar="<path>", help="Folder of bundles, or their URL in an object store.")
]

snapshot_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Back up and restore the queue and the bundles."
)


@snapshot_app.command("save")
def snapshot_save(folder: Folder, queue: QueueUrl = None, bundles: BundleFolder = None) -> None:
    """Copy queue and bundles into a new folder while everything runs.

    The key of an encrypted queue is not in it: keep that elsewhere.
    """
    from guard.storage.snapshot import save_snapshot

    _tell("saved", save_snapshot(folder, queue_url=_url(queue), bundles=bundles))
    for part, given in (("queue", queue), ("bundles", bundles)):
        if given is None:
            tell(f"the snapshot is without the {part}: none named (--{part})")


@snapshot_app.command("verify")
def snapshot_verify(folder: Folder) -> None:
    """Check every file of a snapshot.

    Its bundles, and the chain of its decisions, too.
    """
    from guard.storage.snapshot import verify_snapshot

    _tell("whole", verify_snapshot(folder))


@snapshot_app.command("restore")
def snapshot_restore(folder: Folder, queue: QueueUrl = None, bundles: BundleFolder = None) -> None:
    """Put queue and bundles where there are none.

    Nothing is overwritten.
    """
    from guard.storage.snapshot import restore_snapshot

    _tell("restored", restore_snapshot(folder, queue_url=_url(queue), bundles=bundles))


def _url(queue: str | None) -> str | None:
    from guard.relabel.address import queue_url

    return queue_url(queue) if queue else None


def _tell(done: str, about: Snapshot) -> None:
    say(f"{done}: {about.folder}")
    if about.bundles:
        say(f"{len(about.bundles)} bundles, active: {about.active}")
    if about.decisions is not None:
        say(f"queue with {about.decisions} decisions, newest hash {about.chain_head}")
