"""compose.yaml without Docker: its schema, commands, files, ports, and the Prometheus that it describes."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

from guard.cli import app
from guard.observing.targets import read_targets

ROOT = Path(__file__).resolve().parent.parent
COMPOSE = ROOT / "compose.yaml"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
OURS = [name for name, service in SERVICES.items() if service["image"] == "backdoor-guard"]
TARGETS = ROOT / "deploy" / "compose" / "targets.json"


def words(name: str) -> list[str]:
    """Return the command of a service, with the variables of the environment filled in."""
    return [re.sub(r"\$\{GUARD_MODEL[^}]*\}", "digits", word) for word in SERVICES[name]["command"]]


def options(name: str) -> dict[str, str]:
    given = words(name)
    return {option: value for option, value in itertools.pairwise(given) if option.startswith("--")}


def mounts(name: str) -> dict[str, str]:
    """Return files of the repository that a service is given, by where they are within."""
    found = [text.split(":") for text in SERVICES[name].get("volumes", ()) if text.startswith("./")]
    return {within: here for here, within, *_ in found}


def test_compose_is_what_compose_takes() -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_compose_holds_server_review_retrainer_and_what_watches_them() -> None:
    assert set(OURS) == {"server", "review", "retrainer"}
    assert set(SERVICES) - set(OURS) == {"proxy", "prometheus", "grafana"}
    for name in set(SERVICES) - {"server"}:
        assert SERVICES[name]["network_mode"] == "service:server"  # all of them know each other on loopback
        assert "ports" not in SERVICES[name]
    for name in set(SERVICES) - set(OURS):
        assert re.search(r":v?\d", SERVICES[name]["image"]), "an image without a version"


@pytest.mark.parametrize("name", OURS)
def test_compose_command_is_one_that_the_command_line_takes(name: str) -> None:
    command, *rest = words(name)
    group = get_command(app)
    found = group.get_command(typer.Context(group), command)  # type: ignore[attr-defined]
    assert found is not None
    found.make_context(command, rest)  # parses, and runs nothing


@pytest.mark.parametrize("name", SERVICES)
def test_compose_mounts_files_that_exist(name: str) -> None:
    for here in mounts(name).values():
        assert (ROOT / here).exists(), here
    build = SERVICES[name].get("build")
    assert build is None or (ROOT / build["context"] / build["dockerfile"]).is_file()


def test_compose_publishes_on_loopback_what_somebody_listens_on() -> None:
    nginx = (ROOT / "deploy" / "compose" / "nginx.conf").read_text(encoding="utf-8")
    within = set()
    for published in SERVICES["server"]["ports"]:
        address, _, port = published.split(":")
        assert address == "127.0.0.1"
        within.add(port)
    assert within == {*re.findall(r"listen (\d+);", nginx), "9090", "3000"}
    passed_to = set(re.findall(r"proxy_pass http://127\.0\.0\.1:(\d+);", nginx))
    assert passed_to == {options("server").get("--port", "8080"), options("review")["--port"]}


def test_compose_targets_are_the_metrics_of_its_services() -> None:
    assert read_targets(TARGETS) == [
        "127.0.0.1:8082",  # two above the server's port
        f"127.0.0.1:{options('review')['--metrics-port']}",
        f"127.0.0.1:{options('retrainer')['--metrics-port']}",
    ]
    jobs = [group["labels"]["job"] for group in json.loads(TARGETS.read_text(encoding="utf-8"))]
    assert jobs == ["guard-server", "guard-review", "guard-retrainer"]


def test_compose_prometheus_reads_its_rules_and_targets(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("there is no promtool here: install Debian's prometheus")
    for within, here in mounts("prometheus").items():
        place = tmp_path / Path(within).relative_to("/etc/prometheus")
        place.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / here, place)
    done = subprocess.run(
        [promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("rules found") == 2
    (scrape,) = yaml.safe_load((tmp_path / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    (pattern,) = scrape["file_sd_configs"][0]["files"]
    assert [path.name for path in tmp_path.glob(pattern)] == ["guard.json"]


def test_compose_grafana_has_dashboard_and_source_where_its_files_say() -> None:
    provisioning = ROOT / mounts("grafana")["/etc/grafana/provisioning"]
    (dashboards,) = yaml.safe_load((provisioning / "dashboards" / "guard.yml").read_text())["providers"]
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert any(within.startswith(dashboards["options"]["path"]) for within in mounts("grafana"))
    assert source["url"] == "http://127.0.0.1:9090"
