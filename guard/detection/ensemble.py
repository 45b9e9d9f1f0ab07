"""The detectors of one guard, side by side: made from settings, fitted together, scored in one go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from guard.config import GuardConfig
from guard.detection.detectors import DETECTORS, KINDS, AnytimeDisagreement, BackupDisagreement, Demarcation, Detector
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.errors import BundleError, DataError
from guard.types import BACKUP, FEATURES, Activations, AnyArray, BoolArray, Float32Array, Float64Array, IntArray


@dataclass(frozen=True, slots=True)
class Member:
    """One detector, with the name under which its scores are reported and its kind in `KINDS`."""

    name: str
    kind: str
    detector: Detector | Demarcation


class Ensemble:
    """A fixed list of detectors that see the same activations."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = tuple(members)
        self.names = tuple(member.name for member in self.members)

    @classmethod
    def for_mode(cls, config: GuardConfig, depths: Sequence[str], *, demarcation: bool = False) -> Self:
        """Make the unfitted detectors of a mode.

        In `calibrated` mode every registered detector joins; one with a `depth` setting joins once per depth. A setting
        that a detector shares by name with `GuardConfig` takes its value from there. With `demarcation` one more looks
        for the anomalies that `fit` is given, and where the depths hold a backup's logits, one compares these with the
        suspect's answer. If the settings ask for it, heads at all depths that were trained together join. `paper` mode
        has no place for any of these.
        """
        if config.mode == "paper":
            novelty = PerClassLof(
                n_neighbors=config.n_neighbors,
                summary=config.norm_orders,
                l0_tolerance=config.l0_tolerance,
                compare="any",
            )
            head = HeadDisagreement(feature_noise_std=config.feature_noise_std, seed=config.seed)
            return cls([Member("lof:norms", "lof", novelty), Member(f"disagreement:{FEATURES}", "disagreement", head)])
        members = []
        for kind, detector_class in DETECTORS.items():
            names = _setting_names(detector_class)
            settings = {name: getattr(config, name) for name in names if name in GuardConfig.model_fields}
            layers = [depth for depth in depths if depth != BACKUP]
            for depth in (FEATURES, *layers) if "depth" in names else ("",):
                chosen = {**settings, "depth": depth} if depth else settings
                members.append(Member(f"{kind}:{depth}" if depth else kind, kind, detector_class(**chosen)))
        if demarcation:
            members.append(Member(f"demarcation:{FEATURES}", "demarcation", Demarcation()))
        if config.anytime:
            reads = (*(depth for depth in depths if depth != BACKUP), FEATURES)
            members.append(Member("anytime", "anytime", AnytimeDisagreement(reads, config.seed)))
        if BACKUP in depths:
            members.append(Member("backup", "backup", BackupDisagreement()))
        return cls(members)

    def fit(
        self,
        activations: Activations,
        labels: IntArray,
        for_heads: BoolArray | None = None,
        for_novelty: BoolArray | None = None,
        anomalies: Activations | None = None,
    ) -> Self:
        """Fit every detector on what it may see.

        Parameters
        ----------
        activations : Activations of n inputs
        labels : ndarray of shape (n,), int
            True labels.
        for_heads, for_novelty : ndarray of shape (n,), bool, optional
            Rows for detectors that learn from poisoned inputs, and rows for the others; None = all.
        anomalies : Activations, optional
            Inputs without a true label that a demarcation tells from the rows that all others learn from; needed if
            there is one.

        Raises
        ------
        DataError
            If there is a demarcation and no anomaly.
        """
        everything = np.ones(len(labels), dtype=bool)
        heads = everything if for_heads is None else for_heads
        novelty = everything if for_novelty is None else for_novelty
        for member in self.members:
            detector = member.detector
            if isinstance(detector, Demarcation):
                detector.fit(activations[heads & novelty], anomalies if anomalies is not None else activations[:0])
            else:
                rows = heads if detector.learns_from_poisoned else novelty
                detector.fit(activations[rows], labels[rows])
        return self

    def up_to(self, depths: Sequence[str]) -> Self:
        """Return the detectors that need no more than the first few depths; they are shared."""
        members = []
        for member in self.members:
            detector = member.detector
            if isinstance(detector, AnytimeDisagreement):
                members.append(Member(member.name, member.kind, detector.up_to(len(depths))))
            elif getattr(detector, "depth", FEATURES) in depths and not isinstance(detector, BackupDisagreement):
                members.append(member)
        return type(self)(members)

    def score(self, activations: Activations) -> Float64Array:
        """Return the raw scores, shape (n, n_detectors), columns in the order of `names`."""
        raw = np.empty((len(activations), len(self.members)))
        for column, member in enumerate(self.members):
            raw[:, column] = member.detector.score(activations)
        return raw

    def replacement_logits(self, activations: Activations) -> Float32Array:
        """Return the logits of the replacement head at the split layer, shape (n, n_classes)."""
        for member in self.members:
            if isinstance(member.detector, HeadDisagreement) and member.detector.depth == FEATURES:
                return member.detector.logits(activations)
        raise DataError("this guard holds no replacement head; action 'relabel' needs one.")

    def describe(self) -> list[dict[str, Any]]:
        """Return name, kind and settings of every detector, ready for JSON."""
        return [
            {
                "name": member.name,
                "kind": member.kind,
                "settings": {name: getattr(member.detector, name) for name in _setting_names(type(member.detector))},
            }
            for member in self.members
        ]

    def arrays(self) -> dict[str, AnyArray]:
        """Return everything that was learned, keyed by position and name."""
        return {
            f"{index}.{name}": array
            for index, member in enumerate(self.members)
            for name, array in member.detector.state().items()
        }

    @classmethod
    def restore(cls, description: Sequence[Mapping[str, Any]], arrays: Mapping[str, AnyArray]) -> Self:
        """Return a fitted ensemble from what `describe` and `arrays` returned."""
        members = []
        for index, entry in enumerate(description):
            kind = entry["kind"]
            if kind not in KINDS:
                raise BundleError(f"unknown detector {kind!r}: known are {sorted(KINDS)}. Upgrade backdoor-guard.")
            prefix = f"{index}."
            state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            members.append(Member(entry["name"], kind, KINDS[kind].from_state(state, **_untupled(entry["settings"]))))
        return cls(members)


def _setting_names(detector_class: type[Detector] | type[Demarcation]) -> list[str]:
    return [field.name for field in dataclasses.fields(detector_class) if field.init]  # type: ignore[arg-type]


def _untupled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON does to tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
