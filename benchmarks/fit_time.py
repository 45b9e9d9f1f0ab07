"""Time a fit from activations on, with its peak memory and the size of the bundle; the network's passes aside.

    python benchmarks/fit_time.py

Writes `fit_time.csv`: one row per shape. Data are synthetic, as in `guard_time.py`; each shape is fitted in a process
of its own, so that its peak is its own. Peak memory is that of the process, Python and PyTorch included (about 400 MB).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from guard_time import SEED, synthetic

from guard.config import GuardConfig
from guard.detection.pipeline import Guard

TABLE = Path(__file__).resolve().parent / "results" / "fit_time.csv"
COLUMNS = ("classes", "per_class", "n_features", "seconds", "peak_mb", "bundle_mb")
#: Classes, clean images of each, columns at the split layer; with the aims for time, peak memory and bundle.
SHAPES = {
    (10, 500, 512): "6 s",
    (43, 116, 2048): "10 s",
    (100, 50, 512): "10 s",
    (1000, 25, 2048): "60 s, 1500 MB, 120 MB",
}


def fit_here(shape: tuple[int, int, int], threads: int) -> dict[str, float]:
    """Fit in this process; return seconds, and peak and bundle in megabytes (10^6 bytes)."""
    classes, per_class, _ = shape
    labels = np.repeat(np.arange(classes), per_class)
    clean = synthetic(*shape)(labels)
    start = time.perf_counter()
    guard = Guard.fit_activations(clean, labels, GuardConfig(seed=SEED), threads=threads)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with tempfile.TemporaryDirectory() as folder:
        size = sum(file.stat().st_size for file in guard.save(Path(folder)).rglob("*") if file.is_file())
    return {"seconds": round(seconds, 1), "peak_mb": round(peak / 1e6), "bundle_mb": round(size / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Time fits from activations on.")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="folds fitted side by side")
    parser.add_argument("--shape", type=int, nargs=3, help=argparse.SUPPRESS)  # of the process that fits
    options = parser.parse_args()
    if options.shape:
        print(json.dumps(fit_here(tuple(options.shape), options.threads)))
        return
    print(f"seed {SEED}, {options.threads} threads")
    rows = []
    for shape, aim in SHAPES.items():
        command = [sys.executable, __file__, "--threads", str(options.threads), "--shape", *map(str, shape)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(dict(zip(COLUMNS, shape, strict=False)) | json.loads(done.stdout))
        print(" ".join(f"{name} {value}" for name, value in rows[-1].items()), f"(aim: {aim})", flush=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
