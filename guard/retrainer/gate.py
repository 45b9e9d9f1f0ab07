"""May this candidate serve? Figures of two guards in, a verdict with reasons in plain words out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from guard.retrainer.material import Agreement
from guard.retrainer.measuring import Count, Measurement
from guard.retrainer.movement import CHANCE, Movement, sign_test
from guard.retrainer.settings import RetrainerSettings
from guard.retrainer.traffic import Compared, Traffic
from guard.statistics.evaluation import wilson_interval
from guard.types import BoolArray

#: Fewer clean hold-outs than this measure nothing.
MIN_CLEAN = 20
#: Fewer inputs than this are held against the guard before only, not against a fixed share.
ENOUGH_POISONED = 10
ENOUGH_TO_RELEASE = 20


@dataclass(frozen=True, slots=True)
class Check:
    """One question of the gate.

    Attributes
    ----------
    name : str
    passed : bool or None
        None if there was nothing to measure it by; that refuses nobody.
    text : str
        What was found, in plain words.
    before, after : float or None
        The figure of the active guard and of the candidate.
    """

    name: str
    passed: bool | None
    text: str
    before: float | None = None
    after: float | None = None


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the gate says of a candidate."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """True if no check failed."""
        return all(check.passed is not False for check in self.checks)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the candidate is refused; empty if it passed."""
        return tuple(check.text for check in self.checks if check.passed is False)

    def as_dicts(self) -> list[dict[str, Any]]:
        """Return the checks, ready for JSON."""
        return [asdict(check) for check in self.checks]


def judge(
    before: Measurement,
    after: Measurement,
    agreement: Agreement,
    false_positive_rate: float,
    settings: RetrainerSettings,
    movements: Mapping[str, Movement] | None = None,
    traffic: Traffic | None = None,
) -> Judgement:
    """Compare a candidate with the guard it would replace, and with one that learned from no answer.

    Parameters
    ----------
    before, after : Measurement
        Of the active guard and of the candidate, on the same hold-outs.
    agreement : Agreement
        Of the reviewers whose decisions were used.
    false_positive_rate : float
        The requested one.
    settings : RetrainerSettings
    movements : mapping of str to Movement, optional
        From a guard that learned from no answer to the candidate, by what kind of inputs; none of them learned from.
    traffic : Traffic, optional
        The guard that serves, as it serves, and the candidate on decided traffic.
    """

    def counts(name: str) -> tuple[Count, Count]:
        return before.count(name), after.count(name)

    return Judgement(
        (
            _clean_accuracy(before.clean_right, after.clean_right, settings.max_clean_accuracy_drop),
            _false_positives(before.clean_flagged, after.clean_flagged, false_positive_rate, settings),
            _true_positives("other groups", *counts("other_groups_flagged"), settings),
            _true_positives("the same groups", *counts("same_groups_flagged"), settings),
            _released("undecided flagged inputs", *counts("undecided_flagged"), settings.max_released_share),
            *(_moved(kind, movement) for kind, movement in (movements or {}).items()),
            *(_on_traffic(traffic, false_positive_rate, settings) if traffic is not None else ()),
            _agreement(agreement, settings),
        )
    )


def judge_canary(
    undecided: tuple[Count, Count], poisoned: tuple[Count, Count], settings: RetrainerSettings
) -> Judgement:
    """Compare both guards on what was flagged while the candidate waited.

    Parameters
    ----------
    undecided, poisoned : pair of Count
        How many of these inputs the active guard and the candidate flag: those that nobody has decided, and those
        decided as poisoned.
    settings : RetrainerSettings
    """
    return Judgement(
        (
            _released("undecided flagged inputs", *undecided, settings.max_released_share, at_least=1),
            _true_positives("the canary", *poisoned, settings),
        )
    )


def _clean_accuracy(before: BoolArray, after: BoolArray, allowed: float) -> Check:
    name = "clean accuracy"
    old, new = Count.where(before), Count.where(after)
    if new.of < MIN_CLEAN:
        text = f"{new.of} clean images are held out, {MIN_CLEAN} are needed to measure by. Raise holdout_share."
        return Check(name, False, text, old.rate, new.rate)
    lost, gained = int((before & ~after).sum()), int((after & ~before).sum())
    # Both guards err on a few images, by chance not on the same ones: a fall counts if chance would not explain it.
    passed = lost - gained <= allowed * new.of or sign_test(lost, gained) > CHANCE
    text = f"clean accuracy after the guard: {_percent(new)} of {new.of} held-out images, {_percent(old)} before"
    return _check(name, passed, text, f"a fall of {100 * allowed:g} points is allowed", old, new)


def _false_positives(before: BoolArray, after: BoolArray, requested: float, settings: RetrainerSettings) -> Check:
    factor = settings.max_false_positive_factor
    old, new = Count.where(before), Count.where(after)
    # Few images: a share above the limit is held against the candidate only where chance alone would not explain it.
    too_many = new.of > 0 and new.hits > factor * requested * new.of and wilson_interval(*new).lower > requested
    # Where the hold-out is unlike the rest, the guard that serves shows the same: no reason to keep it instead.
    worse = sign_test(int((after & ~before).sum()), int((before & ~after).sum())) <= CHANCE
    text = (
        f"{_percent(new)} of {new.of} held-out clean images are flagged (before: {_percent(old)}, "
        f"asked for: {100 * requested:g} %)"
    )
    return _check(
        "false-positive rate", not (too_many and worse), text, f"{factor:g} times the rate is allowed", old, new
    )


def _true_positives(whose: str, before: Count, after: Count, settings: RetrainerSettings) -> Check:
    name = f"true-positive rate, {whose}"
    if after.of == 0:
        return Check(name, None, f"no poisoned input of {whose} is held out: nothing to measure by.")
    lost = before.hits - after.hits
    text = f"{_percent(after)} of {after.of} held-out poisoned inputs of {whose} are flagged, {_percent(before)} before"
    if lost > max(1, settings.max_true_positive_drop * after.of + 1e-9):
        limit = f"a fall of {100 * settings.max_true_positive_drop:g} points is allowed"
        return _check(name, False, text, limit, before, after)
    floor = settings.min_true_positive_rate
    passed = after.of < ENOUGH_POISONED or after.hits >= floor * after.of
    return _check(name, passed, text, f"at least {100 * floor:g} % must be", before, after)


def _released(kind: str, before: Count, after: Count, allowed: float, at_least: int = ENOUGH_TO_RELEASE) -> Check:
    if before.hits < at_least:
        return Check(kind, None, f"{before.hits} {kind}: too few to measure by.")
    released = Count(max(0, before.hits - after.hits), before.hits)
    text = f"{_percent(released)} of {before.hits} {kind} would pass now"
    limit = (
        f"{100 * allowed:g} % may. Inputs have changed, or somebody calls a trigger clean: let a second person look, "
        "then raise max_released_share"
    )
    return _check(kind, released.hits <= allowed * released.of, text, limit, before, after)


def _moved(kind: str, movement: Movement) -> Check:
    name = f"{kind}, against a guard without answers"
    if not len(movement.lost):
        return Check(name, None, f"there are no {kind}: nothing to measure by.")
    region = movement.beyond_chance()
    lost, gained = int(movement.lost.sum()), int(movement.gained.sum())
    if region is None:
        text = (
            f"{lost} of {len(movement.lost)} {kind} pass of which a guard without answers is sure; {gained} vice versa."
        )
        return Check(name, True, text)
    where = "" if region.label is None else f" that the network calls class {region.label}"
    text = (
        f"{region.lost} of {region.of} {kind}{where} would pass although a guard without answers calls them more "
        f"suspicious than any clean image, {region.gained} the other way: more than chance explains. Somebody may call "
        "a trigger clean, or clean inputs poisoned: let another person look at these, or leave a reviewer out."
    )
    return Check(name, False, text)


def _on_traffic(traffic: Traffic, requested: float, settings: RetrainerSettings) -> tuple[Check, ...]:
    return (
        _kept(traffic.poisoned, settings.max_true_positive_drop),
        _misses(traffic.poisoned[traffic.is_miss]),
        _live_false_alarms(traffic, requested, settings.max_false_positive_factor),
    )


def _kept(poisoned: Compared, allowed: float) -> Check:
    """Ask for what the serving guard catches: all together, and for every answer of the network."""
    name = "held-out poisoned inputs, against the guard that serves"
    lost, of = int(poisoned.lost.sum()), int(poisoned.before.sum())
    if not of:
        return Check(name, None, "the guard that serves flags no held-out poisoned input: nothing to measure by.")
    labels, counts = np.unique(poisoned.predicted[poisoned.before], return_counts=True)
    parts = {"": poisoned} | {
        f" that the network calls class {label}": poisoned[poisoned.predicted == label]
        for label in labels[counts >= ENOUGH_POISONED].tolist()
    }
    for where, part in parts.items():
        n_lost, n = int(part.lost.sum()), int(part.before.sum())
        if n_lost > max(1, allowed * n + 1e-9) and not _made_good(part):
            text = (
                f"{n_lost} of {n} held-out poisoned inputs{where} that the guard that serves flags would pass, and no "
                f"audits show that as many others would be flagged; a fall of {100 * allowed:g} points is allowed."
            )
            return Check(name, False, text, 1.0, 1 - n_lost / n)
    text = f"{lost} of {of} held-out poisoned inputs that the guard that serves flags would pass."
    return Check(name, True, text, 1.0, 1 - lost / of)


def _made_good(part: Compared) -> bool:
    """Return whether the audits that only the candidate flags stand for as many inputs as it loses.

    What the guard that serves lets pass is in no queue but for the audits. A single one may be an answer that is wrong.
    """
    return int(part.gained.sum()) > 1 and bool(part.weights[part.gained].sum() >= part.weights[part.lost].sum())


def _misses(misses: Compared) -> Check:
    name = "held-out misses"
    if not len(misses):
        return Check(name, None, "no poisoned input of the audit sample is held out: nothing to measure by.")
    before, after = Count.where(misses.before), Count.where(misses.after)
    text = f"{after.hits} of {after.of} held-out poisoned inputs of the audit sample are flagged, {before.hits} before"
    return _check(name, after.hits >= before.hits, text, "no fewer may be", before, after)


def _live_false_alarms(traffic: Traffic, requested: float, factor: float) -> Check:
    name, clean = "false alarms of the traffic", traffic.clean
    before, after = clean.rate_of(clean.before), clean.rate_of(clean.after)
    if not traffic.n_audits or before is None or after is None:
        return Check(name, None, "no clean input of the audit sample is decided: nothing to measure by.")
    n_gained = int(clean.gained.sum())
    # One input may be an answer that is wrong.
    is_worse = n_gained > 1 and clean.chance_of_gain() <= CHANCE
    text = (
        f"{100 * after:.2f} % of the clean traffic would be flagged, {100 * before:.2f} % are now, as "
        f"{len(clean)} decided inputs tell, {traffic.n_audits} of them audits"
        + (f"; {traffic.n_disputed} others look like an attack and want a second reviewer" * bool(traffic.n_disputed))
    )
    limit = f"{factor:g} times the rate of {100 * requested:g} % is allowed where chance does not explain more"
    passed = not (is_worse and after > factor * requested)
    text = f"{text}; {limit}." if not passed else f"{text}."
    if traffic.has_drifted(requested, factor):
        text += (
            f" {100 * requested:g} % were asked for: the clean traffic has changed, which is drift and no attack, or "
            "somebody calls a trigger clean. Let another person look, then fit anew with such inputs, or set "
            "follow_traffic."
        )
    return Check(name, passed, text, before, after)


def _agreement(agreement: Agreement, settings: RetrainerSettings) -> Check:
    name = "agreement of reviewers"
    count = Count(*agreement)
    if count.of < settings.min_shared_decisions:
        return Check(name, None, f"{count.of} inputs were decided by several reviewers: too few to measure by.")
    text = f"reviewers agree on {_percent(count)} of {count.of} inputs that several decided"
    passed = count.hits >= settings.min_agreement * count.of
    return _check(name, passed, text, f"at least {100 * settings.min_agreement:g} % is asked for", count, count)


def _check(name: str, passed: bool, text: str, limit: str, before: Count, after: Count) -> Check:
    return Check(name, passed, f"{text}; {limit}." if not passed else f"{text}.", before.rate, after.rate)


def _percent(count: Count) -> str:
    return "-" if count.rate is None else f"{100 * count.rate:.1f} %"
