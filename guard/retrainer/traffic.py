"""The guard that serves and a candidate on decided inputs of the traffic: flagged ones and the audit sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import scipy.stats

from guard.detection.pipeline import Guard
from guard.retrainer.anomalies import resembles
from guard.retrainer.material import HeldOut, Material
from guard.retrainer.measuring import flags_of
from guard.retrainer.movement import CHANCE
from guard.retrainer.settings import RetrainerSettings
from guard.types import Activations, BoolArray, Float64Array, IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Compared:
    """The same inputs under two guards, each with the number of inputs of the traffic that it stands for.

    Attributes
    ----------
    predicted : ndarray of shape (n,), int64
        What the network answers.
    before, after : ndarray of shape (n,), bool
        Flagged by the guard that serves, and by the candidate.
    weights : ndarray of shape (n,), float64
        1 of a flagged input, 1 / probability of an audit (Horvitz-Thompson).
    """

    predicted: IntArray
    before: BoolArray
    after: BoolArray
    weights: Float64Array

    @classmethod
    def on(cls, serving: Guard, candidate: Guard, inputs: Activations, weights: Float64Array) -> Self:
        """Ask both guards, each at its own rate, about n inputs; n may be 0."""
        return cls(inputs.predicted_labels, flags_of(serving, inputs), flags_of(candidate, inputs), weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, rows: BoolArray) -> Compared:
        """Return the chosen rows."""
        return Compared(self.predicted[rows], self.before[rows], self.after[rows], self.weights[rows])

    @property
    def lost(self) -> BoolArray:
        """Which only the guard that serves flags, shape (n,)."""
        return self.before & ~self.after

    @property
    def gained(self) -> BoolArray:
        """Which only the candidate flags, shape (n,)."""
        return self.after & ~self.before

    def rate_of(self, flagged: BoolArray) -> float | None:
        """Return the share of the traffic that chosen rows stand for, a fraction (ratio estimator); None of nothing."""
        return float(self.weights[flagged].sum() / self.weights.sum()) if len(self) else None

    def chance_of_gain(self) -> float:
        """Return how likely chance alone gains as many inputs of those that only one of the two guards flags.

        If both flag the same share of the traffic, then gains and losses are as frequent in it, and how many of each
        the sample holds depends on the probabilities that it was drawn with: the number gained, of all, is binomial.
        """
        n_gained, n_lost = int(self.gained.sum()), int(self.lost.sum())
        drawn_gained = n_gained / self.weights[self.gained].sum() if n_gained else 1.0
        drawn_lost = n_lost / self.weights[self.lost].sum() if n_lost else 1.0
        return _at_least(n_gained, n_gained + n_lost, drawn_gained / (drawn_gained + drawn_lost))


class CleanTraffic(NamedTuple):
    """Inputs that people called clean and nobody learned from.

    Attributes
    ----------
    activations : Activations of n inputs
        False alarms first, then audits.
    weights : ndarray of shape (n,), float64
        How many inputs of the traffic each stands for.
    n_audits : int
    n_disputed : int
        Left out: one reviewer alone calls them clean, and they look like those that are called poisoned.
    """

    activations: Activations
    weights: Float64Array
    n_audits: int
    n_disputed: int

    @classmethod
    def of(cls, guard: Guard, material: Material, settings: RetrainerSettings) -> Self:
        """Return what is undisputed; where few inputs are called poisoned, everything is.

        Whoever calls a missed trigger clean could have every candidate refused that catches it.

        Parameters
        ----------
        guard : Guard
            Its clean reference is read.
        material : Material
        settings : RetrainerSettings
        """
        held = material.held_out
        activations = Activations.concatenate([held.not_learned, held.clean_audits])
        weights = np.concatenate([np.ones(len(held.not_learned)), held.clean_audit_weights])
        is_audit = np.arange(len(weights)) >= len(held.not_learned)
        disputed = np.zeros(len(weights), dtype=bool)
        if len(material.poisoned) >= settings.min_anomalies and len(weights):
            disputed = resembles(guard, material.poisoned, activations) & ~held.is_confirmed
        return cls(activations[~disputed], weights[~disputed], int(is_audit[~disputed].sum()), int(disputed.sum()))


@dataclass(frozen=True, slots=True, eq=False)
class Traffic:
    """Both guards on decided traffic that neither learned from.

    Attributes
    ----------
    poisoned : Compared
        Held-out poisoned inputs, flagged ones and misses.
    is_miss : ndarray of shape (n,), bool
        Which of these came as audits.
    clean : Compared
        False alarms that are not learned from, and clean audits.
    n_audits : int
        How many of the clean ones came as audits.
    n_disputed : int
        Further ones that are left out, see `CleanTraffic`.
    """

    poisoned: Compared
    is_miss: BoolArray
    clean: Compared
    n_audits: int
    n_disputed: int = 0

    @classmethod
    def of(cls, serving: Guard, candidate: Guard, held_out: HeldOut, clean: CleanTraffic) -> Self:
        """Ask both guards about everything that was decided and not learned from."""
        return cls(
            Compared.on(serving, candidate, held_out.poisoned, held_out.poisoned_weights),
            held_out.is_miss,
            Compared.on(serving, candidate, clean.activations, clean.weights),
            clean.n_audits,
            clean.n_disputed,
        )

    def has_drifted(self, requested: float, factor: float) -> bool:
        """Return whether the serving guard flags more of the clean traffic than asked for, beyond chance.

        Parameters
        ----------
        requested : float
            False-positive rate.
        factor : float
            So many times as much is no drift.
        """
        rate, flagged = self.clean.rate_of(self.clean.before), int(self.clean.before.sum())
        if not self.n_audits or rate is None or rate <= factor * requested:
            return False
        expected = requested * float(self.clean.weights.sum())
        return float(scipy.stats.poisson.sf(flagged - 1, expected)) <= CHANCE

    def as_dict(self) -> dict[str, Any]:
        """Return counts and estimated rates, ready for JSON."""
        return {
            "misses": len(self.is_miss[self.is_miss]),
            "clean_audits": self.n_audits,
            "disputed": self.n_disputed,
            "detection_rate": _rates(self.poisoned),
            "false_positive_rate": _rates(self.clean) if self.n_audits else None,
        }


def _rates(compared: Compared) -> dict[str, float | None]:
    return {"before": compared.rate_of(compared.before), "after": compared.rate_of(compared.after)}


def _at_least(k: int, n: int, p: float) -> float:
    """Return the probability of k or more of n, each with probability p."""
    return float(min(1.0, sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))))
