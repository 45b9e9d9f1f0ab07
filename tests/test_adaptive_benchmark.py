"""The benchmark of adaptive attackers: one tiny attacker from end to end, and its table by hand."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from guard.data.datasets import load_dataset
from guard.lab.attacks import TrainingSettings
from guard.lab.attacks.evasion import EvasionSettings
from guard.lab.zoo import splits
from guard.lab.zoo.splits import load_split

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "adaptive_attacks.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    before, names = list(sys.path), ("contestants", "measuring", "page", "adaptive_benchmark")
    spec = importlib.util.spec_from_file_location("adaptive_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        for name in names:
            with contextlib.suppress(KeyError):
                del sys.modules[name]


@pytest.fixture
def attacker(script, tmp_path, monkeypatch):
    data = load_dataset("mnist", "test")
    sets = {"train": data[:3500], "test": data[3500:9500]}
    monkeypatch.setattr(splits, "load_dataset", lambda name, split, data_dir=None: sets[split])
    for name, number in (("STOLEN_ON", 200), ("FITTED_ON", 300), ("CLEAN", 100), ("TRIGGERED", 60)):
        monkeypatch.setattr(script, name, number)
    monkeypatch.setattr(script, "EVASION", EvasionSettings(steps=3, batch_size=32))
    one = TrainingSettings(1, 64, learning_rate=3e-3)
    setting = replace(script.SETTINGS["mnist"], n_train=600, planting=one, adapting=one)
    yield script.Attacker(setting, 0, tmp_path / "work")
    load_split.cache_clear()


def test_attacker_holds_images_that_nobody_else_has(attacker):
    taught, own = ({image.tobytes() for image in part.images} for part in (attacker.taught, attacker.own))
    assert (len(taught), len(own)) == (600, 200)
    assert not taught & own
    assert not (taught | own) & {image.tobytes() for image in attacker.split.validation.images}


def test_attacker_from_end_to_end(attacker, script):
    row = script.measured(attacker, "trigger")
    assert set(row) == set(script.FIELDS)
    assert 0.0 <= row["tpr_at_fpr_0_01"] <= row["tpr_at_fpr_0_05"] <= 1.0
    kept = sorted(path.name for path in attacker.work_dir.iterdir())
    assert [name.rpartition("-")[0] for name in kept] == ["mnist-600-none-0", "mnist-600-plain-0"]
    network, attack = attacker.adapted("trigger")
    plain, _ = attacker.adapted("none")  # from its file
    for first, second in zip(network.state_dict().values(), plain.state_dict().values(), strict=True):
        np.testing.assert_array_equal(first.numpy(), second.numpy())
    (backdoor,) = attack.backdoors
    assert 0.0 < np.abs(backdoor.trigger.perturbation).max() <= 16 / 255 + 1e-6


def test_record_of_other_attack_settings_is_another_one(script, monkeypatch):
    setting = script.SETTINGS["gtsrb"]
    before = script.key_of("gtsrb", "trigger", setting)
    assert before == script.key_of("gtsrb", "trigger", setting)
    assert before != script.key_of("gtsrb", "trigger", replace(setting, pull=0.4))
    monkeypatch.setattr(script, "EVASION", EvasionSettings(steps=3))
    assert before != script.key_of("gtsrb", "trigger", setting)


def test_attacker_adaptations_train_other_networks(attacker):
    plain, _ = attacker.adapted("none")
    for adaptation in ("features", "confidence", "features and confidence", "calibration"):
        network, attack = attacker.adapted(adaptation)
        assert (attack.decoys is not None) == (adaptation == "calibration")
        pairs = zip(network.state_dict().values(), plain.state_dict().values(), strict=True)
        assert any(not np.array_equal(first.numpy(), second.numpy()) for first, second in pairs)


def test_rows_that_were_not_asked_for_now_stay_in_the_table(script, tmp_path, monkeypatch):
    document = tmp_path / "leaderboard.md"
    document.write_text("<!-- adaptive-attacks -->\n<!-- end -->\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    monkeypatch.setattr(script, "current_method", lambda: "a method")
    records = script.Records(tmp_path / "adaptive_attacks", "a method")
    for name, setting in script.SETTINGS.items():
        row = dict.fromkeys(script.FIELDS, 0.5) | {"data_set": name, "adaptation": "none", "seed": 0, "noticed": 0}
        records.write(row, script.key_of(name, "none", setting), script.DETECTOR, 0)
    script.main(["--page-only", "--settings", next(iter(script.SETTINGS)), "--seeds", "0"])
    _, *lines = (tmp_path / "adaptive_attacks.csv").read_text().splitlines()
    assert len(lines) == len(script.SETTINGS) > 1


def test_table_has_means_and_what_the_attacker_pays(script, tmp_path, monkeypatch):
    document = tmp_path / "leaderboard.md"
    document.write_text("<!-- adaptive-attacks -->\n<!-- end -->\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    shared = dict.fromkeys(script.FIELDS[5:], 0.5) | {"data_set": "mnist", "architecture": "x", "attack": "wanet"}
    rows = [
        shared | {"adaptation": adaptation, "seed": seed, "attack_success": success - 0.1 * seed, "noticed": seed}
        for adaptation, success in (("none", 1.0), ("features", 0.8))
        for seed in (0, 1)
    ]
    script.publish(rows)
    text = document.read_text()
    assert "| mnist, wanet (2) | none | 0.500 | 0.950 | 0.500 | 0.500 | 0.500 | 1 of 2 |" in text
    assert "| mnist, wanet (2) | features | 0.500 (+0.000) | 0.750 (-0.200) | 0.500 |" in text
    header, *lines = (tmp_path / "adaptive_attacks.csv").read_text().splitlines()
    assert header == ",".join(script.FIELDS)
    assert len(lines) == 4
