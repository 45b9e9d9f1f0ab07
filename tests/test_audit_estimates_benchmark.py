"""The simulated weeks of `benchmarks/audit_estimates.py`: what they hold, and the tables."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("audit_bench", PROJECT / "benchmarks" / "audit_estimates.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_truth_of_a_week_by_hand(benchmark: ModuleType) -> None:
    poisoned = np.array([True, True, True, True, False, False, False, False, False, False])
    p_values = np.array([0.001, 0.01, 0.009, 0.05, 0.005, 0.5, 0.6, 0.7, 0.8, 0.9])
    assert benchmark.Week(np.zeros(10, dtype=int), poisoned, p_values, 0.01).truth() == {
        "detection_rate": 3 / 4,
        "false_positive_rate": 1 / 6,
        "poisoned_share": 4 / 10,
        "precision": 3 / 4,
        "missed": 1,
    }


def test_audits_of_a_week_are_drawn_as_often_as_their_probability_says(benchmark: ModuleType) -> None:
    drawn = expected = variance = 0.0
    for run in range(12):
        rng = np.random.default_rng((0, run))
        week = benchmark.draw_week(rng)
        is_audit, probability = benchmark.draw_audits(week, rng)
        assert not (is_audit & week.is_flagged).any()
        drawn += is_audit.sum()
        expected += probability[~week.is_flagged].sum()
        variance += (probability * (1 - probability))[~week.is_flagged].sum()
    assert abs(drawn - expected) < 4 * np.sqrt(variance)


def test_tables_have_their_columns_and_at_least_as_many_runs_as_asked_for(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "SEEDS", (0,))
    picture = tmp_path / "picture.png"
    benchmark.main(["--runs", "2", "--output-dir", str(tmp_path), "--picture", str(picture)])
    with (tmp_path / "audit_estimates.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["run", "quantity", "truth", "estimate", "lower", "upper"]
    quantities = [row["quantity"] for row in rows]
    assert min(quantities.count(name) for name in benchmark.QUANTITIES) == 2
    assert set(quantities) == set(benchmark.QUANTITIES)
    assert all(float(row["lower"]) <= float(row["estimate"]) <= float(row["upper"]) for row in rows)
    assert picture.stat().st_size > 0
    assert (tmp_path / "audit_coverage.csv").read_text().startswith("property,value,quantity,runs,known,not_known_yet,")
