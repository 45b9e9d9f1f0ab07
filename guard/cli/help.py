"""What `--help` says besides the options' own texts: an example of every command, and a default of every option."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_NET = "--weights weights.safetensors --architecture my_net:make"

#: One command line per command, without the program's name.
EXAMPLES = {
    "fit": f"{_NET} --images clean/ --false-positive-rate 0.01",
    "inspect": f"new/ {_NET} --format csv --output verdicts.csv",
    "assess": f"{_NET} --images clean/ --trigger pattern --trigger blend",
    "purify": f"{_NET} --images clean/ --method anp",
    "archive": f"my_model {_NET} --images clean/",
    "check": "model_store/my_model.mar --images clean/",
    "wrap": "model_store/digits.mar --images clean/ --action observe",
    "unwrap": "model_store/digits.guarded.mar --output digits.mar",
    "serve": "my_model --queue queue.db --review --retrain",
    "export": f"my_model {_NET} --to model_repository",
    "proxy": "--upstream http://127.0.0.1:8000 --model my_model --exported model_repository/my_model",
    "retrainer": "--model my_model --queue queue.db",
    "observe": "--target 127.0.0.1:8082",
    "audit": "--from 2026-03-01T08:00 --queue queue.db --metrics-url http://127.0.0.1:8082/metrics",
    "demo": "--output build/demo --keep-serving",
    "doctor": "--json",
    "config": "--template > guard.toml",
    "bundle list": "--bundles bundles",
    "bundle show": "1f0c9a --json",
    "bundle activate": "1f0c9a",
    "bundle rollback": "--bundles bundles",
    "bundle clean": "1f0c9a",
    "zoo train": "'mnist-*' --missing --jobs 2",
    "zoo list": "--folder benchmarks/zoo",
    "zoo show": "mnist-benign",
    "zoo verify": "'mnist-*'",
    "review": "--queue queue.db --bundles bundles --archive model_store/my_model.mar",
    "review settings": "--queue queue.db --quorum 2",
    "review add-user": "ada --role reviewer --queue queue.db",
    "review disable-user": "ada --queue queue.db",
    "review users": "--queue queue.db",
    "review export": "--queue queue.db --format csv --output open.csv",
    "review import": "answers.csv --reviewer ada --queue queue.db",
    "snapshot save": "copy/ --queue queue.db --bundles bundles",
    "snapshot verify": "copy/",
    "snapshot restore": "copy/ --queue queue.db --bundles bundles",
}
_WIDEST = 76  # columns of a line of an example, so that a terminal of 80 does not fold it


def complete_help(app: typer.Typer, path: str = "") -> None:
    """Give every command of an app, and of the apps in it, its example and the defaults that its options lack."""
    for command in app.registered_commands:
        assert command.callback is not None
        name = command.name or command.callback.__name__
        command.epilog, command.cls = _example(f"{path}{name}"), _Command
    for group in app.registered_groups:
        assert group.typer_instance is not None
        if f"{group.name}" in EXAMPLES:
            group.epilog, group.cls = _example(f"{group.name}"), _Group
        complete_help(group.typer_instance, f"{path}{group.name} ")


def _example(path: str) -> str:
    lines = [f"guard {path}"]
    for word in EXAMPLES[path].replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(word) + len("  \\") < _WIDEST:
            lines[-1] += f" {word}"
        else:
            lines.append(f"    {word}")
    return "\b\nExample:\n  " + " \\\n  ".join(lines)  # \b: not folded anew


def _say_defaults(parameters: list[Any]) -> None:
    for option in parameters:
        is_flag = getattr(option, "is_flag", False)
        if option.param_type_name != "option" or option.required or is_flag or option.default is not None:
            continue
        says_it = any(word in (option.help or "") for word in ("default", "Default", "left out"))
        if option.show_default is True and not says_it:
            option.show_default = "none"


class _Command(TyperCommand):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        _say_defaults(self.params)


class _Group(TyperGroup):
    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        _say_defaults(self.params)
