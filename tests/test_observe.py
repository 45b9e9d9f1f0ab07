"""`guard observe` and what it stands on: targets, an installed Prometheus, and one clear line for what is missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from prometheus_client.core import GaugeMetricFamily

from guard.cli import run
from guard.errors import ObservingError
from guard.observing.exporting import exporting
from guard.observing.targets import Target, parse_address, read_targets, write_targets
from guard.processes.ports import free_port
from guard.processes.prometheus import PrometheusInstance, find_prometheus, prometheus_settings

SERVER = Target("guard-server", "127.0.0.1:8082")


class OneMetric:
    """What an endpoint exports in these tests."""

    def collect(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily("guard_queue_up", "Up.", value=1.0)]


@pytest.fixture
def targets(tmp_path: Path) -> Path:
    file = tmp_path / "targets.json"
    write_targets(file, [SERVER])
    return file


@pytest.fixture
def prometheus() -> Path:
    if shutil.which("prometheus") is None:
        pytest.skip("there is no prometheus here: install Debian's prometheus")
    return find_prometheus()


def ask(url: str, expression: str) -> Any:
    """Return what a Prometheus answers to an instant query."""
    with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}") as reply:
        return json.load(reply)["data"]["result"]


def wait_for(condition: Any, seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


# --- targets


def test_targets_are_a_file_that_prometheus_follows(targets: Path) -> None:
    assert json.loads(targets.read_text()) == [{"targets": ["127.0.0.1:8082"], "labels": {"job": "guard-server"}}]
    write_targets(targets, [SERVER, Target("guard-review", "127.0.0.1:8083")])
    assert read_targets(targets) == ["127.0.0.1:8082", "127.0.0.1:8083"]
    assert [file.name for file in targets.parent.iterdir()] == ["targets.json"]
    assert targets.stat().st_mode & 0o777 == 0o644


def test_targets_that_cannot_be_written_or_read_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ObservingError, match=r"targets\.json cannot be written: No such file or directory\.$"):
        write_targets(tmp_path / "missing" / "targets.json", [SERVER])
    with pytest.raises(ObservingError, match=r"No such file or directory\. `guard serve` says where"):
        read_targets(tmp_path / "targets.json")
    for text in ("", "{}x", '{"targets": 1}', "[1]", '[{"labels": {}}]'):
        (tmp_path / "targets.json").write_text(text)
        with pytest.raises(ObservingError, match="is no file of targets"):
            read_targets(tmp_path / "targets.json")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8082", "127.0.0.1:8082"),
        ("http://127.0.0.1:8082/metrics", "127.0.0.1:8082"),
        ("gpu-3.example.org:9/", "gpu-3.example.org:9"),
        ("[::1]:8082", "[::1]:8082"),
    ],
)
def test_address_is_host_and_port(text: str, address: str) -> None:
    assert parse_address(text) == address


@pytest.mark.parametrize(
    "text", ["", "8082", "localhost", "localhost:0", "localhost:70000", "a b:1", "https://h:1", "h:1/x"]
)
def test_address_of_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ObservingError, match="a target is HOST:PORT"):
        parse_address(text)


# --- Prometheus


def test_settings_are_the_shipped_ones_with_full_paths(tmp_path: Path) -> None:
    settings = prometheus_settings(tmp_path / "a[1]*.json", 0.5)
    assert settings["global"] == dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "500ms")
    assert [Path(file).is_file() for file in settings["rule_files"]] == [True, True]
    (job,) = settings["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [f"{tmp_path}/a\\[1]\\*.json"]


def test_prometheus_scrapes_what_the_file_names_and_has_the_rules(
    targets: Path, prometheus: Path, tmp_path: Path
) -> None:
    with exporting(0, OneMetric()) as url:
        write_targets(targets, [Target("guard-review", parse_address(url))])
        with PrometheusInstance(targets, scrape_seconds=0.2) as instance:
            folder = instance.data_dir
            (found,) = wait_for(lambda: ask(instance.url, "guard_queue_up"))
            assert found["metric"]["job"] == "guard-review"
            assert found["value"][1] == "1"
            with urllib.request.urlopen(f"{instance.url}/api/v1/rules") as reply:
                groups = json.load(reply)["data"]["groups"]
            assert {rule["name"] for group in groups for rule in group["rules"]} >= {"guard_clean_drift", "GuardBypass"}
    assert folder is not None
    assert not folder.exists()
    assert not instance.is_alive()


def test_taken_port_and_missing_program_leave_nothing_behind(targets: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        instance = PrometheusInstance(targets, program=Path(sys.executable), port=port, data_dir=tmp_path / "data")
        with pytest.raises(ObservingError, match=rf"^port {port} is taken by another program\. Give another --port"):
            instance.start()
    with pytest.raises(ObservingError, match=r"/nowhere is no program that can be run\. Install it \(Debian"):
        PrometheusInstance(targets, program=Path("/nowhere"), data_dir=tmp_path / "data").start()
    assert not (tmp_path / "data").exists()


def test_program_that_ends_at_once_is_told_with_its_last_words(targets: Path, tmp_path: Path) -> None:
    script = tmp_path / "prometheus"
    script.write_text('#!/bin/sh\necho \'ts=now level=error msg="Opening storage failed" err="no space"\'\nexit 1\n')
    script.chmod(0o755)
    with pytest.raises(ObservingError, match=r"^Prometheus has ended by itself: no space\.$"):
        PrometheusInstance(targets, program=script).start()


def test_data_folder_that_cannot_be_used_is_told(targets: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(ObservingError, match=r"data cannot be used: .*Name another --data-dir\.$"):
        PrometheusInstance(targets, program=Path(sys.executable), data_dir=tmp_path / "data").start()


# --- the command


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ([], 2, "name what to watch: --targets FILE"),
        (["--targets", "t.json", "--target", "h:1"], 2, "name what to watch"),
        (["--target", "nonsense"], 1, "a target is HOST:PORT"),
        (["--targets", "missing.json"], 1, "missing.json: No such file or directory"),
        (["--targets", "empty.json"], 1, "there is no target in empty.json"),
        (["--targets", "list.txt"], 2, "--targets must be a .json file"),
        (["--target", "h:1", "--port", "70000"], 2, "--port must be in [0, 65535]"),
        (["--target", "h:1", "--scrape-seconds", "0"], 2, "--scrape-seconds must be in [0.1, 120]"),
        (["--target", "h:1", "--port", "0"], 1, "there is no prometheus on PATH. Install it (Debian: apt install"),
    ],
)
def test_observe_says_in_one_line_what_is_wrong(
    options: list[str],
    status: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    write_targets(tmp_path / "empty.json", [])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert run(["observe", *options]) == status
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_metrics_of_a_retrainer_that_does_not_stay_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["retrainer", "--model", "m", "--queue", "q.db", "--once", "--metrics-port", "0"]) == 2
    assert capsys.readouterr().err == "error: --metrics-port is for a retrainer that stays. Leave out --once.\n"
    assert list(tmp_path.iterdir()) == []


def test_observe_runs_until_ctrl_c_and_leaves_nothing(prometheus: Path, tmp_path: Path) -> None:
    port = free_port()
    with exporting(0, OneMetric()) as url:
        command = ["observe", "--target", url, "--port", str(port), "--data-dir", "kept", "--scrape-seconds", "0.2"]
        process = subprocess.Popen(
            [sys.executable, "-m", "guard.cli", *command],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == (
                f"Prometheus on http://127.0.0.1:{port}; alerts on http://127.0.0.1:{port}/alerts\n"
            )
            assert process.stdout.readline() == f"watching {parse_address(url)}; Ctrl-C stops it.\n"
            wait_for(lambda: ask(f"http://127.0.0.1:{port}", 'up{job="guard-server"} == 1'))
            children = psutil.Process(process.pid).children(recursive=True)
            assert any(child.name() == "prometheus" for child in children)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60)[0] == "stopped\n"
            assert process.returncode == 0
            assert psutil.wait_procs(children, timeout=10)[1] == []
        finally:
            process.kill()
            process.wait()
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert yaml.safe_load((tmp_path / "kept" / "prometheus.yml").read_text())["scrape_configs"]
