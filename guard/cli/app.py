"""The commands put together, with their errors and exit codes; bundles, the demo and the doctor."""

from __future__ import annotations

import json
import signal
import sys
import warnings
from dataclasses import asdict
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.main import get_command

from guard.cli.archive import archive
from guard.cli.assess import assess
from guard.cli.audit import audit
from guard.cli.check import check
from guard.cli.config import config
from guard.cli.export import export
from guard.cli.help import complete_help
from guard.cli.observe import observe
from guard.cli.offline import fit, inspect
from guard.cli.options import RATE_HELP, AsJson, Bundles, Digest, share
from guard.cli.output import (
    console,
    one_line,
    plain_table,
    print_error,
    print_table,
    print_warning,
    say,
    tell,
    what_failed,
    write,
)
from guard.cli.proxy import proxy
from guard.cli.purify import purify
from guard.cli.retrainer import retrainer
from guard.cli.review import review_app
from guard.cli.serving import serve
from guard.cli.snapshot import snapshot_app
from guard.cli.wrap import unwrap, wrap
from guard.cli.zoo import zoo_app
from guard.errors import BundleError, ConfigError
from guard.extras import require
from guard.users_code import users_place

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,  # frames cut long options off, and cannot be copied
    help="Guard a suspect image classifier at inference time.",
    epilog="Status 0: done. 1: failed, or an image could not be judged. 2: the command or a setting is wrong. "
    "3: `inspect --fail-if-poisoned` found a poisoned image. "
    "Settings: flags over GUARD_* variables over guard.toml over defaults; `guard config` prints them.",
)
bundle_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Look at bundles, and choose which one serves."
)
# fmt: off
for command in (
    fit, inspect, assess, purify, archive, check, wrap, unwrap, serve, export, proxy, retrainer, observe, audit, config
):
    # fmt: on
    app.command()(command)
app.add_typer(bundle_app, name="bundle")
app.add_typer(zoo_app, name="zoo")
app.add_typer(review_app, name="review")
app.add_typer(snapshot_app, name="snapshot")


def main() -> None:
    """Run the command line and leave with its status."""
    sys.path.insert(0, str(Path.cwd()))  # so that --architecture finds a module of the working folder
    if not sys.warnoptions:  # libraries warn whoever writes code; what a user should know is said by `print_warning`
        warnings.simplefilter("ignore")
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


#: What SIGTERM raises, so that what is open is closed in order.
_terminated = SystemExit(128 + signal.SIGTERM)


def _terminate(*_: object) -> None:
    raise _terminated


def run(arguments: list[str]) -> int:
    """Run one command; every error is one line on stderr.

    Returns
    -------
    status : int
        0 done; 1 an expected failure; 2 a wrong command or setting; 130 interrupted.
    """
    shows_tracebacks = "--traceback" in arguments[:1]
    try:
        command = app if shows_tracebacks else _parser()  # typer's own call puts a hook in that prints them
        status = command(arguments, prog_name="guard", standalone_mode=False)
    except typer.Abort:  # Ctrl-C in older versions of typer; newer ones return 130
        return 130
    except Exception as error:
        if shows_tracebacks:
            raise
        if hasattr(error, "format_message"):  # typer's own kinds; it does not export their base class
            return _usage_error(error)
        print_error(one_line(error))
        return 2 if isinstance(error, ConfigError) else 1
    except SystemExit as error:
        if error is _terminated or not users_place(error):
            raise
        print_error(f"{what_failed(error)} It must not end the program.")  # or a status of 0 would say "done"
        return 1
    return status if isinstance(status, int) else 0


@cache
def _parser() -> Any:
    """What reads the arguments: built once, as whoever calls `run` again and again would build it every time."""
    return get_command(app)


def _usage_error(error: Any) -> int:
    message = error.format_message()
    if "\n" in message:  # the help text of a command that was given nothing
        tell(message)
    else:
        command = error.ctx.command_path if getattr(error, "ctx", None) else "guard"
        end = "" if message.endswith((".", "?", "!")) else "."
        print_error(f"{message}{end} See `{command} --help`.")
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        say(f"backdoor-guard {version('backdoor-guard')}")
        raise typer.Exit


@app.callback()
def top(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Guard a suspect image classifier at inference time."""


@bundle_app.command("list")
def bundle_list(bundles: Bundles = "bundles", as_json: AsJson = False) -> None:
    """List the bundles of a folder, newest first."""
    from guard.cli.bundle_summary import in_utc, local_time
    from guard.storage.stores import open_store

    store = open_store(bundles)
    entries = store.entries()
    damaged = sorted({*store.digests()} - {entry.digest for entry in entries})
    if not entries and not damaged:
        raise BundleError(
            f"there is no bundle in {store.address}. Make one with `guard fit`, or name the folder: --bundles."
        )
    rows = [
        {
            "digest": entry.digest,
            "active": entry.is_active,
            "written": in_utc(entry.written),
            "mode": entry.document["settings"]["mode"],
            "false_positive_rate": entry.document["settings"]["false_positive_rate"],
            "realised_false_positive_rate": entry.document["realised_false_positive_rate"],
            "clean_images": entry.document["clean_images"],
            "n_classes": entry.document["n_classes"],
        }
        for entry in entries
    ]
    if as_json:
        write(json.dumps(rows, indent=2, default=datetime.isoformat) + "\n")
    else:
        table = plain_table("digest", "active", "written", "mode", "rate", "realised", "images")
        for row in rows:
            table.add_row(
                row["digest"][:12],
                "yes" if row["active"] else "",
                local_time(row["written"]),
                row["mode"],
                f"{row['false_positive_rate']:g}",
                f"{row['realised_false_positive_rate']:.4f}",
                str(row["clean_images"]),
            )
        print_table(table)
    for digest in damaged:
        print_warning(f"bundle {digest[:12]} is damaged and left out. `guard bundle show {digest[:12]}` says why.")


@bundle_app.command("show")
def bundle_show(digest: Digest = "", bundles: Bundles = "bundles", as_json: AsJson = False) -> None:
    """Verify a bundle, and print what it holds.

    The active one if no digest is given. With --json everything but the arrays.
    """
    from guard.cli.bundle_summary import in_utc, summary
    from guard.config import PLACES
    from guard.storage.bundle import read_bundle
    from guard.storage.stores import open_store

    store = open_store(bundles)
    folder = store.resolve(digest) if digest else store.active_path()
    stored = read_bundle(folder)
    if not as_json:
        write(summary(stored, in_utc(folder.stat().st_mtime), is_active=stored.digest == store.known_active()))
        return
    settings = {name: value for name, value in stored.document["settings"].items() if name not in PLACES}
    write(json.dumps({"digest": stored.digest, **stored.document, "settings": settings}, indent=2) + "\n")


@bundle_app.command("activate")
def bundle_activate(digest: Digest, bundles: Bundles = "bundles") -> None:
    """Make a bundle the active one.

    Servers that follow it take it within two seconds.
    """
    from guard.detection.pipeline import Guard
    from guard.storage.stores import open_store

    store = open_store(bundles)
    folder = store.resolve(digest)
    Guard.load(folder)  # one that no server would take is not activated
    store.activate(folder.name)
    say(f"active: {folder.name}")


@bundle_app.command("rollback")
def bundle_rollback(bundles: Bundles = "bundles") -> None:
    """Go back to the bundle that was active before."""
    from guard.detection.pipeline import Guard
    from guard.storage.stores import open_store

    store = open_store(bundles)
    if previous := store.previous_digest():
        Guard.load(store.fetch(previous))
    say(f"active: {store.roll_back()}")


@bundle_app.command("clean")
def bundle_clean(digest: Digest, bundles: Bundles = "bundles") -> None:
    """Write an older version's bundle without the queue's URL.

    If it was the active one, the new one becomes active. Remove the old folder when no open item was flagged by it.
    """
    from guard.detection.fitted import without_places
    from guard.detection.pipeline import Guard
    from guard.storage.stores import open_store

    store = open_store(bundles)
    old = store.resolve(digest)
    new = without_places(old)
    Guard.load(new)
    store.publish(new.name)
    if new != old and store.known_active() == old.name:
        store.activate(new.name)
    say(f"{'nothing to leave out: ' if new == old else ''}{new.name}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the report, the picture and the artefacts.")] = Path(
        "build/demo"
    ),
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    false_positive_rate: Annotated[float, typer.Option(parser=share, metavar="<float>", help=RATE_HELP)] = 0.05,
    keep_serving: Annotated[
        bool, typer.Option("--keep-serving", help="Leave the server up until Ctrl-C, and print curl lines.")
    ] = False,
) -> None:
    """Plant backdoors, guard, serve, attack, count.

    Backdoors networks on real images, guards and serves them, and prints what the guard catches over HTTP.
    """
    require("torchserve")
    from guard.demo.run import run_demo

    run_demo(output, seed=seed, false_positive_rate=false_positive_rate, keep_serving=keep_serving, console=console)


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this machine, and say how to mend what is missing."""
    from guard.cli.doctor import checks

    found = checks()
    if as_json:
        write(json.dumps([asdict(check) for check in found], indent=2) + "\n")
    else:
        for check in found:
            say(f"{'ok ' if check.ok else 'BAD'} {check.name}: {check.detail}")
            if not check.ok:
                say(f"    -> {check.remedy}")
    if bad := sum(not check.ok for check in found):
        print_error(f"{bad} things are not in order: mend what is marked BAD.")
        raise typer.Exit(1)


complete_help(app)
