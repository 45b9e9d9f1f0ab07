"""The benchmarks of backups: rows that replace their own, runs that go on, tables that say what the paper says."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def backups() -> ModuleType:
    return load("backups")


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    return load("backup_pictures")


def row(backups: ModuleType, model: str, backup: str, recovery: float) -> dict[str, object]:
    return dict(zip(backups.COLUMNS, (model, backup, recovery, 0.9, 0.1, 0.05, 1.5, 0.25, 0.125), strict=True))


def test_table_has_the_columns_of_the_plan_and_a_row_replaces_its_own(backups, tmp_path):
    file = tmp_path / "backups.csv"
    backups.write(file, backups.COLUMNS, [row(backups, "m", "anp", 0.5), row(backups, "a", "anp", 0.25)])
    backups.write(file, backups.COLUMNS, [row(backups, "m", "anp", 0.75)])
    lines = file.read_text().splitlines()
    assert lines[0] == (
        "model,backup,recovery_accuracy,clean_accuracy,attack_success,guarded_attack_success,"
        "training_seconds,megabytes,milliseconds"
    )
    assert [line.split(",")[:3] for line in lines[1:]] == [["a", "anp", "0.25"], ["m", "anp", "0.75"]]


def test_rows_that_are_there_are_not_measured_again(backups, tmp_path, monkeypatch):
    measured = []

    class FakeBench:
        def __init__(self, name: str, *_numbers: int) -> None:
            self.name = name

        def row(self, kind: str, _anp: object) -> tuple[dict[str, object], list[object]]:
            measured.append((self.name, kind))
            if len(measured) == 2:
                raise KeyboardInterrupt
            return row(backups, self.name, kind, 0.5), []

    monkeypatch.setattr(backups, "Bench", FakeBench)
    requested = ["one", "two", "--backups", "head", "anp", "--output-dir", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        backups.main(requested)
    backups.main(requested)
    assert measured == [("one", "head"), ("one", "anp"), ("one", "anp"), ("two", "head"), ("two", "anp")]
    assert len(backups.read(tmp_path / "backups.csv")) == 4


def test_cells_are_bold_from_nine_tenths_of_the_clean_accuracy(pictures):
    cell = {"recovery_accuracy": "0.81", "clean_accuracy": "0.9", "guarded_attack_success": "0.05"}
    assert pictures._cell(cell) == "**81.0** / 90.0 / 5.0"
    assert pictures._cell({**cell, "recovery_accuracy": "0.809"}) == "80.9 / 90.0 / 5.0"


def test_tables_go_between_their_marks_and_stand_beside_the_papers(pictures, backups, tmp_path):
    document = tmp_path / "backups.md"
    mark = "<!-- fine-pruning: benchmarks/backup_pictures.py -->"
    document.write_text(f"before\n{mark}\nold\n<!-- end of fine-pruning -->\nafter\n")
    rows = [{name: str(value) for name, value in row(backups, "mnist-b-mnist_small-0", "fine-pruning", 0.5).items()}]
    for _ in range(2):
        pictures.put(document, "fine-pruning", pictures.fine_pruning_table(rows))
    lines = document.read_text().splitlines()
    assert lines[4] == "| mnist-b-mnist_small-0 | 90.0 (99.1) | 10.0 (14.6) |"
    assert (lines[0], lines[1], lines[-1], len(lines)) == ("before", mark, "after", 7)


def test_curves_of_all_settings_stand_together(pictures):
    at = ("0.0", "0.1", "0.2", "0.3", "0.4", "0.5", "0.7", "0.9")
    curve = [{"at": sample, "test_accuracy": "0.9", "attack_success": sample} for sample in reversed(at)]
    named = [{**row, "model": "cifar10-blend-resnet20-0", "backup": "anp"} for row in curve]
    other = [{**row, "model": "mnist-blend-mnist_cnn-0", "backup": "anp"} for row in curve]
    gentler = [{**row, "model": "cifar10-blend-resnet20-0", "epsilon": "0.2", "iterations": "200"} for row in curve]
    curves = pictures.pruning_curves([*named, *other], [{**row, "attack_success": "0.5"} for row in gentler])
    lines = pictures.anp_table(curves).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| cifar10-blend-resnet20-0 | 0.4, 2000 | 90.0 / 0.0 | 90.0 / 10.0 |")
    assert lines[3].startswith("| cifar10-blend-resnet20-0 | 0.2, 200 | 90.0 / 50.0 |")
