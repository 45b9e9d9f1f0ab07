"""Rehearse what nobody sees: an attack that is caught in part, a drift, and what the audit sample says of both.

    python benchmarks/rehearsal/audits.py            (or `make rehearsal-audits`)

Starts what `guard serve --queue --review` and `guard observe` start, sends three minutes of clean requests, of an
attack whose trigger is so faint that about 60 % of it is flagged, and of clean requests from a worn sensor. A reviewer
answers most of the queue through the review page's API, which tells flagged requests and audits of unflagged ones no
more apart than the page. Then the estimates are held against what was sent, and client, queue and Prometheus against
each other. Writes docs/pictures/rehearsal_audits.png and benchmarks/results/rehearsal_audits.csv (quantity, truth,
estimate, lower, upper). About four minutes.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from reviewer import Reviewer
from service import MODEL, Images, prepare, running
from traffic import Phase, Span, Traffic, bodies_of

from guard.detection.pipeline import Guard
from guard.observing.audit import audit
from guard.observing.detection import FIGURES, Detection, detection_of
from guard.relabel.items import State
from guard.relabel.queue import Queue
from guard.statistics.detection_rates import NotKnown
from guard.types import Float32Array

PROJECT = Path(__file__).resolve().parent.parent.parent
SEED = 0
PER_SECOND = 60.0
AUDIT_RATE = 0.05
CAUGHT = 0.6
#: Of what waits in the queue, answered by the reviewer.
ANSWERED = 0.85
PHASES = (
    Phase("clean", 40),
    Phase("attack", 50, "triggered", 0.25),
    Phase("clean ", 20),
    Phase("drift", 30, "shifted", 1.0),
    Phase("clean  ", 20),
)
QUANTITIES = ("missed", *FIGURES)
_SHADES = {"attack": "#f6d5d0", "drift": "#d8ecd8"}


class Sent(NamedTuple):
    """One request of the client's log."""

    time: float
    is_poisoned: bool
    is_flagged: bool


def faint(guard: Guard, images: Images) -> tuple[Float32Array, float, float]:
    """Return images whose trigger is so strong that it is flagged in part; that strength, and the flagged share."""
    background = images.clean[images.triggered_sources]
    found = []
    for strength in np.linspace(0.05, 1.0, 20):
        mixed = np.rint(255 * (background + strength * (images.triggered - background))).astype(np.float32) / 255
        share = float(np.mean([verdict.is_poisoned for verdict in guard.inspect(mixed)]))
        found.append((abs(share - CAUGHT), float(strength), share, mixed))
    _, strength, share, mixed = min(found, key=lambda entry: entry[:2])
    return mixed, strength, share


def read_log(log: Path) -> list[Sent]:
    """Return the judged requests of the log."""
    rows = map(json.loads, log.read_text(encoding="utf-8").splitlines())
    return [
        Sent(datetime.fromisoformat(row["time"]).timestamp(), row["kind"] == "triggered", row["verdict"] == "poisoned")
        for row in rows
        if row["verdict"] in ("clean", "poisoned")
    ]


def truth_of(sent: Sequence[Sent]) -> dict[str, float]:
    """Return the quantities as they were."""
    bad, flagged = np.array([(entry.is_poisoned, entry.is_flagged) for entry in sent]).T
    return {
        "missed": float((bad & ~flagged).sum()),
        "detection_rate": float(flagged[bad].mean()),
        "false_positive_rate": float(flagged[~bad].mean()),
        "precision": float(bad[flagged].mean()),
        "poisoned_share": float(bad.mean()),
    }


def review(reviewer: Reviewer, queue_url: str) -> tuple[int, int]:
    """Let the reviewer answer most of what waits; return how many came and how many were answered."""
    with Queue.open(queue_url) as queue:
        waiting = queue.counts().by_state[State.PENDING]
    answered = 0
    while answered < ANSWERED * waiting:
        given = reviewer.answer(
            min(50, round(ANSWERED * waiting) - answered or 1), "suspicion"
        )  # as the page gives them
        if not given:
            break
        answered += given
    return waiting, answered


def rows_of(truth: Mapping[str, float], found: Detection) -> list[tuple[str, float, float, float, float]]:
    """Return quantity, truth, estimate and interval; NaN where nothing is known."""
    rows = []
    for name in QUANTITIES:
        figure = getattr(found.rates, name)
        known = (np.nan,) * 3 if isinstance(figure, NotKnown) else (figure.value, figure.lower, figure.upper)
        rows.append((name, truth[name], *known))
    return rows


def draw(
    sent: Sequence[Sent], spans: Sequence[Span], rows: Sequence[tuple[str, float, float, float, float]], file: Path
) -> None:
    """Draw the stream as it was, and every estimate beside the truth."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    stream, *scales = figure.subplot_mosaic(
        [["stream"] * len(rows), [row[0] for row in rows]], height_ratios=[2, 1.5]
    ).values()
    begin = spans[0].start
    seconds = np.arange(0, np.ceil(spans[-1].end - begin) + 1)
    kinds = {
        "poisoned, passed": ("#c0392b", lambda entry: entry.is_poisoned and not entry.is_flagged),
        "poisoned, flagged": ("#e8a49c", lambda entry: entry.is_poisoned and entry.is_flagged),
        "clean, flagged": ("#e08214", lambda entry: not entry.is_poisoned and entry.is_flagged),
    }
    counts = [
        np.histogram([entry.time - begin for entry in sent if belongs(entry)], seconds)[0]
        for _, belongs in kinds.values()
    ]
    stream.stackplot(seconds[:-1] + 0.5, counts, labels=list(kinds), colors=[colour for colour, _ in kinds.values()])
    stream.set_ylabel(f"requests per second\n(clean, passed: the rest of {PER_SECOND:g})")
    stream.set_xlabel("seconds")
    stream.legend(loc="upper left", frameon=False, fontsize=9)
    for span in spans:
        if span.phase.name in _SHADES:
            stream.axvspan(span.start - begin, span.end - begin, color=_SHADES[span.phase.name], zorder=0, lw=0)
            middle = (span.start + span.end) / 2 - begin
            stream.annotate(
                span.phase.name, (middle, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9
            )
    for axis, (name, truth, value, lower, upper) in zip(scales, rows, strict=True):
        scale = 1 if name == "missed" else 100
        axis.errorbar(
            [0],
            [scale * value],
            [[scale * (value - lower)], [scale * (upper - value)]],
            fmt="o",
            color="#1f4e79",
            capsize=6,
            lw=2,
            label="estimate, 95 %",
        )
        axis.axhline(scale * truth, color="#c0392b", lw=1.5, ls="--", label="truth")
        axis.set_xlim(-1, 1)
        axis.set_xticks([])
        axis.set_ylim(0, 1.15 * scale * max(truth, upper))
        axis.set_title(name.replace("_", " ") + ("" if name == "missed" else ", %"), fontsize=10)
    scales[0].legend(loc="lower left", frameon=False, fontsize=8)
    for axis in (stream, *scales):
        axis.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=100)


def run(folder: Path, image: Path, results: Path) -> int:
    """Rehearse in a folder; return the exit status."""
    started = time.perf_counter()
    say(f"seed {SEED}; preparing a backdoored network, its guard and its archive")
    images, guard = prepare(folder, SEED, audit_rate=AUDIT_RATE)
    triggered, strength, share = faint(guard, images)
    say(f"trigger at {100 * strength:.0f} % of its strength: {100 * share:.1f} % of triggered images are flagged")
    bodies = bodies_of(images.clean, triggered, SEED)
    shifted = np.stack([np.frombuffer(body, "<f4") for body in bodies["shifted"]]).reshape(images.clean.shape)
    log = folder / "client.jsonl"
    with running(folder, (), 1.0, retrain=False) as service:
        with Queue.open(service.queue_url) as queue:
            queue.change_settings(max_audits_per_hour=1_000_000)
        reviewer = Reviewer(
            service.review_url,
            service.queue_url,
            (np.concatenate([images.clean, shifted]), np.tile(images.clean_labels, 2)),
            (triggered, images.triggered_labels),
        )
        say(f"everything runs after {time.perf_counter() - started:.0f} s")
        traffic = Traffic(service.inference_url, MODEL, service.token, bodies, PER_SECOND, log)
        begin = time.time()
        spans = traffic.send(PHASES, SEED)
        time.sleep(8)  # the last counts reach Prometheus and the queue
        end = time.time()
        waiting, answered = review(reviewer, service.queue_url)
        say(f"{waiting} items in the queue, {answered} answered by a reviewer who is not told which were flagged")
        window = datetime.fromtimestamp(begin, UTC), datetime.fromtimestamp(end, UTC) + timedelta(seconds=1)
        with Queue.open(service.queue_url) as queue:
            found = detection_of(queue, *window, model=MODEL)
            counted = audit(*window, client_log=log, queue=queue, prometheus=service.prometheus_url, model=MODEL)
    sent = read_log(log)
    rows = rows_of(truth_of(sent), found)
    write(rows, results)
    draw(sent, spans, rows, image)
    return report(rows, found, counted.lines(), counted.balances, time.perf_counter() - started)


def write(rows: Sequence[tuple[str, float, float, float, float]], file: Path) -> None:
    """Write the table."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        writer = csv.writer(opened, lineterminator="\n")
        writer.writerow(("quantity", "truth", "estimate", "lower", "upper"))
        writer.writerows((name, *(f"{number:.6g}" for number in numbers)) for name, *numbers in rows)


def report(
    rows: Sequence[tuple[str, float, float, float, float]],
    found: Detection,
    counts: Sequence[str],
    balances: bool,
    seconds: float,
) -> int:
    """Print what was found; return 0 if every interval holds the truth and the counts agree."""
    say("")
    say("\n".join(found.lines()))
    say("")
    say(f"{'':22}{'truth':>10}{'estimate':>10}{'lower':>10}{'upper':>10}")
    for name, *numbers in rows:
        say(f"{name:22}" + "".join(f"{number:10.4g}" for number in numbers))
    say("")
    say("\n".join(counts))
    say("")
    problems = [
        f"{name}: the interval does not hold the truth" for name, truth, _, low, up in rows if not low <= truth <= up
    ]
    problems += [] if balances else ["the counts do not agree"]
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say(f"{'failed' if problems else 'passed'} in {seconds:.0f} s")
    return 1 if problems else 0


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse in a temporary folder."""
    options = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    options.add_argument("--image", type=Path, default=PROJECT / "docs" / "pictures" / "rehearsal_audits.png")
    options.add_argument("--results", type=Path, default=PROJECT / "benchmarks" / "results" / "rehearsal_audits.csv")
    given = options.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="guard-rehearsal-") as scratch:
        return run(Path(scratch), given.image, given.results)


if __name__ == "__main__":
    sys.exit(main())
