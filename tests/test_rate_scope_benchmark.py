"""The benchmark of the scope of the rate without a network: shares of classes, and the stored table in the docs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("rate_scope_bench", PROJECT / "benchmarks" / "rate_scope.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_shares_leave_out_classes_with_few_images(benchmark: ModuleType) -> None:
    labels = np.repeat([0, 1, 2], [50, 49, 100])
    assert benchmark.shares(labels == 2, labels) == [(0.0, 50), (1.0, 100)]


def test_table_of_the_docs_is_that_of_the_stored_rows(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = benchmark._read(PROJECT / "benchmarks" / "results" / "rate_scope.csv")
    written = benchmark.DOCUMENT.read_text(encoding="utf-8")
    monkeypatch.setattr(benchmark, "DOCUMENT", tmp_path / "detection.md")
    benchmark.DOCUMENT.write_text(written, encoding="utf-8")
    benchmark.write_document(rows)
    assert benchmark.DOCUMENT.read_text(encoding="utf-8") == written
    decided = {(row["model"], row["seed"]) for row in rows}
    for scope in benchmark.SCOPES:  # each guard under both, at every rate
        assert sum(row["scope"] == scope for row in rows) == len(decided) * len(benchmark.RATES)
