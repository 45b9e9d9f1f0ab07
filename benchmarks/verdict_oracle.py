"""Measure what the details of an answer give to somebody who searches for a trigger that passes the guard.

    python benchmarks/verdict_oracle.py

The attacker knows the backdoor and its trigger, and looks for a variant of it that still gets the target label and is
not flagged. He has 1,000 requests, and images of his own. All attackers search alike, ten images per variant: random
variants first, then steps from the best one so far, longer after a success and shorter after a failure. They differ in
what an answer tells them besides the label:

- `full`: the p-value, as under `verdict_detail = "full"`.
- `flag`: flagged or not, as under `verdict_detail = "flag"`.
- `label`: the label alone.
- `own guard`: no request at all; he fits the same guard on clean images of his own, and searches on its p-values.

Families of variants: `trigger`: opacity and place of the known trigger; `mask`: opacity, and a coarse mask that is
added (a grid of 7 x 7 cells, at most 0.25); `towards`: opacity, and up to 30 % of a clean image of the target class.

Writes `results/verdict_oracle.csv`: after so many requests, the share of held-out images (true label not the target)
that got the target label unflagged with the variant that the attacker would choose, and the best p-value that he was
after: the median over the held-out images. With 0 requests it is the trigger as it was planted.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, Float64Array, IntArray

NETWORKS = ("mnist-pattern-mnist_cnn-0", "gtsrb-c-gtsrb_cnn-0")
SEEDS = (0, 1, 2)
DETAILS = ("full", "flag", "label", "own guard")
FAMILIES = ("trigger", "mask", "towards")
REQUESTS = (0, 100, 300, 1000)
#: Images that one variant is tried on; each is a request.
TRIES = 10
FITTED_ON, HELD_OUT = 2000, 500
RATE = 0.01
_CELLS, _LARGEST, _SHARE = 7, 0.25, 0.3

Apply = Callable[[Float64Array, Float32Array], Float32Array]


class Row(NamedTuple):
    """One line of the table."""

    network: str
    seed: int
    detail: str
    queries: int
    trigger_family: str
    attack_success_unflagged: float
    best_p_value: float


class Family(NamedTuple):
    """Variants of a trigger, each described by numbers in [-1, 1]: those of the trigger as it was planted, and what
    others make of images."""

    planted: Float64Array
    apply: Apply


def make_family(name: str, plant: Callable[[Float32Array], Float32Array], targets: Float32Array) -> Family:
    """Return the variants of a planted trigger; the first number is its opacity, and 1 is the trigger as it is."""

    def triggered(values: Float64Array, images: Float32Array, shift: tuple[int, int] = (0, 0)) -> Float32Array:
        still = np.roll(images.astype(np.float32), (-shift[0], -shift[1]), (2, 3))
        moved = np.roll(plant(still), shift, (2, 3))
        return images + (values[0] + 1) / 2 * (moved - images)

    def elsewhere(values: Float64Array, images: Float32Array) -> Float32Array:
        down, right = (round(float(value) * side / 2) for value, side in zip(values[1:], images.shape[2:], strict=True))
        return triggered(values, images, (down, right))

    def masked(values: Float64Array, images: Float32Array) -> Float32Array:
        channels, height, width = images.shape[1:]
        grid = values[1:].reshape(channels, _CELLS, _CELLS) * _LARGEST
        rows, columns = np.arange(height) * _CELLS // height, np.arange(width) * _CELLS // width
        return triggered(values, images) + grid[:, rows[:, None], columns]

    def towards(values: Float64Array, images: Float32Array) -> Float32Array:
        share = (values[1] + 1) / 2 * _SHARE
        chosen = targets[min(int((values[2] + 1) / 2 * len(targets)), len(targets) - 1)]
        return triggered(values, (1 - share) * images + share * chosen)

    families: dict[str, tuple[list[float], Apply]] = {
        "trigger": ([1, 0, 0], elsewhere),
        "mask": ([1] + [0] * (_CELLS * _CELLS * targets.shape[1]), masked),
        "towards": ([1, -1, 0], towards),
    }
    planted, apply = families[name]
    return Family(
        np.array(planted, dtype=np.float64),
        lambda values, images: np.clip(apply(values, images), 0, 1).astype(np.float32),
    )


def search(
    family: Family, worth: Callable[[Float64Array], float], rng: np.random.Generator
) -> Iterator[tuple[int, Float64Array]]:
    """Yield the best variant so far whenever as many requests were sent as the table asks for."""
    best, most = family.planted, REQUESTS[-1] // TRIES
    yield 0, best
    value, step = worth(best), 0.3
    for turn in range(2, most + 1):
        climbs = turn > most // 5
        drawn = best + step * rng.normal(size=best.shape) if climbs else rng.uniform(-1, 1, best.shape)
        other = np.clip(drawn, -1, 1)
        its_value = worth(other)
        if climbs and its_value != value:
            step = min(1.5 * step, 1.0) if its_value > value else max(0.9 * step, 0.02)
        if its_value > value or (climbs and its_value == value):  # across a plateau
            best, value = other, its_value
        if turn * TRIES in REQUESTS:
            yield turn * TRIES, best


def measure(name: str, seed: int) -> Iterator[Row]:
    """Yield the rows of one network and seed."""
    zoo = Zoo(default_zoo_dir())
    card, split = zoo.card(name), load_split(zoo.card(name).data_set)
    rng = np.random.default_rng([2012, seed])
    suspect = SuspectModel(zoo.load(name))
    (backdoor,) = card.restore_attack().backdoors
    target = int(card.target_label)
    order = rng.permutation(len(split.validation))
    config = GuardConfig(false_positive_rate=RATE, seed=seed)
    guard = _fit(suspect, split.validation.images, split.validation.labels, order[:FITTED_ON], config)
    second = _fit(suspect, split.validation.images, split.validation.labels, order[FITTED_ON : 2 * FITTED_ON], config)
    test = rng.permutation(len(split.test))
    others = test[split.test.labels[test] != target]
    pool, held_out = split.test.images[others[:TRIES]], split.test.images[others[TRIES : TRIES + HELD_OUT]]
    targets = split.test.images[test[split.test.labels[test] == target][:20]]

    def seen(judge: Guard, images: Float32Array) -> tuple[IntArray, Float64Array, Any]:
        activations = suspect.activations(images)
        scores = judge.scores(judge.complete(activations, images))
        return activations.predicted_labels, scores.p_values, scores.is_poisoned

    for family_name in FAMILIES:
        family = make_family(family_name, lambda images: backdoor.trigger(images.copy()), targets)
        for detail in DETAILS:

            def worth(values: Float64Array, family: Family = family, detail: str = detail) -> float:
                labels, p_values, flagged = seen(second if detail == "own guard" else guard, family.apply(values, pool))
                is_target = labels == target
                if detail == "label":
                    return float(is_target.mean())
                if detail == "flag":
                    return float((is_target & ~flagged).mean() + 1e-3 * is_target.mean())
                return float(np.where(is_target, np.log10(np.minimum(p_values, 2 * RATE)), -5.0).mean())

            for requests, best in search(family, worth, np.random.default_rng([seed, len(family_name)])):
                labels, p_values, flagged = seen(guard, family.apply(best, held_out))
                got = float(((labels == target) & ~flagged).mean())
                yield Row(name, seed, detail, requests, family_name, got, float(np.median(p_values)))


def _fit(suspect: SuspectModel, images: Float32Array, labels: IntArray, rows: IntArray, config: GuardConfig) -> Guard:
    return Guard.fit(suspect, images[rows], labels[rows], config)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, write the table and print its means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "verdict_oracle.csv")
    options = parser.parse_args(arguments)
    rows = [row for name in options.networks for seed in options.seeds for row in measure(name, seed)]
    with options.output.open("w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row])
    print("share of held-out images with the target label, unflagged: mean over seeds (worst)")
    for name in options.networks:
        for family in FAMILIES:
            for detail in DETAILS:
                cells = []
                for requests in REQUESTS:
                    found = [
                        row.attack_success_unflagged
                        for row in rows
                        if row[0] == name and row[2:5] == (detail, requests, family)
                    ]
                    cells.append(f"{np.mean(found):.3f} ({max(found):.3f})")
                print(f"{name:28} {family:8} {detail:10}", *cells)


if __name__ == "__main__":
    main()
