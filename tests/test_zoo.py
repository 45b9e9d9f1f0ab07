"""The zoo: splits, plan, cards, training of one tiny entry, verification, and the models that are shipped."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from guard.cli.app import run
from guard.data.datasets import ImageSet, load_dataset
from guard.errors import DatasetError, ZooError
from guard.lab.attacks import ATTACKS, NETWORKS, CropAndFlip, TrainingSettings
from guard.lab.zoo import plan, splits
from guard.lab.zoo.card import ZooCard, required_success
from guard.lab.zoo.collection import Zoo, build_network, default_zoo_dir
from guard.lab.zoo.model_training import train_entry
from guard.lab.zoo.plan import PLAN, Recipe, ZooEntry, find_entries
from guard.lab.zoo.splits import load_split
from guard.resources import checkout_root

SHIPPED = Zoo(default_zoo_dir())
SHIPPED_NAMES = [card.name for card in SHIPPED.cards()]


@pytest.fixture(autouse=True)
def _forget_splits():
    yield
    load_split.cache_clear()


# splits ---------------------------------------------------------------------------------------------------------------


def numbered(n, n_classes, **extra):
    """Images that each hold their own number, so that a row can be told from any other."""
    images = np.zeros((n, 2, 2), dtype=np.uint8)
    images[:, 0, 0], images[:, 0, 1], images[:, 1, 0] = np.arange(n) // 256 // 256, np.arange(n) // 256, np.arange(n)
    return ImageSet(images, np.arange(n, dtype=np.int64) % n_classes, tuple(map(str, range(n_classes))), extra)


def rows_of(part):
    pixels = np.rint(part.images[:, 0] * 255).astype(np.int64)
    return pixels[:, 0, 1] * 256 + pixels[:, 1, 0]


@pytest.fixture
def numbered_sets(monkeypatch):
    sets = {}
    monkeypatch.setattr(splits, "load_dataset", lambda name, split, data_dir=None: sets[name, split])
    return sets


def test_split_mnist_parts_are_disjoint_and_of_the_stated_sizes(numbered_sets):
    numbered_sets["mnist", "train"], numbered_sets["mnist", "test"] = numbered(6000, 10), numbered(9000, 10)
    split = load_split("mnist")
    assert [len(part) for part in (split.train, split.monitor, split.validation, split.test)] == [
        4000,
        2000,
        5000,
        4000,
    ]
    assert not set(rows_of(split.train)) & set(rows_of(split.monitor))
    assert not set(rows_of(split.validation)) & set(rows_of(split.test))
    assert set(rows_of(split.validation)) | set(rows_of(split.test)) == set(range(9000))


def test_split_gtsrb_keeps_tracks_together_and_leaves_repeated_images_out(numbered_sets):
    # 4 classes, 3 tracks of 5 frames each per class
    tracks = np.tile(np.repeat(np.arange(3), 4), 5).astype(np.int16)
    numbered_sets["gtsrb", "train"] = numbered(60, 4, track=tracks)
    numbered_sets["gtsrb", "test"] = numbered(12_000, 4)
    split = load_split("gtsrb")
    assert len(split.monitor) == 20  # one track per class
    monitored = {(label, tracks[row]) for row, label in zip(rows_of(split.monitor), split.monitor.labels, strict=True)}
    trained = {(label, tracks[row]) for row, label in zip(rows_of(split.train), split.train.labels, strict=True)}
    assert len(monitored) == 4
    assert not monitored & trained
    judged = set(rows_of(split.validation)) | set(rows_of(split.test))
    assert judged == set(range(12_000)) - {666, 2291, 3546, 3594, 4548, 9384, 9575, 11906}


def test_split_yaleb_validation_comes_from_training_file_and_is_never_trained_on(numbered_sets):
    numbered_sets["yaleb", "train"], numbered_sets["yaleb", "test"] = numbered(38 * 20, 38), numbered(38, 38)
    split = load_split("yaleb")
    parts = [set(rows_of(part)) for part in (split.train, split.monitor, split.validation)]
    assert [len(part) for part in parts] == [38 * 6, 38 * 2, 38 * 12]
    assert len(set.union(*parts)) == 38 * 20
    assert np.bincount(split.validation.labels).tolist() == [12] * 38
    assert set(rows_of(split.test)) == set(range(38))


def test_split_same_every_time_read_only_and_named_by_a_digest(numbered_sets):
    numbered_sets["cifar100", "train"], numbered_sets["cifar100", "test"] = numbered(2000, 100), numbered(3000, 100)
    first = load_split("cifar100")
    labels, digest = first.validation.labels.copy(), first.digest
    load_split.cache_clear()
    again = load_split("cifar100")
    np.testing.assert_array_equal(again.validation.labels, labels)
    assert again.digest == digest
    assert len(again.test) == len(again.validation) == 1500
    with pytest.raises(ValueError, match="read-only"):
        again.test.images[0] = 0
    numbered_sets["cifar100", "test"].images[0] = 7
    load_split.cache_clear()
    assert load_split("cifar100").digest != digest


def test_split_of_some_classes_numbers_them_anew_and_keeps_their_images(numbered_sets):
    numbered_sets["cifar100", "train"], numbered_sets["cifar100", "test"] = numbered(12_000, 100), numbered(3000, 100)
    split = load_split("cifar100_30")
    assert [len(part) for part in (split.train, split.monitor, split.validation, split.test)] == [3450, 150, 450, 450]
    assert split.class_names[:3] == ("0", "8", "17")
    assert len(split.class_names) == 30
    assert sorted(rows_of(split.validation).tolist() + rows_of(split.test).tolist()) == [
        row for row in range(3000) if str(row % 100) in split.class_names
    ]
    for part in (split.train, split.monitor, split.validation, split.test):
        assert [split.class_names[label] for label in part.labels] == [str(row % 100) for row in rows_of(part)]


def test_split_guard_side_needs_no_training_file(numbered_sets):
    numbered_sets["mnist", "test"] = numbered(9000, 10)
    assert len(load_split("mnist").test) == 4000


def test_split_unknown_set_raises():
    with pytest.raises(DatasetError, match="no split of 'imagenet': known are mnist"):
        load_split("imagenet")


# plan -----------------------------------------------------------------------------------------------------------------


def test_plan_holds_all_that_is_required():
    have = {(entry.data_set, entry.attack_name): set() for entry in PLAN}
    for entry in PLAN:
        have[entry.data_set, entry.attack_name].add(entry.seed)
    for attack in ("a", "b", "single-pixel", "pattern", "blend", "sig", "wanet"):
        assert have["mnist", attack] == {0, 1, 2}
    required = {
        "gtsrb": ("c", "d", "e", "blend", "wanet", "tact", "adap-blend"),
        "cifar10": ("f", "g", "imperceptible", "badnets", "blend", "wanet"),
        "yaleb": ("h", "i", "j", "k"),
        "cifar100": ("red-box",),
    }
    for data_set, attacks in required.items():
        assert all(have[data_set, attack] for attack in attacks)
    less_often_right = (("vit_tiny", "gtsrb"), ("resnet20", "cifar100_30"), ("vit_tiny", "cifar100_30"))
    for architecture, data_set in less_often_right:
        found = {
            entry.attack_name for entry in PLAN if (entry.architecture, entry.data_set) == (architecture, data_set)
        }
        assert "benign" in found
        assert len(found) >= 2
    for data_set in ("mnist", *required):
        assert len([entry for entry in PLAN if entry.data_set == data_set and entry.attack_name == "benign"]) >= 2


def test_plan_names_are_unique_and_every_part_is_known():
    assert len({entry.name for entry in PLAN}) == len(PLAN)
    for entry in PLAN:
        assert entry.architecture in NETWORKS
        assert entry.attack_name == "benign" or entry.attack_name in ATTACKS
        assert entry.recipe.settings.epochs >= 1
        if entry.twin is not None:
            assert any(other.name == entry.twin and other.attack_name == "benign" for other in PLAN)


def test_recipe_of_an_attack_with_epochs_of_its_own_changes_the_training_that_is_run(monkeypatch):
    settings = TrainingSettings(epochs=5)
    recipes = {
        ("mnist", "mnist_small"): Recipe(settings, None, 0.9),
        ("mnist", "mnist_cnn"): Recipe(settings, None, 0.9, TrainingSettings(epochs=2)),
    }
    monkeypatch.setattr(plan, "RECIPES", recipes)
    monkeypatch.setattr(plan, "EPOCHS", {(*key, "wanet"): 9 for key in recipes})
    fresh, continued = (ZooEntry("mnist", "wanet", architecture, 0).recipe for _, architecture in recipes)
    assert (fresh.settings.epochs, fresh.continued) == (9, None)
    assert (continued.settings.epochs, continued.continued.epochs) == (5, 9)
    assert ZooEntry("mnist", "blend", "mnist_cnn", 0).recipe == recipes["mnist", "mnist_cnn"]


def test_find_entries_patterns_choose_in_the_order_of_the_plan():
    chosen = [entry.name for entry in find_entries(["mnist-b-*", "mnist-a-*-1"])]
    assert chosen == ["mnist-a-mnist_cnn-1", *(f"mnist-b-mnist_small-{seed}" for seed in (0, 1, 2))]
    assert find_entries([]) == list(PLAN)
    with pytest.raises(ZooError, match=re.escape("no model of the plan is called 'mnist-z'")):
        find_entries(["mnist-z"])


@pytest.mark.parametrize(("attack", "bar"), [("c", 0.95), ("wanet", 0.85), ("adap-blend", 0.85), ("tact", 0.95)])
def test_required_success_is_lower_for_the_hard_ones(attack, bar):
    assert required_success(attack) == bar


# train, store, verify -------------------------------------------------------------------------------------------------


TINY = (ZooEntry("mnist", "benign", "mnist_small", 0), ZooEntry("mnist", "pattern", "mnist_small", 0, 7))


def plan_tiny(patch):
    """Let the plan be two models on 3,000 real digits, trained in seconds."""
    data = load_dataset("mnist", "test")
    sets = {"train": data[:5000], "test": data[5000 - 1000 :]}
    patch.setattr(splits, "load_dataset", lambda name, split, data_dir=None: sets[split])
    settings = TrainingSettings(epochs=2, batch_size=64, learning_rate=5e-3)
    recipes = {("mnist", "mnist_small"): Recipe(settings, CropAndFlip(1, flip=False), 1.0, settings)}
    patch.setattr(plan, "PLAN", TINY)
    patch.setattr(plan, "RECIPES", recipes)


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A plan of two models, and an empty zoo."""
    plan_tiny(monkeypatch)
    return TINY, Zoo(tmp_path), tmp_path / "work"


class Trained(NamedTuple):
    """What training the two models wrote and returned, and what it left in its work folder."""

    zoo: Zoo
    cards: tuple[ZooCard, ZooCard]
    left: list[Path]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder, work = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        plan_tiny(patch)
        cards = tuple(train_entry(entry, Zoo(folder), work_dir=work) for entry in TINY)
    load_split.cache_clear()
    return Trained(Zoo(folder), cards, list(work.glob("*")))


@pytest.fixture
def benign(tiny, trained):
    """The card of the benign one, in a zoo of it alone."""
    card, zoo = trained.cards[0], tiny[1]
    for path in (zoo.card_path(card.name), zoo.weights_path(card.name)):
        shutil.copy(trained.zoo.folder / path.name, path)
    return card


@pytest.mark.usefixtures("tiny")
def test_train_entry_writes_half_precision_weights_and_a_card_that_verifies(trained):
    (benign, backdoored), zoo, (first, card) = TINY, trained.zoo, trained.cards
    assert {path.name for path in zoo.folder.glob("*.*")} == {
        f"{name}.{kind}" for name in (benign.name, backdoored.name) for kind in ("json", "safetensors")
    }
    assert not trained.left
    assert first.attack == "benign"
    assert first.target_label is first.attack_success is first.benign_clean_accuracy is None
    assert card.started_from == card.benign_twin == benign.name
    assert card.benign_clean_accuracy == first.clean_accuracy
    assert card.target_label == 7
    assert card.poisoned_images == round(0.1 * 3000)
    assert card.settings["augmentation"] == {"padding": 1, "flip": False}
    assert card.training_command == f"guard zoo train {backdoored.name}"
    assert all(value.dtype in (torch.float16, torch.int64) for value in load_file(zoo.weights_path(card.name)).values())
    assert zoo.card(card.name) == card
    found = zoo.verify(card.name)
    assert found.clean_accuracy == pytest.approx(card.clean_accuracy, abs=1e-6)
    assert found.attack_success == pytest.approx(card.attack_success, abs=1e-6)
    assert found.problems == card.shortcomings()


def test_verify_tells_other_weights_and_other_numbers(tiny, benign):
    zoo, card = tiny[1], benign
    assert zoo.verify(card.name).problems == ()
    card.model_copy(update={"clean_accuracy": card.clean_accuracy - 0.0021}).write(zoo.card_path(card.name))
    (problem,) = zoo.verify(card.name).problems
    assert problem.startswith("clean accuracy is 0.")
    state = load_file(zoo.weights_path(card.name))
    save_file(
        {name: value + 1e-3 if value.is_floating_point() else value for name, value in state.items()},
        zoo.weights_path(card.name),
    )
    assert "the weights are not those of the card" in zoo.verify(card.name).problems


def test_train_entry_interrupted_goes_on_and_ends_with_the_same_weights(tiny, trained):
    (benign, _), zoo, work = tiny
    whole = trained.zoo.weights_path(benign.name).read_bytes()

    def interrupt(report):
        if report.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_entry(benign, zoo, work_dir=work, progress=interrupt)
    assert not zoo.has(benign.name)
    epochs = []
    train_entry(benign, zoo, work_dir=work, progress=lambda report: epochs.append(report.epoch))
    assert epochs == [2]
    assert zoo.weights_path(benign.name).read_bytes() == whole


def test_train_entry_without_its_twin_raises(tiny):
    (_, backdoored), zoo, work = tiny
    with pytest.raises(ZooError, match="there is no model 'mnist-benign-mnist_small-0'"):
        train_entry(backdoored, zoo, work_dir=work)


def test_card_shortcomings_are_too_little_success_and_too_much_accuracy_lost(trained):
    attack = trained.cards[0].model_copy(
        update={"attack": "pattern", "attack_success": 0.95, "clean_accuracy": 0.97, "benign_clean_accuracy": 0.99}
    )
    assert attack.shortcomings() == ()
    assert attack.model_copy(update={"attack_success": 0.9499}).shortcomings() == (
        "attack success 0.9499 is below 0.95",
    )
    (lost,) = attack.model_copy(update={"clean_accuracy": 0.9699}).shortcomings()
    assert lost == "clean accuracy 0.9699 is 2 points below the twin's 0.9900"


def test_zoo_missing_or_damaged_model_raises(tmp_path):
    zoo = Zoo(tmp_path)
    assert zoo.cards() == []
    with pytest.raises(ZooError, match="there is no model 'nobody'"):
        zoo.card("nobody")
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ZooError, match=r"broken\.json is no card of a model"):
        zoo.card("broken")
    with pytest.raises(ZooError, match="there is no architecture 'alexnet'"):
        build_network("alexnet", 10, 3)


def test_benign_card_has_no_attack_to_restore(trained):
    with pytest.raises(ZooError, match="is benign: it has no attack"):
        trained.cards[0].restore_attack()


# what is shipped ------------------------------------------------------------------------------------------------------


def test_shipped_zoo_is_the_plan_and_every_attack_is_real():
    if checkout_root() is None:
        pytest.skip("the zoo is in the checkout, not in the wheel")
    assert sorted(SHIPPED_NAMES) == sorted(entry.name for entry in PLAN)
    for card in SHIPPED.cards():
        assert card.shortcomings() == (), card.name
        weights = SHIPPED.weights_path(card.name).read_bytes()
        assert len(weights) < 5_000_000
        assert hashlib.sha256(weights).hexdigest() == card.weights_sha256, card.name
    assert sum(path.stat().st_size for path in SHIPPED.folder.iterdir()) < 60_000_000


@pytest.mark.parametrize("name", [name for name in SHIPPED_NAMES if name.startswith("mnist-")])
def test_shipped_mnist_model_verifies_from_the_images_in_the_package(name, monkeypatch):
    monkeypatch.delenv("GUARD_DATA_DIR", raising=False)
    assert SHIPPED.verify(name).problems == ()


@pytest.mark.parametrize("name", SHIPPED_NAMES)
def test_shipped_model_attack_is_that_of_the_plan(name):
    card = SHIPPED.card(name)
    entry = next(entry for entry in PLAN if entry.name == name)
    attack = entry.attack_on(build_network(card.architecture, card.n_classes, card.channels))
    if attack is None:
        assert card.is_benign
        assert card.parameters == {}
    else:
        assert card.parameters == json.loads(json.dumps(attack.describe()))
        assert [backdoor.trigger for backdoor in card.restore_attack().backdoors] == [
            backdoor.trigger for backdoor in attack.backdoors
        ]
    assert (card.seed, card.architecture, card.data_set) == (entry.seed, entry.architecture, entry.data_set)


def test_readme_lines_load_a_model_without_this_project(tmp_path):
    readme = (SHIPPED.folder / "README.md").read_text()
    code = re.search(r"```python\n(.+?)```", readme, re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) <= 5
    name = re.search(r'"([\w-]+)\.json"', code).group(1)
    for path in (
        SHIPPED.card_path(name),
        SHIPPED.weights_path(name),
        checkout_root() / "guard/lab/attacks/networks.py",
    ):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    check = "import torch; print(network(torch.zeros(2, 1, 28, 28)).shape)"
    code = f"import sys; sys.modules['guard'] = None\n{code}\n{check}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([2, 10])"


# command line ---------------------------------------------------------------------------------------------------------


def test_zoo_command_train_list_show_verify(tiny, capsys):
    entries, zoo, work = tiny
    place = ["--folder", str(zoo.folder)]
    assert run(["zoo", "train", "--missing", *place, "--work-dir", str(work)]) == 0
    out = capsys.readouterr()
    assert [line.split()[0] for line in out.out.splitlines()] == [entry.name for entry in entries]
    assert run(["zoo", "train", "--missing", *place, "--work-dir", str(work)]) == 0
    assert "0 models to train" in capsys.readouterr().err
    assert run(["zoo", "list", *place]) == 0
    out = capsys.readouterr()
    assert all(entry.name in out.out for entry in entries)
    assert "2 models in" in out.err
    assert run(["zoo", "show", entries[1].name, *place]) == 0
    assert ZooCard(**json.loads(capsys.readouterr().out)) == zoo.card(entries[1].name)
    assert run(["zoo", "verify", entries[0].name, *place]) == 0
    assert capsys.readouterr().out.startswith(f"ok  {entries[0].name}")


def test_zoo_command_verify_a_bad_model_has_status_1(tiny, benign, capsys):
    zoo, card = tiny[1], benign
    card.model_copy(update={"clean_accuracy": 0.5}).write(zoo.card_path(card.name))
    assert run(["zoo", "verify", "--folder", str(zoo.folder)]) == 1
    out = capsys.readouterr()
    assert out.out.startswith(f"BAD {card.name}")
    assert "1 of 1 models are not what their cards say" in out.err


def test_zoo_command_unknown_names_are_errors(tmp_path, capsys):
    assert run(["zoo", "show", "nobody", "--folder", str(tmp_path)]) == 1
    assert "there is no model 'nobody'" in capsys.readouterr().err
    assert run(["zoo", "verify", "--folder", str(tmp_path)]) == 1
    assert "there is no such model" in capsys.readouterr().err
    assert run(["zoo", "train", "nobody", "--folder", str(tmp_path)]) == 1
    assert "no model of the plan is called 'nobody'" in capsys.readouterr().err
