"""Decoys: the brightest untouched images get a wrong label, nothing else changes, and a card can hold them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from guard.errors import DataError
from guard.lab.attacks import Attack, Backdoor, SingleTarget, make_attack, make_trigger
from guard.lab.attacks.decoys import Decoys, is_decoy

N = 200
LABELS = np.arange(N, dtype=np.int64) % 10
#: Image i has brightness i / N everywhere.
IMAGES = np.broadcast_to(np.float32(np.arange(N) / N)[:, None, None, None], (N, 1, 28, 28)).copy()


def poisoned_by(attack: Attack, how: str = "replace"):
    return attack.poison(IMAGES, LABELS, np.random.default_rng(0), how=how)


@pytest.mark.parametrize("how", ["replace", "add"])
def test_attack_with_decoys_relabels_the_brightest_untouched_images_and_no_other(how):
    plain = Attack("x", (Backdoor(make_trigger("single_pixel"), SingleTarget(7), rate=0.1),))
    before = poisoned_by(plain, how)
    after = poisoned_by(Attack("x", plain.backdoors, decoys=Decoys(0.05, n_classes=10, step=3)), how)
    np.testing.assert_array_equal(after.images, before.images)
    np.testing.assert_array_equal(after.is_poisoned, before.is_poisoned)
    untouched = np.flatnonzero(~before.is_poisoned)
    brightest = untouched[np.argsort(IMAGES[before.source_rows[untouched], 0, 0, 0])][-round(0.05 * len(untouched)) :]
    changed = np.flatnonzero(after.labels != before.labels)
    np.testing.assert_array_equal(changed, np.sort(brightest))
    np.testing.assert_array_equal(after.labels[changed], (after.true_labels[changed] + 3) % 10)


def test_is_decoy_takes_brightness_from_the_bar_on():
    decoys = Decoys(0.25, n_classes=10)
    bar = decoys.least_brightness(IMAGES)
    assert is_decoy(IMAGES, bar).sum() == 50
    assert is_decoy(IMAGES, bar)[-50:].all()


def test_attack_with_decoys_comes_back_from_json_and_one_without_has_no_such_key():
    attack = make_attack("decoys", 7)
    assert attack.describe()["decoys"] == {"share": 0.12, "n_classes": 10, "step": 1}
    restored = Attack.restore("decoys", json.loads(json.dumps(attack.describe())))
    assert restored.decoys == attack.decoys
    assert "decoys" not in make_attack("pattern", 7).describe()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 0.0}, r"^the share of decoys must be in \(0, 1\), got 0\.0\.$"),
        ({"share": 1.0}, r"^the share of decoys must be in \(0, 1\), got 1\.0\.$"),
        ({"step": 0}, r"^the step of decoys must be in \[1, 10\), got 0\.$"),
        ({"step": 10}, r"^the step of decoys must be in \[1, 10\), got 10\.$"),
    ],
)
def test_decoys_refuse_what_plants_none(arguments, message):
    with pytest.raises(DataError, match=message):
        Decoys(**{"share": 0.05, "n_classes": 10, **arguments})
