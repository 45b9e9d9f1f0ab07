"""The leaderboard: the guard and every rival on the zoo, in one command that goes on where it was interrupted.

    python benchmarks/leaderboard/run.py                        # all detectors, all models, seeds 0 to 2
    python benchmarks/leaderboard/run.py --detectors guard ted++ --models gtsrb-wanet-gtsrb_cnn-0 --seeds 0
    python benchmarks/leaderboard/run.py --add my_detector.py   # a file with one class below guard.lab.rivals.Rival
    python benchmarks/leaderboard/run.py --page-only            # tables and plots of what has been measured so far

Every detector learns from the zoo's clean validation images, never from a triggered one. Records are kept in
`benchmarks/results/leaderboard/`; at the end `leaderboard.csv`, `leaderboard_guard.csv`, `leaderboard_images.csv`,
docs/leaderboard.md and its pictures are written anew from them. Seeds are printed.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import torch
from contestants import CONTESTANTS, from_file
from measuring import CLEAN, TRIGGERED, load_subject, measure
from page import publish
from records import PROJECT, Records, current_method

from guard.lab.zoo.collection import Zoo, default_zoo_dir

SEEDS = (0, 1, 2)
#: For the curve over the number of clean images: one model per image set that has so many.
CURVE_MODELS = (
    "mnist-wanet-mnist_cnn-0",
    "gtsrb-wanet-gtsrb_cnn-0",
    "gtsrb-blend-gtsrb_cnn-0",
    "cifar10-blend-resnet20-0",
)
CURVE_DETECTORS = ("guard", "ted++", "ted", "beatrix")
CURVE_IMAGES = (100, 500, 2000, 5000)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the leaderboard and write its page.")
    parser.add_argument("--detectors", nargs="*", help=f"default: all, {', '.join(CONTESTANTS)}")
    parser.add_argument("--models", nargs="*", help="models of the zoo; default: all")
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--add", type=Path, nargs="*", default=[], help="files with a detector each")
    parser.add_argument("--zoo", type=Path, default=default_zoo_dir(), help="folder of the models")
    parser.add_argument("--no-curve", action="store_true", help="leave out the curve over the number of clean images")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    options = parser.parse_args()
    torch.set_num_threads(1)
    contestants = dict(CONTESTANTS)
    for path in options.add:
        contestants |= from_file(path)
    zoo = Zoo(options.zoo)
    records = Records(PROJECT / "benchmarks" / "results" / "leaderboard", current_method())
    models = options.models or [card.name for card in zoo.cards()]
    detectors = options.detectors or list(contestants)
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    wanted = [(model, name, seed, None) for name in detectors for seed in options.seeds for model in models]
    if not options.no_curve and not options.models:
        wanted += [
            (model, name, 0, n)
            for name in CURVE_DETECTORS
            for n in CURVE_IMAGES
            for model in CURVE_MODELS
            if zoo.has(model)
        ]
    for model, name, seed, n_fit in wanted if not options.page_only else []:
        if records.read(model, name, seed, n_fit) is not None:
            continue
        if time.monotonic() > end:
            break
        start = time.perf_counter()
        subject = load_subject(zoo, model, CLEAN, TRIGGERED, n_fit)
        figures = measure(subject, contestants[name], seed)
        records.write(figures | {"data_set": subject.data_set, "attack": subject.attack}, model, name, seed, n_fit)
        told = figures.get("all", {}).get("tpr_at_fpr_0_01", figures.get("not_applicable", "benign"))
        print(f"{name}, {model}, seed {seed}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    publish(records, zoo, contestants, options.seeds, (CURVE_DETECTORS, CURVE_MODELS, CURVE_IMAGES))


if __name__ == "__main__":
    main()
