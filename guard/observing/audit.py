"""Counts compared: what clients, metrics and queue say of the same requests, and where they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from guard.errors import ConfigError
from guard.observing.client_log import Noted, read_client_log
from guard.observing.scrape import Prometheus, check_url
from guard.observing.window_counts import WindowCounts, between, totals_since_start
from guard.relabel.activity import Activity, Arrival
from guard.relabel.queue import Queue
from guard.telemetry import OUTCOMES

COLUMNS = ("received", *OUTCOMES)
#: Rows of the queue are looked for so long before and after the window: they carry another clock's time.
_AROUND = timedelta(minutes=10)
#: Request ids that are named; of more, only the number is told.
_NAMED = 5


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What every source counted, and whether that is the same.

    Attributes
    ----------
    start, end : datetime
    model : str or None
        None: all models.
    sources : dict of str to dict
        Source -> count by column of `COLUMNS`; a column that a source cannot know is left out.
    differences : dict of str to dict
        "A - B" -> difference by column.
    allowed : int
        A difference up to here says nothing: requests near an end of the window, unanswered ones, and `--slack`.
    problems : list of str
        What does not agree, one line each.
    notes : list of str
        What a reader must know, one line each.
    """

    start: datetime
    end: datetime
    model: str | None
    sources: dict[str, dict[str, int]]
    differences: dict[str, dict[str, int]]
    allowed: int
    problems: list[str]
    notes: list[str]

    @property
    def balances(self) -> bool:
        """True if nothing differs by more than is allowed."""
        return not self.problems

    def lines(self) -> list[str]:
        """Return the report for people."""
        report = [
            f"{_shown(self.start)} to {_shown(self.end)}, {'all models' if self.model is None else self.model}",
            "received = clean + poisoned + bypassed + rejected + failed",
            "",
        ]
        rows: list[tuple[str, ...]] = [("", *COLUMNS)]
        for name, counts in (*self.sources.items(), *self.differences.items()):
            signed = "{:+,}" if name in self.differences else "{:,}"
            cells = [signed.format(counts[column]) if column in counts else "-" for column in COLUMNS]
            rows.append((name, *("0" if cell == "+0" else cell for cell in cells)))
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        for name, *cells in rows:
            right = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
            report.append(f"{name.ljust(widths[0])}  {right}".rstrip())
        report += ["", *(f"note: {note}" for note in self.notes), *(f"differs: {problem}" for problem in self.problems)]
        return [*report, "The counts agree." if self.balances else "The counts do not agree."]

    def as_dict(self) -> dict[str, Any]:
        """Return the report for programs."""
        return {
            "from": self.start.isoformat(),
            "to": self.end.isoformat(),
            "model": self.model,
            "balances": self.balances,
            "sources": self.sources,
            "differences": self.differences,
            "allowed": self.allowed,
            "problems": self.problems,
            "notes": self.notes,
        }


@dataclass(slots=True)
class _Findings:
    sources: dict[str, dict[str, int]] = field(default_factory=dict)
    differences: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def audit(
    start: datetime,
    end: datetime,
    *,
    client_log: Path | None = None,
    queue: Queue | None = None,
    metrics_urls: Sequence[str] = (),
    prometheus: str | None = None,
    model: str | None = None,
    slack: int = 0,
) -> AuditReport:
    """Compare what clients, metrics and queue say of the requests of one window.

    Parameters
    ----------
    start, end : datetime
        Aware; `start` counts in, `end` does not.
    client_log : Path, optional
        See `read_client_log`. Where there is one, a request belongs to the window by the client's time.
    queue : Queue, optional
    metrics_urls : sequence of str
        Metrics addresses; their totals since the servers' start are compared with the window.
    prometheus : str, optional
        Address of a Prometheus; instead of `metrics_urls`.
    model : str, optional
        Only this model's requests.
    slack : int
        Requests that may differ besides the known ones, as after a worker was killed (up to a second of its counts).

    Raises
    ------
    ConfigError
        If the window is none, or there is nothing to look at.
    DataError, ObservingError, QueueUnavailable
        If a source cannot be read.
    """
    if start.tzinfo is None or end.tzinfo is None or not start < end:
        raise ConfigError(f"the window must end after it begins, got {start.isoformat()} to {end.isoformat()}.")
    if metrics_urls and prometheus is not None:
        raise ConfigError("--metrics-url and --prometheus answer the same question. Give one of them.")
    if client_log is None and queue is None and not metrics_urls and prometheus is None:
        raise ConfigError("there is nothing to compare: give --client-log, --queue, --prometheus or --metrics-url.")
    counted: WindowCounts | None = None
    if prometheus is not None:
        counted = between(Prometheus(check_url(prometheus, "--prometheus")), start, end, model)
    elif metrics_urls:
        counted = totals_since_start(metrics_urls, model)
    log = None if client_log is None else [noted for noted in read_client_log(client_log) if _is_of(noted, model)]
    rows = None if queue is None else list(Activity(queue).arrivals(start - _AROUND, end + _AROUND, model))
    findings = _Findings()
    inside = None if log is None else [noted for noted in log if start <= noted.time < end]
    allowed = slack
    if slack:
        findings.notes.append(f"{slack} requests may differ, as --slack says")
    if counted is not None:
        allowed += _note_edges(findings, counted, inside, start, end)
    if inside is not None:
        _enter_client(findings, inside, counted)
    if counted is not None:
        findings.sources["metrics"] = {"received": counted.requests.total(), **counted.verdicts}
    audits = [row for row in rows or () if row.is_audit]
    if rows is not None:
        rows = [row for row in rows if not row.is_audit]
        findings.sources["queue"] = {"poisoned": len(_rows_inside(rows, log, inside, start, end))}
        _enter_audits(findings, _rows_inside(audits, log, inside, start, end), log, counted, allowed)
    _check_sums(findings, allowed)
    if inside is not None and counted is not None:
        unanswered = sum(noted.kind == "unanswered" for noted in inside)
        _compare(findings, "metrics", "client log", allowed, more_allowed=unanswered)
    if counted is not None:
        _check_flagged(findings, counted, allowed, has_queue=rows is not None)
    if rows is not None and queue is not None and inside is not None and log is not None:
        _match(findings, log, inside, rows, (start, end), _without_row(counted, queue, model))
    if len(findings.sources) == 1:
        findings.notes.append("there is one source only: its sums were checked, with nothing to compare them with")
    return AuditReport(
        start, end, model, findings.sources, findings.differences, allowed, findings.problems, findings.notes
    )


def _note_edges(
    findings: _Findings, counted: WindowCounts, inside: list[Noted] | None, start: datetime, end: datetime
) -> int:
    """Return how many requests lie so near an end of the window that the metrics may count them on its other side."""
    edge = timedelta(seconds=counted.edge_s)
    at_edges = 0
    if inside is not None:
        at_edges = sum(
            (counted.has_begin and noted.time < start + edge) or noted.time >= end - edge for noted in inside
        )
    near = max(counted.near_ends, at_edges)
    if near:
        findings.notes.append(
            f"{near} requests within {counted.edge_s:.0f} s of an end of the window may be counted on either side of it"
        )
    findings.notes += counted.notes
    findings.notes.append("a worker that is killed may lose up to a second of its counts: see --slack")
    return near


def _enter_client(findings: _Findings, inside: list[Noted], counted: WindowCounts | None) -> None:
    kinds = Counter(noted.kind for noted in inside)
    outside = _not_of_the_guard(inside, counted)
    for (kind, status), number in sorted(outside.items()):
        kinds[kind] -= number
        findings.notes.append(
            f"{number} answers with status {status} came from the server itself: the guard has not seen these requests"
        )
    if kinds["unanswered"]:
        findings.notes.append(f"{kinds['unanswered']} requests of the client log have no answer; the guard may know")
    if kinds["unguarded"]:
        findings.problems.append(
            f"{kinds['unguarded']} answers of the client log have a status below 400 and no Guard-Verdict: "
            "the guard was not in front of the model"
        )
    counts = {kind: kinds[kind] for kind in OUTCOMES}
    left_out = kinds["unanswered"] + kinds["unguarded"] + outside.total()
    findings.sources["client log"] = {"received": len(inside) - left_out, **counts}


def _not_of_the_guard(inside: list[Noted], counted: WindowCounts | None) -> Counter[tuple[str, int]]:
    """Return answers that the server gave by itself (wrong key, too large, full, worker gone), by kind and status.

    They carry no verdict, and are more than the guard counted with that status.
    """
    if counted is None:
        return Counter()
    answers = Counter(noted.status for noted in inside)
    bare = Counter((noted.kind, noted.status) for noted in inside if not noted.verdict and noted.status >= 400)
    excess = {key: min(number, answers[key[1]] - counted.requests[str(key[1])]) for key, number in bare.items()}
    return Counter({key: number for key, number in excess.items() if number > 0})


def _enter_audits(
    findings: _Findings,
    audits: list[Arrival],
    log: list[Noted] | None,
    counted: WindowCounts | None,
    allowed: int,
) -> None:
    """Note how many clean requests are in the queue as audits, and check that metrics and answers say the same."""
    if counted is not None:
        off = len(audits) - counted.audited
        if not -allowed <= off <= allowed + counted.audits_unavailable:
            findings.problems.append(f"audits: queue {len(audits):,} rows, metrics {counted.audited:,} audited")
    if not audits:
        return
    findings.notes.append(f"{len(audits):,} clean requests are in the queue as well: they are the audit sample")
    kinds = {noted.request_id: noted.kind for noted in log or ()}
    other = [row.request_id for row in audits if kinds.get(row.request_id, "clean") != "clean"]
    if other:
        findings.problems.append(f"{_named(other)}: an audit in the queue, and not clean in the client log")
    if log is not None and any(kinds):
        strangers = [row.request_id for row in audits if row.request_id not in kinds]
        if strangers:
            findings.problems.append(f"{_named(strangers)}: an audit in the queue, and not in the client log")


def _rows_inside(
    rows: list[Arrival], log: list[Noted] | None, inside: list[Noted] | None, start: datetime, end: datetime
) -> list[Arrival]:
    """Return the rows of the window: by the client's time where it noted the request, else by the queue's."""
    in_log = {noted.request_id for noted in log or ()}
    in_window = {noted.request_id for noted in inside or ()}
    return [
        row
        for row in rows
        if row.request_id in in_window or (row.request_id not in in_log and start <= row.received_at < end)
    ]


def _check_sums(findings: _Findings, allowed: int) -> None:
    for name, counts in findings.sources.items():
        if "received" not in counts:
            continue
        unknown = counts.keys() - set(COLUMNS)
        for verdict in sorted(unknown):
            findings.problems.append(f"{name}: {counts[verdict]:,} requests have the unknown verdict {verdict!r}")
        off = counts["received"] - sum(counts[verdict] for verdict in OUTCOMES)
        if abs(off) > allowed:
            findings.problems.append(f"{name}: received is {off:+,} off the sum of the verdicts")


def _compare(findings: _Findings, left: str, right: str, allowed: int, *, more_allowed: int = 0) -> None:
    left_counts, right_counts = findings.sources[left], findings.sources[right]
    differences = {column: left_counts[column] - right_counts[column] for column in COLUMNS}
    findings.differences[f"{left} - {right}"] = differences
    for column, difference in differences.items():
        if not -allowed <= difference <= allowed + more_allowed:
            findings.problems.append(f"{column}: {left} {left_counts[column]:,}, {right} {right_counts[column]:,}")


def _check_flagged(findings: _Findings, counted: WindowCounts, allowed: int, *, has_queue: bool) -> None:
    """Check that every flagged request was queued or counted as shed, and that the queue holds what was queued."""
    shed = counted.shed.total()
    if counted.queued or shed:
        poisoned = counted.verdicts["poisoned"]
        off = poisoned - counted.queued - shed
        if abs(off) > allowed:
            findings.problems.append(f"metrics: {poisoned:,} poisoned, but {counted.queued:,} queued and {shed:,} shed")
        if shed:
            reasons = ", ".join(f"{reason} {number:,}" for reason, number in sorted(counted.shed.items()) if number)
            findings.notes.append(f"{shed:,} flagged requests are not in the queue: {reasons}")
    elif counted.verdicts["poisoned"] and not has_queue:
        findings.notes.append("the server hands flagged requests to no queue")
    if has_queue:
        difference = findings.sources["queue"]["poisoned"] - counted.queued
        findings.differences["queue - metrics' queued"] = {"poisoned": difference}
        # What timed out may have been stored all the same.
        if not -allowed <= difference <= allowed + counted.shed["unavailable"]:
            rows = findings.sources["queue"]["poisoned"]
            findings.problems.append(f"poisoned: queue {rows:,} rows, metrics {counted.queued:,} queued")


def _without_row(counted: WindowCounts | None, queue: Queue, model: str | None) -> int:
    """Return how many flagged requests may rightly have no row in the queue."""
    return counted.shed.total() if counted is not None else Activity(queue).turned_away(model)


def _match(
    findings: _Findings,
    log: list[Noted],
    inside: list[Noted],
    rows: list[Arrival],
    window: tuple[datetime, datetime],
    may_lack_row: int,
) -> None:
    """Look up every flagged request of the client log in the queue, and every row of the queue in the log."""
    if not any(noted.request_id for noted in inside):
        findings.notes.append("the client log has no request ids: single requests cannot be looked up")
        return
    flagged = [noted for noted in inside if noted.kind == "poisoned"]
    in_queue = {row.request_id for row in rows}
    lost = [noted for noted in flagged if noted.request_id not in in_queue]
    promised = [noted.request_id for noted in lost if noted.review == "queued"]
    untold = [noted.request_id for noted in lost if not noted.review]
    if promised:
        findings.problems.append(f"{_named(promised)}: the answer says queued, the queue has no such request")
    if len(untold) > may_lack_row:
        findings.problems.append(
            f"{_named(untold)}: flagged, and not in the queue; it turned away {may_lack_row} at most"
        )
    seen: dict[str, Noted] = {noted.request_id: noted for noted in log}
    rows_inside = [row for row in rows if window[0] <= row.received_at < window[1]]
    strangers = [row.request_id for row in rows_inside if row.request_id not in seen]
    if strangers:
        findings.problems.append(f"{_named(strangers)}: in the queue, and not in the client log")
    other = [
        noted.request_id for noted in inside if noted.request_id in in_queue and noted.kind in ("clean", "bypassed")
    ]
    if other:
        findings.problems.append(f"{_named(other)}: in the queue, and not flagged in the client log")
    repeated = [name for name, number in Counter(noted.request_id for noted in inside).items() if number > 1 and name]
    if repeated:
        findings.notes.append(f"{_named(repeated)}: more than once in the client log")


def _named(ids: Iterable[str]) -> str:
    ids = list(ids)
    shown = ", ".join(ids[:_NAMED])
    more = f" and {len(ids) - _NAMED:,} more" if len(ids) > _NAMED else ""
    return f"{len(ids):,} {'request' if len(ids) == 1 else 'requests'} ({shown}{more})"


def _is_of(noted: Noted, model: str | None) -> bool:
    return model is None or noted.model in ("", model)


def _shown(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"
