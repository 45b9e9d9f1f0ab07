"""What each part of the default mode is worth: the guard without it, on the attacked networks of the zoo.

    python benchmarks/ablation.py

Writes `ablation.csv`: one row per rule, model and trigger, with AUROC and the share of all triggered inputs, those that
miss the target too, that are caught where 1 % of all clean test images are flagged. Detectors are fitted once per
model, on the zoo's clean validation images; rules differ in which of them they ask and how they combine. The earlier
rule is that of the versions before: LOF on the features as they are and a head at every depth, root mean square of
surprise; all rules have today's folds. The rule was chosen on these models, so this is no test. With all models the
table goes into docs/detection.md. What `build/ablation` holds is not measured again: delete it after a change.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch

import numpy as np
import torch

from guard.config import GuardConfig
from guard.detection.cross_fitting import folds_for
from guard.detection.detectors.base import Kind
from guard.detection.detectors.disagreement import HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.ensemble import Ensemble, Member
from guard.detection.fusion import CalibratedFusion
from guard.detection.kind_scores import KindScores
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.statistics.calibration import stratified_folds
from guard.statistics.evaluation import auroc
from guard.suspect.model import SuspectModel
from guard.types import Activations, Float64Array, IntArray

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENT = PROJECT / "docs" / "detection.md"
RATE = 0.01
KINDS = ("lof", "disagreement", "residual", "relative_distance")
#: What earlier versions asked besides: LOF of features that are not whitened, and heads before the split layer.
EARLIER, HEADS = "lof of features", "disagreement of earlier depths"


class Case(NamedTuple):
    """Scores of one model's images, (n, n_detectors), and the suspect's logits; clean out-of-fold ones first."""

    kinds: tuple[Kind, ...]
    fitted: tuple[Float64Array, Float64Array, IntArray]
    clean: tuple[Float64Array, Float64Array]
    triggered: Mapping[str, tuple[Float64Array, Float64Array]]


class Rule(NamedTuple):
    """Which kinds of detectors are asked, and what is changed of how they are combined."""

    kinds: tuple[str, ...] = KINDS
    #: Replaces what the detectors say of themselves.
    changed: Mapping[str, str] = {}
    has_factor: bool = True
    weighs_kinds_alike: bool = False
    is_earlier: bool = False


RULES = {
    "default": Rule(),
    **{f"without {kind}": Rule(tuple(other for other in KINDS if other != kind)) for kind in KINDS},
    "without the factors": Rule(has_factor=False),
    "one family, one factor": Rule(changed={"shows": "novelty"}),
    "a head at every depth": Rule((*KINDS, HEADS)),
    "all kinds weigh the same": Rule(weighs_kinds_alike=True),
    "depths of all kinds averaged": Rule(changed={"over_depths": "averaged"}),
    "LOF of features": Rule((EARLIER, *KINDS[1:])),
    "earlier rule": Rule((EARLIER, "disagreement", HEADS), is_earlier=True),
}


def fitted_ensemble(seed: int, activations: Activations, labels: IntArray, share: float) -> Ensemble:
    """Return the default detectors and LOF on features as they are, fitted as in `cross_fit`."""
    config = GuardConfig(seed=seed, n_neighbors=max(1, round(20 * share)))
    depths = tuple(activations.depths)
    ensemble = Ensemble.for_mode(config, depths).fit(activations, labels)
    earlier = [
        *((EARLIER, _Plain(depth=depth, n_neighbors=config.n_neighbors)) for depth in ("features", *depths)),
        *((HEADS, HeadDisagreement(depth=depth, seed=seed)) for depth in depths),
    ]
    members = [Member(f"{kind}:{part.depth}", kind, part.fit(activations, labels)) for kind, part in earlier]
    return Ensemble([*ensemble.members, *members], ensemble.spaces)


class _Plain(PerClassLof):
    """LOF on the features as they are."""

    reads = "activations"


class _Alike(KindScores):
    """Scores of kinds, each of which counts once among those that show the same."""

    @property
    def weights(self) -> Float64Array:
        counts = np.bincount(self.shows)
        return np.asarray(1.0 / (np.count_nonzero(counts) * counts[self.shows]))


def measure_scores(zoo: Zoo, name: str) -> Case:
    """Return all scores of one model."""
    card, suspect = zoo.card(name), SuspectModel(zoo.load(name))
    split = load_split(card.data_set)
    activations, labels = suspect.activations(split.validation.images), split.validation.labels
    folds = folds_for(GuardConfig(), len(labels))
    part = stratified_folds(labels, folds, card.seed)
    raw = np.empty(0)
    for fold in range(folds):
        held = part == fold
        ensemble = fitted_ensemble(card.seed, activations[~held], labels[~held], 1 - 1 / folds)
        if fold == 0:
            raw = np.empty((len(labels), len(ensemble.names)))
        raw[held] = ensemble.score(activations[held])
    ensemble = fitted_ensemble(card.seed, activations, labels, 1.0)

    def scored(images: Float64Array) -> tuple[Float64Array, Float64Array]:
        found = suspect.activations(images)
        return ensemble.score(found), found.logits

    sets = card.restore_attack().test_sets(split.test.images, split.test.labels)
    triggered = {str(place): scored(entry.images) for place, entry in enumerate(sets)}
    return Case(ensemble.kinds, (raw, activations.logits, labels), scored(split.test.images), triggered)


def figures(case: Case) -> Iterator[tuple[str, str, float, float]]:
    """Yield rule, trigger, AUROC and the share caught."""
    for title, rule in RULES.items():
        columns = np.isin([kind.name for kind in case.kinds], rule.kinds)
        raw, logits, labels = case.fitted
        kinds = [kind._replace(**rule.changed) for kind, is_asked in zip(case.kinds, columns, strict=True) if is_asked]
        kinds = [kind._replace(name="disagreement") if kind.name == HEADS else kind for kind in kinds]
        fusion = CalibratedFusion().fit(raw[:, columns], logits, labels, kinds)
        if rule.weighs_kinds_alike:
            scores_of_kinds = fusion.kind_scores_
            assert scores_of_kinds is not None  # fitted above
            fusion.kind_scores_ = _Alike(*(getattr(scores_of_kinds, part.name) for part in fields(scores_of_kinds)))
        if rule.is_earlier:
            fusion = CalibratedFusion(fusion.surprise_map_)

        def combined(scores: Float64Array, logits: Float64Array) -> Float64Array:
            answers = logits if rule.has_factor else np.tile([1e30, 0.0], (len(logits), 1))  # noqa: B023 - of this turn
            return fusion.combine(fusion.surprise(scores[:, columns]), answers)  # noqa: B023

        clean = combined(*case.clean)
        threshold = np.quantile(clean, 1 - RATE, method="higher")
        for trigger, scores in case.triggered.items():
            found = combined(*scores)
            is_poisoned = np.r_[np.zeros(len(clean), dtype=bool), np.ones(len(found), dtype=bool)]
            yield title, trigger, auroc(np.r_[clean, found], is_poisoned), float((found > threshold).mean())


def as_table(rows: list[dict[str, str]]) -> str:
    """Return means and worst by rule, as in docs/detection.md."""
    lines = ["| rule | AUROC mean | worst | TPR at FPR 0.01 mean | worst | of |", "|---|---|---|---|---|---|"]
    for title in RULES:
        of_rule = [row for row in rows if row["rule"] == title]
        areas, caught = ([float(row[key]) for row in of_rule] for key in ("auroc", "tpr_at_fpr_0_01"))
        worst = of_rule[int(np.argmin(caught))]["model"].removesuffix("-0")
        figures_of = f"{np.mean(areas):.4f} | {min(areas):.3f} | {np.mean(caught):.3f} | {min(caught):.3f}"
        lines.append(f"| {title} | {figures_of} | {worst} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the default mode without each of its parts.")
    parser.add_argument("models", nargs="*", help="models of the zoo; default: every attacked one of seed 0")
    parser.add_argument("--records", type=Path, default=PROJECT / "build" / "ablation", help="folder of measured rates")
    parser.add_argument("--output-dir", type=Path, default=PROJECT / "benchmarks" / "results")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo(default_zoo_dir())
    names = arguments.models or [card.name for card in zoo.cards() if card.seed == 0 and not card.is_benign]
    arguments.records.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for name in names:
        record = arguments.records / f"{name}.json"
        if not record.exists():
            print(f"{name}, seed {zoo.card(name).seed}", flush=True)
            found = [
                {
                    "rule": rule,
                    "model": name,
                    "trigger": trigger,
                    "auroc": f"{area:.5f}",
                    "tpr_at_fpr_0_01": f"{tpr:.4f}",
                }
                for rule, trigger, area, tpr in figures(measure_scores(zoo, name))
            ]
            record.write_text(json.dumps(found))
        rows += json.loads(record.read_text())
    with (arguments.output_dir / "ablation.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["rule", "model", "trigger", "auroc", "tpr_at_fpr_0_01"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table = as_table(rows)
    print(f"\n{table}")
    if not arguments.models:
        pattern = re.compile(r"(<!-- ablation -->\n).*?(<!-- end -->)", re.DOTALL)
        text = DOCUMENT.read_text(encoding="utf-8")
        DOCUMENT.write_text(pattern.sub(lambda found: f"{found[1]}{table}\n{found[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
