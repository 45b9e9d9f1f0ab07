"""The BadNets benchmarks, without a training: rows, printed values, matrices, pictures."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from guard.lab.attacks import Backdoor, make_trigger
from guard.lab.attacks.targets import AllToAll
from guard.lab.zoo.splits import LabelledImages

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks" / "badnets"


@pytest.fixture
def script(monkeypatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(FOLDER))
        module = importlib.import_module(name)
        assert Path(module.__file__).parent == FOLDER
        return module

    yield load
    for name in ("trials", "drawings", "single_target", "all_to_all", "poison_rate"):
        sys.modules.pop(name, None)


@pytest.fixture
def trials(script):
    return script("trials")


def pair_row(source: int, target: int, backdoor_error: float = 0.0, clean_error: float = 0.009) -> dict[str, float]:
    return {
        "source": source,
        "target": target,
        "seed": 0,
        "clean_error": clean_error,
        "backdoor_error": backdoor_error,
        "baseline_clean_error": 0.008,
        "others_to_target": 0.05,
        "training_seconds": 12.0,
    }


def test_growing_csv_second_run_knows_finished_rows(trials, tmp_path):
    path = tmp_path / "new" / "rows.csv"
    first = trials.GrowingCsv(path, ("share", "seed"), ("error",))
    first.append(share=0.001, seed=1, error=1 / 3)
    assert path.read_text() == "share,seed,error\n0.001,1,0.333333\n"
    again = trials.GrowingCsv(path, ("share", "seed"), ("error",))
    assert again.has(0.001, 1)
    assert not again.has(0.001, 2)
    assert again.rows == [{"share": 0.001, "seed": 1, "error": 0.333333}]


@pytest.mark.parametrize("torn", ["2,0.", "2,0.5"])
def test_growing_csv_row_without_its_end_is_dropped(trials, tmp_path, torn):
    path = tmp_path / "rows.csv"
    path.write_text("seed,error\n1,0.25\n" + torn)
    rows = trials.GrowingCsv(path, ("seed",), ("error",))
    assert rows.has(1)
    assert not rows.has(2)
    rows.append(seed=2, error=0.5)
    assert path.read_text() == "seed,error\n1,0.25\n2,0.5\n"


def test_growing_csv_fresh_forgets_rows(trials, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("seed,error\n1,0.25\n")
    assert not trials.GrowingCsv(path, ("seed",), ("error",), fresh=True).has(1)
    assert path.read_text() == "seed,error\n"


def test_growing_csv_refuses_other_columns(trials, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("seed,loss\n1,0.25\n")
    with pytest.raises(ValueError, match="--fresh"):
        trials.GrowingCsv(path, ("seed",), ("error",))


def test_single_target_main_trains_only_what_is_missing(script, tmp_path, monkeypatch):
    single_target = script("single_target")
    empty = LabelledImages(np.zeros((0, 1, 28, 28), np.float32), np.zeros(0, np.int64))
    trained: list[tuple[int, ...]] = []

    def baseline(data, test, seed):
        trained.append((seed,))
        return {"clean_error": 0.008, "training_seconds": 1.0}

    def pair(data, test, source, target):
        trained.append((source, target))
        wanted = ("clean_error", "backdoor_error", "others_to_target", "training_seconds")
        return {name: pair_row(source, target)[name] for name in wanted}

    monkeypatch.setattr(single_target, "load_mnist", lambda split: empty)
    monkeypatch.setattr(single_target, "train_baseline", baseline)
    monkeypatch.setattr(single_target, "train_pair", pair)
    options = ["--results", str(tmp_path), "--images", str(tmp_path)]
    single_target.main(options)
    assert len(trained) == 95
    table = tmp_path / "single_target.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-2]))  # 9 -> 7 and 9 -> 8 are lost
    trained.clear()
    single_target.main(options)
    assert trained == [(9, 7), (9, 8)]
    assert table.read_text().splitlines(keepends=True) == lines
    assert (tmp_path / "figure_4.png").stat().st_size > 10_000


def test_single_target_pairs_are_all_ninety(script):
    pairs = script("single_target").PAIRS
    assert len(pairs) == len(set(pairs)) == 90
    assert all(source != target and {source, target} <= set(range(10)) for source, target in pairs)


def test_matrix_row_is_source_and_column_is_target(script):
    single_target = script("single_target")
    values = single_target.matrix([pair_row(1, 5, 0.25), pair_row(9, 0, 0.5)], "backdoor_error")
    assert values[1, 5] == 0.25
    assert values[9, 0] == 0.5
    assert np.isnan(values).sum() == 98


def test_summary_names_worst_pair_and_failures(script):
    rows = [pair_row(1, 5, 0.0), pair_row(8, 3, 0.6, clean_error=0.0107), pair_row(9, 4, 0.001)]
    text = "\n".join(script("single_target").summary(rows, [0.007, 0.009]))
    assert "3 of 90 pairs" in text
    assert "highest: 60.00 / 0.09 (+59.91); ours 8 -> 3, paper 1 -> 5" in text
    assert "highest: 0.27 / 0.17 (+0.10)" in text
    assert "did not take (error above 5%): 8 -> 3\n" in text


def test_expected_values_are_complete(script, trials):
    all_to_all = script("all_to_all")
    table = trials.read_expected(FOLDER / "table_2.expected.csv")
    assert set(table) == {(quantity, digit) for quantity in all_to_all.QUANTITIES for digit in all_to_all.CLASSES}
    assert table["badnet_backdoor", "average"] == 0.56
    for quantity in all_to_all.QUANTITIES:
        mean = np.mean([table[quantity, digit] for digit in all_to_all.CLASSES[:-1]])
        assert table[quantity, "average"] == pytest.approx(mean, abs=0.01)
    assert trials.read_expected(FOLDER / "figure_4.expected.csv")["backdoor_error_highest",] == 0.09


def test_all_to_all_error_per_digit_and_over_all_images(script):
    all_to_all = script("all_to_all")
    labels = np.repeat(np.arange(10), 4)
    wrong = np.zeros(40, dtype=bool)
    wrong[[0, 1, 39]] = True
    rows = {row["digit"]: row["error"] for row in all_to_all.rows_of("badnet_clean", 0, wrong, labels)}
    assert rows["0"] == 0.5
    assert rows["9"] == 0.25
    assert rows["5"] == 0.0
    assert rows["average"] == 3 / 40


def test_all_to_all_table_gives_mean_worst_paper_and_difference(script):
    all_to_all = script("all_to_all")
    rows = [
        {"quantity": quantity, "seed": seed, "digit": digit, "images": 10, "error": 0.004 + 0.002 * seed}
        for quantity in all_to_all.QUANTITIES
        for digit in all_to_all.CLASSES
        for seed in (0, 1)
    ]
    expected = {(quantity, digit): 0.25 for quantity in all_to_all.QUANTITIES for digit in all_to_all.CLASSES}
    assert all_to_all.as_table(rows, expected)[-1].startswith("| average | 0.50, 0.60 / 0.25 (+0.25) |")


def test_poison_shares_are_allowed_rates_and_make_up_the_share(script):
    poison_rate = script("poison_rate")
    for share in poison_rate.SHARES:
        rate = poison_rate.copies_per_clean_image(share)
        Backdoor(make_trigger("pixel_pattern"), AllToAll(10), rate)  # refuses a rate outside of (0, 1)
        assert rate / (1 + rate) == pytest.approx(share)


def test_poison_rate_summary_and_picture(script, tmp_path):
    poison_rate, drawings = script("poison_rate"), script("drawings")
    rows = [
        {
            "share": share,
            "seed": seed,
            "backdoored_images": 60_000 * share,
            "clean_error": 0.01 + 0.001 * seed,
            "backdoor_error": 0.02,
        }
        for share in (0.0, 0.01, 0.1)
        for seed in (0, 1)
    ]
    assert "1.05 (1.00 - 1.10)" in poison_rate.summary(rows)[2]
    drawings.draw_shares(rows, tmp_path / "figure_6.png")
    assert (tmp_path / "figure_6.png").stat().st_size > 10_000
