"""The demo, shortened to one attack and few requests: it ends by itself, tells the truth, and leaves nothing behind."""

from __future__ import annotations

import io
import json
from pathlib import Path

import psutil
import pytest
from PIL import Image
from rich.console import Console

from guard import demo
from guard.attacks.recipes import DEMO_ATTACKS

pytestmark = pytest.mark.torchserve

SUMMARY_KEYS = {"seed", "requested_false_positive_rate", "wall_seconds", "cases"}
CASE_KEYS = {
    "attack",
    "clean_accuracy_unguarded",
    "clean_accuracy_guarded",
    "attack_success_unguarded",
    "attack_success_guarded",
    "true_positive_rate",
    "realised_false_positive_rate",
    "median_ms_unguarded",
    "median_ms_guarded",
    "clean_requests",
    "triggered_requests",
    "bodies_identical",
    "counts_agree",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder and printed text of one short demo."""
    printed = io.StringIO()
    output = tmp_path_factory.mktemp("demo") / "made by the demo"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "DEMO_ATTACKS", tuple(one for one in DEMO_ATTACKS if one.name == "pattern"))
        patch.setattr(demo, "SPLIT", (6000, 1000, 500))
        patch.setattr(demo, "CLEAN_REQUESTS", 200)
        patch.setattr(demo, "TRIGGERED_REQUESTS", 100)
        console = Console(file=printed, width=80)
        demo.run_demo(output, seed=0, false_positive_rate=0.05, keep_serving=False, console=console)
    return output, printed.getvalue()


def test_demo_report_has_exactly_these_keys(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert report.keys() == SUMMARY_KEYS
    (case,) = report["cases"]
    assert case.keys() == CASE_KEYS
    assert report["seed"] == 0
    assert report["requested_false_positive_rate"] == 0.05
    assert 0 < report["wall_seconds"] < 60


def test_demo_catches_the_attack_at_the_rate_asked_for(finished: tuple[Path, str]) -> None:
    (case,) = json.loads((finished[0] / "report.json").read_text())["cases"]
    assert (case["clean_requests"], case["triggered_requests"]) == (200, 100)
    assert case["attack_success_unguarded"] > 0.9
    assert case["attack_success_guarded"] < 0.1
    assert case["true_positive_rate"] > 0.9
    assert case["realised_false_positive_rate"] < 0.12  # 0.05, plus four standard deviations of 200 requests
    assert case["clean_accuracy_unguarded"] > 0.9
    assert case["median_ms_unguarded"] > 0
    assert case["median_ms_guarded"] > 0
    assert case["bodies_identical"] is True
    assert case["counts_agree"] is True


def test_demo_prints_the_table_and_where_the_files_are(finished: tuple[Path, str]) -> None:
    output, printed = finished
    unfolded = "".join(printed.split())
    assert "pattern" in printed
    assert "Bodiesidentical:yes.Prometheuscountedthesameverdicts:yes." in unfolded
    for name in ("report.json", "verdicts.png"):
        assert "".join(str(output / name).split()) in unfolded


def test_demo_picture_is_a_png(finished: tuple[Path, str]) -> None:
    with Image.open(finished[0] / "verdicts.png", formats=("PNG",)) as picture:
        picture.load()
        assert picture.width > 800


def test_demo_leaves_no_process_behind(finished: tuple[Path, str]) -> None:
    assert psutil.Process().children(recursive=True) == []
