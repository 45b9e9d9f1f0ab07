"""The shipped rules with all their times divided: an hour's window in a minute."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from guard.processes.prometheus import RULES
from guard.resources import resource_path

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+)(ms|s|m|h|d)")
#: Durations in an expression: a range in brackets, or an offset.
_IN_EXPRESSION = re.compile(r"(?<=\[)\d+(?:ms|s|m|h|d)(?=\])|(?<=offset )\d+(?:ms|s|m|h|d)")


@dataclass(frozen=True, slots=True)
class Firing:
    """One alert, from going off to clearing; seconds since 1970."""

    alert: str
    start: float
    end: float


def divided(duration: str, factor: float) -> str:
    """Return a duration of Prometheus divided by a factor, in whole milliseconds."""
    match = _DURATION.fullmatch(duration)
    if match is None:
        raise ValueError(f"a duration must be a number and a unit, got {duration!r}.")
    return f"{max(1, round(1000 * int(match[1]) * _SECONDS[match[2]] / factor))}ms"


def faster_rules(folder: Path, factor: float) -> list[Path]:
    """Write the shipped rules with every window, offset and `for` divided by a factor; return the files."""
    files = []
    for name, asset in RULES.items():
        rules: dict[str, Any] = yaml.safe_load(resource_path(asset).read_text(encoding="utf-8"))
        for group in rules["groups"]:
            for rule in group["rules"]:
                rule["expr"] = _IN_EXPRESSION.sub(lambda found: divided(found[0], factor), rule["expr"])
                if "for" in rule:
                    rule["for"] = divided(rule["for"], factor)
        files.append(folder / name)
        files[-1].write_text(yaml.safe_dump(rules, sort_keys=False), encoding="utf-8")
    return files
