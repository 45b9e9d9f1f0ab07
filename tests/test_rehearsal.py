"""The parts of the rehearsal that need no server: faster rules, delays, and what its documents say."""

from __future__ import annotations

import csv
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "rehearsal"
OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
ALERTS = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())
NAMES = [rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """Import the scripts as they import each other: from their own folder."""
    before = set(sys.modules)
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in ("rules", "traffic", "rehearse")})
    sys.path.remove(str(SCRIPTS))
    for name in set(sys.modules) - before:
        if str(SCRIPTS) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("duration", "expected"), [("1h", "60000ms"), ("5m", "5000ms"), ("30s", "500ms"), ("90ms", "2ms"), ("0s", "1ms")]
)
def test_a_duration_is_divided(scripts: SimpleNamespace, duration: str, expected: str) -> None:
    assert scripts.rules.divided(duration, 60.0) == expected


def test_every_window_offset_and_wait_of_the_rules_is_divided_and_nothing_else(
    scripts: SimpleNamespace, tmp_path: Path
) -> None:
    files = scripts.rules.faster_rules(tmp_path, 60.0)
    text = "".join(file.read_text() for file in files)
    shipped = "".join((ROOT / "deploy" / "prometheus" / file.name).read_text() for file in files)
    assert not re.search(r"\[\d+[smhd]\]|(offset|for:) \d+[smhd]\b", text)
    pattern = r"\[\d+m?[smhd]\]|offset \d+m?[smhd]"
    assert len(re.findall(pattern, text)) == len(re.findall(pattern, shipped))
    assert "guard:flagged:ratio_rate1h" in text  # names stay
    assert "> 4 * 3600" in text  # so does an age


#: One waits for hours, two are about guards and handlers that the rehearsal has not, and one about an audit sample.
NOT_REHEARSED = {"GuardQueueAge", "GuardDepthFloor", "GuardBatchMismatch", "GuardMissedPoisoned"}


def test_delays_count_from_the_start_and_from_the_end_of_the_cause(scripts: SimpleNamespace) -> None:
    attack = scripts.traffic.Span(scripts.traffic.Phase("attack", 10, "triggered", 0.3), 100.0, 110.0)
    firing = scripts.rehearse.Firing
    found = [firing("GuardFlagRateJump", 50.0, 60.0), firing("GuardFlagRateJump", 103.0, 117.0)]
    rows = {row.alert: row for row in scripts.rehearse.delays(found, [attack])}
    assert (rows["GuardFlagRateJump"].fired_after_s, rows["GuardFlagRateJump"].cleared_after_s) == (3.0, 7.0)
    assert rows["GuardBypass"].fired_after_s is None


def test_every_alert_is_rehearsed_but_those_that_the_rehearsal_names(scripts: SimpleNamespace) -> None:
    assert set(scripts.rehearse.CAUSES) == set(NAMES) - NOT_REHEARSED
    assert {*scripts.rehearse.CAUSES.values()} <= {
        "retraining refused",
        *(phase.name for phase in scripts.rehearse.PHASES),
    }
    names = [phase.name for phase in scripts.rehearse.PHASES]
    assert len(set(names)) == len(names)  # each is looked up by its name


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_has_its_page_in_the_runbook(name: str) -> None:
    rule = next(rule for group in ALERTS["groups"] for rule in group["rules"] if rule["alert"] == name)
    assert rule["annotations"]["runbook_url"] == f"docs/operations.md#{name.lower()}"
    assert f"\n### {name}\n" in OPERATIONS


def test_document_holds_what_the_last_rehearsal_measured() -> None:
    table = OPERATIONS.split("<!-- rehearsal -->")[1].split("<!-- end -->")[0]
    with (ROOT / "benchmarks" / "results" / "rehearsal.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["alert"] for row in rows} == set(NAMES) - NOT_REHEARSED
    for row in rows:
        assert f"| {row['alert']} | {row['cause']} | {row['fired_after_s']} | {row['cleared_after_s']} |" in table
