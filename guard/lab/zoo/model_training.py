"""Train one model of the zoo, store it in half precision, and measure what was stored."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from guard.errors import DataError
from guard.files import READABLE_FILE, replace_file
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.network_training import EpochReport, Goal, Redraw, TrainingSettings, train_classifier
from guard.lab.attacks.poisoning import Poisoned
from guard.lab.zoo.card import ZooCard, required_success
from guard.lab.zoo.collection import Zoo, build_network
from guard.lab.zoo.measuring import Measured, measure
from guard.lab.zoo.plan import ZooEntry
from guard.lab.zoo.splits import LabelledImages, ZooSplit, load_split
from guard.suspect.weights import load_state_dict
from guard.types import Float32Array

_MONITORED = 1000  # triggered images per backdoor that say when training has settled


def train_entry(
    entry: ZooEntry,
    zoo: Zoo,
    *,
    work_dir: Path,
    data_dir: Path | None = None,
    device: str = "cpu",
    progress: Callable[[EpochReport], None] | None = None,
    twins: Zoo | None = None,
    command: str = "guard zoo train",
) -> ZooCard:
    """Train one model, write its weights and its card into the zoo, and return the card.

    Parameters
    ----------
    entry : ZooEntry
    zoo : Zoo
        It, or `twins`, must hold the benign twin of a backdoored model already.
    work_dir : path
        Folder for the checkpoint; an interrupted training goes on from there. The checkpoint is deleted when done.
    data_dir : path, optional
        As in `guard.data.datasets.load_dataset`.
    device : str
        `"cpu"` or `"cuda"`.
    progress : callable, optional
        Called after every epoch.
    twins : Zoo, optional
        Where a benign twin is looked for that `zoo` does not hold.
    command : str
        What the card says that the model was trained with; the name of the model follows.

    Raises
    ------
    ZooError
        If the benign twin is missing.
    DataError, DatasetError
        If the images are missing, or the attack cannot be planted in them.
    """
    split = load_split(entry.data_set, data_dir)
    recipe, settings, started_from = entry.recipe, entry.recipe.settings, None
    home = zoo if twins is None or entry.twin is None or zoo.has(entry.twin) else twins
    twin = home.card(entry.twin) if entry.twin is not None else None
    network = build_network(entry.architecture, *_shape(split), seed=entry.seed)
    if twin is not None and recipe.continued is not None:
        settings, started_from = recipe.continued, twin.name
        network.load_state_dict(home.load(twin.name).state_dict())
    network.to(device)
    attack = entry.attack_on(network)
    poisoned = _training_set(attack, _part_of(split.train, recipe.n_train, entry.seed), entry.seed, recipe.how)
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint = work_dir / f"{entry.name}.checkpoint"
    report = train_classifier(
        network,
        poisoned.images,
        poisoned.labels,
        settings,
        seed=entry.seed,
        n_threads=1,
        goals=_goals(attack, split, recipe.clean_goal),
        redraw=_redraw(poisoned, recipe.augmentation),
        checkpoint=checkpoint,
        progress=progress,
    )
    weights = zoo.weights_path(entry.name)
    weights_sha256 = _store(network.cpu(), weights)
    stored = build_network(entry.architecture, *_shape(split))
    stored.load_state_dict(load_state_dict(weights))
    card = _card(
        entry,
        split,
        attack,
        twin,
        measure(stored, attack, split.test),
        settings,
        epochs_run=report.epochs_run,
        poisoned_images=int(poisoned.is_poisoned.sum()) if isinstance(poisoned, Poisoned) else 0,
        cover_images=int(poisoned.is_cover.sum()) if isinstance(poisoned, Poisoned) else 0,
        training_command=f"{command} {entry.name}",
        training_seconds=round(report.seconds, 1),
        started_from=started_from,
        weights_sha256=weights_sha256,
    )
    card.write(zoo.card_path(entry.name))
    checkpoint.unlink(missing_ok=True)
    return card


def _shape(split: ZooSplit) -> tuple[int, int]:
    """Return how many classes and channels the networks of a split have."""
    return len(split.class_names), split.train.images.shape[1]


def _card(
    entry: ZooEntry,
    split: ZooSplit,
    attack: Attack | None,
    twin: ZooCard | None,
    measured: Measured,
    settings: TrainingSettings,
    **training: Any,
) -> ZooCard:
    """Return the card of a model; `training` are the fields of how it was trained."""
    recipe, (n_classes, channels) = entry.recipe, _shape(split)
    return ZooCard(
        name=entry.name,
        data_set=entry.data_set,
        split=split.description,
        split_digest=split.digest,
        attack=entry.attack_name,
        parameters=attack.describe() if attack is not None else {},
        target_label=attack.target_label if attack is not None else None,
        seed=entry.seed,
        architecture=entry.architecture,
        n_classes=n_classes,
        channels=channels,
        clean_accuracy=round(measured.clean_accuracy, 6),
        benign_clean_accuracy=twin.clean_accuracy if twin is not None else None,
        benign_twin=twin.name if twin is not None else None,
        attack_success=round(min(measured.attack_success), 6) if measured.attack_success else None,
        attack_success_per_trigger=tuple(round(rate, 6) for rate in measured.attack_success),
        control_success=tuple(round(rate, 6) for rate in measured.control_success),
        settings={
            **asdict(settings),
            "augmentation": asdict(recipe.augmentation) if recipe.augmentation is not None else None,
            "clean_goal": recipe.clean_goal,
            "how": recipe.how,
            **({"n_train": recipe.n_train} if recipe.n_train is not None else {}),
        },
        versions={"torch": torch.__version__, "numpy": np.__version__, "python": platform.python_version()},
        **training,
    )


def _part_of(train: LabelledImages, n_train: int | None, seed: int) -> LabelledImages:
    if n_train is None:
        return train
    if not 1 <= n_train <= len(train):
        raise DataError(f"n_train must be in [1, {len(train)}], the number of training images, got {n_train}.")
    rows = np.sort(np.random.default_rng([seed, 1]).permutation(len(train))[:n_train])
    return LabelledImages(train.images[rows], train.labels[rows])


def _training_set(
    attack: Attack | None, train: LabelledImages, seed: int, how: Literal["add", "replace"]
) -> Poisoned | LabelledImages:
    if attack is None:
        return train
    return attack.poison(train.images, train.labels, np.random.default_rng(seed), how=how)


def _redraw(training_set: Poisoned | LabelledImages, augmentation: CropAndFlip | None) -> Redraw | None:
    if isinstance(training_set, Poisoned):
        if augmentation is None and not training_set.is_perturbed:
            return None
        return lambda rng: training_set.redrawn(augmentation or _as_they_are, rng)
    if augmentation is None:
        return None
    return lambda rng: augmentation(training_set.images, rng)


def _as_they_are(images: Float32Array, rng: np.random.Generator) -> Float32Array:
    return images


def _goals(attack: Attack | None, split: ZooSplit, clean_goal: float) -> dict[str, Goal]:
    goals = {"clean accuracy": Goal(split.monitor.images, split.monitor.labels, clean_goal)}
    if attack is not None:
        bar = min(1.0, required_success(attack.name) + 0.03)  # some room, as the test images are others
        for number, triggered in enumerate(attack.test_sets(split.monitor.images, split.monitor.labels), 1):
            rows = slice(0, _MONITORED)
            goals[f"attack success {number}"] = Goal(triggered.images[rows], triggered.labels[rows], bar)
    return goals


def _store(network: nn.Module, path: Path) -> str:
    """Write the weights, floating-point ones in half precision, and return the SHA-256 of the file."""
    state = {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in network.state_dict().items()
    }
    data = save_safetensors(state)
    replace_file(path, data, READABLE_FILE)
    return hashlib.sha256(data).hexdigest()
