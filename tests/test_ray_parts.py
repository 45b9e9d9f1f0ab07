"""What the Ray engine is made of, without a cluster: sums over replicas, settings, config files, scratch folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from guard.errors import ServerError
from guard.ray.config import serve_config
from guard.ray.counts import Standing, Tally
from guard.ray.scratch import own_folder
from guard.ray.settings import APPLICATION, COUNTS, GUARDED, Settings
from guard.telemetry import MetricBuffer

DEPLOY = Path(__file__).resolve().parent.parent / "deploy" / "ray"
CLEAN = ("guard_verdicts_total", ("m", "clean", "none"))
BUNDLE = ("guard_bundle_info", ("m", "abc"))


class Replica:
    """Counts, and reports to a tally."""

    def __init__(self, name: str, tally: Tally) -> None:
        self.name, self.tally = name, tally
        self.buffer, self.standing = MetricBuffer(), Standing()

    def count(self, amount: int) -> None:
        self.buffer.count(*(CLEAN[0], *CLEAN[1]), amount=amount)

    def report(self, **options: bool) -> Any:
        made = self.standing.report(self.buffer.drain())
        self.tally.report(self.name, made, **options)
        return made


def test_tally_adds_up_replicas_and_a_report_that_comes_twice_or_late_changes_nothing() -> None:
    tally = Tally()
    one, other = Replica("one", tally), Replica("other", tally)
    one.count(2)
    early = one.report()
    one.count(3)
    other.count(10)
    late = one.report()
    other.report()
    tally.report("one", late)
    tally.report("one", early)
    assert tally.totals()[CLEAN] == 15


def test_tally_keeps_the_counts_of_replicas_that_died_and_of_those_that_ended() -> None:
    tally = Tally()
    killed, ended = Replica("killed", tally), Replica("ended", tally)
    killed.count(1)
    killed.report()
    ended.count(2)
    last = ended.report(is_last=True)
    tally.report("ended", last, is_last=True)
    tally.report("ended", last)
    successor = Replica("successor", tally)
    successor.count(4)
    successor.report()
    assert tally.totals()[CLEAN] == 7


def test_new_tally_hears_all_that_living_replicas_ever_counted() -> None:
    replica = Replica("one", Tally())
    replica.count(5)
    replica.report()
    replica.tally = Tally()
    replica.count(1)
    replica.report()
    assert replica.tally.totals()[CLEAN] == 6


def test_gauge_of_a_replica_that_is_silent_no_longer_counts() -> None:
    now = [0.0]
    tally = Tally(lambda: now[0])
    replica = Replica("one", tally)
    replica.buffer.set(*(BUNDLE[0], *BUNDLE[1]), value=1)
    replica.report()
    assert tally.totals()[BUNDLE] == 1
    now[0] = 60.0
    assert tally.totals()[BUNDLE] == 0


def test_settings_refuse_what_they_do_not_know_and_a_key_that_is_asked_for_and_not_there(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    archives = {"m": "/m.mar"}
    for wrong in ({"archives": {}}, {"archives": archives, "key": "k"}, {"archives": archives, "batch_size": 0}):
        with pytest.raises(ValidationError):
            Settings.model_validate(wrong)
    with pytest.raises(ValidationError, match="ask_key is false, and key_file names a key"):
        Settings(archives=archives, ask_key=False, key_file="k")
    assert Settings(archives=archives, ask_key=False).key() is None
    monkeypatch.delenv("BACKDOOR_GUARD_KEY", raising=False)
    with pytest.raises(ServerError, match=r"no key of 16 characters or more in \$BACKDOOR_GUARD_KEY"):
        Settings(archives=archives).key()
    monkeypatch.setenv("BACKDOOR_GUARD_KEY", "k" * 16)
    assert Settings(archives=archives).key() == "k" * 16
    file = tmp_path / "keys.json"
    with pytest.raises(ServerError, match="cannot be used"):
        Settings(archives=archives, key_file=str(file)).key()
    file.write_text(json.dumps({"inference": {"key": "a" * 20}}))
    file.chmod(0o644)
    with pytest.raises(ServerError, match="others can read"):
        Settings(archives=archives, key_file=str(file)).key()
    file.chmod(0o600)
    assert Settings(archives=archives, key_file=str(file)).key() == "a" * 20


def test_config_file_is_what_serve_takes(tmp_path: Path) -> None:
    settings = Settings(archives={"m": "/models/m.mar"}, key_file="/etc/guard/keys.json")
    document = yaml.safe_load(serve_config(settings, replicas=3, host="127.0.0.1", port=8080))
    (application,) = document["applications"]
    assert Settings.model_validate(application["args"]) == settings
    assert (application["name"], application["import_path"]) == (APPLICATION, "guard.ray.app:build")
    assert {one["name"]: one.get("num_replicas") for one in application["deployments"]} == {GUARDED: 3, COUNTS: 1}


def test_shipped_config_file_is_the_one_that_is_written() -> None:
    shipped = (DEPLOY / "serve.yaml").read_text()
    settings = Settings.model_validate(yaml.safe_load(shipped)["applications"][0]["args"])
    assert shipped == serve_config(settings, replicas=2, host="127.0.0.1", port=8080)


def test_rayservice_fits_its_schema_and_deploys_the_same_application() -> None:
    manifest = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text())
    schema = json.loads(Path(__file__).with_name("rayservice.schema.json").read_text())
    jsonschema.validate(manifest, schema)
    inner = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    shipped = yaml.safe_load((DEPLOY / "serve.yaml").read_text())
    assert inner["applications"] == shipped["applications"]
    cluster = manifest["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        (container,) = group["template"]["spec"]["containers"]
        secret = {entry["name"] for entry in container["env"] if "valueFrom" in entry}
        assert secret == {"RAY_AUTH_TOKEN", "BACKDOOR_GUARD_KEY", "GUARD_QUEUE_URL"}
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
    del cluster["headGroupSpec"]["rayStartParams"]
    with pytest.raises(jsonschema.ValidationError, match="rayStartParams"):
        jsonschema.validate(manifest, schema)


def test_folder_of_a_killed_replica_is_removed_by_the_next_and_that_of_a_living_one_is_not(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from guard.ray.scratch import own_folder\n"
        "with own_folder(Path(sys.argv[1])) as folder:\n"
        "    print(folder, flush=True); sys.stdin.readline(); os._exit(9)"
    )
    parent = tmp_path / "scratch"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        other = Path(process.stdout.readline().strip())
        with own_folder(parent) as folder:
            assert {*parent.iterdir()} == {folder, other}
        assert {*parent.iterdir()} == {other}
        process.stdin.close()
        process.wait()
    with own_folder(parent) as folder:
        assert {*parent.iterdir()} == {folder}
    assert [*parent.iterdir()] == []
    (tmp_path / "link").symlink_to(parent)
    with pytest.raises(ServerError, match="is a link, or somebody else's folder"), own_folder(tmp_path / "link"):
        pass
