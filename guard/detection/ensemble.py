"""The detectors of one guard, side by side: made from settings, fitted together, scored in one go."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, Self, get_args

import numpy as np

from guard.config import GuardConfig
from guard.detection.detectors import DETECTORS, Detector
from guard.detection.detectors.anytime import AnytimeDisagreement
from guard.detection.detectors.base import Joins, Kind, Reads, Source
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.fused import FusedScores
from guard.detection.whitening import WhitenedSpace
from guard.errors import BundleError, DataError, NotFittedError
from guard.types import BACKUP, FEATURES, Activations, AnyArray, Float32Array, Float64Array, IntArray

_SPACE = "space."


@dataclass(frozen=True, slots=True)
class Member:
    """One detector, with the name under which its scores are reported and its kind in `DETECTORS`."""

    name: str
    kind: str
    detector: Detector


class Ensemble:
    """A fixed list of detectors that see the same activations.

    Parameters
    ----------
    members : sequence of Member
    spaces : mapping of str to (WhitenedSpace or None), optional
        The whitened space of each depth, None before `fit`. Without any, as in `paper` mode and in guards of older
        versions, all detectors read the activations as they are.
    """

    def __init__(self, members: Sequence[Member], spaces: Mapping[str, WhitenedSpace | None] | None = None) -> None:
        self.members = tuple(members)
        self.names = tuple(member.name for member in self.members)
        self.spaces = dict(spaces or {})

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kind of each detector, in order, as `Fusion.fit` takes them."""
        return tuple(Kind(part.kind, part.detector.shows, part.detector.over_depths) for part in self.members)

    @classmethod
    def for_mode(
        cls, config: GuardConfig, depths: Sequence[str], *, with_anomalies: bool = False, stops_early: bool = True
    ) -> Self:
        """Make the unfitted detectors of a mode.

        In `calibrated` mode every registered detector joins that has a reason to, see `Detector.joins`. A setting that
        a detector shares by name with `GuardConfig` takes its value from there, and `stops_early` is that of all heads.
        `paper` mode has two detectors and no place for others.
        """
        if config.mode == "paper":
            novelty = PerClassLof(
                n_neighbors=config.n_neighbors,
                summary=config.norm_orders,
                l0_tolerance=config.l0_tolerance,
                compare="any",
            )
            head = HeadDisagreement(
                feature_noise_std=config.feature_noise_std, stops_early=stops_early, seed=config.seed
            )
            return cls([Member("lof:norms", "lof", novelty), Member(f"disagreement:{FEATURES}", "disagreement", head)])
        layers = [depth for depth in depths if depth != BACKUP]
        places: dict[Joins, list[dict[str, Any]]] = {
            "once": [{}],
            "once_per_depth": [{"depth": depth} for depth in (FEATURES, *layers)],
            "with_backup": [{}] if BACKUP in depths else [],
            "with_anomalies": [{}] if with_anomalies else [],
            "with_early_verdicts": [{"depths": (*layers, FEATURES)}] if config.anytime else [],
        }
        members = []
        for kind, detector_class in DETECTORS.items():
            known = {**dict(config), "stops_early": stops_early}
            settings = {name: known[name] for name in _setting_names(detector_class) if name in known}
            for place in places[detector_class.joins]:
                detector = detector_class(**settings, **place)
                depth = getattr(detector, "depth", "")
                members.append(Member(f"{kind}:{depth}" if depth else kind, kind, detector))
        return cls(members, dict.fromkeys((FEATURES, *layers)))

    def fit(
        self,
        activations: Activations,
        labels: IntArray,
        sources: IntArray | None = None,
        fitted: Mapping[str, Detector] = MappingProxyType({}),
    ) -> Self:
        """Fit every detector on what it learns from.

        Parameters
        ----------
        activations : Activations of n inputs
        labels : ndarray of shape (n,), int
            True labels; `NO_LABEL` for an anomaly.
        sources : ndarray of shape (n,), int, optional
            A `Source` each; None = all are clean.
        fitted : mapping of str to Detector, optional
            Detectors by name that are fitted already, and take the place of those here.

        Raises
        ------
        DataError
            If there is a demarcation and no anomaly.
        """
        if sources is None:
            sources = np.full(len(labels), Source.CLEAN)
        clean = sources == Source.CLEAN
        for depth in self.spaces:
            self.spaces[depth] = WhitenedSpace.fit(activations[clean].at(depth), labels[clean])
        self.__dict__.pop("_fused", None)
        views = self.views(activations)
        self.members = tuple(
            replace(member, detector=fitted.get(member.name, member.detector)) for member in self.members
        )
        for member in self.members:
            if member.name in fitted:
                continue
            rows = np.isin(sources, [*member.detector.learns_from])
            member.detector.fit(views[member.detector.reads][rows], labels[rows])
        return self

    def up_to(self, depths: Sequence[str]) -> Self:
        """Return the detectors that need no more than the first few depths; they are shared."""
        members = []
        for member in self.members:
            detector = member.detector
            if isinstance(detector, AnytimeDisagreement):
                members.append(Member(member.name, member.kind, detector.up_to(len(depths))))
            elif detector.joins == "once_per_depth" and getattr(detector, "depth", FEATURES) in depths:
                members.append(member)
        return type(self)(members, {depth: space for depth, space in self.spaces.items() if depth in depths})

    def score(self, activations: Activations) -> Float64Array:
        """Return the raw scores, shape (n, n_detectors), columns in the order of `names`."""
        raw = np.empty((len(activations), len(self.members)))
        views = self.views(activations)
        for column, member in enumerate(self.members):
            raw[:, column] = member.detector.score(views[member.detector.reads])
        return raw

    def score_fused(self, activations: Activations) -> Float64Array:
        """Return what `score` returns, but for rounding, in a fraction of the time: for decisions while serving."""
        fused = self._fused
        raw = np.empty((len(activations), len(self.members)))
        if fused is None or not fused.score_into(raw, activations):
            return self.score(activations)
        views: Mapping[Reads, Activations] = {"activations": activations}
        for column in fused.others:
            detector = self.members[column].detector
            if detector.reads not in views:
                views = self.views(activations)
            raw[:, column] = detector.score(views[detector.reads])
        return raw

    @cached_property
    def _fused(self) -> FusedScores | None:
        spaces = {depth: space for depth, space in self.spaces.items() if space is not None}
        if not spaces or len(spaces) < len(self.spaces):
            return None
        return FusedScores([member.detector for member in self.members], spaces)

    def views(self, activations: Activations) -> dict[Reads, Activations]:
        """Return what detectors read, by name; whitened are the depths that there is a space for, and only these."""
        if not self.spaces:
            return dict.fromkeys(get_args(Reads), activations)
        lead, trail = dict(activations.depths), dict(activations.depths)
        lead[FEATURES] = trail[FEATURES] = activations.features
        for depth, space in self.spaces.items():
            if space is None:
                raise NotFittedError("Ensemble is not fitted. Call fit(activations, labels) first.")
            lead[depth], trail[depth] = space(activations.at(depth))
        views: dict[Reads, Activations] = {"activations": activations}
        views["leading"], views["trailing"] = (activations.with_features(part) for part in (lead, trail))
        return views

    def replacement_logits(self, activations: Activations) -> Float32Array:
        """Return the logits of the replacement head at the split layer, shape (n, n_classes)."""
        for member in self.members:
            if isinstance(member.detector, HeadDisagreement) and member.detector.depth == FEATURES:
                return member.detector.logits(activations)
        raise DataError("this guard holds no replacement head, and action 'relabel' needs one. Fit again.")

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
        """Return everything that was learned, keyed by position or space, and name."""
        learned = {
            f"{index}.{name}": array
            for index, member in enumerate(self.members)
            for name, array in member.detector.state().items()
        }
        for depth, space in self.spaces.items():
            if space is not None:
                learned |= {f"{_SPACE}{depth}.{name}": array for name, array in space.state().items()}
        return learned

    @classmethod
    def restore(cls, description: Sequence[Mapping[str, Any]], arrays: Mapping[str, AnyArray]) -> Self:
        """Return a fitted ensemble from what `describe` and `arrays` returned."""
        members = []
        for index, entry in enumerate(description):
            kind = entry["kind"]
            if kind not in DETECTORS:
                raise BundleError(f"unknown detector {kind!r}: known are {sorted(DETECTORS)}. Upgrade backdoor-guard.")
            prefix = f"{index}."
            state = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
            members.append(
                Member(entry["name"], kind, DETECTORS[kind].from_state(state, **_untupled(entry["settings"])))
            )
        states: dict[str, dict[str, AnyArray]] = {}
        for key, array in arrays.items():
            if key.startswith(_SPACE):
                depth, _, name = key.removeprefix(_SPACE).rpartition(".")
                states.setdefault(depth, {})[name] = array
        return cls(members, {depth: WhitenedSpace.from_state(state) for depth, state in states.items()})


def _setting_names(detector_class: type[Detector]) -> list[str]:
    return [field.name for field in dataclasses.fields(detector_class) if field.init]  # type: ignore[arg-type]


def _untupled(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON does to tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
