"""`guard config`: the settings as a commented `guard.toml`."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from guard.cli.options import Settings
from guard.cli.output import write

if TYPE_CHECKING:
    from pydantic import BaseModel

#: For settings that are not set by default.
EXAMPLES = {
    "folds": 10,
    "max_guard_ms": 20.0,
    "deadline_header": "X-Guard-Deadline-Ms",
    "min_depth": "layer2",
    "queue_url": "sqlite:////var/lib/guard/queue.db",
    "data_dir": "/srv/images",
}
_WIDTH = 100


def config(
    template: Annotated[
        bool, typer.Option("--template", help="Print every setting with its default, whatever is set.")
    ] = False,
    settings: Settings = None,
) -> None:
    """Print the settings in force here as a commented guard.toml.

    A line that begins with # and no space has a default. The URL of the queue is not shown.
    """
    from guard.config import load_settings

    write(settings_file({} if template else load_settings(settings)))


def settings_file(given: Mapping[str, Any]) -> str:
    """Return a `guard.toml` with every setting, its meaning, rule and value; those not in `given` are commented out.

    Parameters
    ----------
    given : mapping of str to object
        Settings by name, as `load_settings` returns them. Of `queue_url`, which may hold a password, only the name is
        told.
    """
    from guard.config import FitSettings, GuardConfig, Places, ServingSettings

    values = GuardConfig(**given).model_dump(mode="json")
    rules = GuardConfig.model_json_schema()["properties"]
    lines = ["# Settings of backdoor-guard. Flags win over GUARD_* variables, these over this file, it over defaults."]
    for group in (FitSettings, ServingSettings, Places):
        lines += ["", *_comment(f"--- {inspect.getdoc(group)}")]
        meanings = _meanings(group)
        for name in group.model_fields:
            lines += ["", *_comment(f"{meanings[name]}{_rule(rules[name])}")]
            if name == "queue_url" and name in given:
                lines.append("# queue_url is set, and not shown")
            elif values[name] is None:
                lines.append(f"# Not set. For example: {name} = {_toml(EXAMPLES[name])}")
            else:
                lines.append(f"{'' if name in given else '#'}{name} = {_toml(values[name])}")
    return "".join(f"{line}\n" for line in lines)


def _meanings(group: type[BaseModel]) -> dict[str, str]:
    """Return the comment above every field."""
    found = re.findall(r"((?:^    #: .*\n)+)    (\w+):", inspect.getsource(group), re.MULTILINE)
    return {name: " ".join(comment.replace("#: ", "").split()) for comment, name in found}


def _rule(schema: Mapping[str, Any]) -> str:
    """Return what a value must be, as a sentence, from the JSON schema of a field."""
    kinds = [schema, *schema.get("anyOf", ())]
    bounds = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {kind[key]:g}" for kind in kinds for key, sign in bounds if key in kind and kind[key] < 2**53]
    choices = next((kind["enum"] for kind in kinds if "enum" in kind), schema.get("items", {}).get("enum"))
    if choices:
        return f" {'Some' if 'items' in schema else 'One'} of: {', '.join(map(str, choices))}."
    return f" Must be {' and '.join(limits)}." if limits else ""


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, _WIDTH))


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)  # of text, numbers, truth values and lists of them also TOML
