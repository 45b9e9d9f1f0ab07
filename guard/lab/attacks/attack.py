"""A whole attack as one value: what is planted, what covers it up, what must not set it off; to JSON and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np

from guard.errors import DataError
from guard.lab.attacks.decoys import Decoys
from guard.lab.attacks.perturbation import PgdPerturbation
from guard.lab.attacks.poisoning import Backdoor, Cover, Perturb, Poisoned, poison, poisoned_test_set
from guard.lab.attacks.targets import AllToAll, SingleTarget, SourceSpecific, Target
from guard.lab.attacks.triggers import NamedTrigger, Trigger, make_trigger
from guard.types import Float32Array, IntArray

_BACKDOOR_KEYS = ("trigger", "target", "rate", "train_trigger", "clean_label", "perturbed")
_COVER_KEYS = ("trigger", "rate", "classes")
_TARGET_KEYS = {"single": ("label",), "all_to_all": ("n_classes",), "source_specific": ("label", "sources")}


@dataclass(frozen=True, slots=True)
class Attack:
    """Everything about an attack but the network, the data and the seed.

    Attributes
    ----------
    name : str
        Short name, as tables print it.
    backdoors : tuple of Backdoor
        At least one.
    covers : tuple of Cover
    controls : tuple of callable
        Triggers that must *not* work: the parts of one that needs all of them.
    decoys : Decoys or None
        Clean images that are taught with a wrong label as well, against the calibration of a guard.
    """

    name: str
    backdoors: tuple[Backdoor, ...]
    covers: tuple[Cover, ...] = ()
    controls: tuple[Trigger, ...] = ()
    decoys: Decoys | None = None

    def __post_init__(self) -> None:
        if not self.backdoors:
            raise DataError(f"attack {self.name!r} plants nothing. Give at least one backdoor.")

    def poison(
        self,
        images: Float32Array,
        labels: IntArray,
        rng: np.random.Generator,
        *,
        how: Literal["add", "replace"] = "replace",
    ) -> Poisoned:
        """Poison a training set as `guard.lab.attacks.poison` does, and plant the decoys."""
        poisoned = poison(images, labels, self.backdoors, rng, covers=self.covers, how=how)
        return poisoned if self.decoys is None else self.decoys.plant(poisoned)

    def test_sets(self, images: Float32Array, labels: IntArray) -> list[Poisoned]:
        """Return what measures the attack, one set per backdoor."""
        return [poisoned_test_set(images, labels, backdoor.trigger, backdoor.target) for backdoor in self.backdoors]

    def control_sets(self, images: Float32Array, labels: IntArray) -> list[Poisoned]:
        """Return what measures the controls, one set each: triggered, and nobody should get the attacker's label."""
        target = self.backdoors[0].target
        return [poisoned_test_set(images, labels, trigger, target) for trigger in self.controls]

    @property
    def target_label(self) -> int | str:
        """The target in a word for tables: a label, several with commas, or "y+1"."""
        targets = [backdoor.target for backdoor in self.backdoors]
        if any(not target.is_one_label for target in targets):
            return "y+1"
        labels = list(dict.fromkeys(label for target in targets for label in target.target_labels))
        return labels[0] if len(labels) == 1 else ",".join(map(str, labels))

    def describe(self) -> dict[str, Any]:
        """Return all parameters, ready for JSON; needs named triggers."""
        return {
            "backdoors": [
                {
                    "trigger": _describe_trigger(backdoor.trigger),
                    "target": _describe_target(backdoor.target),
                    "rate": backdoor.rate,
                    "train_trigger": backdoor.train_trigger and _describe_trigger(backdoor.train_trigger),
                    "clean_label": backdoor.clean_label,
                    "perturbed": _describe_perturbation(backdoor.perturb),
                }
                for backdoor in self.backdoors
            ],
            "covers": [
                {"trigger": _describe_trigger(cover.trigger), "rate": cover.rate, "classes": cover.classes}
                for cover in self.covers
            ],
            "controls": [_describe_trigger(trigger) for trigger in self.controls],
            **({"decoys": self.decoys.describe()} if self.decoys is not None else {}),
        }

    @classmethod
    def restore(cls, name: str, description: Mapping[str, Any]) -> Self:
        """Return an attack from what `describe` returned; a perturbation before the trigger is not restored.

        Raises
        ------
        DataError
            If something in the description is missing or unknown.
        """
        try:
            _known(description, ("backdoors", "covers", "controls", "decoys"))
            return cls(
                name,
                tuple(
                    Backdoor(
                        trigger=_restore_trigger(entry["trigger"]),
                        target=_restore_target(entry["target"]),
                        rate=entry["rate"],
                        train_trigger=entry["train_trigger"] and _restore_trigger(entry["train_trigger"]),
                        clean_label=entry["clean_label"],
                    )
                    for entry in (_known(written, _BACKDOOR_KEYS) for written in description["backdoors"])
                ),
                tuple(
                    Cover(
                        _restore_trigger(entry["trigger"]), entry["rate"], entry["classes"] and tuple(entry["classes"])
                    )
                    for entry in (_known(written, _COVER_KEYS) for written in description["covers"])
                ),
                tuple(_restore_trigger(entry) for entry in description["controls"]),
                Decoys(**description["decoys"]) if "decoys" in description else None,
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise DataError(f"the description of attack {name!r} lacks or misuses {error}. Write it anew.") from error


def _describe_trigger(trigger: Trigger) -> dict[str, Any]:
    if not isinstance(trigger, NamedTrigger):
        raise DataError("only named triggers can be described. Make them with make_trigger(name, ...).")
    return {"name": trigger.name, "parameters": trigger.full_parameters()}


def _describe_perturbation(perturb: Perturb | None) -> dict[str, Any] | bool:
    return perturb.describe() if isinstance(perturb, PgdPerturbation) else perturb is not None


def _known(entry: Mapping[str, Any], keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{entry!r}, which is no mapping")
    unknown = [key for key in entry if key not in keys]
    if unknown:
        raise DataError(f"unknown key {unknown[0]!r} in an attack's description: known are {', '.join(keys)}.")
    return entry


def _restore_trigger(entry: Mapping[str, Any]) -> NamedTrigger:
    _known(entry, ("name", "parameters"))
    return make_trigger(entry["name"], **entry["parameters"])


def _describe_target(target: Target) -> dict[str, Any]:
    if isinstance(target, AllToAll):
        return {"kind": "all_to_all", "n_classes": target.n_classes}
    if isinstance(target, SourceSpecific):
        return {"kind": "source_specific", "label": target.label, "sources": list(target.sources)}
    return {"kind": "single", "label": target.label}


def _restore_target(entry: Mapping[str, Any]) -> Target:
    kind = entry["kind"]
    if kind not in _TARGET_KEYS:
        raise DataError(f"unknown kind of target {kind!r}: known are {', '.join(_TARGET_KEYS)}.")
    _known(entry, ("kind", *_TARGET_KEYS[kind]))
    if kind == "single":
        return SingleTarget(entry["label"])
    if kind == "all_to_all":
        return AllToAll(entry["n_classes"])
    return SourceSpecific(entry["label"], tuple(entry["sources"]))
