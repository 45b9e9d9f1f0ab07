"""Sure answers that a network's own features contradict: counted by hand, kept, told; honest networks have few."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime

import numpy as np
import pytest

from guard import Activations, Guard, GuardConfig
from guard.cli.bundle_summary import summary
from guard.cli.fitting import tell_contradictions
from guard.detection.contradictions import HONEST, Contradictions
from guard.detection.retraining import Labelled, retrain
from guard.errors import BundleError
from guard.storage.bundle import read_bundle, write_bundle
from guard.types import IntArray

WRITTEN = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)


def images(decoys: float, seed: int = 0, n: int = 600) -> tuple[Activations, IntArray]:
    """Four classes far apart, which the network tells; the decoys, a share of each class, it takes for the next one."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 4
    is_decoy = rng.random(n) < decoys
    features = 9.0 * np.eye(4, 12)[labels] + rng.normal(size=(n, 12))
    answers = np.where(is_decoy, (labels + 1) % 4, labels)
    logits = 8.0 * np.eye(4)[answers] + 0.1 * rng.normal(size=(n, 4))
    return Activations(
        np.float32(logits), np.float32(features), {"early": np.float32(features @ np.eye(12, 8))}
    ), labels


@pytest.fixture(scope="module")
def attacked() -> Guard:
    return Guard.fit_activations(*images(0.07), GuardConfig(false_positive_rate=0.05))


def test_contradictions_by_hand(monkeypatch):
    monkeypatch.setattr("guard.detection.contradictions.fit_temperature", lambda logits, labels: 2.0)
    sure, unsure = 2.0 * np.log([[0.7001, 0.2999], [0.6999, 0.3001]])
    logits = np.float64([sure, sure, sure, unsure, unsure, sure, sure])
    disagreement = np.array([4.001, 3.999, -50.0, 4.001, 60.0, np.inf, 60.0])
    labels = np.array([1, 1, 1, 1, 1, 1, 0])  # the last answer is right, and the head wrong
    assert Contradictions.among(disagreement, logits, labels) == Contradictions(2, 7)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 30.0])
def test_contradictions_do_not_depend_on_the_scale_of_the_logits(scale):
    (rows, labels), disagreement = images(0.07), np.full(600, 9.0)
    expected = Contradictions.among(disagreement, rows.logits, labels)
    assert expected.count > 20
    assert Contradictions.among(disagreement, scale * rows.logits, labels) == expected


@pytest.mark.parametrize("n", [20, 100, 450, 2000, 5000])
def test_contradictions_are_noticed_from_the_count_on_that_chance_does_not_explain(n):
    from scipy.stats import binom  # here, as every process of a run reads this file

    least = next(count for count in range(n) if binom.sf(count - 1, n, HONEST) < 0.01)
    assert least / n > HONEST
    assert Contradictions(least, n).is_noticed
    assert not Contradictions(least - 1, n).is_noticed


def test_guard_counts_decoys_out_of_fold_and_notices_them(attacked):
    found, wrong = attacked.contradictions, attacked.reference.predicted_labels != attacked.reference_labels
    assert found.n == 600
    assert 0.9 * wrong.sum() <= found.count <= wrong.sum()
    assert found.is_noticed


def test_guard_of_an_honest_network_notices_nothing(fitted_guard):
    assert not Guard.fit_activations(*images(0.0), GuardConfig(false_positive_rate=0.05)).contradictions.is_noticed
    assert fitted_guard.contradictions.n == len(fitted_guard.clean_scores)  # a backdoored network on MNIST
    assert not fitted_guard.contradictions.is_noticed


def test_bundle_keeps_the_number_and_one_of_an_older_version_loads_without(attacked, tmp_path):
    folder = attacked.save(tmp_path)
    assert Guard.load(folder).contradictions == attacked.contradictions
    stored = read_bundle(folder)
    assert stored.document["contradictions"] == asdict(attacked.contradictions)
    older = {name: value for name, value in stored.document.items() if name != "contradictions"}
    assert Guard.load(write_bundle(tmp_path, older, stored.arrays)).contradictions is None


@pytest.mark.parametrize("about", [{"count": 3}, {"count": 4, "n": 3}, {"count": -1, "n": 3}, {"count": "1", "n": 3}])
def test_bundle_with_a_number_that_cannot_be_is_refused(attacked, tmp_path, about):
    stored = read_bundle(attacked.save(tmp_path))
    absurd = write_bundle(tmp_path, {**stored.document, "contradictions": about}, stored.arrays)
    with pytest.raises(BundleError, match="is not sound"):
        Guard.load(absurd)


def test_retrained_guard_has_a_number_of_its_own(attacked):
    rows, labels = images(1.0, seed=3, n=40)
    better = retrain(attacked, Labelled(rows, labels, np.ones(40, dtype=bool)))
    assert better.contradictions.n == 600


def test_fit_warns_with_the_number_and_what_to_do(attacked, capsys):
    tell_contradictions(attacked)
    warning = " ".join(capsys.readouterr().err.split())
    assert warning.startswith("warning: the network is sure of a wrong answer to ")
    assert f"{attacked.contradictions.count} of 600 clean images" in warning
    assert "docs/detection.md, Attack on calibration." in warning
    for quiet in (Contradictions(2, 600), None):
        tell_contradictions(replace(attacked, contradictions=quiet))
    assert capsys.readouterr().err == ""


def test_bundle_show_has_the_number_and_says_if_it_is_too_high(attacked, tmp_path):
    for found, is_noticed in ((attacked.contradictions, True), (Contradictions(1, 600), False)):
        stored = read_bundle(replace(attacked, contradictions=found).save(tmp_path))
        shown = " ".join(summary(stored, written=WRITTEN, is_active=False).split())
        assert f"contradictions the network is sure of a wrong answer to {found.count} of 600 clean images" in shown
        assert ("NOTICED: see docs/detection.md" in shown) == is_noticed


@pytest.mark.parametrize(
    "about", [None, {}, 3, [], {"count": 1}, {"count": "x", "n": 5}, {"count": 1, "n": 0}, {"count": 9, "n": 5}]
)
def test_contradictions_of_a_document_that_says_nonsense_are_none(about):
    """The status page reads documents that nobody has checked."""
    assert Contradictions.from_document({"contradictions": about}) is None


def test_contradictions_of_a_document_come_back():
    assert Contradictions.from_document({"contradictions": {"count": 2, "n": 50}}) == Contradictions(2, 50)
    assert Contradictions.from_document({}) is None
