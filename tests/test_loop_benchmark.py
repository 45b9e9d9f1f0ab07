"""The stream benchmark, without a training: means, worst seeds, the table, the picture, and the stored results."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def stream() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("loop_stream", PROJECT / "benchmarks" / "loop" / "stream.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def rows_of(stream: ModuleType) -> list[dict[str, str]]:
    """Two seeds; after the reviewed parts the attack succeeds at 10 and 30 % with nobody, and at 0 % otherwise."""
    return [
        {
            "case": "x",
            "model": f"x-{seed}",
            "seed": str(seed),
            "variant": variant,
            "part": str(part),
            "attack_success": "0.9" if part < stream.REVIEWED_PARTS else str(success if variant == "nobody" else 0.0),
            "clean_accuracy": str(0.9 + 0.02 * seed),
            "false_positive_rate": "0.01",
        }
        for seed, success in ((0, 0.1), (1, 0.3))
        for variant in stream.VARIANTS
        for part in range(stream.PARTS)
    ]


def test_mean_of_leaves_out_reviewed_parts_and_gives_the_worst_seed(stream: ModuleType) -> None:
    rows = rows_of(stream)
    assert stream.mean_of(rows, "x", "nobody", "attack_success") == pytest.approx((20.0, 30.0))
    assert stream.mean_of(rows, "x", "person", "attack_success") == (0.0, 0.0)
    assert stream.mean_of(rows, "x", "nobody", "clean_accuracy") == pytest.approx((91.0, 90.0))


def test_print_table_counts_outcomes(stream: ModuleType) -> None:
    rounds = [
        {"case": "x", "variant": "person", "outcome": "promoted"},
        {"case": "x", "variant": "person", "outcome": "refused"},
        {"case": "x", "variant": "person", "outcome": "promoted", "attack_worse": "False"},
        {"case": "x", "variant": "person", "outcome": "promoted", "attack_worse": "True"},
    ]
    lines = stream.print_table(rows_of(stream), rounds)
    assert lines[2] == "| x | nobody | 20.00 (30.00) | 91.00 (90.00) | 1.00 | – |"
    assert lines[3] == "| x | person | 0.00 | 91.00 (90.00) | 1.00 | 2 promoted, 1 refused, 1 promoted (worse) |"


def test_draw_makes_a_picture(stream: ModuleType, tmp_path: Path) -> None:
    stream.draw(rows_of(stream), tmp_path / "new" / "stream.png")
    with Image.open(tmp_path / "new" / "stream.png", formats=("PNG",)) as picture:
        assert picture.width > 800


@pytest.mark.parametrize("stem", ["stream", "few_images"])
def test_document_holds_the_stored_results(stream: ModuleType, stem: str) -> None:
    results = PROJECT / "benchmarks" / "results" / "loop"
    table = stream.print_table(stream.read(results / f"{stem}.csv"), stream.read(results / f"{stem}_rounds.csv"))
    document = (PROJECT / "docs" / "retraining.md").read_text(encoding="utf-8")
    assert "\n".join(table) in document, "run benchmarks/loop/stream.py"


@pytest.mark.parametrize("stem", ["stream", "few_images"])
def test_no_stored_round_made_a_later_part_worse(stream: ModuleType, stem: str) -> None:
    rounds = stream.read(PROJECT / "benchmarks" / "results" / "loop" / f"{stem}_rounds.csv")
    assert not [row for row in rounds if row["outcome"] == "promoted" and row.get("attack_worse") == "True"]


def test_compare_counts_what_only_one_guard_stops(stream: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = np.arange(40) < 20
    beaten = {"old": (~flags, flags), "new": (np.arange(40) >= 26, flags), "none": (np.zeros(40, bool), flags)}
    monkeypatch.setattr(stream, "is_beaten", lambda guard, part: beaten[guard])
    assert stream.compare("old", "new", [None, None]) == {
        "attack_lost": 0,
        "attack_gained": 12,
        "clean_lost": 0,
        "clean_gained": 0,
        "attack_worse": False,
        "clean_worse": False,
    }
    assert stream.compare("new", "old", [None])["attack_worse"] is True
    assert stream.compare("none", "new", [None])["attack_lost"] == 14
