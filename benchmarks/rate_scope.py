"""What `false_positive_rate_scope = "class"` gives its user, and what it gives an attacker.

    python benchmarks/rate_scope.py [--part zoo|decoys]

Needs the zoo's images (`GUARD_DATA_DIR`). One guard is fitted for each model and seed, on the zoo's clean validation
images, and asked about all clean and triggered test images under both scopes, at 1 and 5 %. The seed is that of the
guard (folds and heads), and on MNIST of the network as well. The part `decoys` trains WaNet networks on MNIST as
`benchmarks/calibration_attack.py` does, whose attacker has read how the scope works: a few of the brightest images of
other classes are taught with the target label, so that clean inputs of that class are loud.

Writes `rate_scope.csv`, a row per model, seed, rate and scope. All rates are shares:

- `realised_rate`: of the clean test images that are flagged; `worst_class_rate`: the same among those that the network
  answers with one class, the largest of the classes with 50 and more; `worst_true_class_rate`: by true label instead.
- `classes_above`: classes whose flagged images are more than the requested rate explains (binomial, one-sided, 1 % in
  all classes together); `own_thresholds`: classes that are calibrated by themselves.
- `true_positive_rate`: of all triggered images that are flagged, those that miss the target too; `attack_success`: of
  those whose true label is another that get the attacker's label unflagged.
- `target_realised_rate`: of the clean test images answered with the target label that are flagged;
  `target_true_positive_rate`: of the triggered ones answered with the attacker's.

What `build/rate_scope` holds is not measured again: delete it after a change. About an hour on one core.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
from safetensors.torch import load_file, save_file
from scipy.stats import binom

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.catalogue import make_attack
from guard.lab.attacks.decoys import Decoys, is_decoy
from guard.lab.attacks.network_training import TrainingSettings, train_classifier
from guard.lab.zoo.collection import Zoo, build_network, default_zoo_dir
from guard.lab.zoo.splits import ZooSplit, load_split
from guard.statistics.evaluation import attack_success_rate
from guard.suspect.model import SuspectModel
from guard.types import Activations, BoolArray, IntArray

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "detection.md"
BEGIN, END = "<!-- rate scope: benchmarks/rate_scope.py -->", "<!-- end of rate scope -->"
HEAD = (
    "| network, attack | guards | worst class at 0.01 | at 0.05 | attack success at 0.01 | at 0.05 | target at 0.05 |",
    "|---|---|---|---|---|---|---|",
)
RATES, SCOPES, SEEDS = (0.01, 0.05), ("all", "class"), (0, 1, 2)
#: Fewer clean test images of a class say nothing of its rate.
_ENOUGH, _LEVEL = 50, 0.01
TARGET = 7
#: Share of the training images that are decoys.
SHARES = (0.0, 0.01)
_TRAINED_ON = 20_000
#: Models of the zoo, which has three seeds of those on MNIST; of two others there are guards with three seeds.
PLAN = (
    *((f"mnist-{name}-mnist_cnn-{seed}", seed) for name in ("wanet", "blend", "benign") for seed in SEEDS),
    *((f"gtsrb-{name}-gtsrb_cnn-0", 0) for name in ("benign", "wanet", "blend", "tact", "adap-blend", "c")),
    *((f"cifar10-{name}-resnet20-0", 0) for name in ("benign", "badnets", "blend", "wanet")),
    *((f"gtsrb-{name}-gtsrb_cnn-0", seed) for name in ("wanet", "blend") for seed in SEEDS[1:]),
)


class Case(NamedTuple):
    """A network, and what it makes of the images: clean ones to fit on, clean and triggered ones to ask about."""

    names: dict[str, Any]
    fit: Activations
    fit_labels: IntArray
    clean: Activations
    clean_labels: IntArray
    triggered: Activations | None
    attacker_labels: IntArray
    true_labels: IntArray


def case_of(names: dict[str, Any], suspect: SuspectModel, split: ZooSplit, attack: Attack | None) -> Case:
    """Let a network see the images."""
    suspect.locate(split.validation.images, split.validation.labels)
    sets = attack.test_sets(split.test.images, split.test.labels) if attack is not None else []
    none = np.empty(0, dtype=np.int64)
    return Case(
        names,
        suspect.activations(split.validation.images),
        split.validation.labels,
        suspect.activations(split.test.images),
        split.test.labels,
        Activations.concatenate([suspect.activations(part.images) for part in sets]) if sets else None,
        np.concatenate([part.labels for part in sets]) if sets else none,
        np.concatenate([part.true_labels for part in sets]) if sets else none,
    )


def measure(case: Case, seed: int) -> Iterator[dict[str, Any]]:
    """Fit one guard, and return a row per rate and scope."""
    fitted = Guard.fit_activations(case.fit, case.fit_labels, GuardConfig(false_positive_rate=max(RATES), seed=seed))
    for rate in RATES:
        for scope in SCOPES:
            guard = fitted.with_config(false_positive_rate=rate, false_positive_rate_scope=scope)
            flagged = guard.scores(case.clean).is_poisoned
            answers = case.clean.predicted_labels
            of_class = shares(flagged, answers)
            row = {
                **case.names,
                "seed": seed,
                "scope": scope,
                "false_positive_rate": rate,
                "realised_rate": float(flagged.mean()),
                "worst_class_rate": max(share for share, _ in of_class),
                "true_positive_rate": "",
                "attack_success": "",
                "worst_true_class_rate": max(share for share, _ in shares(flagged, case.clean_labels)),
                "classes_above": sum(
                    binom.sf(round(share * n) - 1, n, rate) < _LEVEL / len(of_class) for share, n in of_class
                ),
                "own_thresholds": 0 if guard.class_ranks is None else int((~guard.class_ranks.is_shared).sum()),
                "target_realised_rate": "",
                "target_true_positive_rate": "",
            }
            if case.triggered is not None:
                caught, given = guard.scores(case.triggered).is_poisoned, case.triggered.predicted_labels
                is_hit = given == case.attacker_labels
                row |= {
                    "true_positive_rate": float(caught.mean()),
                    "attack_success": attack_success_rate(given, case.attacker_labels, case.true_labels, caught),
                    "target_true_positive_rate": float(caught[is_hit].mean()),
                }
                if len(targets := np.unique(case.attacker_labels)) == 1:
                    row["target_realised_rate"] = float(flagged[answers == targets[0]].mean())
            yield row


def shares(flagged: BoolArray, labels: IntArray) -> list[tuple[float, int]]:
    """Return the flagged share of each class with enough images, and their number."""
    classes, counts = np.unique(labels, return_counts=True)
    return [
        (float(flagged[labels == label].mean()), n)
        for label, n in zip(classes.tolist(), counts.tolist(), strict=True)
        if n >= _ENOUGH
    ]


def zoo_case(model: str) -> Case:
    """Return a model of the zoo with its images."""
    zoo = Zoo(default_zoo_dir())
    card = zoo.card(model)
    names = {"data_set": card.data_set, "attack": card.attack, "model": model}
    attack = None if card.is_benign else card.restore_attack()
    return case_of(names, SuspectModel(zoo.load(model)), load_split(card.data_set), attack)


def decoy_case(share: float, seed: int, work_dir: Path) -> Case:
    """Return a network with WaNet and a share of decoys in the target's class; trained where no file keeps it."""
    split, network = load_split("mnist"), build_network("mnist_cnn", 10, 1, seed=seed)
    attack, kept = make_attack("wanet", TARGET, seed), work_dir / f"decoys-{share:g}-{seed}.safetensors"
    if kept.is_file():
        network.load_state_dict(load_file(kept))
    else:
        images, labels = split.train.images[:_TRAINED_ON], split.train.labels[:_TRAINED_ON]
        poisoned = attack.poison(images, labels, np.random.default_rng(seed))
        if share:
            others = ~(poisoned.is_poisoned | poisoned.is_cover) & (poisoned.true_labels != TARGET)
            limit = Decoys(share, n_classes=10).least_brightness(poisoned.images[others])
            chosen = others & is_decoy(poisoned.images, limit)
            poisoned = replace(poisoned, labels=np.where(chosen, TARGET, poisoned.labels))
        settings = TrainingSettings(epochs=5, batch_size=128, learning_rate=3e-3)
        train_classifier(network, poisoned.images, poisoned.labels, settings, seed=seed, n_threads=1)
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, kept)
    names = {"data_set": "mnist", "attack": f"wanet, {share:.1%} decoys", "model": kept.stem}
    return case_of(names, SuspectModel(network), split, attack)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, write the table, and print means and worst cases."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("zoo", "decoys"), help="only one part; both if left out")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--work-dir", type=Path, default=Path("build/rate_scope"))
    chosen = parser.parse_args(arguments)
    chosen.work_dir.mkdir(parents=True, exist_ok=True)
    kept = chosen.work_dir / "rows.csv"
    done = {(row["model"], int(row["seed"])) for row in _read(kept)}
    wanted = [] if chosen.part == "zoo" else [(f"decoys-{share:g}-{seed}", seed) for share in SHARES for seed in SEEDS]
    wanted += [] if chosen.part == "decoys" else list(PLAN)
    for model, seed in wanted:
        if (model, seed) in done:
            continue
        started = time.perf_counter()
        is_decoys = model.startswith("decoys-")
        case = decoy_case(float(model.split("-")[1]), seed, chosen.work_dir) if is_decoys else zoo_case(model)
        rows = list(measure(case, seed))
        _append(kept, rows)
        print(f"{model}, seed {seed}, {time.perf_counter() - started:.0f} s", flush=True)
        for row in rows:
            told = {name: value for name, value in row.items() if name not in case.names}
            print("   ", ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in told.items()))
    rows_of_all = sorted(_read(kept), key=lambda row: (row["data_set"], row["attack"], row["model"], row["seed"]))
    with (chosen.output_dir / "rate_scope.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows_of_all[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows_of_all)
    report(rows_of_all)
    if chosen.output_dir == Path(__file__).parent / "results":
        write_document(rows_of_all)


def report(rows: Sequence[dict[str, str]]) -> None:
    """Print a line per data set and attack, rate and scope: means, and the worst of its guards."""
    figures = {
        "realised_rate": max,
        "worst_class_rate": max,
        "worst_true_class_rate": max,
        "classes_above": max,
        "true_positive_rate": min,
        "attack_success": max,
        "target_realised_rate": max,
        "target_true_positive_rate": min,
    }
    print(f"\nmean (worst) of the guards\n{'':44}" + "".join(f"{name[:22]:>24}" for name in figures))
    groups = dict.fromkeys((r["data_set"], r["attack"], r["false_positive_rate"], r["scope"]) for r in rows)
    for group in groups:
        of_group = [r for r in rows if (r["data_set"], r["attack"], r["false_positive_rate"], r["scope"]) == group]
        line = f"{' '.join(group):38}{len(of_group):>4}  "
        for name, worst in figures.items():
            values = [float(r[name]) for r in of_group if r[name] != ""]
            told = f"{statistics.mean(values):.4f} ({worst(values):.4f})" if values else "-"
            line += f"{told:>24}"
        print(line)


def write_document(rows: Sequence[dict[str, str]]) -> None:
    """Write the table of docs/detection.md: percentages, the mean of the guards and the worst."""
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["data_set"], row["attack"]), []).append(row)
    lines = []
    for (data_set, attack), of_group in groups.items():
        cells = [
            " → ".join(_told(of_group, name, rate, scope) for scope in SCOPES)
            for name in ("worst_class_rate", "attack_success")
            for rate in RATES
        ]
        target = _told(of_group, "target_realised_rate", RATES[-1], "all")
        n_guards = len(of_group) // (len(RATES) * len(SCOPES))
        lines.append(f"| {data_set}, {attack} | {n_guards} | {' | '.join(cells)} | {target} |")
    text = DOCUMENT.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text("\n".join([f"{before}{BEGIN}", *HEAD, *lines, f"{END}{after}"]), encoding="utf-8")


def _told(rows: Sequence[dict[str, str]], name: str, rate: float, scope: str) -> str:
    chosen = [row for row in rows if row["scope"] == scope and float(row["false_positive_rate"]) == rate]
    values = [100 * float(row[name]) for row in chosen if row[name]]
    worst = f" ({max(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{worst}" if values else "-"


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    is_new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: round(v, 6) if isinstance(v, float) else v for name, v in row.items()} for row in rows)


if __name__ == "__main__":
    main()
