"""Is it all right? The answer in one sentence, and what is to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from guard.review.status.numbers import Numbers

Level = Literal["well", "look", "bad"]
_OPENING: dict[Level, str] = {"well": "All well", "look": "Look at this", "bad": "Not well"}
_ORDER: tuple[Level, ...] = ("well", "look", "bad")

# As in deploy/prometheus/alerts.yml, so that page and alerts agree.
#: Shares of failed requests that would use up a month's error budget (0.1 %) in two days, and in five.
FAILED_FAST, FAILED_SLOW = 0.0144, 0.006
FAILED_LEAST = 5
#: Seconds after which an input has waited too long for a person.
WAITED_S = 4 * 3600.0
#: Drift that is worth a look, and how surprising it must be besides (standard deviations).
DRIFT_FACTOR, DRIFT_SURPRISE = 1.5, 4.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to look at: how bad it is, and one sentence without its full stop."""

    level: Level
    text: str


@dataclass(frozen=True, slots=True)
class Health:
    """The first line of the page.

    Attributes
    ----------
    level : {"well", "look", "bad"}
    opening : str
        Two or three words.
    sentence : str
        What there is to know in one sentence.
    findings : list of Finding
        The worst first; empty if all is well.
    """

    level: Level
    opening: str
    sentence: str
    findings: list[Finding]


def answer(numbers: Numbers, now: datetime) -> Health:
    """Return whether all is well."""
    findings = sorted(
        (*_of_metrics(numbers), *_of_queue(numbers, now), *_of_bundles(numbers)),
        key=lambda finding: -_ORDER.index(finding.level),
    )
    level: Level = findings[0].level if findings else "well"
    return Health(level, _OPENING[level], _sentence(numbers, now), findings)


def _sentence(numbers: Numbers, now: datetime) -> str:
    span = f"the last {numbers.history.span.name}"
    parts = []
    if not numbers.has_metrics or numbers.history.since is None:
        parts.append("no numbers of the server")
    elif numbers.received == 0:
        parts.append(f"no request in {span}")
    else:
        requests = f"{numbers.received:,} {'request' if numbers.received == 1 else 'requests'}"
        is_told = not numbers.history.hides_flagged
        parts.append(f"{numbers.flagged:,} of {requests} flagged in {span}" if is_told else f"{requests} in {span}")
        bypassed = numbers.verdicts["bypassed"]
        parts.append(f"{bypassed:,} bypassed" if bypassed else "no bypass")
    oldest = numbers.queue.counts.oldest_pending_at
    parts.append("nothing waits" if oldest is None else f"oldest waiting item {_age(oldest, now)}")
    return ", ".join(parts)


def _of_metrics(numbers: Numbers) -> list[Finding]:
    history, verdicts = numbers.history, numbers.verdicts
    span = f"in the last {history.span.name}"
    found: list[Finding] = []
    if not numbers.has_metrics:
        found.append(Finding("look", "the page was given no metrics address: start it with --metrics-url"))
    for line in history.away:
        found.append(Finding("bad" if history.is_away else "look", f"numbers are missing: {line}"))
    if bypassed := verdicts["bypassed"]:
        reasons = history.parts("guard_bypassed_total")
        counts = ", ".join(
            f"{reason.replace('_', ' ')} {count:,.0f}" for reason, count in sorted(reasons.items()) if count >= 0.5
        )
        found.append(
            Finding("bad", f"{bypassed:,} answered without being judged {span} ({counts or 'no reason known'})")
        )
    failed = verdicts["failed"]
    if failed >= FAILED_LEAST and failed >= FAILED_SLOW * numbers.received:
        level: Level = "bad" if failed >= FAILED_FAST * numbers.received else "look"
        found.append(Finding(level, f"{failed:,} of {numbers.received:,} requests failed {span}"))
    if numbers.surplus:
        counts = f"{numbers.flagged:,} flagged {span}, about {numbers.expected:,.0f} are expected of clean traffic"
        found.append(Finding("look", f"{counts}: an attack, or drift"))
    if (text := _drift_told(numbers)) is not None:
        found.append(Finding("look", text))
    for reason, count in sorted(history.parts("guard_shed_total").items()):
        if count >= 0.5:
            why = {"full": "the queue was full", "unavailable": "the queue did not answer"}.get(reason, reason)
            found.append(Finding("look", f"{count:,.0f} flagged inputs did not get into the queue: {why}"))
    return found


def _drift_told(numbers: Numbers) -> str | None:
    lately, whole = numbers.drift_lately, numbers.drift
    for drift, when in ((lately, "lately"), (whole, f"in the last {numbers.history.span.name}")):
        if drift is None or abs(drift.surprise) < DRIFT_SURPRISE:
            continue
        if drift.factor >= DRIFT_FACTOR:
            return f"clean traffic drifts: {when}, low p-values are {drift.factor:.1f} times as frequent as calibrated"
        if drift.factor <= 1 / DRIFT_FACTOR:
            return f"{when}, low p-values are only {drift.factor:.1f} times as frequent as calibrated"
    return None


def _of_queue(numbers: Numbers, now: datetime) -> list[Finding]:
    oldest = numbers.queue.counts.oldest_pending_at
    if oldest is not None and (now - oldest).total_seconds() > WAITED_S:
        return [Finding("look", f"an input has waited for a person for {_age(oldest, now)}")]
    return []


def _of_bundles(numbers: Numbers) -> list[Finding]:
    found = []
    last, history = numbers.last_round, numbers.history
    if last is not None and last.finished_at is not None and last.outcome in ("refused", "failed"):
        began = datetime.fromtimestamp(history.edges[0], UTC)
        if last.finished_at >= began:
            found.append(Finding("look", f"the last retraining, round {last.id}, was {_outcome_text(last.outcome)}"))
    if (sure := numbers.contradictions) is not None and sure.is_noticed:
        found.append(Finding("look", f"the active bundle may be of little use: {sure.told}"))
    for active in numbers.active if history.in_use else ():
        if active not in history.in_use:
            used = ", ".join(digest[:12] for digest in history.in_use)
            found.append(Finding("look", f"bundle {active[:12]} is active, but the server uses {used}"))
    if refused := history.total("guard_bundle_swaps_total", "refused"):
        found.append(
            Finding("look", f"the server refused a new bundle {refused:,.0f} times in the last {history.span.name}")
        )
    return found


def _outcome_text(outcome: str) -> str:
    return "refused by the gate" if outcome == "refused" else "broken off by an error"


def _age(since: datetime, now: datetime) -> str:
    minutes = max(0.0, (now - since).total_seconds()) / 60
    if minutes < 1:
        return "under a minute"
    if minutes < 120:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.0f} h" if minutes < 48 * 60 else f"{minutes / 1440:.0f} days"
