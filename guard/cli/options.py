"""Options that several commands share, so that they read the same everywhere."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath
from typing import Annotated

import typer

from guard.errors import ConfigError

#: Default of a setting that a bundle keeps.
_AS_FITTED = "as fitted"

Weights = Annotated[
    Path, typer.Option(help="Weights of the suspect model: safetensors, a state dict, or a trainer's checkpoint.")
]
StateKey = Annotated[
    str | None,
    typer.Option(
        show_default="found by itself",
        help="Where in the weights file the weights lie, if several sets fit, such as state_dict.ema.",
    ),
]


def _no_file(name: str | None) -> str | None:
    """Refuse an architecture that is written as the path of a file."""
    module, colon, factory = (name or "").rpartition(":")
    if not colon or factory.startswith("\\"):  # none, or that of a drive
        module, colon, factory = name or "", "", ""
    if name and (module.endswith(".py") or "/" in module or "\\" in module):
        path = PureWindowsPath(module)  # knows both slashes
        raise ConfigError(
            f"--architecture {name} names a file. Name its module, with its folder on PYTHONPATH: "
            f"{path.name.removesuffix('.py')}:{factory if colon else 'factory'}."
        )
    return name


Architecture = Annotated[
    str | None, typer.Option(callback=_no_file, help="Function that builds the network, as package.module:factory.")
]
Handler = Annotated[
    str | None,
    typer.Option(help="Your TorchServe handler, a file or a shipped one's name; it makes the network's inputs."),
]
ModelFile = Annotated[Path | None, typer.Option(help="TorchServe's --model-file, for your handler.")]
ExtraFile = Annotated[
    list[Path] | None, typer.Option(metavar="<path>", help="File or folder your handler needs; may be repeated.")
]
Bundles = Annotated[
    str, typer.Option(metavar="<path>", help="Folder of bundles, or their URL: s3://BUCKET/PREFIX, gs://...")
]
Settings = Annotated[
    Path | None, typer.Option("--settings", help="Settings file; default is ./guard.toml if there is one.")
]
LabelledImages = Annotated[
    Path, typer.Option("--images", help="Clean labelled images: a .npz, or a folder with one sub-folder per class.")
]
ClassNames = Annotated[
    str | None,
    typer.Option(
        help="Class list in the model's order: names with commas, or a file (JSON, or one per line, numbered or not); "
        "default: the names of the sub-folders."
    ),
]
AllowMissingClasses = Annotated[
    bool,
    typer.Option(
        "--allow-missing-classes", help="Fit although classes of the network have no clean image; says what it costs."
    ),
]
Mode = Annotated[str | None, typer.Option(show_default="calibrated", help="calibrated or paper.")]
Seed = Annotated[int | None, typer.Option(show_default="0", help="Seed of folds and training.")]
_ACTIONS = "observe, flag, relabel or block."
ActionName = Annotated[str | None, typer.Option("--action", show_default="flag", help=_ACTIONS)]
ServedAction = Annotated[str | None, typer.Option("--action", show_default=_AS_FITTED, help=_ACTIONS)]
_FAILURE_MODES = "What cannot be scored is an error (closed), or answered and marked bypassed (open)."
FailureMode = Annotated[str | None, typer.Option(show_default="closed", help=_FAILURE_MODES)]
ServedFailureMode = Annotated[str | None, typer.Option("--failure-mode", show_default=_AS_FITTED, help=_FAILURE_MODES)]
ImageNoise = Annotated[
    float | None, typer.Option(show_default="0", help="Also learn from copies with this much noise.")
]
Split = Annotated[str | None, typer.Option(help="Layer whose input is the split; found by itself if left out.")]
Depths = Annotated[
    list[str] | None,
    typer.Option(
        "--depth",
        metavar="<str>",
        show_default="found by itself",
        help="Earlier layer to watch as well; may be repeated, up to 3.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        show_default="one for each core, 8 at most",
        help="Parts of the fit that are done side by side; each takes a core and a copy of all features.",
    ),
]
FitAnyway = Annotated[
    bool, typer.Option("--fit-anyway", "--force", help="Fit although the network's answers do not fit the labels.")
]
Check = Annotated[
    bool, typer.Option(help="Load the archive in another process and try it before it gets its name; takes seconds.")
]
LOGITS_HELP = "Where the logits are in what the network returns, such as 1 or out.logits; found by itself if left out."
Logits = Annotated[str | None, typer.Option("--logits", help=LOGITS_HELP)]


def share(text: str | float) -> float:
    """Return the number that was given for a share; typer.BadParameter tells how one is written."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number. Write a share: 0.05 for 5 %.") from None


RATE_HELP = "Share of clean inputs that may be flagged."
Rate = Annotated[float | None, typer.Option(parser=share, metavar="<float>", show_default="0.01", help=RATE_HELP)]
ServedRate = Annotated[
    float | None,
    typer.Option("--false-positive-rate", parser=share, metavar="<float>", show_default=_AS_FITTED, help=RATE_HELP),
]
_AUDITS = "Share of unflagged inputs that go to the queue, too, drawn at random, so that misses are seen."
AuditRate = Annotated[float | None, typer.Option(parser=share, metavar="<float>", show_default="0", help=_AUDITS)]
ServedAuditRate = Annotated[
    float | None,
    typer.Option("--audit-rate", parser=share, metavar="<float>", show_default=_AS_FITTED, help=_AUDITS),
]
_SCOPES = "Where that rate holds: in all clean inputs together (all), or in each class that the model answers (class)."
RateScope = Annotated[str | None, typer.Option("--false-positive-rate-scope", show_default="all", help=_SCOPES)]
ServedRateScope = Annotated[
    str | None, typer.Option("--false-positive-rate-scope", show_default=_AS_FITTED, help=_SCOPES)
]


def _url_or_file(context: typer.Context, parameter: typer.CallbackParam, url: str | None) -> str | None:
    """Take the URL from GUARD_QUEUE_URL_FILE where it is given nowhere else; warn of one that everybody can see."""
    from guard.cli.output import print_warning
    from guard.config import queue_url_from_file

    if context.resilient_parsing:
        return url
    if not url:
        return queue_url_from_file()
    source = context.get_parameter_source(str(parameter.name))
    if source is not None and source.name == "COMMANDLINE" and "://" in url and "@" in url:
        print_warning(
            "a URL on the command line is seen by everybody on this machine. Put one with a password into "
            "GUARD_QUEUE_URL, or into a file of mode 0600 that GUARD_QUEUE_URL_FILE names."
        )
    return url


QueueUrl = Annotated[
    str | None,
    typer.Option(
        "--queue",
        envvar="GUARD_QUEUE_URL",
        show_envvar=False,
        show_default="GUARD_QUEUE_URL",
        callback=_url_or_file,
        help="Queue of flagged inputs: a SQLite file, or postgresql+psycopg://...",
    ),
]
Preprocess = Annotated[
    str | None,
    typer.Option(
        help="module:function that turns float32 images (n, channels, h, w) in [0, 1] into what the model takes."
    ),
]
Device = Annotated[str, typer.Option(help="Where the suspect model runs: cpu, cuda or cuda:N.")]
MetricsPort = Annotated[
    int | None, typer.Option(help="Also export metrics for Prometheus, on this port of loopback; 0 = any free one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Digest = Annotated[str, typer.Argument(help="First digits of the digest (6 or more).")]


def handler_argument(name: str) -> Path | str:
    """Return a handler as a file, or as the name of one that TorchServe ships."""
    return Path(name) if name.endswith(".py") else name


def check_output_folder(folder: Path) -> None:
    """Refuse what can be no folder, before the long work."""
    first = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not first.is_dir():
        raise ConfigError(f"--output {folder}: {first} is no folder. Name another.")
