"""What Prometheus is to scrape, as a file that it follows (file_sd)."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from guard.errors import ObservingError
from guard.files import READABLE_FILE, replace_file

_ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


@dataclass(frozen=True, slots=True)
class Target:
    """One metrics endpoint.

    Attributes
    ----------
    job : str
        `guard-server`, `guard-review` or `guard-retrainer`: the label `job` of everything that comes from it.
    address : str
        `host:port`; its path is `/metrics`.
    """

    job: str
    address: str


def parse_address(text: str) -> str:
    """Return `host:port` of an address that a person gave, with or without `http://` and `/metrics`.

    Raises
    ------
    ObservingError
        If it is none.
    """
    short = text.removeprefix("http://").removesuffix("/").removesuffix("/metrics")
    match = _ADDRESS.fullmatch(short)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ObservingError(f"a target is HOST:PORT of a metrics endpoint, got {text!r}.")
    return short


def write_targets(file: Path, targets: Sequence[Target]) -> None:
    """Write the file anew, so that a Prometheus that reads it meanwhile sees the old or the new one.

    It holds no secret, and everybody may read it: Prometheus mostly runs under another account.

    Raises
    ------
    ObservingError
        If it cannot be written.
    """
    groups = [{"targets": [target.address], "labels": {"job": target.job}} for target in targets]
    try:
        replace_file(file, (json.dumps(groups, indent=2) + "\n").encode("ascii"), READABLE_FILE)
    except OSError as error:
        raise ObservingError(f"{file} cannot be written: {error.strerror}.") from error


def read_targets(file: Path) -> list[str]:
    """Return the addresses in such a file.

    Raises
    ------
    ObservingError
        If there is no such file, or it is another kind of file.
    """
    try:
        groups = json.loads(file.read_text(encoding="utf-8"))
        return [str(address) for group in groups for address in group["targets"]]
    except OSError as error:
        raise ObservingError(f"{file}: {error.strerror}. `guard serve` says where its file of targets is.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ObservingError(f"{file} is no file of targets (JSON, as `guard serve` writes it).") from error
