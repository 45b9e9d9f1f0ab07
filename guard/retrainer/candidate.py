"""A candidate and the guard it is compared with: neither has seen the hold-outs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from guard.detection.pipeline import Guard
from guard.detection.retraining import Labelled, retrain
from guard.errors import DataError
from guard.relabel.items import QueueItem
from guard.retrainer.anomalies import purify, recognise
from guard.retrainer.gate import Judgement, judge, judge_canary
from guard.retrainer.material import Material, fits
from guard.retrainer.measuring import Count, Measurement, flags_of, measure
from guard.retrainer.movement import Movement
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.traffic import CleanTraffic, Traffic
from guard.statistics.calibration import check_rate
from guard.types import Activations, BoolArray

#: Why false alarms are not learned from although no cap forbids it, for the report.
MOVED_TOO_MUCH = "false alarms that would let other inputs pass"

#: Why answers that say "poisoned" are not learned from, for the report.
NOT_BORNE_OUT = "poisoned, unlike the others called so"


class Pair(NamedTuple):
    """Guards of one round.

    Attributes
    ----------
    before, candidate : Guard
        Fitted on the same clean images, without the hold-outs.
    untaught : Guard or None
        Fitted on these, and learned from no answer.
    final : Guard or None
        With the lessons of the candidate and the whole clean reference: what is promoted. With a fifth fewer clean
        images a guard may miss half as many attacks again, as the first round on GTSRB Blend did.
    """

    before: Guard
    candidate: Guard
    untaught: Guard | None = None
    final: Guard | None = None

    @property
    def promoted(self) -> Guard:
        """What serves if the gate lets it."""
        return self.candidate if self.final is None else self.final


class Trial(NamedTuple):
    """Two guards measured on the same hold-outs, and what the gate says of the second."""

    before: Measurement
    after: Measurement
    traffic: Traffic
    judgement: Judgement

    @property
    def is_same(self) -> bool:
        """True if every figure of both is the same."""
        return self.before.as_dict() == self.after.as_dict()


def doubt_poisoned(guard: Guard, material: Material, settings: RetrainerSettings) -> Material:
    """Return the material without poisoned answers that no other bears out; without all, where most are such.

    Parameters
    ----------
    guard : Guard
        The active one; only its reference is read.
    material : Material
    settings : RetrainerSettings
    """
    alike = recognise(guard, material.poisoned)
    n_alike = int(alike.sum())
    if n_alike < settings.min_anomalies or 2 * n_alike < len(alike):
        alike[:] = False
    return material.without_poisoned(~alike, NOT_BORNE_OUT)


def choose_anomalies(
    guard: Guard, material: Material, undecided: Sequence[QueueItem], settings: RetrainerSettings
) -> Activations:
    """Return what a demarcation learns from; half of what nobody has decided stays out, to measure by.

    Parameters
    ----------
    guard : Guard
        The active one.
    material : Material
    undecided : sequence of QueueItem
        Flagged inputs that nobody has decided.
    settings : RetrainerSettings
    """
    anomalies = material.poisoned if settings.demarcation != "off" else guard.reference[:0]
    if settings.demarcation == "purified":
        flagged = stacked(guard, [item for item in undecided if item.id % 2])
        pure = purify(guard.with_config(false_positive_rate=requested_rate(guard, settings)), flagged)
        anomalies = Activations.concatenate([anomalies, flagged[pure]])
    return anomalies if len(anomalies) >= settings.min_anomalies else anomalies[:0]


def fit_candidate(
    guard: Guard,
    material: Material,
    *,
    anomalies: Activations | None = None,
    measured_before: Guard | None = None,
    trained_ids: Collection[int] = (),
) -> Pair:
    """Fit a candidate, and the guard that it is compared with.

    Parameters
    ----------
    guard : Guard
        The active one; it is left as it was.
    material : Material
    anomalies : Activations, optional
        What a demarcation learns from, as `choose_anomalies` says.
    measured_before : Guard, optional
        The active guard as it is without these clean hold-outs. If there is none, it is fitted again without them for
        the comparison: on what it has seen, it would look better than it is.
    trained_ids : collection of int
        Items that the active guard has learned from.

    Raises
    ------
    DataError
        If the clean images that are not held out are too few for the guard's false-positive rate.
    """
    base = _without_rows(guard, material.clean_held_out)
    try:
        check_rate(guard.config.false_positive_rate, int(base.is_distinct.sum()))
    except DataError as error:
        held = f"{int(material.clean_held_out.sum())} of {len(guard.reference_labels)}"
        raise DataError(f"{error} {held} are held out: lower holdout_share.") from error
    candidate = _taught(guard, base, material.training, anomalies)
    again = np.array([item_id in trained_ids for item_id in material.training_ids], dtype=bool)
    untaught = retrain(base, material.training[:0])
    if measured_before is not None:
        return Pair(measured_before, candidate, untaught)
    return Pair(retrain(base, material.training[again]) if again.any() else untaught, candidate, untaught)


def with_final(guard: Guard, pair: Pair, material: Material, *, anomalies: Activations | None = None) -> Pair:
    """Return the pair with its final guard, unless it has one."""
    if pair.final is not None:
        return pair
    return pair._replace(final=_taught(guard, guard, material.training, anomalies))


def check_false_alarms(
    guard: Guard,
    pair: Pair,
    material: Material,
    undecided: Sequence[QueueItem],
    settings: RetrainerSettings,
    *,
    anomalies: Activations | None = None,
) -> tuple[Pair, Material]:
    """Return the candidate as it is, or one that learns from no false alarm where those move more than chance does.

    The two are alike in everything else, the seeds included. Compared are flagged inputs that neither learns from and
    the clean hold-outs: all together, and for every answer of the network.
    """
    if material.training.is_poisoned.all():
        return pair, material
    sober = material.without_false_alarms(MOVED_TOO_MUCH)
    twin = _taught(guard, _without_rows(guard, material.clean_held_out), sober.training, anomalies)
    held = material.held_out
    clean = guard.reference[material.clean_held_out & guard.is_distinct]
    watched = Activations.concatenate([clean, held.poisoned, held.not_learned, stacked(guard, undecided)])
    rate = requested_rate(guard, settings)
    first, second = (fitted.with_config(false_positive_rate=rate) for fitted in (twin, pair.candidate))
    if Movement.between(first, second, watched).beyond_chance() is None:
        return pair, material
    return pair._replace(candidate=twin), sober


def try_candidate(
    guard: Guard, pair: Pair, material: Material, undecided: Sequence[QueueItem], settings: RetrainerSettings
) -> Trial:
    """Measure both guards on the hold-outs and on decided traffic, and ask the gate."""
    held, rate = material.clean_held_out & guard.is_distinct, requested_rate(guard, settings)
    clean, labels = guard.reference[held], guard.reference_labels[held]
    flagged = stacked(guard, undecided)
    guards = [fitted.with_config(false_positive_rate=rate) for fitted in pair[:2]]
    before, after = (measure(fitted, clean, labels, material.held_out, flagged) for fitted in guards)
    movements = {}
    if pair.untaught is not None:
        first = pair.untaught.with_config(false_positive_rate=rate)
        watched = {
            "false alarms that were not learned from": material.held_out.not_learned,
            "held-out poisoned inputs": material.held_out.poisoned,
            "undecided flagged inputs": flagged,
        }
        movements = {
            kind: Movement.between(first, guards[1], inputs, far_only=True) for kind, inputs in watched.items()
        }
    # Both as they serve, and not as they are without the clean hold-outs: neither has learned from these inputs.
    serving, promoted = (fitted.with_config(false_positive_rate=rate) for fitted in (guard, pair.promoted))
    traffic = Traffic.of(serving, promoted, material.held_out, CleanTraffic.of(guard, material, settings))
    judgement = judge(before, after, material.agreement, rate, settings, movements, traffic)
    return Trial(before, after, traffic, judgement)


def compare_on(flagged: Sequence[QueueItem], pair: Pair, settings: RetrainerSettings) -> Judgement:
    """Compare both guards on what was flagged while the candidate waited."""
    rate = requested_rate(pair.before, settings)
    guards = [fitted.with_config(false_positive_rate=rate) for fitted in pair[:2]]

    def counts(items: Sequence[QueueItem]) -> tuple[Count, Count]:
        activations = stacked(pair.before, items)
        before, after = (Count.where(flags_of(fitted, activations)) for fitted in guards)
        return before, after

    flagged = [item for item in flagged if not item.input.is_audit]
    undecided = [item for item in flagged if item.decision is None]
    poisoned = [item for item in flagged if item.decision is not None and item.decision.is_poisoned]
    return judge_canary(counts(undecided), counts(poisoned), settings)


def requested_rate(guard: Guard, settings: RetrainerSettings) -> float:
    """Return the false-positive rate that guards are measured at."""
    return settings.false_positive_rate or guard.config.false_positive_rate


def stacked(guard: Guard, items: Sequence[QueueItem]) -> Activations:
    """Return the activations of those items that the guard can score, one row each."""
    rows = [item.input.activations for item in items if fits(guard, item.input.activations)]
    return Activations.concatenate([guard.reference[:0], *rows])


def _taught(guard: Guard, base: Guard, training: Labelled, anomalies: Activations | None) -> Guard:
    return replace(  # with the whole reference, for the rounds to come
        retrain(base, training, anomalies=anomalies),
        reference=guard.reference,
        reference_labels=guard.reference_labels,
        reference_groups=guard.reference_groups,
        noisy_reference=guard.noisy_reference,
    )


def _without_rows(guard: Guard, held: BoolArray) -> Guard:
    noisy, groups = guard.noisy_reference, guard.reference_groups
    return replace(
        guard,
        reference=guard.reference[~held],
        reference_labels=guard.reference_labels[~held],
        reference_groups=groups[~held] if groups is not None else None,
        noisy_reference=noisy[~held] if noisy is not None else None,
    )
