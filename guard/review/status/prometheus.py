"""The history of the guard's metrics, asked from a Prometheus: it survives restarts of the page."""

from __future__ import annotations

import json
import threading
import time

from guard.errors import ObservingError
from guard.observing.scrape import Prometheus, Series, check_url
from guard.review.status.history import BUNDLE_INFO, WANTED, History, Key, Span, add_up, kept_values
from guard.telemetry import label_value

#: A rate is taken over at least so many seconds, so that two scrapes a minute are enough.
_LEAST_WINDOW_S = 120.0
#: Whether what is scraped answers; jobs are named as `guard serve` writes them.
_UP = 'up{job=~"guard.*"}'
#: Answers are used again for so long, whoever asks.
_KEPT_S = 4.0


class PrometheusSource:
    """Asks a Prometheus for every history. Counts are its estimates (`increase()`), rounded where they are shown.

    Parameters
    ----------
    url : str

    Raises
    ------
    ConfigError
        If that is no address.
    """

    def __init__(self, url: str) -> None:
        self._prometheus = Prometheus(check_url(url, "--prometheus"))
        self._kept: dict[tuple[str, str | None], tuple[float, History]] = {}
        self._away_since: float | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Prometheus collects by itself."""

    def stop(self) -> None:
        """Nothing was begun."""

    def history(self, span: Span, model: str | None, now: float) -> History:
        """Return what was counted over a span that ends now."""
        with self._lock:  # several who look at once ask once
            asked_at, known = self._kept.get((span.name, model), (0.0, None))
            if known is not None and time.monotonic() - asked_at < _KEPT_S:
                return known
            try:
                found = self._ask(span, model, now)
                self._away_since = None
            except (ObservingError, ValueError) as error:
                self._away_since = self._away_since or now
                since = time.strftime("%H:%M", time.gmtime(self._away_since))
                away = f"{str(error).rstrip('.')}, since {since} UTC"
                found = History(
                    span=span, edges=span.edges(now), read_from=self._prometheus.url, away=(away,), is_away=True
                )
            self._kept[span.name, model] = (time.monotonic(), found)
            return found

    def _ask(self, span: Span, model: str | None, now: float) -> History:
        edges = span.edges(now)
        selector = "" if model is None else f"{{model={json.dumps(label_value(model))}}}"
        window = max(span.step, _LEAST_WINDOW_S)
        rates: dict[Key, list[float | None]] = {}
        totals: dict[Key, float] = {}
        for name, labels in WANTED.items():
            by = f"sum by ({', '.join(labels)})"
            drawn = self._prometheus.over(
                f"{by} (rate({name}{selector}[{window:.0f}s]))", edges[1], edges[-2], span.step
            )
            newest = self._prometheus.at(f"{by} (rate({name}{selector}[{window:.0f}s]))", now)
            summed = self._prometheus.at(f"{by} (increase({name}{selector}[{span.seconds:.0f}s]))", now)
            for series in drawn.keys() | newest.keys():
                at = {round(when): rate for when, rate in drawn.get(series, [])}
                column = [at.get(round(edge)) for edge in edges[1:-1]] + [newest.get(series)]
                key = _key(name, series)
                rates[key] = add_up([rates[key], column]) if key in rates else column
            for series, total in summed.items():
                key = _key(name, series)
                totals[key] = totals.get(key, 0.0) + total
        scored = [rate for key, column in rates.items() if key.name == "guard_verdicts_total" for rate in [column]]
        seen = [edge for edge, rate in zip(edges, add_up(scored), strict=False) if rate is not None]
        down = [series.label("instance") for series, up in self._prometheus.at(_UP, now).items() if up == 0]
        in_use = self._prometheus.at(f"{BUNDLE_INFO}{selector} == 1", now)
        models = self._prometheus.at(
            f"count by (model) (last_over_time(guard_verdicts_total[{span.seconds:.0f}s]))", now
        )
        away = [f"{self._prometheus.url} cannot reach {name}" for name in sorted(down)]
        has_now = any(column[-1] is not None for column in scored)
        if not has_now and not away:
            away = [f"{self._prometheus.url} has nothing new of the guard: does it scrape the metrics address?"]
        return History(
            span=span,
            edges=edges,
            rates=rates,
            totals=totals,
            since=seen[0] if seen else None,
            read_from=f"Prometheus at {self._prometheus.url}",
            away=tuple(away),
            is_away=not has_now,
            models=tuple(sorted(series.label("model") for series in models)),
            in_use=tuple(sorted({series.label("digest") for series in in_use})),
        )


def _key(name: str, series: Series) -> Key:
    return Key(name, kept_values(name, series.label))
