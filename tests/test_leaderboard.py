"""The leaderboard's figures by hand, its page from records, and a detector that an outsider adds."""

from __future__ import annotations

import contextlib
import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from guard.errors import ZooError
from guard.lab.rivals import RIVALS
from guard.lab.rivals.max_softmax import MaxSoftmax
from guard.lab.zoo.freeze import method_digest, method_digests
from guard.suspect.model import SuspectModel

SCRIPTS = Path(__file__).resolve().parent.parent / "benchmarks" / "leaderboard"
ADDED = '''
import numpy as np
from guard.lab.rivals import Rival

class Brightness(Rival):
    title = "brightness"
    source = "nobody, 2026"

    def _fit(self, images, labels):
        """Nothing."""

    def _score(self, images):
        return images.mean(axis=(1, 2, 3)).astype(np.float64)
'''


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts as modules, as they find each other: by bare names."""
    names = ("contestants", "measuring", "records", "page")
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            with contextlib.suppress(KeyError):
                del sys.modules[name]


def test_rates_by_hand(scripts):
    clean, found = np.arange(100.0), np.array([99.5, 98.5, 96.0, -1.0])
    rates = scripts.measuring._rates(clean, found)
    assert rates["tpr_at_fpr_0_01"] == 0.25  # the threshold is 99: one clean image is not below it
    assert rates["tpr_at_fpr_0_05"] == 0.75  # 95
    assert rates["auroc"] == pytest.approx((100 + 99 + 96.5) / 400)


def test_rates_of_infinite_scores_are_rates(scripts):
    rates = scripts.measuring._rates(np.array([0.0, 1.0, np.inf]), np.array([np.inf, 2.0]))
    assert rates["auroc"] == pytest.approx((2.5 + 2) / 6)
    assert rates["tpr_at_fpr_0_01"] == 0.0  # an infinite clean score is the threshold


def test_contestants_are_every_rival_and_the_guard_in_both_modes(scripts):
    assert set(scripts.contestants.CONTESTANTS) == {"guard", "guard-paper", *RIVALS}


@pytest.fixture(scope="module")
def subject(scripts, suspect, clean_split, triggered):
    images, labels = clean_split.validation
    return scripts.measuring.Subject(
        name="it",
        data_set="mnist",
        attack="pattern",
        suspect=SuspectModel(suspect.module),
        fit_images=images[:200],
        fit_labels=labels[:200],
        clean=images[200:400],
        clean_labels=labels[200:400],
        triggered=triggered.images[:100],
        attacker_labels=triggered.labels[:100],
        true_labels=triggered.true_labels[:100],
    )


def test_measure_of_the_guard_has_all_figures_and_one_pass(scripts, subject):
    figures = scripts.measuring.measure(subject, scripts.contestants.CONTESTANTS["guard"], seed=0)
    assert figures["passes"] == 1.0
    assert (figures["n_clean"], figures["n_triggered"]) == (200, 100)
    assert figures["all"]["auroc"] > 0.9
    assert figures["after"]["attack_success"] < figures["after"]["attack_success_before"]
    assert figures["realised_false_positive_rate"] < 0.15


def test_measure_of_a_rival_sets_its_threshold_on_images_that_it_did_not_learn_from(scripts, subject):
    seen = []

    class Watched(MaxSoftmax):
        def _fit(self, images, labels):
            seen.append(images)

        def _score(self, images):
            seen.append(images)
            return super()._score(images)

    figures = scripts.measuring.measure(subject, Watched, seed=0)
    taught = {image.tobytes() for image in seen[0]}
    assert len(taught) == pytest.approx(160, abs=4)
    assert not any(image.tobytes() in taught for images in seen[1:] for image in images)
    assert "after" not in figures


def test_added_file_is_a_contestant(scripts, subject, tmp_path):
    (tmp_path / "brightness.py").write_text(ADDED)
    found = scripts.contestants.from_file(tmp_path / "brightness.py")
    figures = scripts.measuring.measure(subject, found["brightness"], seed=0)
    assert figures["passes"] == 0.0
    assert 0.0 <= figures["all"]["auroc"] <= 1.0
    (tmp_path / "none.py").write_text("import numpy")
    with pytest.raises(ValueError, match="must define one class below Rival, and defines 0"):
        scripts.contestants.from_file(tmp_path / "none.py")


def test_records_are_of_one_method_and_one_rival(scripts, tmp_path, monkeypatch):
    first, other = (scripts.records.Records(tmp_path, method) for method in ("a method", "another"))
    for detector in ("guard", "ted++"):
        first.write({"auroc": 0.5}, "model", detector, 0)
    assert other.read("model", "guard", 0) is None
    assert other.read("model", "ted++", 0) == {"auroc": 0.5}
    assert scripts.records.Records(tmp_path, "a method").read("model", "guard", 0) == {"auroc": 0.5}
    monkeypatch.setitem(scripts.records.RIVALS, "ted++", RIVALS["ted"])  # as if its file had changed
    assert scripts.records.Records(tmp_path, "a method").read("model", "ted++", 0) is None


def test_method_is_named_by_its_freeze_while_that_holds(scripts, monkeypatch):
    def changed():
        raise ZooError("changed")

    monkeypatch.setattr(scripts.records, "check_frozen", lambda: SimpleNamespace(digest="of the freeze"))
    assert scripts.records.current_method() == "of the freeze"
    monkeypatch.setattr(scripts.records, "check_frozen", changed)
    assert scripts.records.current_method() == method_digest(method_digests())


def test_page_is_written_from_records(scripts, tmp_path, monkeypatch):
    page = scripts.page
    document = tmp_path / "leaderboard.md"
    marks = ("detectors", "models", "benign", "after", "images")
    document.write_text("".join(f"<!-- {name} -->\n<!-- end -->\n" for name in marks))
    for name, value in (("RESULTS", tmp_path), ("DOCUMENT", document), ("PICTURES", tmp_path / "images")):
        monkeypatch.setattr(page, name, value)
    records = scripts.records.Records(tmp_path / "records", "a method")
    shared = {"data_set": "mnist", "realised_false_positive_rate": 0.04, "passes": 1.0, "milliseconds": 2.0}
    for model, caught in (("easy", 1.0), ("hard", 0.5)):
        for seed in (0, 1):
            rates = {"auroc": 0.9, "tpr_at_fpr_0_01": caught - 0.1 * seed, "tpr_at_fpr_0_05": 1.0}
            records.write(shared | {"attack": "a", "all": rates, "hits": rates}, model, "guard", seed)
    records.write(shared | {"attack": "benign"}, "clean", "guard", 0)
    records.write({"not_applicable": "no batch norm"}, "hard", "ibd-psc", 0)
    zoo = SimpleNamespace(cards=lambda: [SimpleNamespace(name=name) for name in ("clean", "easy", "hard")])
    page.publish(records, zoo, scripts.contestants.CONTESTANTS, (0, 1), (("guard",), ("easy",), (100,)))
    text = document.read_text()
    # seed means 0.75 and 0.65: 12.71 * 0.0707 / sqrt(2) = 0.635
    assert "| guard (calibrated) | 2 (2) | 0.9000 ± 0.000 | 0.900 | 0.700 ± 0.635 | 0.450 | 1.000 | 1.000 |" in text
    assert "| hard | **0.45** |" in text
    assert "| guard (calibrated) | 1 | 0.040 | 0.040 | 0.040 |" in text
    with (tmp_path / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert (tmp_path / "images" / "caught.png").is_file()
