"""What a guard catches and lets through, from the answers about flagged inputs and audits of its queue."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil, floor
from typing import Any, Literal, get_args

from sqlalchemy.engine import Connection

from guard.errors import ConfigError
from guard.relabel.audits import SampledItems, read_sample, sampled_models, sampled_parts, whole_hours
from guard.relabel.queue import Queue
from guard.statistics.detection_rates import DetectionRates, Estimate, NotKnown, estimate_rates
from guard.statistics.review_sample import Populations, Stratum, strata_of_items
from guard.statistics.strata import STRATA

#: What is asked of a guard if nobody names a window: its last week.
WEEK = timedelta(days=7)
_HOUR = timedelta(hours=1)
CONFIDENCE = 0.95
#: What detection can be told apart by: who judged, or what the suspect model answers (the attacked class).
Part = Literal["bundle", "class"]
PARTS: tuple[Part, ...] = get_args(Part)
#: Items that are named; of more, only the number is told.
_NAMED = 10

#: Figures in the order in which they are told: attribute of `DetectionRates` -> its name and what it is, for a person.
FIGURES = {
    "detection_rate": ("detection rate", "of poisoned inputs, flagged"),
    "false_positive_rate": ("false-positive rate", "of clean inputs, flagged"),
    "precision": ("precision", "of flagged inputs, poisoned"),
    "poisoned_share": ("poisoned share", "of all inputs, poisoned"),
}


@dataclass(frozen=True, slots=True)
class Detection:
    """What one guard did in a window.

    Attributes
    ----------
    model : str
    start, end : datetime
        Whole hours, UTC: requests are counted per hour.
    since : datetime or None
        Begin of the first of these hours whose requests were counted, as they are while there is an audit sample. None:
        there was no sample in the window, or no request.
    n_hours : int
        How many of these hours were counted; the figures rest on no others.
    rates : DetectionRates
    requests : int or None
        Judged in the window while there was an audit sample; None: they were not counted so.
    found : tuple of int
        Numbers of the items of the window that were not flagged, and are poisoned as reviewers say.
    """

    model: str
    start: datetime
    end: datetime
    since: datetime | None
    n_hours: int
    rates: DetectionRates
    requests: int | None
    found: tuple[int, ...]

    @property
    def missed_range(self) -> tuple[int, int] | None:
        """Between which whole numbers the poisoned inputs that were let through are; None where that is not known."""
        missed = self.rates.missed
        if isinstance(missed, NotKnown):
            return None
        n_found = len(self.found)
        return max(n_found, floor(missed.lower + 1e-9)), max(n_found, ceil(missed.upper - 1e-9))

    def sentence(self, window: str) -> str:
        """Return in one line how many poisoned inputs were let through.

        Parameters
        ----------
        window : str
            As in "in the last 7 days"; where not all of its hours were counted, it is told in how many.
        """
        if self.since is None:
            why = "it had no audit sample in that time, or no request"
            return f"How many poisoned inputs this guard let through {window} is not known: {why}."
        n_hours = (self.end - self.start) // _HOUR
        if self.n_hours < n_hours:
            window += f", in {self.n_hours:,} of {n_hours:,} hours counted, the first at {_minute(self.since)},"
        between = self.missed_range
        if between is None:
            found = f"; {len(self.found):,} found so far" if self.found else ""
            return f"How many poisoned inputs this guard let through {window} is {self.rates.missed}{found}."
        sure = f"({100 * self.rates.confidence:g} % confidence)"
        window = window.removesuffix(",")
        return f"This guard let through between {between[0]:,} and {between[1]:,} poisoned inputs {window} {sure}."

    @property
    def basis(self) -> str:
        """What the figures rest on, for people."""
        flagged = counted(self.rates.decided_flagged, "answered flagged input")
        return f"{flagged}, {counted(self.rates.decided_audits, 'audit')}"

    def lines(self) -> list[str]:
        """Return all figures for people, the most asked one first; only that one where there was no audit sample."""
        told = [self.sentence(f"from {_minute(self.start)} to {_minute(self.end)}")]
        if self.since is None:
            return told
        told += [f"{name} ({text}): {shown(getattr(self.rates, key))}" for key, (name, text) in FIGURES.items()]
        told.append(f"from {self.basis}")
        if self.found:
            more = f" and {len(self.found) - _NAMED:,} more" if len(self.found) > _NAMED else ""
            told.append(f"found among the audits: item {', '.join(map(str, self.found[:_NAMED]))}{more}")
        return told

    def line(self) -> str:
        """Return the most asked figures in half a line, as one of many."""
        between = self.missed_range
        passed = str(self.rates.missed) if between is None else f"{between[0]:,} to {between[1]:,}"
        return f"let through: {passed}; detection rate: {shown(self.rates.detection_rate)}; from {self.basis}"

    def as_dict(self) -> dict[str, Any]:
        """Return all figures for programs."""
        figures = {name: _for_programs(getattr(self.rates, name)) for name in ("missed", *FIGURES)}
        return {
            "model": self.model,
            "from": self.start.isoformat(),
            "to": self.end.isoformat(),
            "since": None if self.since is None else self.since.isoformat(),
            "hours_counted": self.n_hours,
            "confidence": self.rates.confidence,
            "let_through": figures.pop("missed"),
            **figures,
            "requests": self.requests,
            "answered_flagged": self.rates.decided_flagged,
            "answered_audits": self.rates.decided_audits,
            "found_missed": list(self.found),
        }


def detection_of(
    queue: Queue,
    start: datetime,
    end: datetime,
    *,
    model: str,
    bundle_digest: str | None = None,
    attacked_class: int | None = None,
    confidence: float = CONFIDENCE,
) -> Detection:
    """Return what a guard caught and let through in a window, as far as the answers tell.

    Parameters
    ----------
    queue : Queue
    start, end : datetime
        Aware; widened to whole hours.
    model : str
    bundle_digest : str, optional
        Only what this bundle judged.
    attacked_class : int, optional
        Only inputs that the suspect model gives this label. Requests are not counted by class: how many there are is
        told by the sample alone, and intervals are wider.
    confidence : float
        Of the intervals, in (0, 1).

    Raises
    ------
    ConfigError
        If the window ends before it begins, or `confidence` is out of range.
    QueueUnavailable
        If the queue does not answer.
    """
    with queue.database.reading() as connection:
        return read_detection(connection, start, end, model, bundle_digest, attacked_class, confidence)


def detection_of_models(queue: Queue, start: datetime, end: datetime, model: str | None = None) -> list[Detection]:
    """Return `detection_of` each model that has an audit sample, or of the named one; none if it has no sample."""
    with queue.database.reading() as connection:
        models = [known for known in sampled_models(connection) if model in (None, known)]
        return [read_detection(connection, start, end, known) for known in models]


def models_with_audits(queue: Queue) -> list[str]:
    """Return the names of the models that have an audit sample, sorted."""
    with queue.database.reading() as connection:
        return sampled_models(connection)


def detection_by(queue: Queue, start: datetime, end: datetime, *, model: str, by: Part) -> dict[str, Detection]:
    """Return `detection_of` each bundle that judged requests in a window, by digest, or of each class, by number."""
    with queue.database.reading() as connection:
        bundles, labels = sampled_parts(connection, *whole_hours(start, end), model)
        if by == "bundle":
            return {digest: read_detection(connection, start, end, model, digest) for digest in bundles}
        return {str(label): read_detection(connection, start, end, model, None, label) for label in labels}


def read_detection(
    connection: Connection,
    start: datetime,
    end: datetime,
    model: str,
    bundle_digest: str | None = None,
    attacked_class: int | None = None,
    confidence: float = CONFIDENCE,
) -> Detection:
    """Return the same as `detection_of`, by an open connection of the queue."""
    if start.tzinfo is None or end.tzinfo is None or not start < end:
        raise ConfigError(f"the window must end after it begins, got {start.isoformat()} to {end.isoformat()}.")
    first, last = whole_hours(start, end)
    sample = read_sample(
        connection, first, last, model=model, bundle_digest=bundle_digest, suspect_label=attacked_class
    )
    return Detection(
        model,
        first,
        last,
        sample.since,
        sample.n_hours,
        estimate_rates(_strata(sample), confidence),
        sum(sample.requests.values()) if sample.requests else None,
        tuple(sorted(sample.ids[~sample.is_flagged & (sample.answers == 1)].tolist())),
    )


def _strata(sample: SampledItems) -> list[Stratum]:
    populations = Populations()  # nobody counted, be it by class or at all: any number of requests may have come
    if sample.requests:
        populations = Populations(*(sample.requests.get(name, 0) for name in STRATA))
    return strata_of_items(
        is_flagged=sample.is_flagged,
        p_values=sample.p_values,
        false_positive_rates=sample.false_positive_rates,
        probabilities=sample.probabilities,
        answers=sample.answers,
        populations=populations,
    )


def counted(number: int, noun: str) -> str:
    """Return a number of things in words: "1 audit", "2,000 audits"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shown(figure: Estimate | NotKnown) -> str:
    """Return a share for people: in percent with its interval, or that it is not known yet."""
    if isinstance(figure, NotKnown):
        return str(figure)
    return f"{percent(figure.value)} ({percent(figure.lower)} to {percent(figure.upper)})"


def percent(share: float) -> str:
    """Return a share with the digits that it is worth: three, of what is nearer to 0 or to 1."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f} %"
    distance = 100 * min(share, 1 - share)
    digits = 1 if distance >= 1 else 2 if distance >= 0.1 else 3
    return f"{100 * share:.{digits}f} %"


def _for_programs(figure: Estimate | NotKnown) -> dict[str, Any]:
    if isinstance(figure, NotKnown):
        return {"known": False, "needed": figure.needed, "of": figure.of}
    return {"known": True, "value": figure.value, "lower": figure.lower, "upper": figure.upper}


def _minute(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
