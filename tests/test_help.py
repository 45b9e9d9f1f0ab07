"""`--help` of every command: a default of every option, an example that the command takes; and shell completion."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from guard import GuardConfig
from guard.backups.anp import AnpSettings
from guard.backups.last_layer import LastLayerSettings
from guard.backups.pruning import FinePruningSettings, NormPruningSettings
from guard.cli import run
from guard.cli.app import app
from guard.cli.help import EXAMPLES
from guard.lab.assess.planting import PlantingSettings
from guard.retrainer.settings import RetrainerSettings


def commands(command: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by its words."""
    command = command or get_command(app)
    for name, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*path, name))
    if path and (not hasattr(command, "commands") or command.invoke_without_command):
        yield " ".join(path), command


COMMANDS = dict(commands())


def shown_help(path: str, capfd: pytest.CaptureFixture[str]) -> str:
    assert run([*path.split(), "--help"]) == 0
    return capfd.readouterr().out


def option_texts(command: Any) -> dict[str, str]:
    """What `--help` says of each option, on one line."""
    context = command.make_context("guard", [], resilient_parsing=True)
    records = {parameter.name: parameter.get_help_record(context) for parameter in command.params}
    return {name: " ".join(record[1].split()) for name, record in records.items() if record is not None}


def test_every_command_has_an_example_and_no_other() -> None:
    assert EXAMPLES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS)
def test_help_example_is_shown_whole_and_is_taken_by_the_command(
    path: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = shown_help(path, capfd)
    assert all(len(line) <= 80 for line in shown.splitlines())
    example = shown.partition("\n  Example:\n")[2]
    words = shlex.split(example.replace("\\\n", ""))
    assert words == ["guard", *path.split(), *shlex.split(EXAMPLES[path])]
    arguments = shlex.split(EXAMPLES[path].partition(" > ")[0])
    context = COMMANDS[path].make_context(path, arguments)  # raises what a wrong option would raise
    assert not context.args


@pytest.mark.parametrize("group", ["", "bundle", "zoo", "review", "snapshot"])
def test_help_lists_every_command_with_its_whole_line(
    group: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    listed = shown_help(group, capfd).partition("\nCommands:\n")[2].partition("\n\n")[0].splitlines()
    assert listed
    assert [line for line in listed if line.endswith("...")] == []


@pytest.mark.parametrize("path", COMMANDS)
def test_help_says_a_default_of_every_option(path: str) -> None:
    command = COMMANDS[path]
    texts = option_texts(command)
    for option in command.params:
        if option.param_type_name != "option" or option.hidden or (option.is_flag and not option.secondary_opts):
            continue  # a flag alone is off
        words = ("[required]",) if option.required else ("[default: ", "default", "Default", "left out")
        assert any(word in texts[option.name] for word in words), f"{path} {option.opts[0]}: {texts[option.name]}"


def test_help_defaults_are_those_of_the_settings() -> None:
    usual = GuardConfig().model_dump()
    found = 0
    for path in ("fit", "wrap", "assess"):
        for option in COMMANDS[path].params:
            if option.name in usual and isinstance(option.show_default, str):
                value = usual[option.name]
                assert option.show_default == (f"{value:g}" if isinstance(value, float) else str(value)), option.name
                found += 1
    assert found >= 9
    retrainer = {option.name: option.show_default for option in COMMANDS["retrainer"].params}
    for name in ("enough_decisions", "every_hours", "canary_inputs"):
        assert retrainer[name] == f"{getattr(RetrainerSettings(), name):g}"
    (epochs,) = (option.show_default for option in COMMANDS["assess"].params if option.name == "epochs")
    assert epochs == str(PlantingSettings().epochs)


def test_help_of_purify_names_the_defaults_of_its_methods() -> None:
    texts = option_texts(COMMANDS["purify"])
    usual = {
        **{name: getattr(AnpSettings(), name) for name in ("iterations", "epsilon", "threshold")},
        **{name: getattr(NormPruningSettings(), name) for name in ("norm", "scope", "share")},
        "epochs": LastLayerSettings().epochs,
        "allowed_accuracy_loss": FinePruningSettings().allowed_accuracy_loss,
    }
    for name, value in usual.items():
        assert texts[name].endswith(f" {value}."), texts[name]


@pytest.mark.parametrize("name", ["mode", "action", "failure_mode"])
def test_help_names_every_choice_of_a_setting(name: str) -> None:
    choices = GuardConfig.model_json_schema()["properties"][name]["enum"]
    offering = [path for path, command in COMMANDS.items() if name in {option.name for option in command.params}]
    assert offering
    for path in offering:
        if path != "config":
            assert all(choice in option_texts(COMMANDS[path])[name] for choice in choices), path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script_is_printed_and_names_the_variable(shell: str) -> None:
    done = complete(f"source_{shell}")
    assert done.returncode == 0, done.stderr
    assert f"_GUARD_COMPLETE=complete_{shell}" in done.stdout


def test_completion_offers_commands_and_options() -> None:
    offered = complete("complete_bash", COMP_WORDS="guard bundle ", COMP_CWORD="2")
    assert {"list", "show", "activate", "rollback", "clean"} <= set(offered.stdout.split())
    offered = complete("complete_bash", COMP_WORDS="guard inspect --fail", COMP_CWORD="2")
    assert "--fail-if-poisoned" in offered.stdout.split()


def complete(instruction: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "_GUARD_COMPLETE": instruction, **variables}
    return subprocess.run([sys.executable, "-m", "guard.cli"], env=environment, capture_output=True, text=True)


def test_help_loads_no_heavy_package() -> None:
    script = (
        "import sys; from guard.cli import run; assert run(['--help']) == 0; "
        "assert not {'torch', 'pydantic', 'sqlalchemy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)
