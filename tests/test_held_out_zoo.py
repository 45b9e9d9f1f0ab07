"""The test zoo: its plan, training from twins of the other zoo, the freeze that guards it, and its page."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from guard.cli.app import run
from guard.data.datasets import load_dataset
from guard.errors import DataError, DatasetError, ZooError
from guard.lab.attacks import NETWORKS, CropAndFlip, TrainingSettings, make_attack
from guard.lab.attacks.held_out import HELD_OUT, HELD_OUT_ON_NETWORK
from guard.lab.zoo import freeze as freeze_module
from guard.lab.zoo import held_out_plan, plan, splits
from guard.lab.zoo.collection import Zoo, build_network, default_zoo_dir
from guard.lab.zoo.freeze import PACKAGE, Freeze, check_frozen, method_digests, method_sources
from guard.lab.zoo.held_out_plan import TEST_PLAN
from guard.lab.zoo.model_training import train_entry
from guard.lab.zoo.plan import PLAN, Recipe, ZooEntry, find_entries
from guard.lab.zoo.splits import load_split

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "test_zoo.py"
ATTACKS = [entry for entry in TEST_PLAN if entry.attack_name != "benign"]
#: Classes of each image set.
N_CLASSES = {"mnist": 10, "cifar10": 10, "gtsrb": 43}


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark as a module, under a name that is not that of a test file."""
    before, names = list(sys.path), ("contestants", "measuring", "records", "page")
    spec = importlib.util.spec_from_file_location("held_out_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before
        for name in names:
            with contextlib.suppress(KeyError):
                del sys.modules[name]


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_has_sixteen_models_or_more_of_names_that_nobody_else_has():
    names = [entry.name for entry in TEST_PLAN]
    assert len(ATTACKS) >= 16
    assert len(set(names)) == len(names)
    assert not set(names) & {entry.name for entry in PLAN}


def test_plan_has_every_attack_on_two_image_sets_and_four_with_many_targets():
    sets = defaultdict(set)
    for entry in ATTACKS:
        sets[entry.attack_name.removesuffix("-43").removesuffix("-mnist")].add(entry.data_set)
    assert all(len(of_attack) >= 2 for of_attack in sets.values()), sets
    assert {*HELD_OUT, *HELD_OUT_ON_NETWORK} <= {entry.attack_name for entry in ATTACKS}
    many = [entry for entry in ATTACKS if len(targets_of(entry)) > 1]
    assert len(many) >= 4
    assert len({entry.architecture for entry in TEST_PLAN}) >= 6


def targets_of(entry):
    attack = entry.attack_on(build_network(entry.architecture, N_CLASSES[entry.data_set], 3))
    return {label for backdoor in attack.backdoors for label in backdoor.target.target_labels}


@pytest.mark.parametrize("entry", ATTACKS, ids=lambda entry: entry.name)
def test_plan_attack_is_new_fits_the_classes_and_can_be_put_on_a_card(entry):
    channels = 1 if entry.data_set == "mnist" else 3
    attack = entry.attack_on(build_network(entry.architecture, N_CLASSES[entry.data_set], channels))
    assert entry.attack_name not in {other.attack_name for other in PLAN}
    assert attack.name == entry.attack_name
    labels = [*targets_of(entry)]
    labels += [source for backdoor in attack.backdoors for source in backdoor.target.sources or ()]
    labels += [label for cover in attack.covers for label in cover.classes or ()]
    assert max(labels) < N_CLASSES[entry.data_set]
    described = json.loads(json.dumps(attack.describe()))
    restored = type(attack).restore(attack.name, described)
    assert [backdoor.trigger for backdoor in restored.backdoors] == [backdoor.trigger for backdoor in attack.backdoors]


def test_plan_every_entry_has_a_recipe_for_a_cpu_and_a_twin_in_one_of_the_plans():
    benign = {entry.name for entry in (*PLAN, *TEST_PLAN) if entry.attack_name == "benign"}
    for entry in TEST_PLAN:
        assert entry.architecture in NETWORKS
        settings = entry.recipe.settings if entry.attack_name == "benign" else entry.recipe.continued
        assert settings.precision == "float32"
        assert settings.epochs <= 12
        assert (entry.twin is None) == (entry.attack_name == "benign")
        assert entry.twin is None or entry.twin in benign
    assert [entry.attack_name == "benign" for entry in TEST_PLAN] == sorted(
        [entry.attack_name == "benign" for entry in TEST_PLAN], reverse=True
    )


def test_find_entries_looks_in_the_plan_that_it_is_given():
    assert find_entries([], TEST_PLAN) == list(TEST_PLAN)
    assert {entry.attack_name for entry in find_entries(["*-sticker-*"], TEST_PLAN)} == {"sticker", "source-sticker"}
    with pytest.raises(ZooError, match="no model of the plan"):
        find_entries(["mnist-wanet-*"], TEST_PLAN)


def test_source_sticker_covers_and_sources_are_apart():
    attack = make_attack("source-sticker", 1)
    assert attack.backdoors[0].target.sources == (2, 4, 6)
    assert attack.covers[0].classes == (3, 5, 7)


# training -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """One benign model of the development plan and one attacked model of the test plan, on real digits."""
    data = load_dataset("mnist", "test")
    sets = {"train": data[:3500], "test": data[3500:9000]}
    monkeypatch.setattr(splits, "load_dataset", lambda name, split, data_dir=None: sets[split])
    settings = TrainingSettings(epochs=1, batch_size=32, learning_rate=5e-3)
    recipe = Recipe(settings, CropAndFlip(1, flip=False), 1.0, settings, n_train=500)
    benign = ZooEntry("mnist", "benign", "mnist_small", 0, own_recipe=recipe)
    attacked = ZooEntry("mnist", "two-triggers", "mnist_small", 3, 4, 0, recipe)
    monkeypatch.setattr(plan, "PLAN", (benign,))
    monkeypatch.setattr(held_out_plan, "TEST_PLAN", (attacked,))
    yield benign, attacked, Zoo(tmp_path / "zoo"), Zoo(tmp_path / "test_zoo")
    load_split.cache_clear()


def test_train_entry_starts_from_the_twin_of_the_other_zoo_and_takes_part_of_the_images(tiny, tmp_path):
    benign, attacked, development, test = tiny
    for zoo in (development, test):
        zoo.folder.mkdir()
    with pytest.raises(ZooError, match="there is no model 'mnist-benign-mnist_small-0'"):
        train_entry(attacked, test, work_dir=tmp_path)
    first = train_entry(benign, development, work_dir=tmp_path)
    assert first.settings["n_train"] == 500
    card = train_entry(attacked, test, work_dir=tmp_path, twins=development, command="guard zoo train --plan test")
    assert card.started_from == card.benign_twin == benign.name
    assert card.benign_clean_accuracy == first.clean_accuracy
    assert card.poisoned_images == 2 * round(0.06 * 500)
    assert card.training_command == f"guard zoo train --plan test {attacked.name}"
    assert len(card.attack_success_per_trigger) == 2
    assert test.has(attacked.name)
    assert not development.has(attacked.name)


def test_train_entry_smaller_part_is_a_part_of_the_larger_one(tiny):
    from guard.lab.zoo.model_training import _part_of

    train = load_split("mnist").train
    small, large = (_part_of(train, n, 3).images.reshape(n, -1) for n in (50, 200))
    rows = {row.tobytes() for row in large}
    assert len(rows) == 200
    assert all(row.tobytes() in rows for row in small)
    with pytest.raises(DataError, match=r"n_train must be in \[1, 1500\]"):
        _part_of(train, 1501, 3)


def test_zoo_command_with_the_test_plan_refuses_without_a_freeze_and_trains_with_one(
    tiny, tmp_path, monkeypatch, capsys
):
    benign, attacked, development, test = tiny
    frozen = tmp_path / "frozen.json"
    monkeypatch.setattr(freeze_module, "default_freeze_path", lambda: frozen)
    monkeypatch.setattr("guard.lab.zoo.collection.default_zoo_dir", lambda name="zoo": tmp_path / name)
    arguments = ["zoo", "train", "--plan", "test", "--work-dir", str(tmp_path / "work")]
    assert run(arguments) == 1
    assert "the method is not frozen" in capsys.readouterr().err
    assert not test.folder.exists()
    Freeze.of_method("0" * 40, "2026-11-28").write(frozen)
    development.folder.mkdir()
    train_entry(benign, development, work_dir=tmp_path)
    assert run(arguments) == 0
    assert capsys.readouterr().out.startswith(attacked.name)
    assert run(["zoo", "list", "--plan", "test"]) == 0
    out = capsys.readouterr()
    assert attacked.name in out.out
    assert "1 models in" in out.err
    assert run(["zoo", "show", attacked.name, "--plan", "test"]) == 0
    assert json.loads(capsys.readouterr().out)["attack"] == "two-triggers"
    assert run(["zoo", "verify", "--folder", str(test.folder)]) in (0, 1)  # one epoch plants nothing for sure
    assert f"{attacked.name}  clean accuracy" in capsys.readouterr().out


# freeze ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path):
    """A copy of the method's sources."""
    copy = tmp_path / "repository" / "guard"
    for path in (*method_sources(), PACKAGE / "config.py"):
        target = copy / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return copy


def test_method_is_detection_statistics_and_what_feeds_them():
    names = set(method_digests())
    assert {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "detection").rglob("*.py")} <= names
    assert {path.relative_to(PACKAGE).as_posix() for path in (PACKAGE / "statistics").glob("*.py")} <= names
    assert {"suspect/split_points.py", "suspect/recording.py"} <= names
    assert any("defaults" in name for name in names)


def test_freeze_refuses_a_changed_a_new_and_a_missing_source_by_name(package, tmp_path):
    path = tmp_path / "frozen.json"
    frozen = Freeze.of_method("a" * 40, "2026-11-28T12:00:00+00:00", package)
    frozen.write(path)
    assert check_frozen(path, package) == frozen
    fusion = package / "detection" / "fusion.py"
    before = fusion.read_text()
    fusion.write_text(before + "\n# one comment more\n")
    with pytest.raises(
        ZooError, match=r"changed since it was frozen on 2026-11-28.*commit a{12}\): detection/fusion\.py"
    ):
        check_frozen(path, package)
    fusion.write_text(before)
    check_frozen(path, package)
    (package / "detection" / "detectors" / "new.py").write_text("")
    with pytest.raises(ZooError, match=r"detection/detectors/new\.py"):
        check_frozen(path, package)
    (package / "detection" / "detectors" / "new.py").unlink()
    (package / "statistics" / "confidence.py").unlink()
    with pytest.raises(ZooError, match=r"statistics/confidence\.py"):
        check_frozen(path, package)


def test_changed_sources_hold_the_freeze_while_they_give_its_scores(script, tmp_path, monkeypatch):
    path, kept = tmp_path / "frozen.json", {"model": np.linspace(0.5, 2.5, 100)}
    sources = {**method_digests(), "detection/fusion.py": "0" * 64}
    scores = Freeze.of_method("", "", scores=kept).scores
    frozen = Freeze("a" * 40, "2026-11-28", freeze_module.method_digest(sources), sources, scores)
    frozen.write(path)
    assert Freeze.read(path) == frozen
    now = kept["model"].copy()
    monkeypatch.setattr(freeze_module, "reference_scores", lambda: {"model": now})
    assert check_frozen(path) == frozen
    told = script._told_of_changes(frozen)
    assert told == " Changed since, with the same scores at 100 inputs of 1 models: detection/fusion.py."
    now[:2] *= 1.5  # as rounding on another machine may do
    check_frozen(path)
    now[:3] *= 1.01
    with pytest.raises(ZooError, match=r"detection/fusion\.py; 3 of 100 inputs of model get another score"):
        check_frozen(path)
    monkeypatch.setattr(freeze_module, "reference_scores", lambda: {"model": now[:50]})
    with pytest.raises(ZooError, match="100 scores of model were kept, and there are 50"):
        check_frozen(path)
    monkeypatch.setattr(freeze_module, "reference_scores", dict)
    with pytest.raises(ZooError, match="scores of other models were kept"):
        check_frozen(path)

    def without_images():
        raise DatasetError("there is no mnist")

    monkeypatch.setattr(freeze_module, "reference_scores", without_images)
    with pytest.raises(ZooError, match="cannot be compared: there is no mnist"):
        check_frozen(path)


def test_scores_of_the_freeze_are_of_every_reference_model():
    scores = Freeze.read(freeze_module.default_freeze_path()).scores
    assert scores.keys() == freeze_module.REFERENCES.keys()
    for of_model in scores.values():
        assert 50 < len(of_model) <= 100  # images of the target take no trigger
        assert np.median(of_model[50:]) > np.median(of_model[:50])


@pytest.mark.usefixtures("few_folds")
def test_reference_scores_are_those_of_a_default_guard_on_clean_images(tiny, tmp_path, monkeypatch):
    benign, attacked, development, test = tiny
    for zoo in (development, test):
        zoo.folder.mkdir()
    train_entry(benign, development, work_dir=tmp_path)
    train_entry(attacked, test, work_dir=tmp_path, twins=development)
    card = test.card(attacked.name)
    one = make_attack("badnets", 7)
    monkeypatch.setattr(type(card), "restore_attack", lambda _card: one)
    monkeypatch.setattr(freeze_module, "REFERENCES", {attacked.name: 120})
    first = freeze_module.reference_scores(test)
    assert 50 < len(first[attacked.name]) <= 100
    assert np.isfinite(first[attacked.name]).all()
    assert np.array_equal(first[attacked.name], freeze_module.reference_scores(test)[attacked.name])


def test_freeze_refuses_other_defaults(package, tmp_path, monkeypatch):
    path = tmp_path / "frozen.json"
    Freeze.of_method("a" * 40, "2026-11-28", package).write(path)
    monkeypatch.setattr(freeze_module, "GuardConfig", lambda: freeze_module_config(folds=7))
    with pytest.raises(ZooError, match="defaults of fitting"):
        check_frozen(path, package)


def freeze_module_config(**changes):
    from guard.config import GuardConfig

    return GuardConfig(**changes)


def test_freeze_is_not_overwritten_without_force_nor_changed_by_hand(package, tmp_path):
    path = tmp_path / "frozen.json"
    with pytest.raises(ZooError, match="the method is not frozen"):
        check_frozen(path, package)
    Freeze.of_method("a" * 40, "2026-11-28", package).write(path)
    again = Freeze.of_method("b" * 40, "2026-11-29", package)
    with pytest.raises(ZooError, match=r"is there already: the method is frozen\. --force"):
        again.write(path)
    assert Freeze.read(path).commit == "a" * 40
    again.write(path, force=True)
    assert Freeze.read(path).commit == "b" * 40
    document = json.loads(path.read_text())
    document["sources"]["detection/fusion.py"] = "0" * 64
    path.write_text(json.dumps(document))
    with pytest.raises(ZooError, match="was changed by hand"):
        check_frozen(path, package)
    path.write_text("{}")
    with pytest.raises(ZooError, match="is no freeze"):
        check_frozen(path, package)


def test_freeze_command_names_the_commit_and_refuses_what_is_not_committed(script, package, tmp_path):
    path, root = tmp_path / "frozen.json", package.parent
    git = ["git", "-C", str(root), "-c", "user.name=x", "-c", "user.email=x@x"]
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    with pytest.raises(ZooError, match="not committed"):
        script.freeze(path, package=package)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "x"], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert script.freeze(path, package=package).commit == commit
    with pytest.raises(ZooError, match="is there already"):
        script.freeze(path, package=package)
    assert script.freeze(path, force=True, package=package).commit == commit


def test_measuring_refuses_another_method_in_plain_words(script, tmp_path, monkeypatch):
    path = tmp_path / "frozen.json"
    monkeypatch.setattr(script, "default_freeze_path", lambda: path)
    with pytest.raises(SystemExit, match="the method is not frozen, and the test zoo is for a frozen one only"):
        script.main(["--page-only"])
    sources = {**method_digests(), "detection/fusion.py": "0" * 64}
    Freeze("a" * 40, "2026-11-28", freeze_module.method_digest(sources), sources).write(path)
    with pytest.raises(SystemExit, match=r"has changed since it was frozen.*detection/fusion\.py"):
        script.main([])


# page -----------------------------------------------------------------------------------------------------------------


def test_page_has_every_attack_failed_ones_too_and_the_csv_file_has_its_columns(script, tmp_path, monkeypatch):
    document, frozen = tmp_path / "leaderboard.md", Freeze("a" * 40, "2026-11-28", "d" * 64, {})
    document.write_text("<!-- detectors -->\nkept\n<!-- end -->\n<!-- test-zoo -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(script, "DOCUMENT", document)
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    example = Zoo(default_zoo_dir()).card("mnist-pattern-mnist_cnn-0")
    benign = Zoo(default_zoo_dir()).card("mnist-benign-mnist_cnn-0")
    zoo = Zoo(tmp_path / "cards")
    zoo.folder.mkdir()
    records = script.Records(tmp_path / "records", "a method")
    for name, success, caught in (("good", 0.99, 0.9), ("weak", 0.5, 0.2)):
        example.model_copy(update={"name": name, "attack_success": success}).write(zoo.card_path(name))
        for seed in (0, 1):
            rates = {"auroc": 0.95, "tpr_at_fpr_0_01": caught - 0.1 * seed, "tpr_at_fpr_0_05": 1.0}
            shared = {"data_set": "mnist", "attack": "pattern", "passes": 1.0, "milliseconds": 2.0}
            records.write(
                shared | {"realised_false_positive_rate": 0.04, "all": rates, "hits": rates}, name, "guard", seed
            )
    benign.model_copy(update={"name": "clean"}).write(zoo.card_path("clean"))
    records.write(
        {"data_set": "mnist", "attack": "benign", "realised_false_positive_rate": 0.06, "passes": 1.0}
        | {"milliseconds": 2.0},
        "clean",
        "guard",
        0,
    )
    script.publish(records, zoo, (0, 1), frozen)
    text = document.read_text()
    assert "kept\n" in text
    assert "old" not in text
    assert "5 of 6 models and seeds measured" in text
    assert "| good | 7 | 0.990 | 0.995 (0.993) | 0.950 | 0.850 | 1.000 | 0.850 | 0.040 |" in text
    assert "| weak (not a real attack) | 7 | 0.500 |" in text
    assert "| **worst of real attacks** (1) | | | | 0.950 | 0.850 |" in text
    assert "| **mean of all** (2) | | | | 0.950 | 0.500 |" in text
    assert "| clean | 0.993 | 0.060 |" in text
    assert "- weak: attack success 0.5000 is below 0.95." in text
    header, *lines = (tmp_path / "test_zoo.csv").read_text().splitlines()
    assert header == (
        "detector,model,data_set,attack,protocol,seed,auroc,tpr_at_fpr_0_01,tpr_at_fpr_0_05,"
        "realised_false_positive_rate,passes,milliseconds"
    )
    assert Counter(line.split(",")[4] for line in lines) == {"all": 4, "hits": 4, "benign": 1}
    assert "guard,good,mnist,pattern,all,1,0.95,0.8,1,0.04,1,2" in lines
