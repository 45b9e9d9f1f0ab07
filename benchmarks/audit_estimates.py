"""Do the intervals of what the guard lets through hold the truth? Simulated traffic, audits and reviewers.

    python benchmarks/audit_estimates.py

A run is a week of requests. Drawn anew for each run, evenly or, where marked *, evenly on a logarithmic scale:

- 5,000 to 200,000 * requests, with a daily rhythm; false-positive rate 0.005, 0.01, 0.02 or 0.05
- 0.05 to 10 % * of them poisoned, in half of the runs 20 times as likely in six hours of the week
- 60 to 98 % of the poisoned flagged, with p-values that go down from the rate by about 1.2 powers of ten; of the others
  30 to 95 % near the threshold, the rest anywhere above; p-values of clean requests are even
- audit rate 0.002 to 0.02 *, five times as much near the threshold; in half of the runs an hourly limit of 0.5 to 2
  times the mean hour scales it down to at least 1/16
- half to all of the audits decided, at random; 20 to 100 % of the flagged: all, at random, lowest p-values first, or
  lowest first but for noise of one power of ten
- in half of the runs requests are counted; in 30 % of those, up to 30 % of the queue's items were lost at random

The truth is what that week held. A seed has as many runs as it takes until each quantity was known in 1,000 of them.
`audit_estimates.csv` has what was known in the runs of seed 0; `audit_coverage.csv` has all runs of all seeds by
scenario, with the share of "not known yet". Draws `docs/images/audit_estimates.png`. About 10 minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from guard.statistics.detection_rates import DetectionRates, Estimate, estimate_rates
from guard.statistics.review_sample import Populations, strata_of_items
from guard.statistics.strata import NEAR_FACTOR, NEAR_WEIGHT
from guard.types import UNDECIDED, BoolArray, Float64Array, IntArray

mpl.use("Agg")
PROJECT = Path(__file__).resolve().parent.parent
PICTURE = PROJECT / "docs" / "images" / "audit_estimates.png"
SEEDS = (0, 1, 2)
WANTED = 1000  # runs in which a quantity is known, per seed
HOURS = 168
QUANTITIES = ("detection_rate", "false_positive_rate", "poisoned_share")
ALSO = ("precision", "missed")
ORDERS = ("all", "random", "lowest first", "lowest first, with noise")


@dataclass
class Week:
    """The requests of one run, one value per request, and what was drawn for the run."""

    hour: IntArray
    is_poisoned: BoolArray
    p_values: Float64Array
    rate: float
    scenario: dict[str, str] = field(default_factory=dict)

    @property
    def is_flagged(self) -> BoolArray:
        return self.p_values <= self.rate

    @property
    def is_near(self) -> BoolArray:
        return ~self.is_flagged & (self.p_values <= NEAR_FACTOR * self.rate)

    def truth(self) -> dict[str, float]:
        caught, flagged = int((self.is_poisoned & self.is_flagged).sum()), int(self.is_flagged.sum())
        poisoned, requests = int(self.is_poisoned.sum()), len(self.p_values)
        return {
            "detection_rate": caught / poisoned,
            "false_positive_rate": (flagged - caught) / (requests - poisoned),
            "poisoned_share": poisoned / requests,
            "precision": caught / flagged if flagged else float("nan"),
            "missed": poisoned - caught,
        }


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def draw_week(rng: np.random.Generator) -> Week:
    """Return the requests of a week, and which are poisoned."""
    n = int(log_uniform(rng, 5_000, 200_000))
    rate = float(rng.choice([0.005, 0.01, 0.02, 0.05]))
    caught, near = rng.uniform(0.6, 0.98), rng.uniform(0.3, 0.95)
    rhythm = 1 + 0.6 * np.sin(2 * np.pi * np.arange(HOURS) / 24)
    hour = rng.choice(HOURS, n, p=rhythm / rhythm.sum())
    in_bursts = rng.random() < 0.5
    odds = np.where(np.isin(hour, rng.choice(HOURS, 6)), 20.0, 1.0) if in_bursts else np.ones(n)
    share = log_uniform(rng, 0.0005, 0.1)
    n_poisoned = max(1, rng.binomial(n, share))
    poisoned = rng.choice(n, n_poisoned, replace=False, p=odds / odds.sum())
    is_poisoned = np.zeros(n, dtype=bool)
    is_poisoned[poisoned] = True
    p_values = rng.random(n)
    far = NEAR_FACTOR * rate + (1 - NEAR_FACTOR * rate) * rng.random(n_poisoned)
    missed = np.where(rng.random(n_poisoned) < near, rate * 10 ** rng.uniform(0, 1, n_poisoned), far)
    flagged = rate * 10 ** -np.abs(rng.normal(0, 1.2, n_poisoned))
    p_values[poisoned] = np.where(rng.random(n_poisoned) < caught, flagged, missed)
    scenario = {
        "requests": "below 30,000" if n < 30_000 else "30,000 and more",
        "poisoned": "below 0.5 %" if share < 0.005 else "0.5 % and more",
        "caught": "60 to 80 %" if caught < 0.8 else "80 to 98 %",
        "attack": "in bursts" if in_bursts else "all week",
    }
    return Week(hour, is_poisoned, p_values, rate, scenario)


def draw_audits(week: Week, rng: np.random.Generator) -> tuple[BoolArray, Float64Array]:
    """Return which requests are audits, and the probability that each was drawn with."""
    audit_rate = log_uniform(rng, 0.002, 0.02)
    probability = np.where(week.is_near, min(1.0, NEAR_WEIGHT * audit_rate), audit_rate)
    ticket = rng.random(len(probability))
    is_limited = rng.random() < 0.5
    if is_limited:
        mean = (probability * ~week.is_flagged).sum() / HOURS
        limit = max(4, int(rng.uniform(0.5, 2) * mean))
        _limit(week, probability, ticket, limit, rng)
    week.scenario["audit rate"] = "below 0.006" if audit_rate < 0.006 else "0.006 and more"
    week.scenario["hourly limit"] = "yes" if is_limited else "no"
    return ~week.is_flagged & (ticket < probability), probability


def _limit(week: Week, probability: Float64Array, ticket: Float64Array, limit: int, rng: np.random.Generator) -> None:
    """Scale probabilities down, in place, by what the hour's earlier tenths left of the limit."""
    order = np.argsort(week.hour + rng.random(len(ticket)))
    for rows in np.split(order, np.searchsorted(week.hour[order], np.arange(1, HOURS))):
        used = 0
        for tenth in np.array_split(rows, 10):
            probability[tenth] *= min(max(2 * (limit - used) / limit, 1 / 16), 1.0)
            used += int(((ticket[tenth] < probability[tenth]) & ~week.is_flagged[tenth]).sum())


def draw_decided(week: Week, is_audit: BoolArray, rng: np.random.Generator) -> BoolArray:
    """Return which requests reviewers decided."""
    order = str(rng.choice(ORDERS))
    share = 1.0 if order == "all" else rng.uniform(0.2, 1)
    flagged = np.flatnonzero(week.is_flagged)
    key = np.log10(week.p_values[flagged])
    if order == "random":
        key = rng.random(len(flagged))
    elif order == "lowest first, with noise":
        key = key + rng.normal(0, 1, len(flagged))
    decided = is_audit & (rng.random(len(is_audit)) < rng.uniform(0.5, 1))
    decided[flagged[np.argsort(key)[: int(np.ceil(share * len(flagged)))]]] = True
    week.scenario["flagged decided"] = order
    return decided


def estimated(week: Week, rng: np.random.Generator) -> DetectionRates:
    """Return what a user of the library is told about a week."""
    is_audit, probability = draw_audits(week, rng)
    decided = draw_decided(week, is_audit, rng)
    counted = rng.random() < 0.5
    lost = rng.uniform(0, 0.3) if counted and rng.random() < 0.3 else 0.0
    in_queue = (week.is_flagged | is_audit) & (rng.random(len(is_audit)) >= lost)
    week.scenario["counted"] = ("yes, items lost" if lost else "yes") if counted else "no"
    populations = Populations()
    if counted:
        far = ~week.is_flagged & ~week.is_near
        populations = Populations(int(week.is_flagged.sum()), int(week.is_near.sum()), int(far.sum()))
    strata = strata_of_items(
        is_flagged=week.is_flagged[in_queue],
        p_values=week.p_values[in_queue],
        false_positive_rates=np.full(int(in_queue.sum()), week.rate),
        probabilities=probability[in_queue],
        answers=np.where(decided, week.is_poisoned.astype(np.int64), UNDECIDED)[in_queue],
        populations=populations,
    )
    return estimate_rates(strata)


def runs_of(seed: int, wanted: int) -> Iterator[dict[str, Any]]:
    """Yield a row per run and quantity, until each of `QUANTITIES` was known in as many runs as wanted."""
    known = dict.fromkeys(QUANTITIES, 0)
    run = 0
    while min(known.values()) < wanted:
        rng = np.random.default_rng((seed, run))
        week = draw_week(rng)
        truth, rates = week.truth(), estimated(week, rng)
        for quantity in (*QUANTITIES, *ALSO):
            told = getattr(rates, quantity)
            row = {"run": run, "quantity": quantity, "truth": truth[quantity], "seed": seed, **week.scenario}
            if isinstance(told, Estimate):
                row |= {"estimate": told.value, "lower": told.lower, "upper": told.upper}
                known[quantity] = known.get(quantity, 0) + 1
            yield row
        run += 1


def coverage(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return how often the intervals hold the truth, per quantity and value of each property of a run."""
    groups: list[tuple[str, str, Callable[[dict[str, Any]], bool]]] = [("all", "all", lambda _: True)]
    groups += [("seed", str(seed), lambda row, seed=seed: row["seed"] == seed) for seed in SEEDS]
    for name in [
        key for key in rows[0] if key not in ("run", "quantity", "truth", "seed", "estimate", "lower", "upper")
    ]:
        for value in sorted({row[name] for row in rows}):
            groups.append((name, value, lambda row, name=name, value=value: row[name] == value))
    table = []
    for name, value, belongs in groups:
        for quantity in (*QUANTITIES, *ALSO):
            of_group = [row for row in rows if row["quantity"] == quantity and belongs(row)]
            known = [row for row in of_group if "estimate" in row]
            if not known:
                continue
            below = np.mean([row["truth"] < row["lower"] for row in known])
            above = np.mean([row["truth"] > row["upper"] for row in known])
            table.append(
                {
                    "property": name,
                    "value": value,
                    "quantity": quantity,
                    "runs": len(of_group),
                    "known": len(known),
                    "not_known_yet": 1 - len(known) / len(of_group),
                    "holds_truth": 1 - below - above,
                    "truth_below": below,
                    "truth_above": above,
                }
            )
    return table


def draw(rows: Sequence[dict[str, Any]], path: Path, shown: int = 60) -> None:
    """Draw the truth of the first runs, and the intervals around it."""
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    titles = ("detection rate", "false-positive rate", "share of poisoned requests")
    for axes, quantity, title in zip(figure.subplots(3, 1), QUANTITIES, titles, strict=True):
        some = [row for row in rows if row["quantity"] == quantity][:shown]
        some.sort(key=lambda row: row["truth"])
        truth, value, lower, upper = (
            np.array([row[key] for row in some]) for key in ("truth", "estimate", "lower", "upper")
        )
        holds = (lower <= truth) & (truth <= upper)
        places = np.arange(len(some))
        for which, colour, label in (
            (holds, "#4477aa", "95 % interval"),
            (~holds, "#ee6677", "interval without the truth"),
        ):
            axes.vlines(places[which], lower[which], upper[which], color=colour, linewidth=4, alpha=0.55, label=label)
        axes.plot(places, value, "_", color="black", markersize=6, label="estimate")
        axes.plot(places, truth, "o", color="#228833", markersize=4, label="truth")
        axes.set_title(f"{title}: {int(holds.sum())} of {len(some)} intervals hold the truth", fontsize=10)
        axes.set_xlim(-1, len(some))
        axes.set_xticks([])
        axes.grid(axis="y", alpha=0.3)
        if quantity != "detection_rate":
            axes.set_yscale("log")
    axes.set_xlabel("simulated weeks, by the truth")
    figure.axes[0].legend(fontsize=8, loc="lower right", ncols=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: float(f"{v:.6g}") if isinstance(v, float) else v for key, v in row.items()} for row in rows
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate, print, write the tables and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=WANTED, help="in which each quantity is known, per seed")
    parser.add_argument("--output-dir", type=Path, default=PROJECT / "benchmarks" / "results")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        rows += runs_of(seed, options.runs)
        print(f"seed {seed}: {rows[-1]['run'] + 1} runs", flush=True)
    first = [row for row in rows if row["seed"] == SEEDS[0] and "estimate" in row]
    kept = [row for quantity in QUANTITIES for row in first if row["quantity"] == quantity]
    columns = ("run", "quantity", "truth", "estimate", "lower", "upper")
    write(options.output_dir / "audit_estimates.csv", [{key: row[key] for key in columns} for row in kept])
    table = coverage(rows)
    write(options.output_dir / "audit_coverage.csv", table)
    draw(kept, options.picture)
    for quantity in QUANTITIES:
        held = [row["lower"] <= row["truth"] <= row["upper"] for row in kept if row["quantity"] == quantity]
        print(f"{quantity:20} {100 * np.mean(held):.1f} % of {len(held)} intervals hold the truth")
    print(f"\n{'':46}{'quantity':20}{'runs':>6}{'unknown':>9}{'holds':>8}{'below':>8}{'above':>8}")
    for row in table:
        print(
            f"{row['property']:18}{row['value']:28}{row['quantity']:20}{row['runs']:6}{row['not_known_yet']:9.3f}"
            f"{row['holds_truth']:8.3f}{row['truth_below']:8.3f}{row['truth_above']:8.3f}"
        )
    for quantity in (*QUANTITIES, *ALSO):
        of_quantity = [row for row in table if row["quantity"] == quantity]
        for pick, word in ((min, "lowest"), (max, "highest")):
            worst = pick(of_quantity, key=lambda row: row["holds_truth"])
            print(f"{quantity:20} {word:8} {worst['holds_truth']:.3f} ({worst['property']}: {worst['value']})")


if __name__ == "__main__":
    main()
