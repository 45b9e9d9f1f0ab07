"""What the guard's metrics said over the last hour, day or week: the noun that the status page is drawn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of time that ends now, and the intervals that it is shown in.

    Attributes
    ----------
    name : str
    seconds, step : float
        Of the whole, and of one interval.
    """

    name: str
    seconds: float
    step: float

    @property
    def points(self) -> int:
        """Number of intervals."""
        return round(self.seconds / self.step)

    def edges(self, now: float) -> list[float]:
        """Return the begin of the first interval and the ends of all: whole multiples of the step, the last is now.

        Seconds since 1970. The last interval is at least a quarter of a step long, so that there is something in it.
        """
        last = now - 0.25 * self.step
        last -= last % self.step
        return [last - self.step * (self.points - 1 - place) for place in range(self.points)] + [now]


SPANS = {
    span.name: span for span in (Span("hour", 3600, 60), Span("day", 86400, 900), Span("week", 7 * 86400, 2 * 3600))
}

#: Counters that the page is drawn from, and their labels that it tells apart; all others are added up.
WANTED: Mapping[str, tuple[str, ...]] = {
    "guard_verdicts_total": ("verdict",),
    "guard_bypassed_total": ("reason",),
    "guard_unflagged_low_total": (),
    "guard_queued_total": (),
    "guard_shed_total": ("reason",),
    "guard_detector_fired_total": ("detector",),
    "guard_bundle_swaps_total": ("outcome",),
    "guard_stage_duration_seconds_bucket": ("stage", "le"),
}
#: Says which bundle a server uses.
BUNDLE_INFO = "guard_bundle_info"


class Key(NamedTuple):
    """A counter and the values of the labels that the page tells apart."""

    name: str
    values: tuple[str, ...] = ()


_CLEAN, _POISONED = (Key("guard_verdicts_total", (verdict,)) for verdict in ("clean", "poisoned"))
#: Counters that tell how many requests were flagged, beside that of the verdicts.
_ABOUT_FLAGGED = (
    "guard_unflagged_low_total",
    "guard_queued_total",
    "guard_shed_total",
    "guard_detector_fired_total",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """What was counted over one span. A value that nobody knows is None, never 0.

    Attributes
    ----------
    span : Span
    edges : list of float
        Begin of the first interval, then the end of each; seconds since 1970.
    rates : dict of Key to list of float or None
        Per second, one value per interval.
    totals : dict of Key to float
        Over the whole span, as far as it is known.
    since : float or None
        Begin of what is known; None = nothing is.
    read_from : str
        Where the numbers come from, in words.
    away : tuple of str
        One line for each place that does not answer now.
    is_away : bool
        True if none answers.
    models : tuple of str
    in_use : tuple of str
        Digests of the bundles that servers say they use.
    hides_flagged : bool
        See `without_flagged`.
    """

    span: Span
    edges: list[float]
    rates: Mapping[Key, list[float | None]] = field(default_factory=dict)
    totals: Mapping[Key, float] = field(default_factory=dict)
    since: float | None = None
    read_from: str = ""
    away: tuple[str, ...] = ()
    is_away: bool = False
    models: tuple[str, ...] = ()
    in_use: tuple[str, ...] = ()
    hides_flagged: bool = False

    def total(self, name: str, *values: str) -> float:
        """Return a counter's total; with fewer values than it has labels, of all series that begin with them."""
        return sum(self.totals[key] for key in _matching(self.totals, name, values))

    def parts(self, name: str, *values: str) -> dict[str, float]:
        """Return a counter's totals by the label that comes after the given values."""
        place = len(values)
        return {key.values[place]: self.totals[key] for key in _matching(self.totals, name, values)}

    def rate(self, name: str, *values: str) -> list[float | None]:
        """Return a counter's rate per interval; as `total`."""
        empty: list[float | None] = [None] * self.span.points
        return add_up([self.rates[key] for key in _matching(self.rates, name, values)]) or empty

    def ratio(self, above: Iterable[float | None], below: Iterable[float | None], least: float) -> list[float | None]:
        """Return above / below per interval; None where fewer than `least` were counted below."""
        enough = least / self.span.step
        return [
            None if top is None or bottom is None or bottom < enough or bottom == 0 else top / bottom
            for top, bottom in zip(above, below, strict=True)
        ]

    def quantiles(self, stage: str, share: float) -> list[float | None]:
        """Return a quantile of the seconds that a stage took, per interval."""
        name = "guard_stage_duration_seconds_bucket"
        keys = sorted(_matching(self.rates, name, (stage,)), key=lambda key: float(key.values[1]))
        bounds = [float(key.values[1]) for key in keys]
        columns = zip(*(self.rates[key] for key in keys), strict=True)
        return [_quantile(bounds, column, share) for column in columns] or [None] * self.span.points

    def quantile(self, stage: str, share: float) -> float | None:
        """Return a quantile of the seconds that a stage took, over the whole span."""
        counts = self.parts("guard_stage_duration_seconds_bucket", stage)
        bounds = sorted(counts, key=float)
        return _quantile([float(bound) for bound in bounds], [counts[bound] for bound in bounds], share)


def without_flagged(history: History) -> History:
    """Return a history that does not say how many requests were flagged: they count as clean.

    For reviewers of a queue with an audit sample: what came into the queue and was not flagged is an audit.
    """

    def shown(key: Key) -> Key:
        return _CLEAN if key == _POISONED else key

    rates: dict[Key, list[float | None]] = {}
    totals: dict[Key, float] = {}
    for key, column in history.rates.items():
        if key.name not in _ABOUT_FLAGGED:
            rates[shown(key)] = add_up([rates[shown(key)], column]) if shown(key) in rates else column
    for key, total in history.totals.items():
        if key.name not in _ABOUT_FLAGGED:
            totals[shown(key)] = totals.get(shown(key), 0.0) + total
    return replace(history, rates=rates, totals=totals, hides_flagged=True)


class MetricsSource(Protocol):
    """Where the status page has its numbers from."""

    def history(self, span: Span, model: str | None, now: float) -> History:
        """Return what was counted over a span that ends now; of one model, or of all."""
        ...

    def start(self) -> None:
        """Begin to collect, if that is needed."""
        ...

    def stop(self) -> None:
        """Stop collecting."""
        ...


def kept_values(name: str, label: Callable[[str], str]) -> tuple[str, ...]:
    """Return the values of the labels that the page tells apart; bounds of a histogram written in one way.

    Parameters
    ----------
    name : str
        A counter of `WANTED`.
    label : callable
        Name of a label -> its value.
    """
    return tuple(
        f"{float(label(name_of_label)):g}" if name_of_label == "le" else label(name_of_label)
        for name_of_label in WANTED[name]
    )


def add_up(columns: list[list[float | None]]) -> list[float | None]:
    """Return the sum per interval; None where no column has a value."""
    sums: list[float | None] = []
    for values in zip(*columns, strict=True):
        known = [value for value in values if value is not None]
        sums.append(sum(known) if known else None)
    return sums


def _matching(keys: Iterable[Key], name: str, values: tuple[str, ...]) -> list[Key]:
    return [key for key in keys if key.name == name and key.values[: len(values)] == values]


def _quantile(bounds: list[float], counts: Iterable[float | None], share: float) -> float | None:
    """Return a quantile of a histogram with cumulative counts, as Prometheus' histogram_quantile estimates it."""
    known = [count for count in counts if count is not None]
    if len(known) != len(bounds) or len(bounds) < 2 or known[-1] <= 0:
        return None
    wanted = share * known[-1]
    below, lower = 0.0, 0.0
    for bound, count in zip(bounds, known, strict=True):
        if count >= wanted:
            if bound == float("inf"):
                return lower
            return bound if count == below else lower + (bound - lower) * (wanted - below) / (count - below)
        below, lower = count, bound
    return lower
