"""Alerts, rules, dashboard and the table of metrics: held to each other and to the code, and run by promtool."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from guard.observing.collectors import COMPANION_METRICS, PAGE_METRICS, QUEUE_UP, RETRAINER_METRICS
from guard.telemetry import METRICS, prometheus_names

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
RULES, ALERTS = (
    [rule for group in yaml.safe_load((DEPLOY / "prometheus" / name).read_text())["groups"] for rule in group["rules"]]
    for name in ("rules.yml", "alerts.yml")
)
ALERT_TESTS = sorted((DEPLOY / "prometheus" / "tests").glob("*.yml"))
DASHBOARD = json.loads((DEPLOY / "grafana" / "guard.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
#: Every series that an expression may name.
SERIES = {name for name, _, _ in prometheus_names()} | set(COMPANION_METRICS) | {rule["record"] for rule in RULES}


@pytest.fixture(scope="module")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("there is no promtool here: install Debian's prometheus")
    return found


# --- alerts


@pytest.mark.parametrize("file", ALERT_TESTS, ids=lambda file: file.stem)
def test_alerts_fire_and_do_not_as_their_tests_say(file: Path, promtool: str) -> None:
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_configuration_and_rules_are_what_prometheus_takes(promtool: str) -> None:
    for kind, name in (("config", "prometheus.yml"), ("rules", "rules.yml"), ("rules", "alerts.yml")):
        command = [promtool, "check", kind, str(DEPLOY / "prometheus" / name)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in ALERTS])
def test_every_alert_is_tested_both_firing_and_quiet(alert: str) -> None:
    cases = [
        case
        for file in ALERT_TESTS
        for test in yaml.safe_load(file.read_text())["tests"]
        for case in test["alert_rule_test"]
        if case["alertname"] == alert
    ]
    assert {bool(case["exp_alerts"]) for case in cases} == {True, False}


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_every_alert_says_how_bad_it_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert re.fullmatch("Guard[A-Z][A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    file, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == rule["alert"].lower()
    headings = re.findall(r"^#+ (.*)$", (ROOT / file).read_text(), re.MULTILINE)
    assert rule["alert"] in headings


def names_in(expression: str) -> set[str]:
    """Return the guard's series that an expression names, without what is in quotes."""
    return set(re.findall(r"\bguard[a-z0-9_:]+", re.sub(r'"[^"]*"', "", expression)))


@pytest.mark.parametrize("expression", [rule["expr"] for rule in (*RULES, *ALERTS)] + EXPRESSIONS)
def test_rules_and_panels_name_series_that_exist(expression: str) -> None:
    assert names_in(expression) <= SERIES


def test_promtool_files_feed_series_that_exist() -> None:
    for file in ALERT_TESTS:
        for test in yaml.safe_load(file.read_text())["tests"]:
            for given in test["input_series"]:
                assert given["series"].partition("{")[0] in SERIES | {"up"}


# --- dashboard


def test_committed_dashboard_is_the_one_that_is_built() -> None:
    spec = importlib.util.spec_from_file_location("build_dashboard", DEPLOY / "grafana" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DEPLOY / "grafana" / "guard.json").read_text() == module.build(), "run python deploy/grafana/build.py"


def test_dashboard_shows_every_metric_of_the_table() -> None:
    shown = set().union(*map(names_in, EXPRESSIONS))
    for rule in RULES:  # what a recorded series is made of is shown by it
        if rule["record"] in shown:
            shown |= names_in(rule["expr"])
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert {*METRICS, *COMPANION_METRICS} <= families


def test_dashboards_panels_have_titles_units_and_room_of_their_own() -> None:
    cells: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    for panel in DASHBOARD["panels"]:
        assert panel["title"]
        assert panel["description"].endswith(".")
        place = panel["gridPos"]
        selected = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not selected & cells
        cells |= selected
        assert [target["refId"] for target in panel["targets"]] == list("ABCDEF"[: len(panel["targets"])])


def test_provisioning_names_the_dashboards_data_source() -> None:
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources" / "prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((folder / "dashboards" / "guard.yml").read_text())["providers"]
    variable = DASHBOARD["templating"]["list"][0]
    assert (variable["name"], variable["query"]) == ("datasource", source["type"])
    assert provider["type"] == "file"


# --- the table


def table() -> dict[str, tuple[str, tuple[str, ...], set[str]]]:
    """Return docs/metrics.md's table: name -> type, labels, who exports it."""
    rows = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `guard") and len(cells) == 5:
            name = cells[0].strip("`")
            assert name not in rows
            rows[name] = (cells[1], tuple(re.findall(r"`(\w+)`", cells[2])), set(cells[3].split(", ")))
    return rows


def test_table_of_metrics_is_that_of_the_code() -> None:
    expected = {name: (metric.kind, metric.labels, {"server"}) for name, metric in METRICS.items()}
    for exporter, metrics in (("page", PAGE_METRICS), ("retrainer", RETRAINER_METRICS)):
        expected |= {name: (metric.kind, metric.labels, {exporter}) for name, metric in metrics.items()}
    expected[QUEUE_UP.name] = (QUEUE_UP.kind, QUEUE_UP.labels, {"page", "retrainer"})
    for rule in RULES:
        labels = re.findall(r"sum by \(([a-z, ]+)\)", rule["expr"])
        assert len(set(labels)) == 1
        expected[rule["record"]] = ("recorded", tuple(labels[0].split(", ")), {"rule"})
    assert table() == expected


def test_companions_metrics_follow_prometheus_habits() -> None:
    for metric in COMPANION_METRICS.values():
        assert metric.name.endswith("_total") == (metric.kind == "counter")
        assert metric.help.endswith(".")
