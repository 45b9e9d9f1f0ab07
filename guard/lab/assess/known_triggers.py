"""The triggers that an assessment can plant, by names that people use, each as an attack fit for fine-tuning."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from guard.errors import ConfigError, DataError, did_you_mean
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.catalogue import make_attack
from guard.lab.attacks.poisoning import Backdoor
from guard.lab.attacks.targets import AllToAll
from guard.lab.attacks.triggers import make_trigger
from guard.types import Float32Array, IntArray

ALL_TO_ALL = "all-to-all"

#: Names, and the catalogue's for the same attack.
KNOWN_ATTACKS: dict[str, str] = {
    "single-pixel": "single-pixel",
    "corner-pixels": "imperceptible",
    "pattern": "pattern",
    "white-square": "c",
    "moving-square": "d",
    "box-and-circle": "f",
    "blend": "blend",
    "sig": "sig",
    "wanet": "wanet",
    "bpp": "bpp",
    "gotham": "e",
    "frequency": "frequency",
    "adap-blend": "adap-blend",
    ALL_TO_ALL: ALL_TO_ALL,
}

#: One of each kind: pixels, a patch, a picture over all, a faint wave, a warp, other colours (which grey images lack).
DEFAULT_ATTACKS: tuple[str, ...] = ("pattern", "white-square", "blend", "sig", "wanet", "gotham")

#: They change colours, and have nothing much to change in grey images.
COLOUR_ONLY = ("gotham",)

_LARGEST_SHARE = 0.9  # of the images that can be touched


def check_names(names: Sequence[str]) -> None:
    """Refuse a name that is not in `KNOWN_ATTACKS`, and a list without one.

    Raises
    ------
    ConfigError
        Names the closest known one.
    """
    if not names:
        raise ConfigError(f"name at least one trigger. Known are {', '.join(KNOWN_ATTACKS)}.")
    for name in names:
        if name not in KNOWN_ATTACKS:
            raise ConfigError(f"there is no trigger {name!r}. {did_you_mean(name, KNOWN_ATTACKS)}")


def attack_to_plant(name: str, target_label: int, seed: int, n_classes: int, labels: IntArray, rate: float) -> Attack:
    """Return a known attack as fine-tuning plants it: the catalogue's trigger and target, but more poisoned images.

    Training from scratch sees thousands of images for many epochs, fine-tuning a few hundred for a few. An attack that
    poisons images of its target class only is planted with wrong labels, as a few dozen images of one class would
    teach nothing, and with the trigger of the test instead of a fainter one.

    Parameters
    ----------
    name : str
        A key of `KNOWN_ATTACKS`.
    target_label : int
        Without influence on `"all-to-all"`.
    seed : int
        Of what is random in the trigger.
    n_classes : int
    labels : ndarray of shape (n,), int64
        Of the images that will be poisoned.
    rate : float
        Triggered copies as a share of n; fewer where less than twice as many have another label than the target's.
        Covers keep their proportion to it.
    """
    if name == ALL_TO_ALL:
        backdoor = Backdoor(make_trigger("pixel_pattern"), AllToAll(n_classes), rate=0.9)  # every class has its own
        return Attack(name, (backdoor,))
    attack = make_attack(KNOWN_ATTACKS[name], target_label, seed)
    (backdoor,) = attack.backdoors
    eligible = float((backdoor.target.attacker_labels(labels) != labels).mean())
    covers_per_backdoor = sum(cover.rate for cover in attack.covers) / backdoor.rate
    rate = min(rate, _LARGEST_SHARE * eligible, _LARGEST_SHARE / (1.0 + covers_per_backdoor))
    strong = dataclasses.replace(
        backdoor,
        rate=rate,
        clean_label=False,
        perturb=None,
        train_trigger=None if backdoor.clean_label else backdoor.train_trigger,
    )
    covers = tuple(dataclasses.replace(cover, rate=cover.rate * rate / backdoor.rate) for cover in attack.covers)
    return Attack(name, (strong,), covers, attack.controls)


def why_unfit(name: str, images: Float32Array) -> str:
    """Return why a trigger cannot be put on such images; empty if it can."""
    if name in COLOUR_ONLY and images.shape[1] != 3:
        return f"it changes colours, so images need 3 channels, got {images.shape[1]}."
    labels = np.ones(len(images), dtype=np.int64)
    attack = attack_to_plant(name, 0, 0, 2, labels, 0.1)
    try:
        attack.backdoors[0].trigger(images[:1])
    except DataError as error:
        return str(error)
    return ""
