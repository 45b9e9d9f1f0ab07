"""The benchmark of what p-values give to an attacker: its search, its variants, and the table in the docs."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def oracle() -> ModuleType:
    spec = importlib.util.spec_from_file_location("verdict_oracle", ROOT / "benchmarks" / "verdict_oracle.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def plant(images: np.ndarray) -> np.ndarray:
    assert images.dtype == np.float32
    planted = images.copy()
    planted[:, :, -2:, -2:] = 1.0
    return planted


@pytest.mark.parametrize("name", ["trigger", "mask", "towards"])
def test_first_variant_is_the_trigger_as_it_was_planted(oracle: ModuleType, name: str) -> None:
    images = np.random.default_rng(0).random((4, 3, 14, 14), dtype=np.float32)
    family = oracle.make_family(name, plant, images[:2])
    np.testing.assert_allclose(family.apply(family.planted, images), plant(images), atol=1e-6)
    gone = family.planted.copy()
    gone[0] = -1
    np.testing.assert_allclose(family.apply(gone, images), images, atol=1e-6)
    wild = family.apply(np.random.default_rng(1).uniform(-1, 1, family.planted.shape), images)
    assert (wild.shape, wild.dtype) == (images.shape, np.float32)
    assert 0 <= wild.min() <= wild.max() <= 1


def test_search_climbs_and_sends_no_more_requests_than_it_says(oracle: ModuleType) -> None:
    family = oracle.Family(np.array([1.0, -1.0, 0.0]), lambda values, images: images)
    requested: list[float] = []

    def worth(values: np.ndarray) -> float:
        requested.append(-float(np.square(values - 0.5).sum()))
        return requested[-1]

    found = list(oracle.search(family, worth, np.random.default_rng(0)))
    assert [requests for requests, _ in found] == list(oracle.REQUESTS)
    assert len(requested) == oracle.REQUESTS[-1] // oracle.TRIES
    assert (found[0][1] == family.planted).all()
    distances = [float(np.square(best - 0.5).sum()) for _, best in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.01


def test_table_in_the_docs_is_that_of_the_results() -> None:
    rates = defaultdict(list)
    with (ROOT / "benchmarks" / "results" / "verdict_oracle.csv").open() as stream:
        for row in csv.DictReader(stream):
            key = (row["network"], row["trigger_family"], row["queries"], row["detail"])
            rates[key].append(100 * float(row["attack_success_unflagged"]))
    text = (ROOT / "docs" / "serving.md").read_text()
    shown = re.findall(r"^\| (\S+) \| (trigger|mask|towards) \| (.*) \|$", text, re.MULTILINE)
    columns = (("0", "full"), ("1000", "full"), ("1000", "flag"), ("1000", "label"), ("1000", "own guard"))
    assert len(shown) == 6
    for network, family, cells in shown:
        found = [rates[network, family, *column] for column in columns]
        assert all(len(seeds) == 3 for seeds in found)
        assert cells.split(" | ") == [f"{np.mean(seeds):.1f} % ({max(seeds):.1f})" for seeds in found]
    networks = {network for network, _, _ in shown}
    assert {(network, family) for network, family, _ in shown} == set(
        itertools.product(networks, ("trigger", "mask", "towards"))
    )
