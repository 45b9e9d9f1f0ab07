"""Settings: which source wins, and what is refused with which words."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from guard import GuardConfig
from guard.config import PLACES, SERVING_SETTINGS, FitSettings, load_config, load_settings
from guard.errors import ConfigError

NONE_BY_DEFAULT = {"max_guard_ms", "deadline_header", "min_depth"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no GUARD_* variable of the machine's."""
    for name in list(os.environ):
        if name.upper().startswith("GUARD_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_load_config_nothing_given_returns_defaults():
    assert load_config() == GuardConfig()


def test_load_config_flag_wins_over_environment_over_file_over_default(folder, monkeypatch):
    (folder / "guard.toml").write_text('seed = 1\nfolds = 3\naction = "block"\n')
    monkeypatch.setenv("GUARD_SEED", "2")
    monkeypatch.setenv("GUARD_FOLDS", "4")
    config = load_config(seed=3)
    assert (config.seed, config.folds, config.action, config.n_neighbors) == (3, 4, "block", 20)


def test_load_config_flag_of_none_means_not_given(monkeypatch):
    monkeypatch.setenv("GUARD_SEED", "2")
    assert load_config(seed=None).seed == 2


def test_load_config_named_file_replaces_the_one_in_the_working_folder(folder):
    (folder / "guard.toml").write_text("seed = 1\n")
    other = folder / "other.toml"
    other.write_text("folds = 3\n")
    config = load_config(other)
    assert (config.seed, config.folds) == (0, 3)


def test_load_settings_returns_only_those_that_were_given(folder, monkeypatch):
    (folder / "guard.toml").write_text("folds = 3\n")
    monkeypatch.setenv("GUARD_ACTION", "observe")
    assert load_settings(seed=0, mode=None) == {"folds": 3, "action": "observe", "seed": 0}
    (folder / "guard.toml").unlink()
    monkeypatch.delenv("GUARD_ACTION")
    assert load_settings() == {}


def test_load_config_environment_data_dir_is_accepted(monkeypatch):
    monkeypatch.setenv("GUARD_DATA_DIR", "images")
    assert load_config().data_dir == Path("images")


def test_load_config_environment_empty_is_not_given(monkeypatch):
    monkeypatch.setenv("GUARD_ACTION", "")
    assert load_settings() == {}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("rows_per_request", "1", 1),
        ("rows_per_request", "any", "any"),
        ("norm_orders", '["l0", "l2"]', ("l0", "l2")),
        ("verdict_in_body", "true", True),
        ("false_positive_rate", "0.05", 0.05),
        ("max_image_pixels", "1000", 1000),
        ("queue_url", "sqlite:////var/queue.db", "sqlite:////var/queue.db"),
        ("max_guard_ms", "2.5", 2.5),
        ("deadline_header", "Guard-Max-Ms", "Guard-Max-Ms"),
    ],
)
def test_load_config_environment_text_becomes_the_settings_type(monkeypatch, name, text, value):
    monkeypatch.setenv(f"GUARD_{name.upper()}", text)
    assert load_settings() == {name: value}


@pytest.mark.parametrize("name", sorted(SERVING_SETTINGS - NONE_BY_DEFAULT))
def test_load_config_environment_takes_every_serving_settings_default_as_text(monkeypatch, name):
    default = getattr(GuardConfig(), name)
    monkeypatch.setenv(f"GUARD_{name.upper()}", str(default))
    assert load_settings() == {name: default}


def test_load_config_unknown_key_is_refused_with_a_suggestion_in_each_place(folder, monkeypatch):
    with pytest.raises(
        ConfigError, match=r"^unknown setting 'fals_positive_rate'\. Did you mean 'false_positive_rate'"
    ):
        GuardConfig(fals_positive_rate=0.1)
    with pytest.raises(ConfigError, match=r"^unknown setting 'actoin'\. Did you mean 'action'\?$"):
        load_config(actoin="flag")
    for name in ("GUARD_ACTOIN", "guard_actoin"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "flag")
            with pytest.raises(ConfigError, match=rf"variable {name}: .* 'action'\?$"):
                load_config()
    (folder / "guard.toml").write_text('actoin = "flag"\n')
    with pytest.raises(ConfigError, match=r"^unknown setting 'actoin'\. Did you mean 'action'\?$"):
        load_config()


def test_config_unknown_key_unlike_all_others_lists_the_known_ones():
    with pytest.raises(ConfigError, match=r"^unknown setting 'zzz'\. Known are action, .*, verdict_in_body\.$"):
        GuardConfig(zzz=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"false_positive_rate": 0}, "false_positive_rate must be in (0, 1), got 0."),
        ({"false_positive_rate": 1.0}, "false_positive_rate must be in (0, 1), got 1.0."),
        ({"false_positive_rate": float("nan")}, "false_positive_rate must be in (0, 1), got nan."),
        ({"action": "shout"}, "action: input should be 'observe', 'flag', 'relabel' or 'block', got 'shout'."),
        ({"rows_per_request": 2}, "rows_per_request: input should be 1 or 'any', got 2."),
        ({"folds": 1}, "folds: input should be greater than or equal to 2, got 1."),
        (
            {"false_positive_rate_scope": "label"},
            "false_positive_rate_scope: input should be 'all' or 'class', got 'label'.",
        ),
        ({"seed": True}, "seed: input should not be true or false, got True."),
        ({"false_positive_rate": False}, "false_positive_rate must be in (0, 1), got False."),
        ({"seed": -1}, "seed: input should be greater than or equal to 0, got -1."),
        ({"norm_orders": ("l7",)}, "norm_orders.0: input should be 'l0', 'l1', 'l2' or 'linf', got 'l7'."),
        ({"image_noise_std": float("inf")}, "image_noise_std: input should be a finite number, got inf."),
        ({"bundle_poll_seconds": 2.1}, "bundle_poll_seconds: input should be less than or equal to 2, got 2.1."),
    ],
)
def test_config_bad_value_is_one_line_with_key_rule_and_value(settings, message):
    with pytest.raises(ConfigError) as error:
        GuardConfig(**settings)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "inside", "outside"),
    [
        ("false_positive_rate", (1e-9, 0.999), (0.0, 1.0, float("nan"))),
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
        ("n_neighbors", (1,), (0,)),
        ("folds", (2,), (1,)),
        ("norm_orders", (("l0",),), ((),)),
        ("l0_tolerance", (0.0, 0.999), (-1e-9, 1.0)),
        ("image_noise_std", (0.0, 3.0), (-1e-9, float("inf"), float("nan"))),
        ("feature_noise_std", (0.0, 3.0), (-1e-9, float("inf"), float("nan"))),
        ("max_image_pixels", (1,), (0,)),
        ("bundle_poll_seconds", (1e-3, 2.0), (0.0, 2.001)),
        ("model_attribute", ("m",), ("",)),
    ],
)
def test_config_edge_values_are_accepted_inside_and_refused_outside(name, inside, outside):
    for value in inside:
        assert getattr(GuardConfig(**{name: value}), name) == value
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{name}"):
            GuardConfig(**{name: value})


def test_config_is_frozen():
    config = GuardConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.seed = 1


def test_config_replace_checks_like_a_new_one_and_leaves_the_old():
    config = GuardConfig(seed=3)
    assert config.replace(action="block") == GuardConfig(seed=3, action="block")
    assert config.action == "flag"
    with pytest.raises(ConfigError, match=r"^false_positive_rate must be in \(0, 1\), got 2\.$"):
        config.replace(false_positive_rate=2)


def test_config_serving_settings_are_settings():
    assert set(GuardConfig.model_fields) >= SERVING_SETTINGS


def test_config_settings_are_of_three_kinds_without_overlap():
    kinds = [set(FitSettings.model_fields), set(SERVING_SETTINGS), set(PLACES)]
    assert set().union(*kinds) == set(GuardConfig.model_fields)
    assert sum(map(len, kinds)) == len(GuardConfig.model_fields)


def test_documentation_lists_every_setting_with_its_kind():
    page = Path(__file__).parents[1] / "docs" / "serving.md"
    rows = re.findall(
        r"^\| `([a-z0-9_]+)`( [*\u2020])? \| ",
        page.read_text(encoding="utf-8").split("\n## In a hurry")[0],
        re.MULTILINE,
    )
    documented = {name: mark.strip() for name, mark in rows}
    marks = dict.fromkeys(FitSettings.model_fields, "*") | dict.fromkeys(PLACES, "†")
    assert documented == {name: marks.get(name, "") for name in GuardConfig.model_fields}


def test_config_portable_leaves_out_the_defaults_of_later_settings():
    later = {"review", "folds", "audit_rate", "false_positive_rate_scope"}
    assert GuardConfig().portable().keys() == GuardConfig.model_fields.keys() - PLACES - later
    changed = {"review": False, "folds": 4, "false_positive_rate_scope": "class"}
    assert changed.items() <= GuardConfig(**changed).portable().items()


def test_config_from_portable_drops_places_and_names_them():
    config = GuardConfig(seed=3, queue_url="sqlite:///q.db", data_dir=Path("images"), review=False)
    portable = config.portable()
    assert GuardConfig.from_portable(portable) == (GuardConfig(seed=3, review=False), [])
    older = {**portable, "queue_url": "sqlite:///q.db", "data_dir": None}
    assert GuardConfig.from_portable(older) == (GuardConfig(seed=3, review=False), ["queue_url"])


def test_load_config_bad_value_in_environment_is_one_line(monkeypatch):
    monkeypatch.setenv("GUARD_FALSE_POSITIVE_RATE", "1.5")
    with pytest.raises(ConfigError, match=r"^false_positive_rate: .*, got '1\.5'\.$"):
        load_config()


def test_load_config_environment_list_that_is_no_json_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("GUARD_NORM_ORDERS", "l1,l2")
    with pytest.raises(ConfigError, match=r"^settings cannot be read: .*norm_orders.*GUARD_\* variables\.$"):
        load_config()


@pytest.mark.parametrize("data", [b"action =\n", b"seed = 1\nseed = 2\n", b"\xff\xfe=\0"])
def test_load_config_broken_toml_is_one_line_that_names_the_file(folder, data):
    (folder / "guard.toml").write_bytes(data)
    with pytest.raises(ConfigError, match=r"^settings cannot be read: [^\n]+ Look at guard\.toml and the GUARD_\*"):
        load_config()


def test_load_config_named_file_missing_is_refused(folder):
    with pytest.raises(ConfigError, match=r"nowhere\.toml does not exist\. Name another with --settings\.$"):
        load_config(folder / "nowhere.toml")
    with pytest.raises(ConfigError, match=r"^settings file \S+ is a folder\. Name another with --settings\.$"):
        load_config(folder)


def test_settings_below_a_heading_are_told_from_unknown_ones(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text("[guard]\nfalse_positive_rate = 0.05\n")
    with pytest.raises(ConfigError, match=r"^there is a table \[guard\], and settings stand alone\. Remove that line"):
        load_settings(tmp_path / "s.toml")
    (tmp_path / "s.toml").write_text("guard = 0.05\n")
    with pytest.raises(ConfigError, match="unknown setting 'guard'"):
        load_settings(tmp_path / "s.toml")
