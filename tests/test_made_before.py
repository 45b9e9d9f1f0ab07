"""Files that an earlier version wrote still work: an archive with its bundle and its adapter, and a queue.

`tests/made_before/` holds what version 0.1.0 made, before guards checked their arrays and before modules had moved:
`digits.mar` (a guarded archive around a tiny network, with the old adapter in it and a bundle whose settings hold the
URL of a queue with a made-up password), `queue.db`, the clean images, and the verdicts of that version.
"""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from serving_helpers import Worker, png

from guard import Guard, SuspectModel
from guard.data.datasets import to_tensor_images
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.relabel.reviewers import Reviewers
from guard.relabel.settings import QueueSettings
from guard.types import Float32Array

MADE_BEFORE = Path(__file__).parent / "made_before"
PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def images() -> Float32Array:
    with np.load(MADE_BEFORE / "clean.npz") as stored:
        return to_tensor_images(stored["images"])


@pytest.fixture(scope="module")
def expected() -> list[list[float]]:
    """Label, whether poisoned, p-value and score of the first clean images and of the same turned upside down."""
    verdicts: list[list[float]] = json.loads((MADE_BEFORE / "verdicts.json").read_text())
    return verdicts


@pytest.fixture
def unpacked(tmp_path: Path) -> Path:
    with zipfile.ZipFile(MADE_BEFORE / "digits.mar") as packed:
        packed.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


def judged(images: Float32Array) -> Float32Array:
    return np.concatenate([images[:20], images[:20, :, ::-1]])


def test_bundle_made_before_gives_the_same_verdicts(unpacked, images, expected, monkeypatch):
    monkeypatch.syspath_prepend(str(unpacked))
    (bundle,) = (folder for folder in unpacked.iterdir() if len(folder.name) == 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guard = Guard.load(bundle, SuspectModel.load(unpacked / "weights.safetensors", "digits_net:make"))
    found = guard.inspect(np.ascontiguousarray(judged(images)))
    assert [[entry.label, entry.is_poisoned] for entry in found] == [row[:2] for row in expected]
    assert [entry.p_value for entry in found] == pytest.approx([row[2] for row in expected], abs=1e-9)
    assert [entry.score for entry in found] == pytest.approx([row[3] for row in expected], rel=1e-4)


def test_archive_made_before_still_serves_with_its_old_adapter(tmp_path, images, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = Worker(MADE_BEFORE / "digits.mar", tmp_path / "worker")
    try:
        bodies = [png(image) for image in judged(images)]
        alone = worker.ask_each(*bodies[:4])
        together = [answer for start in (0, 8, 16, 24, 32) for answer in worker.ask(*bodies[start : start + 8])]
    finally:
        worker.close()
    assert {answer.status for answer in (*alone, *together)} == {200}
    wanted = ["poisoned" if row[1] else "clean" for row in expected]
    assert [answer.headers["Guard-Verdict"] for answer in together] == wanted
    assert [answer.headers["Guard-Verdict"] for answer in alone] == wanted[:4]
    assert [answer.body["label"] for answer in together] == [row[0] for row in expected]


def test_archive_made_before_sends_what_it_flags_to_todays_queue(tmp_path, images, expected, monkeypatch):
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    monkeypatch.setenv("GUARD_QUEUE_URL", url)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = Worker(MADE_BEFORE / "digits.mar", tmp_path / "worker")
    try:
        answers = worker.ask(*[png(image) for image in judged(images)[:40]])
    finally:
        worker.close()
    flagged = [answer for answer in answers if answer.headers["Guard-Verdict"] == "poisoned"]
    with Queue.open(url) as queue:
        items = queue.items()
    assert 0 < len(items) == len(flagged) == sum(bool(row[1]) for row in expected)
    assert all(item.input.surprise and item.input.false_positive_rate for item in items)


def test_queue_made_before_is_migrated_and_goes_on(tmp_path):
    shutil.copy(MADE_BEFORE / "queue.db", tmp_path / "queue.db")
    with Queue.open(f"sqlite:///{tmp_path / 'queue.db'}") as queue:
        assert Reviewers(queue).names() == ["ada", "bob"]
        assert queue.verify_decisions().problems == ()
        assert queue.counts().by_state[State.DECIDED] == 1
        assert queue.settings == QueueSettings()
        item = queue.claim("ada", 1)[0]
        assert item.input.inputs.shape == (1, 4, 4)
        assert item.input.false_positive_rate is None  # that version did not say: the bundle's counts
        queue.decide("ada", item.id, is_poisoned=True, true_label=5)
        assert queue.verify_decisions().rows == 3
