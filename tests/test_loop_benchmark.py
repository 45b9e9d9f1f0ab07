"""The stream benchmark, without a training: means, worst seeds, the table, the picture, and the stored results."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

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
        {"case": "x", "variant": "person", "outcome": "promoted"},
    ]
    lines = stream.print_table(rows_of(stream), rounds)
    assert lines[2] == "| x | nobody | 20.00 (30.00) | 91.00 (90.00) | 1.00 | – |"
    assert lines[3] == "| x | person | 0.00 | 91.00 (90.00) | 1.00 | 2 promoted, 1 refused |"


def test_draw_makes_a_picture(stream: ModuleType, tmp_path: Path) -> None:
    stream.draw(rows_of(stream), tmp_path / "new" / "stream.png")
    with Image.open(tmp_path / "new" / "stream.png", formats=("PNG",)) as picture:
        assert picture.width > 800


def test_document_holds_the_stored_results(stream: ModuleType) -> None:
    results = PROJECT / "benchmarks" / "results" / "loop"
    table = stream.print_table(stream.read(results / "stream.csv"), stream.read(results / "stream_rounds.csv"))
    document = (PROJECT / "docs" / "retraining.md").read_text(encoding="utf-8")
    assert "\n".join(table) in document, "run benchmarks/loop/stream.py"
