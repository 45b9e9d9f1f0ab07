"""The zoo on disk: cards and weights in one folder, found by name, verified by measuring again."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from guard.errors import ZooError
from guard.lab.attacks.networks import NETWORKS
from guard.lab.zoo.card import ZooCard
from guard.lab.zoo.measuring import measure
from guard.lab.zoo.splits import load_split
from guard.resources import checkout_root
from guard.suspect.weights import load_state_dict

#: Largest difference between a card's rate and the same rate measured again.
TOLERANCE = 0.002


def default_zoo_dir(name: str = "zoo") -> Path:
    """Return the folder of a zoo: benchmarks/`name` in a checkout, else `name` below the working folder."""
    root = checkout_root()
    return root / "benchmarks" / name if root is not None else Path(name)


def build_network(architecture: str, n_classes: int, channels: int, seed: int | None = None) -> nn.Module:
    """Return an untrained network in eval mode.

    Raises
    ------
    ZooError
        If there is no such architecture.
    """
    if architecture not in NETWORKS:
        raise ZooError(f"there is no architecture {architecture!r}: known are {', '.join(NETWORKS)}.")
    network: nn.Module = NETWORKS[architecture](n_classes, channels=channels, seed=seed)
    return network.eval()


@dataclass(frozen=True, slots=True)
class Verification:
    """What measuring a model again found.

    Attributes
    ----------
    card : ZooCard
    clean_accuracy, attack_success : float, float or None
        Measured now.
    problems : tuple of str
        Where card, weights and measurement do not agree, or the attack is not a real one; empty if all is well.
    """

    card: ZooCard
    clean_accuracy: float
    attack_success: float | None
    problems: tuple[str, ...]


class Zoo:
    """A folder of models: `<name>.safetensors` with weights in half precision, `<name>.json` with the card.

    Parameters
    ----------
    folder : path
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def card_path(self, name: str) -> Path:
        """Return where a card is or belongs."""
        return self.folder / f"{name}.json"

    def weights_path(self, name: str) -> Path:
        """Return where weights are or belong."""
        return self.folder / f"{name}.safetensors"

    def has(self, name: str) -> bool:
        """True if both card and weights are there."""
        return self.card_path(name).is_file() and self.weights_path(name).is_file()

    def cards(self) -> list[ZooCard]:
        """Return all cards, by name."""
        return [ZooCard.read(path) for path in sorted(self.folder.glob("*.json"))]

    def card(self, name: str) -> ZooCard:
        """Return one card; ZooError if there is none."""
        return ZooCard.read(self.card_path(name))

    def load(self, name: str) -> nn.Module:
        """Return a model with its weights, float32, in eval mode.

        Raises
        ------
        ZooError
            If card or weights are missing or do not fit.
        """
        card = self.card(name)
        path = self.weights_path(name)
        if not path.is_file():
            raise ZooError(f"{path} is missing. `guard zoo train {name}` makes it again.")
        network = build_network(card.architecture, card.n_classes, card.channels)
        try:
            network.load_state_dict(load_state_dict(path))
        except RuntimeError as error:
            raise ZooError(f"{path} does not fit {card.architecture}: {error}") from error
        return network

    def verify(self, name: str, data_dir: Path | None = None) -> Verification:
        """Measure a model again from its weights, and compare with its card and with the bar for a real attack."""
        card = self.card(name)
        network = self.load(name)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half of the time on CPU
        split = load_split(card.data_set, data_dir)
        measured = measure(network, None if card.is_benign else card.restore_attack(), split.test)
        success = min(measured.attack_success) if measured.attack_success else None
        problems = list(card.shortcomings())
        if hashlib.sha256(self.weights_path(name).read_bytes()).hexdigest() != card.weights_sha256:
            problems.append("the weights are not those of the card")
        if split.digest != card.split_digest:
            problems.append("the images are not those of the card")
        if abs(measured.clean_accuracy - card.clean_accuracy) > TOLERANCE:
            problems.append(f"clean accuracy is {measured.clean_accuracy:.4f}, the card says {card.clean_accuracy:.4f}")
        if (success is None) != (card.attack_success is None) or (
            success is not None and card.attack_success is not None and abs(success - card.attack_success) > TOLERANCE
        ):
            problems.append(f"attack success is {success}, the card says {card.attack_success}")
        return Verification(card, measured.clean_accuracy, success, tuple(problems))
