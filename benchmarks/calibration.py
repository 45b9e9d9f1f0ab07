"""Measure whether the false-positive rate of a guard is the one asked for, over fresh splits of the zoo's clean images.

    python benchmarks/calibration.py [--draws N]

Needs the zoo's images (`GUARD_DATA_DIR`). A draw is a model, a split seed and a number of images per class: a guard is
fitted on that many clean images of each class, chosen at random among validation and test part, and asked about as many
others of every class as the rarest class has, 200 at most. `all` takes half of the images to fit, in the classes' own
shares, and asks about the other half. Detectors see clean images only; models of the zoo are benign and backdoored.

Writes `calibration.csv`, a row per draw and rate: the realised rate and its 95 % band. With n distinct clean images,
the rate of one guard is Beta(j, n + 1 - j) over draws of these images, j = floor(rate (n + 1)) [1]; the number flagged
of m fresh images is beta-binomial, and the band lies between its 2.5 % and 97.5 % quantiles. The narrower binomial band
of m images at the asked rate, as if the n images were no draw, is printed beside it. Rates that n images cannot show
are left out.

`calibration_notices.csv` has a row per draw: how many of the n images are contradictions, and whether the guard says
so, which would be a false notice, as no model of the zoo attacks the calibration.

An interrupted run goes on from `build/calibration`; delete that folder to start anew. About 20 minutes on one core.

[1] Vovk (2012), Conditional validity of inductive conformal predictors, proposition 2.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from scipy.stats import betabinom, binom

from guard.config import GuardConfig
from guard.detection.contradictions import Contradictions
from guard.detection.pipeline import Guard
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.statistics.calibration import images_needed
from guard.suspect.model import SuspectModel
from guard.types import FEATURES, Activations, IntArray

RATES = (0.001, 0.01, 0.05, 0.1)
#: Images per class that stand for half of all there are.
ALL = 0
_CHEAP = {10: 12, 20: 5, 100: 1}
#: Fresh images of each class at most, where the classes have the same number.
_FRESH = 200
#: Models, and how many splits with how many images per class; those that are quick to fit have more of them.
PLAN: dict[str, dict[int, int]] = {
    "mnist-benign-mnist_cnn-0": {**_CHEAP, ALL: 1},
    "mnist-benign-mnist_small-1": _CHEAP,
    "mnist-single-pixel-mnist_cnn-0": _CHEAP,
    "mnist-wanet-mnist_cnn-0": _CHEAP,
    "mnist-blend-mnist_cnn-0": _CHEAP,
    "mnist-b-mnist_small-1": {**_CHEAP, ALL: 1},
    "cifar10-benign-resnet20-0": {**_CHEAP, ALL: 1},
    "cifar10-badnets-resnet20-0": _CHEAP,
    "cifar10-wanet-resnet20-0": {**_CHEAP, ALL: 1},
    "cifar10-blend-resnet20-0": _CHEAP,
    "gtsrb-benign-vit_tiny-0": {10: 2, 20: 1},
    "gtsrb-blend-vit_tiny-0": {10: 2, 20: 1},
    "gtsrb-benign-gtsrb_cnn-0": {10: 1},
    "gtsrb-wanet-gtsrb_cnn-0": {10: 1, ALL: 1},
    "cifar100_30-benign-resnet20-0": {10: 2},
    "cifar100_30-blend-resnet20-0": {10: 2, ALL: 1},
    "cifar100_30-red-box-resnet20-0": {10: 2},
    "yaleb-benign-deepid-0": {10: 1},
}


class Draw(NamedTuple):
    """One guard to fit: on `per_class` images of each class, drawn with seed `split`."""

    model: str
    split: int
    per_class: int


@dataclass(frozen=True, slots=True)
class Row:
    """The rate of one guard.

    Attributes
    ----------
    draw : Draw
    requested, realised : float
    n, m : int
        Distinct clean images that it was fitted on, and fresh images that it was asked about.
    contradictions : int
        Among the n images, see `guard.detection.contradictions`.
    """

    draw: Draw
    requested: float
    realised: float
    n: int
    m: int
    contradictions: int

    @property
    def band(self) -> tuple[float, float]:
        """The 95 % band of the realised rate, over draws of the clean and of the fresh images."""
        j = int(self.requested * (self.n + 1) + 1e-9)
        low, high = betabinom(self.m, j, self.n + 1 - j).ppf([0.025, 0.975]) / self.m
        return float(low), float(high)

    @property
    def binomial_band(self) -> tuple[float, float]:
        """The 95 % band of a share of the fresh images alone, each flagged at exactly the requested rate."""
        low, high = binom(self.m, self.requested).ppf([0.025, 0.975]) / self.m
        return float(low), float(high)

    def where(self, band: tuple[float, float]) -> str:
        """Return `"below"`, `"within"` or `"above"`; ends belong to a band."""
        if self.realised < band[0] - 1e-9:
            return "below"
        return "above" if self.realised > band[1] + 1e-9 else "within"


def draws(count: int | None = None) -> list[Draw]:
    """Return the first draws of the plan, models taking turns; all if `count` is None. No two splits share a seed.

    Every model of the zoo that the plan does not name has one draw, with a seed from its name.
    """
    of_models = [
        [Draw(model, 1000 * number + 100 * place + split, size)
         for place, (size, splits) in enumerate(sizes.items()) for split in range(splits)]
        for number, (model, sizes) in enumerate(PLAN.items())
    ]  # fmt: skip
    others = [card.name for card in Zoo(default_zoo_dir()).cards() if card.name not in PLAN]
    places = [((turn + 0.5) / len(planned), draw) for planned in of_models for turn, draw in enumerate(planned)]
    in_turn = [draw for _, draw in sorted(places, key=lambda entry: entry[0])]
    return [*in_turn, *(Draw(model, 100_000 + zlib.crc32(model.encode()) % 100_000, ALL) for model in others)][:count]


def divide(labels: IntArray, per_class: int, rng: np.random.Generator) -> tuple[IntArray, IntArray]:
    """Return rows to fit on and rows to ask about, both with the classes in the same shares.

    Parameters
    ----------
    labels : ndarray of shape (n,), int64
    per_class : int
        Images of each class to fit on; `ALL` = half of each.
    rng : numpy.random.Generator
    """
    of_classes = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    if per_class == ALL:
        counts = [(len(rows) // 2, len(rows) // 2) for rows in of_classes]
    else:
        left = min(map(len, of_classes)) - per_class
        if left < 1:
            raise ValueError(f"the rarest class has {left + per_class} images, too few for {per_class} to fit on.")
        counts = [(per_class, min(left, _FRESH))] * len(of_classes)
    fit, fresh = [], []
    for rows, (n, m) in zip(of_classes, counts, strict=True):
        fit.append(rows[:n])
        fresh.append(rows[n : n + m])
    return np.concatenate(fit), np.concatenate(fresh)


def clean_images(model: str, work_dir: Path) -> tuple[Activations, IntArray]:
    """Return activations and labels of a model's clean validation and test images; computed once, then read."""
    zoo = Zoo(default_zoo_dir())
    kept = work_dir / f"{model}-{zoo.card(model).weights_sha256[:12]}.npz"
    if not kept.is_file():
        split = load_split(zoo.card(model).data_set)
        suspect = SuspectModel(zoo.load(model))
        suspect.locate(split.validation.images, split.validation.labels)
        parts = [suspect.activations(part.images) for part in (split.validation, split.test)]
        labels = np.concatenate([split.validation.labels, split.test.labels])
        unfinished = kept.with_suffix(".part.npz")
        np.savez(unfinished, labels=labels, **dict(Activations.concatenate(parts).items()))
        unfinished.replace(kept)
    with np.load(kept) as stored:
        arrays = dict(stored)
    labels, logits, features = (arrays.pop(name) for name in ("labels", "logits", FEATURES))
    return Activations(logits, features, arrays), labels


def measure(draw: Draw, activations: Activations, labels: IntArray) -> list[Row]:
    """Fit one guard, and return a row for every rate that its images can show."""
    fit, fresh = divide(labels, draw.per_class, np.random.default_rng(draw.split))
    guard = Guard.fit_activations(
        activations[fit], labels[fit], GuardConfig(false_positive_rate=max(RATES), seed=draw.split)
    )
    n, found = len(guard.clean_scores), guard.contradictions
    assert found is not None  # every fit counts them
    asked = [rate for rate in RATES if n >= images_needed(rate)]
    p_values = guard.scores(activations[fresh]).p_values
    return [Row(draw, rate, float((p_values <= rate).mean()), n, len(fresh), found.count) for rate in asked]


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Row(
                Draw(line["model"], int(line["split"]), int(line["per_class"])),
                *(float(line[name]) for name in ("requested", "realised")),
                *(int(line[name]) for name in ("n", "m", "contradictions")),
            )
            for line in csv.DictReader(file)
        ]


def _append(path: Path, rows: Sequence[Row]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow([*Draw._fields, "requested", "realised", "n", "m", "contradictions"])
        writer.writerows([*row.draw, row.requested, row.realised, row.n, row.m, row.contradictions] for row in rows)


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows as tidy CSV."""
    n_classes = {model: Zoo(default_zoo_dir()).card(model).n_classes for model in {row.draw.model for row in rows}}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "split", "images_per_class", "requested", "realised", "lower", "upper"])
        for row in rows:
            model, split, size = row.draw
            band = (f"{end:.6f}" for end in row.band)
            writer.writerow([model, split, size or round(row.n / n_classes[model]), row.requested,
                             f"{row.realised:.6f}", *band])  # fmt: skip


def write_notices(path: Path, rows: Sequence[Row]) -> None:
    """Write how many contradictions each guard found among its clean images, and print which notices are false."""
    found = {row.draw: Contradictions(row.contradictions, row.n) for row in rows}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["model", "split", "clean_images", "contradictions", "noticed"])
        writer.writerows([draw.model, draw.split, one.n, one.count, one.is_noticed] for draw, one in found.items())
    noticed = [f"{draw.model} ({one.count} of {one.n})" for draw, one in found.items() if one.is_noticed]
    print(f"\n{len(noticed)} of {len(found)} guards notice contradictions: {', '.join(noticed) or '-'}")
    of_models: dict[str, list[Contradictions]] = {}
    for draw, one in found.items():
        of_models.setdefault(draw.model, []).append(one)
    shares = {model: sum(one.count for one in ones) / sum(one.n for one in ones) for model, ones in of_models.items()}
    for model, share in sorted(shares.items(), key=lambda entry: -entry[1]):
        print(f"  {model:36}{100 * share:6.2f} % of {sum(one.n for one in of_models[model])} clean images")


def report(rows: Sequence[Row]) -> None:
    """Print, per rate and number of images per class, how many draws lie in the band, and the mean rate."""
    print(f"\n{'images':>8}{'asked':>8}{'draws':>7}{'mean':>9}{'exact':>9}{'below':>8}{'within':>8}{'above':>8}"
          f"{'binomial: below':>18}{'within':>8}{'above':>8}")  # fmt: skip
    sizes = sorted({row.draw.per_class for row in rows}, key=lambda size: size or 10**9)
    groups = [(str(size or "half"), [row for row in rows if row.draw.per_class == size]) for size in sizes]
    for name, of_size in [*groups, ("all", list(rows))]:
        for rate in (*RATES, None):
            chosen = [row for row in of_size if rate is None or row.requested == rate]
            if not chosen:
                continue
            shares = []
            for bands in ([row.band for row in chosen], [row.binomial_band for row in chosen]):
                places = [row.where(band) for row, band in zip(chosen, bands, strict=True)]
                shares += [places.count(place) / len(places) for place in ("below", "within", "above")]
            realised = f"{np.mean([row.realised for row in chosen]):.5f}" if rate is not None else ""
            exact = np.mean([int(row.requested * (row.n + 1) + 1e-9) / (row.n + 1) for row in chosen])
            print(f"{name:>8}{rate or 'every':>8}{len(chosen):>7}{realised:>9}"
                  f"{f'{exact:.5f}' if rate is not None else '':>9}"
                  + "".join(f"{share:>8.3f}" for share in shares[:3]) + f"{shares[3]:>18.3f}"
                  + "".join(f"{share:>8.3f}" for share in shares[4:]))  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing of the draws, write the table, and print the shares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, help="the first so many of the plan; all if left out")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work-dir", type=Path, default=Path("build/calibration"))
    chosen = parser.parse_args(arguments)
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    wanted, kept = draws(chosen.draws), chosen.work_dir / "rows.csv"
    done = {row.draw for row in _read(kept)}
    splits = [draw.split for draw in wanted]
    print(f"{len(wanted)} draws, {len(done & set(wanted))} done, seeds {min(splits)} to {max(splits)}", flush=True)
    for draw in wanted:
        if draw in done:
            continue
        started = time.perf_counter()
        rows = measure(draw, *clean_images(draw.model, chosen.work_dir))
        _append(kept, rows)
        told = ", ".join(f"{row.requested:g}: {row.realised:.4f}" for row in rows)
        size = draw.per_class or "half"
        print(
            f"{draw.model}, split {draw.split}, {size} per class, {time.perf_counter() - started:.1f} s: {told}",
            flush=True,
        )
    rows = [row for row in _read(kept) if row.draw in set(wanted)]
    write_table(chosen.output_dir / "calibration.csv", rows)
    write_notices(chosen.output_dir / "calibration_notices.csv", rows)
    report(rows)


if __name__ == "__main__":
    main()
