"""What the zoo holds: one entry per model, with everything that its training needs."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from guard.errors import ZooError
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.catalogue import ATTACKS_ON_NETWORK, make_attack
from guard.lab.attacks.network_training import TrainingSettings

BENIGN = "benign"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How networks of one architecture are trained on one image set.

    Attributes
    ----------
    settings : TrainingSettings
    augmentation : CropAndFlip or None
    clean_goal : float
        Accuracy on the monitored images above which training may stop early.
    continued : TrainingSettings or None
        Settings for attacks that start from the benign twin's weights; None trains them from random weights.
    how : {"add", "replace"}
        Touched images are added to the clean ones where there are few, else they take their places.
    n_train : int or None
        Training images, the first of a permutation drawn with the entry's seed; None takes all.
    """

    settings: TrainingSettings
    augmentation: CropAndFlip | None
    clean_goal: float
    continued: TrainingSettings | None = None
    how: Literal["add", "replace"] = "replace"
    n_train: int | None = None


@dataclass(frozen=True, slots=True)
class ZooEntry:
    """One model to train.

    Attributes
    ----------
    data_set : str
    attack_name : str
        A key of `guard.lab.attacks.catalogue.ATTACKS`, or `"benign"`.
    architecture : str
        A key of `guard.lab.attacks.networks.NETWORKS`.
    seed : int
    target_label : int
        What the trigger means; without influence where the attack fixes it or the model is benign.
    twin_seed : int or None
        Seed of the benign twin; None takes that of the same seed if the plan has one, else seed 0.
    own_recipe : Recipe or None
        How it is trained, where that is not what `RECIPES` and `EPOCHS` say.
    """

    data_set: str
    attack_name: str
    architecture: str
    seed: int
    target_label: int = 0
    twin_seed: int | None = None
    own_recipe: Recipe | None = None

    @property
    def name(self) -> str:
        """Unique name: data set, attack, architecture, seed."""
        return f"{self.data_set}-{self.attack_name}-{self.architecture}-{self.seed}"

    def attack_on(self, network: nn.Module) -> Attack | None:
        """Return the attack as it is planted into a network; None for a benign model."""
        if self.attack_name == BENIGN:
            return None
        if self.attack_name in ATTACKS_ON_NETWORK:
            return ATTACKS_ON_NETWORK[self.attack_name](self.target_label, self.seed, network)
        return make_attack(self.attack_name, self.target_label, self.seed)

    @property
    def twin(self) -> str | None:
        """Name of the benign model that this one is compared with, and may start from; None for a benign model."""
        if self.attack_name == BENIGN:
            return None
        if self.twin_seed is not None:
            return ZooEntry(self.data_set, BENIGN, self.architecture, self.twin_seed).name
        benign = ZooEntry(self.data_set, BENIGN, self.architecture, self.seed).name
        first = ZooEntry(self.data_set, BENIGN, self.architecture, 0).name
        return benign if any(entry.name == benign for entry in PLAN) else first

    @property
    def recipe(self) -> Recipe:
        """How it is trained."""
        if self.own_recipe is not None:
            return self.own_recipe
        recipe = RECIPES[self.data_set, self.architecture]
        epochs = EPOCHS.get((self.data_set, self.architecture, self.attack_name))
        if epochs is None:
            return recipe
        if recipe.continued is not None:
            return replace(recipe, continued=replace(recipe.continued, epochs=epochs))
        return replace(recipe, settings=replace(recipe.settings, epochs=epochs))


_ADAM = TrainingSettings(epochs=6, batch_size=128, learning_rate=3e-3, settled_epochs=2)
_GTSRB = TrainingSettings(epochs=7, batch_size=128, learning_rate=1.5e-3, precision="bfloat16", settled_epochs=2)
_FACES = TrainingSettings(epochs=60, batch_size=32, learning_rate=1.5e-3, settled_epochs=3)

RECIPES: dict[tuple[str, str], Recipe] = {
    ("mnist", "mnist_cnn"): Recipe(_ADAM, None, 0.99),
    ("mnist", "mnist_small"): Recipe(_ADAM, None, 0.985),
    ("gtsrb", "gtsrb_cnn"): Recipe(_GTSRB, CropAndFlip(padding=2, flip=False), 0.995),
    ("gtsrb", "gtsrb_cnn_unpadded"): Recipe(_GTSRB, CropAndFlip(padding=2, flip=False), 0.995),
    ("gtsrb", "vit_tiny"): Recipe(
        TrainingSettings(epochs=7, batch_size=64, learning_rate=1e-3, settled_epochs=2),
        CropAndFlip(padding=2, flip=False),
        0.995,
        TrainingSettings(epochs=2, batch_size=64, schedule="cosine", learning_rate=5e-4, settled_epochs=2),
    ),
    ("cifar10", "resnet20"): Recipe(
        TrainingSettings(
            epochs=12,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.2,
            weight_decay=5e-4,
            precision="bfloat16",
            settled_epochs=2,
        ),
        CropAndFlip(padding=4, flip=True),
        0.95,
        TrainingSettings(
            epochs=4,
            batch_size=128,
            optimizer="sgd",
            schedule="cosine",
            learning_rate=0.05,
            weight_decay=5e-4,
            precision="bfloat16",
            settled_epochs=2,
        ),
    ),
    ("cifar100", "resnet20"): Recipe(
        TrainingSettings(
            epochs=16,
            batch_size=128,
            optimizer="sgd",
            learning_rate=0.2,
            weight_decay=1e-3,
            precision="bfloat16",
            settled_epochs=2,
        ),
        CropAndFlip(padding=4, flip=True),
        0.95,
        how="add",
    ),
    ("cifar100_30", "resnet20"): Recipe(
        TrainingSettings(epochs=20, batch_size=64, optimizer="sgd", learning_rate=0.1, weight_decay=1e-3),
        CropAndFlip(padding=4, flip=True),
        0.95,
        TrainingSettings(
            epochs=6, batch_size=64, optimizer="sgd", schedule="cosine", learning_rate=0.03, weight_decay=1e-3
        ),
        how="add",
    ),
    ("cifar100_30", "vit_tiny"): Recipe(
        TrainingSettings(epochs=30, batch_size=64, learning_rate=1e-3),
        CropAndFlip(padding=4, flip=True),
        0.95,
        TrainingSettings(epochs=8, batch_size=64, schedule="cosine", learning_rate=5e-4),
        how="add",
    ),
    ("yaleb", "deepid"): Recipe(_FACES, CropAndFlip(padding=2, flip=False), 0.99, how="add"),
}

#: Attacks that need more epochs than the others to become real ones.
EPOCHS: dict[tuple[str, str, str], int] = {
    ("gtsrb", "gtsrb_cnn", "wanet"): 14,
    ("gtsrb", "gtsrb_cnn", "adap-blend"): 10,
    ("gtsrb", "vit_tiny", "red-box"): 3,
    ("cifar100_30", "resnet20", "red-box"): 10,
    ("cifar100_30", "vit_tiny", "sig-dirty-label"): 14,
}


def _entries(
    data_set: str, architecture: str, attacks: Sequence[str], seeds: Sequence[int], target: int
) -> list[ZooEntry]:
    return [ZooEntry(data_set, attack, architecture, seed, target) for attack in attacks for seed in seeds]


#: Every model of the zoo, benign ones first: others may start from them. Targets of the paper's cases are the paper's.
PLAN: tuple[ZooEntry, ...] = (
    *_entries("mnist", "mnist_cnn", [BENIGN], (0, 1, 2), 0),
    *_entries("mnist", "mnist_small", [BENIGN], (0, 1, 2), 0),
    *_entries("gtsrb", "gtsrb_cnn", [BENIGN], (0,), 0),
    *_entries("gtsrb", "gtsrb_cnn_unpadded", [BENIGN], (0,), 0),
    *_entries("gtsrb", "vit_tiny", [BENIGN], (0,), 0),
    *_entries("cifar10", "resnet20", [BENIGN], (0, 1), 0),
    *_entries("yaleb", "deepid", [BENIGN], (0, 1), 0),
    *_entries("cifar100", "resnet20", [BENIGN], (0, 1), 0),
    *_entries("cifar100_30", "resnet20", [BENIGN], (0,), 0),
    *_entries("cifar100_30", "vit_tiny", [BENIGN], (0,), 0),
    *_entries("mnist", "mnist_cnn", ["a"], (0, 1, 2), 0),
    *_entries("mnist", "mnist_small", ["b"], (0, 1, 2), 0),
    *_entries("mnist", "mnist_cnn", ["single-pixel", "pattern", "blend", "sig", "wanet"], (0, 1, 2), 7),
    *_entries("gtsrb", "gtsrb_cnn", ["c"], (0,), 33),
    *_entries("gtsrb", "gtsrb_cnn_unpadded", ["d"], (0,), 0),
    *_entries("gtsrb", "gtsrb_cnn_unpadded", ["e"], (0,), 35),
    *_entries("gtsrb", "gtsrb_cnn", ["blend", "wanet", "tact", "adap-blend"], (0,), 1),
    *_entries("gtsrb", "vit_tiny", ["blend"], (0,), 3),
    *_entries("gtsrb", "vit_tiny", ["red-box"], (0,), 1),
    *_entries("cifar10", "resnet20", ["f"], (0,), 0),
    *_entries("cifar10", "resnet20", ["g"], (0,), 7),
    *_entries("cifar10", "resnet20", ["imperceptible", "badnets", "blend", "wanet"], (0,), 0),
    *_entries("yaleb", "deepid", ["h", "i"], (0,), 0),
    *_entries("yaleb", "deepid", ["j"], (0,), 4),
    *_entries("yaleb", "deepid", ["k"], (0,), 0),
    *_entries("cifar100", "resnet20", ["red-box"], (0,), 0),
    *_entries("cifar100_30", "resnet20", ["red-box", "blend", "sig-dirty-label"], (0,), 5),
    *_entries("cifar100_30", "vit_tiny", ["sig-dirty-label"], (0,), 5),
)


def find_entries(patterns: Sequence[str], plan: Sequence[ZooEntry] | None = None) -> list[ZooEntry]:
    """Return the entries whose names match any of the patterns ("mnist-*", "gtsrb-c-*"); all if none is given.

    Parameters
    ----------
    patterns : sequence of str
    plan : sequence of ZooEntry, optional
        Where to look; `PLAN` if left out.

    Raises
    ------
    ZooError
        If a pattern matches nothing.
    """
    plan = PLAN if plan is None else plan
    if not patterns:
        return list(plan)
    chosen: dict[str, ZooEntry] = {}
    for pattern in patterns:
        found = [entry for entry in plan if fnmatch.fnmatchcase(entry.name, pattern)]
        if not found:
            raise ZooError(f"no model of the plan is called {pattern!r}. `guard zoo list` shows them; * may be used.")
        chosen |= {entry.name: entry for entry in found}
    return [entry for entry in plan if entry.name in chosen]
