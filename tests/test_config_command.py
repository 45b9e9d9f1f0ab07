"""`guard config`: a template that is the defaults, and the settings in force without a secret."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from guard import GuardConfig
from guard.cli import run
from guard.cli.config import EXAMPLES
from guard.config import load_config

Printed = Callable[..., str]


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Printed:
    """What `guard config` prints in an empty folder, without GUARD_* variables of the machine's."""
    for name in list(os.environ):
        if name.upper().startswith("GUARD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> str:
        assert run(["config", *arguments]) == 0
        return capfd.readouterr().out

    return command


def uncommented(text: str) -> str:
    """What a person gets who takes the # from every setting."""
    return re.sub(r"^#(?! )", "", text, flags=re.MULTILINE)


def test_template_uncommented_loads_as_the_defaults(printed: Printed, tmp_path: Path) -> None:
    template = printed("--template")
    assert tomllib.loads(template) == {}
    (tmp_path / "guard.toml").write_text(uncommented(template), encoding="utf-8")
    given = tomllib.loads(uncommented(template))
    assert given.keys() | EXAMPLES.keys() == GuardConfig.model_fields.keys()
    assert not given.keys() & EXAMPLES.keys()
    assert load_config() == GuardConfig()


def test_template_examples_of_settings_without_a_default_are_taken(printed: Printed) -> None:
    lines = re.findall(r"^# Not set\. For example: (.*)$", printed("--template"), re.MULTILINE)
    examples = tomllib.loads("\n".join(lines))
    assert examples == EXAMPLES
    config = GuardConfig(anytime=True, **examples)
    assert config.max_guard_ms == EXAMPLES["max_guard_ms"]


def test_template_says_meaning_rule_and_choices_of_every_setting(printed: Printed) -> None:
    template = printed("--template")
    blocks = {
        name: block
        for block in template.split("\n\n")
        for name in GuardConfig.model_fields
        if re.search(rf"^(#|# Not set\. For example: ){name} = ", block, re.MULTILINE)
    }
    assert blocks.keys() == GuardConfig.model_fields.keys()
    assert all(len(block.splitlines()) >= 2 and block.startswith("# ") for block in blocks.values())
    assert "One of: observe, flag, relabel, block." in blocks["action"]
    assert "Some of: l0, l1, l2, linf." in blocks["norm_orders"]
    assert "Must be > 0 and < 1." in blocks["false_positive_rate"]
    assert "Must be >= 0.\n#seed = 0" in blocks["seed"]
    assert "One of: 1, any." in blocks["rows_per_request"]
    assert all(len(line) <= 120 for line in template.splitlines())


def test_config_prints_what_is_set_here_and_hides_the_queue(
    printed: Printed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "guard.toml").write_text('seed = 7\naction = "block"\ndata_dir = "/srv/ä"\n', encoding="utf-8")
    monkeypatch.setenv("GUARD_ACTION", "observe")
    monkeypatch.setenv("GUARD_QUEUE_URL", "postgresql+psycopg://guard:secret@host/queue")
    shown = printed()
    assert tomllib.loads(shown) == {"seed": 7, "action": "observe", "data_dir": "/srv/ä"}
    assert "secret" not in shown
    assert "# queue_url is set, and not shown\n" in shown
    assert tomllib.loads(printed("--template")) == {}


def test_config_of_a_wrong_file_is_one_line_and_status_2(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "wrong.toml").write_text("seeds = 1\n")
    assert run(["config", "--settings", str(tmp_path / "wrong.toml")]) == 2
    assert capfd.readouterr().err == "error: unknown setting 'seeds'. Did you mean 'seed'?\n"
