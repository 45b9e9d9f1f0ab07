"""The calibration benchmark without a network: draws, splits, bands against an experiment, and the stored table."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from guard.statistics.calibration import conformal_p_values, images_needed

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("calibration_bench", PROJECT / "benchmarks" / "calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_plan_has_200_fresh_splits_of_benign_and_backdoored_models(benchmark: ModuleType) -> None:
    draws = benchmark.draws()
    assert len(draws) >= 200
    assert len({draw.split for draw in draws}) == len(draws)
    for first in (draws, benchmark.draws(40)):
        assert {"benign" in draw.model for draw in first} == {True, False}
    assert sum(draw.per_class == 10 for draw in draws) >= 50


@pytest.mark.parametrize("per_class", [2, 7])
def test_divide_gives_every_class_the_same_numbers_and_no_image_twice(benchmark: ModuleType, per_class: int) -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [9, 20, 40]))
    fit, fresh = benchmark.divide(labels, per_class, np.random.default_rng(1))
    np.testing.assert_array_equal(np.bincount(labels[fit]), [per_class] * 3)
    np.testing.assert_array_equal(np.bincount(labels[fresh]), [9 - per_class] * 3)
    assert len(np.unique([*fit, *fresh])) == len(fit) + len(fresh)


def test_divide_in_halves_keeps_the_shares_of_the_classes(benchmark: ModuleType) -> None:
    labels = np.repeat([0, 1, 2], [9, 20, 40])
    for rows in benchmark.divide(labels, benchmark.ALL, np.random.default_rng(1)):
        np.testing.assert_array_equal(np.bincount(labels[rows]), [4, 10, 20])


def test_divide_refuses_more_images_than_the_rarest_class_has(benchmark: ModuleType) -> None:
    with pytest.raises(ValueError, match="the rarest class has 9 images, too few for 9 to fit on"):
        benchmark.divide(np.repeat([0, 1], [9, 20]), 9, np.random.default_rng(1))


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1])
def test_band_holds_95_of_100_exchangeable_experiments_and_the_binomial_one_holds_fewer(
    benchmark: ModuleType, rate: float
) -> None:
    rng, n, m = np.random.default_rng(0), 199, 2000
    places = {"band": [], "binomial_band": []}
    any_row = benchmark.Row(benchmark.Draw("x", 0, 10), rate, rate, n, m, 0)
    bands = {name: getattr(any_row, name) for name in places}  # of the rate and the numbers of images only
    for _ in range(1000):
        clean, fresh = np.sort(rng.normal(size=n)), rng.normal(size=m)
        realised = float((conformal_p_values(fresh, clean) <= rate).mean())
        row = benchmark.Row(benchmark.Draw("x", 0, 10), rate, realised, n, m, 0)
        for name, found in places.items():
            found.append(row.where(bands[name]))
    assert {name: getattr(row, name) for name in places} == bands
    assert 0.93 <= places["band"].count("within") / 1000 <= 0.975
    assert places["band"].count("below") < 45
    assert places["band"].count("above") < 45
    assert places["binomial_band"].count("within") / 1000 < 0.8


def test_rows_come_back_as_they_were_written(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = [benchmark.Row(benchmark.Draw("x", 3, 10), rate, 0.04, 100, 50, 3) for rate in (0.05, 0.1)]
    for row in rows:
        benchmark._append(tmp_path / "rows.csv", [row])
    assert benchmark._read(tmp_path / "rows.csv") == rows


def test_stored_table_holds_its_draws_and_bands_around_the_requested_rate(benchmark: ModuleType) -> None:
    with (PROJECT / "benchmarks" / "results" / "calibration.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({(row["model"], row["split"]) for row in rows}) >= 200
    assert {float(row["requested"]) for row in rows} == {0.001, 0.01, 0.05, 0.1}
    for row in rows:
        assert 0.0 <= float(row["lower"]) <= float(row["requested"]) <= float(row["upper"]) <= 1.0
        assert int(row["images_per_class"]) >= 10
    assert images_needed(0.001) == 999
