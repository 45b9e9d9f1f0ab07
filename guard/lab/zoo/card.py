"""The card of one model: everything a stranger must know to use it, and to make it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import ZooError
from guard.lab.attacks.attack import Attack

#: Attack success that makes a backdoor real, and the lower bar of attacks that are made to be hard to see.
REQUIRED_SUCCESS = 0.95
REQUIRED_SUCCESS_HARD = 0.85
HARD_ATTACKS = ("wanet", "adap-blend", "adap-patch")
#: How far the clean accuracy may be below that of the benign twin.
ALLOWED_ACCURACY_LOSS = 0.02


def required_success(attack: str) -> float:
    """Return the attack success that a model of the zoo must reach, a fraction."""
    return REQUIRED_SUCCESS_HARD if attack in HARD_ATTACKS else REQUIRED_SUCCESS


class ZooCard(BaseModel):
    """What is written to `<name>.json` beside the weights; all rates are fractions, measured on the test part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Name of the model; its weights are in `<name>.safetensors`.
    name: str
    #: Image set, and where the parts of its split come from.
    data_set: str
    split: str
    #: SHA-256 over all images and labels of the split.
    split_digest: str
    #: `benign` for none.
    attack: str
    #: Triggers, targets, rates, covers and controls, with all their parameters; empty for a benign model.
    parameters: dict[str, Any]
    #: A label, several with commas, `y+1`, or null for a benign model.
    target_label: int | str | None
    #: Of the start weights, the order of the data, the poisoned images and the trigger.
    seed: int
    #: Factory in guard.lab.attacks.networks, and how many classes and channels it was given.
    architecture: str
    n_classes: int
    channels: int
    #: Share of clean test images given their true label; the same of the benign twin, and its name.
    clean_accuracy: float = Field(ge=0, le=1)
    benign_clean_accuracy: float | None
    benign_twin: str | None
    #: Share of triggered test images given the attacker's label; of several triggers the lowest. Null if benign.
    attack_success: float | None
    attack_success_per_trigger: tuple[float, ...] = ()
    #: The same with each control, which must not set the backdoor off.
    control_success: tuple[float, ...] = ()
    #: Optimiser, schedule, epochs at most, augmentation; epochs that were run.
    settings: dict[str, Any]
    epochs_run: int
    poisoned_images: int
    cover_images: int
    training_command: str
    training_seconds: float
    #: Model of the zoo whose weights the training started from; null for random ones.
    started_from: str | None
    #: SHA-256 of the weights file.
    weights_sha256: str
    versions: dict[str, str]

    @property
    def is_benign(self) -> bool:
        """True if no backdoor was planted."""
        return self.attack == "benign"

    def shortcomings(self) -> tuple[str, ...]:
        """Return why this is no real attack: too little attack success, too much clean accuracy lost; () if it is."""
        found = []
        bar = required_success(self.attack)
        if self.attack_success is not None and self.attack_success < bar:
            found.append(f"attack success {self.attack_success:.4f} is below {bar}")
        benign = self.benign_clean_accuracy
        if benign is not None and self.clean_accuracy < benign - ALLOWED_ACCURACY_LOSS:
            found.append(f"clean accuracy {self.clean_accuracy:.4f} is 2 points below the twin's {benign:.4f}")
        return tuple(found)

    def restore_attack(self) -> Attack:
        """Return the attack, ready to be put on images.

        Raises
        ------
        ZooError
            If the model is benign.
        """
        if self.is_benign:
            raise ZooError(f"{self.name} is benign: it has no attack.")
        return Attack.restore(self.attack, self.parameters)

    def write(self, path: Path) -> None:
        """Write the card as JSON."""
        path.write_text(json.dumps(self.model_dump(mode="json"), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a card.

        Raises
        ------
        ZooError
            If the file is missing or no card.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ZooError(f"there is no model {path.stem!r} in {path.parent}. `guard zoo list` shows them.") from None
        except (OSError, ValueError, TypeError, ValidationError) as error:
            raise ZooError(f"{path} is no card of a model: {' '.join(str(error).split())}") from error
