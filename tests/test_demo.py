"""The demo, shortened to one attack and few requests: it ends by itself, tells the truth, and leaves nothing behind."""

from __future__ import annotations

import io
import json
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from conftest import CleanSplit
from PIL import Image
from rich.console import Console

from guard import GuardConfig
from guard.demo import run
from guard.lab.attacks import MnistCnn
from guard.lab.attacks.recipes import DEMO_ATTACKS, AttackRecipe
from guard.relabel.address import queue_url
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.types import AnyArray

pytestmark = pytest.mark.torchserve

SUMMARY_KEYS = {"seed", "requested_false_positive_rate", "wall_seconds", "cases", "loop"}
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


def children() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


@pytest.fixture(scope="module")
def running_before() -> set[psutil.Process]:
    """What other tests have started, such as a database."""
    return children()


@pytest.fixture(scope="module")
def finished(
    running_before: set[psutil.Process],
    badnet: MnistCnn,
    clean_split: CleanSplit,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, str]:
    """Folder and printed text of one short demo, with a network that was trained before on the demo's own images."""

    def trained(attack: AttackRecipe, *train: AnyArray, seed: int, progress: object) -> tuple[MnistCnn, None, None]:
        assert (attack.name, seed) == ("pattern", 0)
        np.testing.assert_array_equal(train[0], clean_split.train.images)
        np.testing.assert_array_equal(train[1], clean_split.train.labels)
        return badnet, None, None

    printed = io.StringIO()
    output = tmp_path_factory.mktemp("demo") / "made by the demo"
    with pytest.MonkeyPatch.context() as patch:
        (pattern,) = (demo_attack for demo_attack in DEMO_ATTACKS if demo_attack.name == "pattern")
        patch.setattr(run, "DEMO_ATTACKS", (pattern,))
        patch.setattr(run, "train_badnet", trained)
        patch.setattr(run, "REVIEWED", pattern)
        patch.setattr(run, "SPLIT", (6000, 500, 350))
        patch.setattr(run, "GuardConfig", partial(GuardConfig, folds=5))  # in the first fit, and in those of a round
        patch.setattr(run, "CLEAN_REQUESTS", 200)
        patch.setattr(run, "TRIGGERED_REQUESTS", 60)
        console = Console(file=printed, width=80)
        run.run_demo(output, seed=0, false_positive_rate=0.05, keep_serving=False, console=console)
    return output, printed.getvalue()


def test_demo_report_has_exactly_these_keys(finished: tuple[Path, str]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert report.keys() == SUMMARY_KEYS
    (case,) = report["cases"]
    assert case.keys() == CASE_KEYS
    assert report["seed"] == 0
    assert report["requested_false_positive_rate"] == 0.05
    assert report["wall_seconds"] > 0


def test_demo_catches_the_attack_at_the_rate_asked_for(finished: tuple[Path, str]) -> None:
    (case,) = json.loads((finished[0] / "report.json").read_text())["cases"]
    assert (case["clean_requests"], case["triggered_requests"]) == (200, 60)
    assert case["attack_success_unguarded"] > 0.9
    assert case["attack_success_guarded"] < 0.1
    assert case["true_positive_rate"] > 0.9
    assert case["realised_false_positive_rate"] < 0.12  # 0.05, plus four standard deviations of 200 requests
    assert case["clean_accuracy_unguarded"] > 0.9
    assert case["median_ms_unguarded"] > 0
    assert case["median_ms_guarded"] > 0
    assert case["bodies_identical"] is True
    assert case["counts_agree"] is True


def test_demo_learns_from_a_reviewer_and_serves_what_it_learned(finished: tuple[Path, str]) -> None:
    output, printed = finished
    loop = json.loads((output / "report.json").read_text())["loop"]
    assert loop["model"] == "pattern"
    assert loop["answers"] == 50
    assert 0 < loop["called_poisoned"] < 50
    assert (loop["outcome"], loop["reasons"]) == ("promoted", [])
    assert loop["bundle_after"] != loop["bundle_before"]
    assert (output / "pattern" / "bundles" / "ACTIVE").read_text().strip() == loop["bundle_after"]
    for rates in (loop["before"], loop["after"]):
        assert rates["true_positive_rate"] > 0.9
        assert rates["false_positive_rate"] < 0.12  # likewise, of 150
    assert "retraining: promoted" in printed
    with Queue.open(queue_url(str(output / "queue.db"))) as queue:
        counts = queue.counts()
    assert counts.by_state[State.TRAINED] > 0
    assert counts.decisions["poisoned"] == loop["called_poisoned"]
    assert counts.decisions["false_alarm"] == 50 - loop["called_poisoned"]


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


def test_demo_leaves_no_process_behind(running_before: set[psutil.Process], finished: tuple[Path, str]) -> None:
    postgresql = {child for child in children() if child.name() == "postgres"}  # makes and ends helpers of its own
    assert children() - running_before - postgresql == set()
