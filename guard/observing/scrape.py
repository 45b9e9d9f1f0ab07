"""Counters read from metrics endpoints, or from a Prometheus that keeps them: exact values, with resets handled."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from guard.errors import ConfigError, ObservingError
from guard.telemetry import label_value

#: Bytes of one answer at most; a page of metrics has a few hundred KB.
_LARGEST_ANSWER = 64 * 2**20
#: Raw samples are asked for in parts of so many seconds, so that no answer grows too large.
_PART_S = 6 * 3600.0


class Series(NamedTuple):
    """One time series: the metric's name, and its labels sorted by name."""

    name: str
    labels: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, labels: Mapping[str, str]) -> Series:
        """Return the series of a name and its labels."""
        return cls(name, tuple(sorted(labels.items())))

    def label(self, name: str) -> str:
        """Return a label's value; "" where it has none, as Prometheus has it."""
        return dict(self.labels).get(name, "")


def parse(text: str) -> dict[Series, float]:
    """Return the guard's series in a page of metrics (Prometheus' text format); all others are passed over.

    Names are kept as they stand: types are not read, as the parser appends `_total` to every counter without it, and
    TorchServe declares a histogram's `_bucket`, `_sum` and `_count` as counters.

    Raises
    ------
    ObservingError
        If it is no such page.
    """
    ours = [line for line in text.splitlines() if line.startswith("guard_")]
    found: dict[Series, float] = {}
    try:
        for family in text_string_to_metric_families("\n".join(ours) + "\n"):
            for sample in family.samples:
                found[Series.of(sample.name, sample.labels)] = float(sample.value)
    except (ValueError, IndexError, KeyError) as error:
        raise ObservingError(f"the metrics cannot be read: {error}. Is it a metrics address?") from error
    return found


def read_endpoint(url: str, timeout_s: float = 3.0) -> dict[Series, float]:
    """Return what one metrics address says now.

    Raises
    ------
    ObservingError
        If it does not answer in time, or says something else than metrics.
    """
    return parse(_get(url, timeout_s).decode("utf-8", "replace"))


def increase(samples: Sequence[tuple[float, float]], start: float, end: float) -> float:
    """Return by how much a counter grew between two times: exactly, not extrapolated.

    A value below the one before means that the counter began anew at 0, as Prometheus takes it. A counter without a
    value at or before `start` began at 0 as well: the guard makes its series known before it counts.

    Parameters
    ----------
    samples : sequence of (float, float)
        (seconds since 1970, value), in order of time; from a time before `start` if there are such.
    start, end : float
        Seconds since 1970; the last values at or before them count.
    """
    last, total = 0.0, 0.0
    for time, value in samples:
        if time > end:
            break
        if time > start:
            total += value - last if value >= last else value
        last = value
    return total


def check_url(url: str, option: str) -> str:
    """Return an address without its last slash.

    Raises
    ------
    ConfigError
        If it is not http or https with a host.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ConfigError(f"{option} must be an http or https address, got {url!r}. Try http://127.0.0.1:8082/metrics.")
    return url.rstrip("/")


def metrics_address(url: str, option: str = "--metrics-url") -> str:
    """Return the address of a metrics page; `/metrics` is added where only host and port are given."""
    url = check_url(url, option)
    return f"{url}/metrics" if not urllib.parse.urlsplit(url).path else url


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running Prometheus, asked through its HTTP API.

    Attributes
    ----------
    url : str
        Such as `http://127.0.0.1:9090`.
    timeout_s : float
        Seconds that one question may take.
    """

    url: str
    timeout_s: float = 5.0

    def at(self, query: str, time: float) -> dict[Series, float]:
        """Return the value of an expression at one time (seconds since 1970), by series."""
        found = self._ask("query", {"query": query, "time": f"{time:.3f}"})
        return {_series(series): float(series["value"][1]) for series in found}

    def over(self, query: str, start: float, end: float, step: float) -> dict[Series, list[tuple[float, float]]]:
        """Return (time, value) of an expression from start to end; times without a value are left out."""
        parameters = {"query": query, "start": f"{start:.3f}", "end": f"{end:.3f}", "step": f"{step:.3f}"}
        return {_series(series): _points(series["values"]) for series in self._ask("query_range", parameters)}

    def samples(self, chosen: str, start: float, end: float) -> dict[Series, list[tuple[float, float]]]:
        """Return all samples of a selector as they were scraped, start < time <= end, in order of time."""
        found: dict[Series, list[tuple[float, float]]] = {}
        while start < end:
            part_end = min(end, start + _PART_S)
            parameters = {"query": f"{chosen}[{int(1000 * (part_end - start))}ms]", "time": f"{part_end:.3f}"}
            for series in self._ask("query", parameters):
                known = found.setdefault(_series(series), [])
                # Versions before 3 hand out the left end of a range as well.
                known += [point for point in _points(series["values"]) if not known or point[0] > known[-1][0]]
            start = part_end
        return found

    def _ask(self, endpoint: str, parameters: Mapping[str, str]) -> list[Any]:
        body = _get(f"{self.url}/api/v1/{endpoint}?{urllib.parse.urlencode(parameters)}", self.timeout_s)
        try:
            answer = json.loads(body)
            result = answer["data"]["result"]
        except (ValueError, KeyError, TypeError) as error:
            raise ObservingError(f"{self.url} does not answer as Prometheus does. Is it one?") from error
        if not isinstance(result, list):
            raise ObservingError(f"{self.url} does not answer as Prometheus does. Is it one?")
        return result


def selector(metric: str, model: str | None) -> str:
    """Return a Prometheus selector of a metric, of one model or of all."""
    return metric if model is None else f"{metric}{{model={json.dumps(label_value(model))}}}"


def _series(entry: Mapping[str, Any]) -> Series:
    labels = dict(entry["metric"])
    return Series.of(labels.pop("__name__", ""), labels)


def _points(values: Iterable[Sequence[Any]]) -> list[tuple[float, float]]:
    return [(float(time), float(value)) for time, value in values]


def _get(url: str, timeout_s: float) -> bytes:
    request = urllib.request.Request(url, headers={"Accept": "text/plain, application/json"})
    shown = url.partition("?")[0]
    try:
        with _opener.open(request, timeout=timeout_s) as answer:
            body: bytes = answer.read(_LARGEST_ANSWER + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise ObservingError(f"{shown} answered {error.code}: {_why(error)}.") from error
    except (OSError, ValueError) as error:  # ValueError: an answer that is no HTTP
        reason = getattr(error, "reason", None) or error
        text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
        raise ObservingError(f"{shown} does not answer: {text}.") from error
    except http.client.HTTPException as error:
        raise ObservingError(f"{shown} does not answer as a web server does: {type(error).__name__}.") from error
    if len(body) > _LARGEST_ANSWER:
        raise ObservingError(f"{shown} answered with more than {_LARGEST_ANSWER // 2**20} MiB.")
    return body


def _why(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.loads(error.read(4096))["error"]).rstrip(".")
    except (ValueError, KeyError, TypeError, OSError):
        return str(error.reason)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """An address that was named is the one that is read; nobody sends us on to another."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


#: No proxy and no other scheme: what is read is in one's own network.
_opener = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.HTTPHandler(),
    urllib.request.HTTPSHandler(),
    urllib.request.HTTPDefaultErrorHandler(),
    urllib.request.HTTPErrorProcessor(),
    _NoRedirect(),
):
    _opener.add_handler(_handler)
