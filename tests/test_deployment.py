"""What is shipped to run the guard as a service: the systemd unit and the container file."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from guard.cli.options import QueueUrl
from guard.relabel.address import queue_url

ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "deploy" / "systemd" / "guard.service"
CONTAINERFILE = ROOT / "deploy" / "container" / "Containerfile"


def settings_of(unit: Path, section: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit, encoding="utf-8")
    return dict(parser[section])


def instructions() -> list[tuple[str, str]]:
    """Return (instruction, arguments) of the container file, continuation lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", CONTAINERFILE.read_text()))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


@pytest.fixture
def installed_unit(tmp_path: Path) -> Path:
    """The unit with a program that exists, as after an installation."""
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here: install Debian's systemd")
    unit = tmp_path / "guard.service"
    unit.write_text(UNIT.read_text().replace("/opt/guard/bin/guard", sys.executable))
    return unit


def test_systemd_finds_nothing_wrong_with_the_unit(installed_unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", installed_unit], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_systemd_calls_the_unit_well_confined(installed_unit: Path) -> None:
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", "--no-pager", installed_unit],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-300:]


def test_unit_starts_a_command_that_exists_with_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    from guard.cli import run

    program, command, *options = shlex.split(settings_of(UNIT, "Service")["ExecStart"])
    assert program.endswith("/guard")
    assert run([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(option in shown for option in options if option.startswith("--"))


@pytest.mark.parametrize(
    ("file", "queue"),
    [
        ([], "sqlite:////here/queue.db"),
        (["GUARD_QUEUE_URL=postgresql+psycopg://host/guard"], "postgresql+psycopg://host/guard"),
        (["GUARD_QUEUE_URL=", "GUARD_QUEUE_URL_FILE=queue_url"], "postgresql+psycopg://host/secret"),
    ],
)
def test_queue_of_unit_and_container_is_what_their_environment_says(
    file: list[str], queue: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "queue_url").write_text("postgresql+psycopg://host/secret")
    (tmp_path / "queue_url").chmod(0o600)
    unit = dict(word.split("=", 1) for word in settings_of(UNIT, "Service")["Environment"].split())
    container = dict(re.findall(r"(\w+)=(\S+)", dict(instructions())["ENV"]))
    starts = (shlex.split(settings_of(UNIT, "Service")["ExecStart"])[1:], json.loads(dict(instructions())["CMD"]))
    asked: list[str] = []
    app = typer.Typer()

    @app.command()
    def serve(queue: QueueUrl = None) -> None:
        asked.append(queue_url(str(queue)).replace(str(tmp_path), "/here"))

    monkeypatch.chdir(tmp_path)
    for start, given in zip(starts, (unit, container), strict=True):
        assert "--queue" not in start
        environment = {"GUARD_QUEUE_URL": given["GUARD_QUEUE_URL"], **dict(line.split("=", 1) for line in file)}
        assert CliRunner().invoke(app, [], env=environment).exit_code == 0
    assert asked == [queue, queue]


def test_container_runs_as_nobody_special_and_keeps_what_it_learns() -> None:
    last_stage = instructions()[max(i for i, (word, _) in enumerate(instructions()) if word == "FROM") :]
    words = dict(last_stage)
    uid, _, gid = words["USER"].partition(":")
    assert int(uid) > 0
    assert int(gid) > 0
    assert words["VOLUME"] == '["/var/lib/guard"]'
    assert "HEALTHCHECK" in words
    assert not {"ADD", "MAINTAINER", "EXPOSE"} & {word for word, _ in instructions()}  # nothing is open to the outside
    assert all(":" in image and "latest" not in image for word, image in instructions() if word == "FROM")


def test_container_copies_what_the_package_is_built_from() -> None:
    """Every file that pyproject.toml puts into the wheel is copied, and the ignore file lets it through."""
    import tomllib

    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {path.split("/")[0] for path in (*wheel["packages"], *wheel["force-include"])}
    needed |= {"pyproject.toml", "README.md", "LICENSE", "constraints.txt"}
    copied = {
        name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]
    }
    ignored = Path(f"{CONTAINERFILE}.dockerignore").read_text().splitlines()
    assert needed <= copied
    assert needed <= {line.removeprefix("!") for line in ignored if line.startswith("!")}
