"""Rehearse a bad night: an attack, a bypass, failures, a dead page and a drift, and what the alerts say of them.

    python benchmarks/rehearsal/rehearse.py          (or `make rehearsal`)

Starts what `guard serve --queue --review --retrain` and `guard observe` start, sends two minutes of requests, lets a
simulated reviewer answer and ask for retraining, and watches the alerts go off and clear. The rules are the shipped
ones with every time divided by 60, so that an hour's window slides by in a minute. Ends with the counts of client,
queue and Prometheus compared, and with nothing left running. Writes docs/pictures/rehearsal.png and
benchmarks/results/rehearsal.csv (alert, cause, fired_after_s, cleared_after_s; empty = did not), and the table in
docs/operations.md with `--runbook docs/operations.md`. About four minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import psutil
from picture import draw
from reviewer import Reviewer
from rules import Firing, faster_rules
from service import MODEL, Service, prepare, running
from traffic import Phase, Span, Traffic, bodies_of

from guard.observing.audit import AuditReport, audit
from guard.observing.collectors import DETECTION_METRICS
from guard.observing.scrape import Prometheus
from guard.relabel.queue import Queue

_MARK, _END = "<!-- rehearsal -->", "<!-- end -->"
PROJECT = Path(__file__).resolve().parent.parent.parent
SEED = 0
PER_SECOND = 60.0
#: Shipped times are divided by this.
FACTOR = 60.0
SCRAPE_SECONDS = 0.5
PHASES = (
    Phase("clean", 24),
    Phase("attack", 12, "triggered", 0.3),
    Phase("clean ", 10),
    Phase("bypass", 6, "broken", 0.1),
    Phase("clean  ", 8),
    Phase("failures", 8, "failing", 0.1),
    Phase("clean   ", 6),
    Phase("page killed", 8),
    Phase("clean    ", 4),
    Phase("drift", 22, "shifted", 1.0),
    Phase("clean     ", 12),
)
#: Clean traffic goes on until every alert has cleared, in parts of this length, so often at most.
TAIL, MOST_TAILS = Phase("until all is clear", 10), 14
#: Which phase is to set off which alert. Not rehearsed: GuardQueueAge (an item must wait for four hours),
#: GuardDepthFloor (the guard here has no early verdicts), GuardBatchMismatch (the handler here keeps requests apart),
#: GuardMissedPoisoned (no audit sample; see audits.py).
CAUSES = {
    "GuardFlagRateJump": "attack",
    "GuardBypass": "bypass",
    "GuardErrorBudgetFastBurn": "failures",
    "GuardErrorBudgetSlowBurn": "failures",
    "GuardTargetDown": "page killed",
    "GuardCleanDrift": "drift",
    "GuardRetrainingRefused": "retraining refused",
}


#: What happens in a moment, at the start of its phase.
MOMENTARY = ("page killed",)


@dataclass(frozen=True, slots=True)
class Delay:
    """What an alert took: seconds from the start of its cause to its firing, from the end to its clearing."""

    alert: str
    cause: str
    fired_after_s: float | None
    cleared_after_s: float | None


def firings(prometheus: Prometheus, start: float, end: float) -> list[Firing]:
    """Return when which alert fired, from Prometheus' own record."""
    found: dict[str, list[float]] = {}
    for series, points in prometheus.over('ALERTS{alertstate="firing"}', start, end, SCRAPE_SECONDS).items():
        found.setdefault(series.label("alertname"), []).extend(time for time, _ in points)
    spans = []
    for alert, times in found.items():
        ordered = sorted(set(times))
        begin = last = ordered[0]
        for moment in ordered[1:]:
            if moment - last > 4 * SCRAPE_SECONDS:
                spans.append(Firing(alert, begin, last))
                begin = moment
            last = moment
        spans.append(Firing(alert, begin, last))
    return sorted(spans, key=lambda span: span.start)


def delays(found: Sequence[Firing], causes: Sequence[Span]) -> list[Delay]:
    """Return, for every rehearsed alert, how long after its cause it fired and cleared."""
    rows = []
    for alert, name in CAUSES.items():
        cause = next((span for span in causes if span.phase.name == name), None)
        after = [entry for entry in found if cause is not None and entry.alert == alert and entry.start >= cause.start]
        fired = after[0].start - cause.start if cause is not None and after else None
        over = None if cause is None else cause.start if name in MOMENTARY else cause.end
        cleared = after[-1].end - over if over is not None and after else None
        rows.append(Delay(alert, name, fired, cleared))
    return rows


def panels_without_data(prometheus: Prometheus, start: float, end: float) -> list[str]:
    """Return the panels of the shipped dashboard with an expression that gives nothing over the rehearsal."""
    board = json.loads((PROJECT / "deploy" / "grafana" / "guard.json").read_text())
    empty = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$model", ".+").replace("$__rate_interval", "10s")
            is_estimate = any(name in expression for name in DETECTION_METRICS)  # none without an audit sample
            if not is_estimate and not prometheus.over(expression, start, end, 1.0):
                empty.append(f"{panel['title']}: {target['expr']}")
    return empty


def kill_page(service: Service) -> None:
    """Kill the review page; `guard serve` is to start it again."""
    for process in service.server.family():
        command = process.cmdline()
        if "review" in command and "--metrics-url" in command and "supervisor.py" not in " ".join(command):
            process.kill()
            return
    raise RuntimeError("there is no review page to kill")


def run(folder: Path, image: Path, results: Path, runbook: Path | None) -> int:
    """Run the rehearsal in a folder; return the exit status."""
    started = time.perf_counter()
    say(f"seed {SEED}; preparing a backdoored network, its guard and its archive")
    images, _ = prepare(folder, SEED)
    log = folder / "client.jsonl"
    rules = faster_rules(folder, FACTOR)
    with running(folder, rules, SCRAPE_SECONDS) as service:
        say(f"everything runs after {time.perf_counter() - started:.0f} s; rules {FACTOR:g} times as fast as shipped")
        prometheus = Prometheus(service.prometheus_url)
        reviewer = Reviewer(
            service.review_url,
            service.queue_url,
            (images.clean, images.clean_labels),
            (images.triggered, images.triggered_labels),
        )
        traffic = Traffic(
            service.inference_url,
            MODEL,
            service.token,
            bodies_of(images.clean, images.triggered, SEED),
            PER_SECOND,
            log,
        )
        wait_until_all_answer(prometheus)
        begin = time.time()
        refused: list[float] = []

        def answer_too_little() -> None:
            reviewer.answer(5)
            reviewer.ask_for_retraining(MODEL)
            refused.append(time.time())

        def answer_much() -> None:
            say(f"the reviewer has answered {reviewer.answer(60)} more inputs")
            reviewer.ask_for_retraining(MODEL)

        offsets = {
            phase.name: sum(phase_before.seconds for phase_before in PHASES[:turn]) for turn, phase in enumerate(PHASES)
        }
        plan: list[tuple[float, Callable[[], None]]] = [
            (offsets["clean "] + 1, answer_too_little),
            (offsets["page killed"], lambda: kill_page(service)),
            (offsets["clean     "] + 2, answer_much),
        ]
        timers = [threading.Timer(0.5 + after, act) for after, act in plan]
        for timer in timers:
            timer.start()
        spans = traffic.send(PHASES, SEED)
        for timer in timers:
            timer.join()
        for turn in range(MOST_TAILS):
            if not firing_now(prometheus):
                break
            spans += traffic.send([TAIL], SEED + 1 + turn)
        time.sleep(3)  # the last counts reach Prometheus
        end = time.time()
        causes = [*spans, *(Span(Phase("retraining refused", 0), moment, moment) for moment in refused)]
        found = firings(prometheus, begin, end)
        rows = delays(found, causes)
        empty = panels_without_data(prometheus, begin, end)
        with Queue.open(service.queue_url) as queue:
            counted = audit(
                datetime.fromtimestamp(begin, UTC),
                datetime.fromtimestamp(end, UTC) + timedelta(seconds=1),
                client_log=log,
                queue=queue,
                prometheus=service.prometheus_url,
                model=MODEL,
            )
        draw(prometheus, spans, found, begin, end, log, image)
        still = firing_now(prometheus)
    write(rows, results)
    if runbook is not None:
        document(rows, runbook)
    return report(rows, empty, counted, still, time.perf_counter() - started)


def wait_until_all_answer(prometheus: Prometheus) -> None:
    """Wait until server, review page and retrainer have been scraped, and nothing fires: then the night may begin."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        up = prometheus.at('up{job=~"guard-.*"}', time.time())
        if len(up) == 3 and all(up.values()) and not firing_now(prometheus):
            time.sleep(2)  # every series was scraped before anything happens
            return
        time.sleep(0.5)
    raise RuntimeError("server, review page and retrainer do not all answer Prometheus")


def firing_now(prometheus: Prometheus) -> list[str]:
    """Return the alerts that fire at this moment."""
    return sorted({sample.label("alertname") for sample in prometheus.at('ALERTS{alertstate="firing"}', time.time())})


def write(rows: Sequence[Delay], file: Path) -> None:
    """Write the delays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("alert", "cause", "fired_after_s", "cleared_after_s"))
        for row in rows:
            writer.writerow(
                (
                    row.alert,
                    row.cause,
                    *("" if value is None else round(value, 1) for value in (row.fired_after_s, row.cleared_after_s)),
                )
            )


def document(rows: Sequence[Delay], file: Path) -> None:
    """Put the delays into the runbook, between its marks."""
    lines = ["| alert | cause | fired after | cleared after the cause ended |", "|---|---|---|---|"]
    for row in rows:
        cells = ("never" if value is None else f"{value:.1f}" for value in (row.fired_after_s, row.cleared_after_s))
        lines.append(f"| {row.alert} | {row.cause} | {' | '.join(cells)} |")
    before, _, rest = file.read_text(encoding="utf-8").partition(_MARK)
    after = rest.partition(_END)[2]
    file.write_text(f"{before}{_MARK}\n" + "\n".join(lines) + f"\n{_END}{after}", encoding="utf-8")


def report(
    rows: Sequence[Delay], empty: Sequence[str], counted: AuditReport, still: Sequence[str], seconds: float
) -> int:
    """Print what happened; return 0 if everything went as it should."""
    say("")
    say(
        f"{'alert':26}{'cause':20}{'fired after':>12}{'cleared after':>15}   seconds; shipped windows: times {FACTOR:g}"
    )
    for row in rows:
        fired, cleared = (
            "never" if value is None else f"{value:.1f}" for value in (row.fired_after_s, row.cleared_after_s)
        )
        say(f"{row.alert:26}{row.cause:20}{fired:>12}{cleared:>15}")
    say("")
    say("\n".join(counted.lines()))
    say("")
    silent = [row.alert for row in rows if row.fired_after_s is None]
    problems = [
        *(f"{alert} never fired" for alert in silent),
        *(f"{alert} has not cleared" for alert in still),
        *(f"no data in panel {panel}" for panel in empty),
        *([] if counted.balances else ["the counts do not agree"]),
    ]
    for problem in problems:
        say(f"PROBLEM: {problem}")
    if problems:
        say(f"failed in {seconds:.0f} s")
    else:
        say(f"passed in {seconds:.0f} s: every alert fired and cleared, every panel has data, the counts agree")
    return 1 if problems else 0


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse in a temporary folder."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--image", type=Path, default=PROJECT / "docs" / "pictures" / "rehearsal.png")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "rehearsal.csv")
    options.add_argument("--runbook", type=Path, help="document whose table of delays is written anew")
    options.add_argument("--folder", type=Path, help="keep everything here; default: a temporary folder")
    given = options.parse_args(arguments)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    if given.folder is not None:
        given.folder.mkdir(parents=True)
        status = run(given.folder.absolute(), given.image, given.results, given.runbook)
    else:
        with tempfile.TemporaryDirectory(prefix="guard-rehearsal-") as scratch:
            status = run(Path(scratch), given.image, given.results, given.runbook)
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    if left:
        say(f"PROBLEM: {len(left)} processes run on")
    return 1 if left else status


if __name__ == "__main__":
    sys.exit(main())
