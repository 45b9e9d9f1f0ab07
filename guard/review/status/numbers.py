"""The status in numbers: what the metrics' history and the queue say together, and the lines of every chart."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from guard.detection.contradictions import Contradictions
from guard.relabel.activity import Activity, Share
from guard.relabel.items import Counts, State
from guard.relabel.rounds import Round
from guard.review.status.history import History, add_up
from guard.telemetry import OUTCOMES

#: Fewer clean requests say nothing of drift: a tenth of them is what is compared.
DRIFT_LEAST = 100
#: Requests below which a share of them is not drawn.
SHARE_LEAST = 1
#: Share of clean requests whose p-value is in the lowest tenth of what is left to them, as calibrated.
LOW_SHARE = 0.1
#: Intervals that drift is drawn over: it needs many requests.
_TRAILING = 10
#: More flagged requests than expected of clean traffic are no chance from so many standard deviations on, and so many.
FLAGGED_SURPRISE, FLAGGED_LEAST = 4.0, 3


@dataclass(frozen=True, slots=True)
class QueueNow:
    """The queue now and over the span.

    Attributes
    ----------
    counts : Counts
    arrived, answered : list of int
        Per interval of the span.
    by_reviewer : list of Share
        Of the span.
    """

    counts: Counts
    arrived: list[int]
    answered: list[int]
    by_reviewer: list[Share]

    @property
    def waiting(self) -> int:
        """Items that nobody has answered."""
        return self.counts.by_state[State.PENDING] + self.counts.by_state[State.CLAIMED]


def read_queue(activity: Activity, counts: Counts, history: History, model: str | None) -> QueueNow:
    """Return what the queue says of the span of a history."""
    edges = [datetime.fromtimestamp(edge, UTC) for edge in history.edges]
    step = timedelta(seconds=history.span.step)
    first, last = edges[0], edges[-1] + timedelta(microseconds=1)

    def column(counted: dict[int, int]) -> list[int]:
        numbers = [0] * history.span.points
        for place, count in counted.items():  # what came in the last, longer interval
            numbers[min(place, len(numbers) - 1)] += count
        return numbers

    return QueueNow(
        counts,
        column(activity.arrivals_per(step, first, last, model)),
        column(activity.answers_per(step, first, last, model)),
        activity.by_reviewer(first, last, model),
    )


@dataclass(frozen=True, slots=True)
class Drift:
    """How much more frequent low p-values are in clean traffic than calibrated.

    Attributes
    ----------
    factor : float
        1 = as calibrated.
    surprise : float
        Standard deviations away from 1, if requests were independent.
    """

    factor: float
    surprise: float


def _drift(low: float, clean: float) -> Drift | None:
    if clean < DRIFT_LEAST:
        return None
    spread = math.sqrt(LOW_SHARE * (1 - LOW_SHARE) * clean)
    return Drift(low / (LOW_SHARE * clean), (low - LOW_SHARE * clean) / spread)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everything that the page shows in figures, over one span.

    Attributes
    ----------
    history : History
    queue : QueueNow
    expected_rate : float or None
        Share of clean requests that are flagged by mistake, as measured when the guard was fitted.
    last_round : Round or None
        The newest retraining.
    active : tuple of str
        Digests that ACTIVE names, of every folder of bundles.
    has_metrics : bool
        False if the page was given no metrics address.
    contradictions : Contradictions or None
        Among the clean images of the active bundle.
    """

    history: History
    queue: QueueNow
    expected_rate: float | None = None
    last_round: Round | None = None
    active: tuple[str, ...] = ()
    has_metrics: bool = True
    contradictions: Contradictions | None = None

    @property
    def verdicts(self) -> dict[str, int]:
        """Requests by verdict."""
        return {verdict: round(self.history.total("guard_verdicts_total", verdict)) for verdict in OUTCOMES}

    @property
    def received(self) -> int:
        """Requests of all verdicts."""
        return sum(self.verdicts.values())

    @property
    def flagged(self) -> int:
        """Requests that were judged poisoned."""
        return self.verdicts["poisoned"]

    @property
    def judged(self) -> int:
        """Requests with a verdict of the guard."""
        return self.verdicts["clean"] + self.verdicts["poisoned"]

    @property
    def flagged_share(self) -> float | None:
        """Share of the judged requests that were flagged."""
        return self.flagged / self.judged if self.judged else None

    @property
    def expected(self) -> float | None:
        """Requests that would be flagged if all were clean; None if the rate is not known."""
        return None if self.expected_rate is None else self.expected_rate * self.judged

    @property
    def surplus(self) -> bool:
        """True if more were flagged than chance explains, were all requests clean."""
        if self.expected is None:
            return False
        return self.flagged - self.expected > max(FLAGGED_LEAST, FLAGGED_SURPRISE * math.sqrt(self.expected))

    @property
    def drift(self) -> Drift | None:
        """Of the whole span; None with too few clean requests."""
        total = self.history.total
        if not self._counts_low:
            return None
        return _drift(total("guard_unflagged_low_total"), total("guard_verdicts_total", "clean"))

    @property
    def drift_lately(self) -> Drift | None:
        """Of the last intervals; None with too few clean requests."""
        history = self.history
        if not self._counts_low:
            return None
        last = -_TRAILING
        low, clean = (
            sum(rate or 0.0 for rate in rates[last:]) * history.span.step
            for rates in (history.rate("guard_unflagged_low_total"), history.rate("guard_verdicts_total", "clean"))
        )
        return _drift(low, clean)

    @property
    def _counts_low(self) -> bool:
        return any(key.name == "guard_unflagged_low_total" for key in self.history.totals)

    def milliseconds(self, stage: str, share: float) -> float | None:
        """Return a quantile of what a stage took per batch."""
        seconds = self.history.quantile(stage, share)
        return None if seconds is None else 1000 * seconds


#: Colours of the verdicts.
_TONES = {"poisoned": "poison", "bypassed": "warn", "rejected": "accent", "failed": "strong"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart: a name, a colour's name, and a value per interval (None = a gap)."""

    name: str
    tone: str
    values: list[float | None]
    is_dashed: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart, and what it shows in words."""

    id: str
    title: str
    #: What the numbers are, after the title.
    unit: str
    lines: list[Line]
    summary: str
    #: Digits after the point.
    digits: int = 1
    #: Bars side by side instead of lines.
    is_bars: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return what the page's script draws."""
        lines = [
            {
                "name": line.name,
                "tone": line.tone,
                "dashed": line.is_dashed,
                "values": [None if value is None else float(f"{value:.4g}") for value in line.values],
            }
            for line in self.lines
        ]
        return {"id": self.id, "unit": self.unit, "digits": self.digits, "bars": self.is_bars, "lines": lines}


def charts(numbers: Numbers) -> list[Chart]:
    """Return all charts."""
    history, queue = numbers.history, numbers.queue
    minute = 60.0
    verdicts = {verdict: history.rate("guard_verdicts_total", verdict) for verdict in OUTCOMES}
    clean, poisoned = verdicts["clean"], verdicts["poisoned"]
    judged = [None if a is None or b is None else a + b for a, b in zip(clean, poisoned, strict=True)]
    per_minute = {verdict: _times(minute, values) for verdict, values in verdicts.items()}
    received = add_up(list(per_minute.values()))
    share = _times(100, history.ratio(poisoned, judged, SHARE_LEAST))
    drift = _times(1 / LOW_SHARE, _trailing_ratio(history.rate("guard_unflagged_low_total"), clean, history.span.step))
    told = [verdict for verdict in OUTCOMES[1:] if verdict != "poisoned" or not history.hides_flagged]
    points, while_drift = history.span.points, _step_text(_TRAILING * history.span.step)
    found = [
        Chart(
            "flagged",
            "Flagged",
            "% of judged requests",
            [Line("flagged", "poison", share)],
            _range("flagged", share, "{:.3g} %", "No request was judged."),
            2,
        ),
        Chart(
            "requests",
            "Requests",
            "per minute",
            [Line("requests", "accent", received)],
            _range("requests", received, "{:,.0f}", "No request came."),
        ),
        Chart(
            "verdicts",
            "Verdicts other than clean",
            "per minute",
            [Line(verdict, _TONES[verdict], per_minute[verdict]) for verdict in told],
            ", ".join(f"{numbers.verdicts[verdict]:,} {verdict}" for verdict in told) + ".",
            2,
        ),
        _latency(numbers),
        Chart(
            "drift",
            "Drift of clean traffic",
            f"times as many low p-values as calibrated, over {while_drift}",
            [Line("drift", "accent", drift), Line("as calibrated", "soft", [1.0] * points, is_dashed=True)],
            _range("drift", drift, "{:.2f}", f"Fewer than {DRIFT_LEAST} clean requests in {while_drift}."),
            2,
        ),
        Chart(
            "queue",
            "Queue",
            f"inputs per {_step_text(history.span.step)}",
            [
                Line("came in", "poison", [float(count) for count in queue.arrived]),
                Line("answered", "alarm", [float(count) for count in queue.answered]),
            ],
            f"{sum(queue.arrived):,} came in, {sum(queue.answered):,} answers were given.",
            0,
            is_bars=True,
        ),
    ]
    if history.hides_flagged:
        return [chart for chart in found if chart.id not in ("flagged", "drift")]
    if numbers.expected_rate is not None:
        expected: list[float | None] = [100 * numbers.expected_rate] * points
        found[0].lines.append(Line("expected of clean traffic", "soft", expected, is_dashed=True))
    return found


def _latency(numbers: Numbers) -> Chart:
    history = numbers.history
    lines = [
        Line(f"{stage} p{round(100 * share)}", tone, _times(1000, history.quantiles(stage, share)), is_dashed)
        for stage, tone in (("guard", "poison"), ("handler", "accent"))
        for share, is_dashed in ((0.5, False), (0.99, True))
    ]
    quantiles = []
    for stage in ("guard", "handler"):
        half, most = numbers.milliseconds(stage, 0.5), numbers.milliseconds(stage, 0.99)
        if half is not None and most is not None:
            quantiles.append(f"{stage} {half:.3g} ms (p50), {most:.3g} ms (p99)")
    summary = f"{'; '.join(quantiles)}." if quantiles else "No request was timed."
    return Chart("latency", "Latency", "ms per batch", lines, summary[0].upper() + summary[1:], 2)


def _times(factor: float, values: Iterable[float | None]) -> list[float | None]:
    return [None if value is None else factor * value for value in values]


def _trailing_ratio(above: list[float | None], below: list[float | None], step: float) -> list[float | None]:
    """Return above / below over the intervals up to each; None where nothing is known of it, or of too few."""
    found: list[float | None] = []
    for place, now in enumerate(below):
        begin = max(0, place + 1 - _TRAILING)
        top, bottom = (sum(rate or 0.0 for rate in rates[begin : place + 1]) for rates in (above, below))
        found.append(top / bottom if now is not None and bottom * step >= DRIFT_LEAST else None)
    return found


def _range(name: str, values: list[float | None], form: str, nothing: str) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return nothing
    low, high, last = (form.format(value) for value in (min(known), max(known), known[-1]))
    return f"{name.capitalize()} between {low} and {high}; last {last}."


def _step_text(seconds: float) -> str:
    if seconds < 120:
        return "minute"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.0f} h"


def milliseconds(value: float | None) -> str:
    """Return a time in ms with the digits that it is worth."""
    if value is None:
        return "–"
    return f"{value:.2f} ms" if value < 10 else f"{value:,.0f} ms"
