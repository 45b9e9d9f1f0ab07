"""The test zoo: models that no setting of the guard was chosen on, trained once the guard is frozen.

Attacks and targets are others than in the zoo of `guard.lab.zoo.plan`, though some use its blended pattern or sinusoid
with other parameters; two of seven architectures are new. Most benign twins are shared with it. Every recipe fits two
CPU cores: float32, parts of the training images, and weights of a benign twin to start from. All-to-all attacks can
succeed no more often than the network is right, so that on CIFAR-10 theirs stays below the bar of a real attack. Failed
attacks stay in the zoo, with a card that says so.
"""

from __future__ import annotations

from dataclasses import replace

from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.network_training import TrainingSettings
from guard.lab.zoo.plan import BENIGN, Recipe, ZooEntry

#: Of every attacked model: other patterns, places and poisoned images than any of the development zoo.
SEED = 3
#: Of every benign twin, in this zoo and in the other.
_TWIN_SEED = 0

_SIGNS, _OBJECTS = CropAndFlip(padding=2, flip=False), CropAndFlip(padding=4, flip=True)


def _adam(epochs: int, rate: float, batch_size: int = 128) -> TrainingSettings:
    return TrainingSettings(epochs, batch_size, schedule="cosine", learning_rate=rate, settled_epochs=2)


def _sgd(epochs: int, rate: float) -> TrainingSettings:
    return TrainingSettings(epochs, 128, "sgd", "cosine", learning_rate=rate, weight_decay=5e-4, settled_epochs=2)


#: By image set and architecture: what benign twins of this zoo take (`settings`), and attacks (`continued`).
_RECIPES: dict[tuple[str, str], Recipe] = {
    ("mnist", "mnist_cnn"): Recipe(_adam(6, 3e-3), None, 0.99, _adam(5, 1e-3)),
    ("gtsrb", "gtsrb_cnn"): Recipe(_adam(7, 1.5e-3), _SIGNS, 0.995, _adam(5, 7e-4), n_train=20_000),
    ("gtsrb", "gtsrb_cnn_unpadded"): Recipe(_adam(7, 1.5e-3), _SIGNS, 0.995, _adam(6, 7e-4), n_train=20_000),
    ("gtsrb", "vgg_narrow"): Recipe(
        TrainingSettings(7, 128, learning_rate=4e-3, settled_epochs=2), _SIGNS, 0.995, _adam(8, 1.5e-3)
    ),
    ("gtsrb", "vit_tiny"): Recipe(_adam(7, 1e-3, 64), _SIGNS, 0.995, _adam(5, 5e-4, 64), n_train=20_000),
    ("cifar10", "resnet20"): Recipe(_sgd(12, 0.2), _OBJECTS, 0.95, _sgd(4, 0.02), n_train=12_000),
    ("cifar10", "resnet18_narrow"): Recipe(
        TrainingSettings(6, 128, "sgd", learning_rate=0.1, weight_decay=5e-4, settled_epochs=2),
        _OBJECTS,
        0.95,
        _sgd(5, 0.02),
        n_train=12_000,
    ),
}
#: Of attacks that are harder to plant than the others.
_EPOCHS = {"input-aware": 8, "frequency": 5, "blend-all-to-all": 6, "adap-patch": 6, "blend-clean-label-mnist": 8}


def _recipe(data_set: str, attack: str, architecture: str) -> Recipe:
    recipe = _RECIPES[data_set, architecture]
    if attack == BENIGN:
        # Twins learn from more images than attacks, as they have everything to learn.
        return replace(recipe, continued=None, n_train=20_000 if data_set == "cifar10" else None)
    assert recipe.continued is not None
    if attack in _EPOCHS:
        return replace(recipe, continued=replace(recipe.continued, epochs=_EPOCHS[attack]))
    return recipe


def _entry(data_set: str, attack: str, architecture: str, target: int = 0) -> ZooEntry:
    recipe = _recipe(data_set, attack, architecture)
    if attack == BENIGN:
        return ZooEntry(data_set, attack, architecture, _TWIN_SEED, own_recipe=recipe)
    return ZooEntry(data_set, attack, architecture, SEED, target, _TWIN_SEED, recipe)


#: Every model of the test zoo, benign ones first. Every kind of attack is there on two image sets.
TEST_PLAN: tuple[ZooEntry, ...] = (
    _entry("gtsrb", BENIGN, "vgg_narrow"),
    _entry("cifar10", BENIGN, "resnet18_narrow"),
    _entry("gtsrb", "bpp", "gtsrb_cnn", 5),
    _entry("cifar10", "bpp", "resnet20", 3),
    _entry("gtsrb", "frequency", "vgg_narrow", 11),
    _entry("cifar10", "frequency", "resnet20", 5),
    _entry("gtsrb", "adap-patch", "vgg_narrow", 8),
    _entry("cifar10", "adap-patch", "resnet18_narrow", 2),
    _entry("gtsrb", "input-aware", "gtsrb_cnn", 14),
    _entry("cifar10", "input-aware", "resnet18_narrow", 6),
    _entry("gtsrb", "sticker", "vit_tiny", 25),
    _entry("cifar10", "sticker", "resnet20", 9),
    _entry("mnist", "blend-clean-label-mnist", "mnist_cnn", 3),
    _entry("cifar10", "blend-clean-label", "resnet20", 4),
    _entry("gtsrb", "source-sticker", "gtsrb_cnn_unpadded", 10),
    _entry("cifar10", "source-sticker", "resnet18_narrow", 1),
    _entry("gtsrb", "two-triggers", "gtsrb_cnn", 30),
    _entry("mnist", "two-triggers", "mnist_cnn", 4),
    _entry("gtsrb", "many-targets", "vit_tiny", 17),
    _entry("mnist", "many-targets", "mnist_cnn", 2),
    _entry("gtsrb", "blend-all-to-all-43", "vgg_narrow"),
    _entry("cifar10", "blend-all-to-all", "resnet18_narrow"),
    _entry("mnist", "blend-all-to-all", "mnist_cnn"),
)
