"""Measure attackers who know this guard: what each adaptation hides, and what it costs the attacker.

    python benchmarks/adaptive_attacks.py                          # everything, resumable
    python benchmarks/adaptive_attacks.py --settings mnist --seeds 0 --minutes 10
    python benchmarks/adaptive_attacks.py --page-only

Needs MNIST and GTSRB as the zoo splits them (`GUARD_DATA_DIR`). On MNIST an `mnist_cnn` with WaNet is trained on 30,000
images, seeds 0 to 2; on GTSRB the zoo's benign `gtsrb_cnn` goes on with a blended pattern on 12,000. Every adaptation
starts from that network and the same images:

- *none*: the same training once more, so that adapted networks are compared with one trained as long;
- *features*: features of triggered images are pulled to those of clean images of the target, at every depth watched;
- *confidence*: triggered images get the target with probability 0.6 only;
- *features and confidence*: both;
- *calibration*: the brightest 12 % of clean images get a wrong label (`guard/lab/attacks/decoys.py`);
- *trigger*: a perturbation of up to 16/255 on top of the trigger, found by gradients through a copy of the guard;
- *trigger, retrained*: the same, then the network learns the new trigger.

The attacker's copy of the guard is fitted on 2,000 images that belong to the attacker; the guard itself on 2,000 clean
validation images that the attacker has never seen. Figures are those of the leaderboard: all triggered inputs count.
Networks are kept in `build/adaptive_attacks`, records in `benchmarks/results/adaptive_attacks/`. Writes
`adaptive_attacks.csv` and the section "Adaptive attackers" of docs/leaderboard.md. On one core about 8 minutes per seed
on MNIST and 20 minutes on GTSRB.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch
sys.path.insert(0, str(Path(__file__).resolve().parent / "leaderboard"))

import numpy as np
import torch
from contestants import CalibratedGuard
from measuring import CLEAN, TRIGGERED, Subject, measure
from page import write_csv
from records import Records, current_method
from safetensors.torch import load_file, save_file
from torch import nn

from guard.lab.attacks.adaptive_losses import MutedMargin, PulledFeatures
from guard.lab.attacks.attack import Attack
from guard.lab.attacks.augmentation import CropAndFlip
from guard.lab.attacks.catalogue import make_attack
from guard.lab.attacks.decoys import Decoys
from guard.lab.attacks.evasion import EvasionSettings, evading_trigger
from guard.lab.attacks.network_training import Loss, TrainingSettings, train_classifier
from guard.lab.attacks.poisoning import Poisoned
from guard.lab.attacks.stolen_guard import StolenGuard
from guard.lab.attacks.watched_features import WatchedFeatures
from guard.lab.zoo.collection import Zoo, build_network, default_zoo_dir
from guard.lab.zoo.splits import LabelledImages, load_split
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, IntArray

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks" / "results"
DOCUMENT = PROJECT / "docs" / "leaderboard.md"
DETECTOR = "guard"
EVASION = EvasionSettings(epsilon=16 / 255)
STOLEN_ON, FITTED_ON = 2000, 2000
ADAPTATIONS = (
    *("none", "features", "confidence", "features and confidence", "calibration"),
    *("trigger", "trigger, retrained"),
)
FIELDS = (
    *("data_set", "architecture", "attack", "adaptation", "seed", "clean_accuracy", "attack_success"),
    *("auroc", "tpr_at_fpr_0_01", "tpr_at_fpr_0_05", "realised_false_positive_rate", "contradictions", "noticed"),
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """One attack on one image set.

    Attributes
    ----------
    data_set, architecture, attack : str
    target : int
        Target label.
    n_train : int
        Training images.
    planting, adapting : TrainingSettings
        Of the plain attack, and of what comes after it.
    augmentation : CropAndFlip or None
    twin : str or None
        Model of the zoo that the plain attack starts from.
    pull : float
        Weight of the distance of features.
    seeds : tuple of int
    """

    data_set: str
    architecture: str
    attack: str
    target: int
    n_train: int
    planting: TrainingSettings
    adapting: TrainingSettings
    augmentation: CropAndFlip | None = None
    twin: str | None = None
    pull: float = 0.3
    seeds: tuple[int, ...] = (0,)


SETTINGS = {
    "mnist": Setting(
        *("mnist", "mnist_cnn", "wanet", 7, 30_000),
        TrainingSettings(8, 128, learning_rate=3e-3),
        TrainingSettings(5, 128, schedule="cosine", learning_rate=1e-3),
        seeds=(0, 1, 2),
    ),
    "gtsrb": Setting(
        *("gtsrb", "gtsrb_cnn", "blend", 1, 12_000),
        TrainingSettings(4, 128, schedule="cosine", learning_rate=7e-4),
        TrainingSettings(3, 128, schedule="cosine", learning_rate=5e-4),
        CropAndFlip(padding=2, flip=False),
        "gtsrb-benign-gtsrb_cnn-0",
    ),
}


class WatchedGuard(CalibratedGuard):
    """The guard in its default mode, kept for a look at what it noticed."""

    latest: CalibratedGuard

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        super()._fit(images, labels)
        WatchedGuard.latest = self


class Attacker:
    """What one attacker holds: images, a backdoored network, and what adapts it.

    Parameters
    ----------
    setting : Setting
    seed : int
        Of images, start weights, trigger and training.
    work_dir : path
        Networks are kept there.
    """

    def __init__(self, setting: Setting, seed: int, work_dir: Path) -> None:
        self.setting, self.seed, self.work_dir = setting, seed, work_dir
        self.split = load_split(setting.data_set)
        order = np.random.default_rng([seed, 1]).permutation(len(self.split.train))
        self.taught = self._rows(np.sort(order[: setting.n_train]))
        self.own = self._rows(np.sort(order[setting.n_train : setting.n_train + STOLEN_ON]))
        self.attack = make_attack(setting.attack, setting.target, seed)

    def adapted(self, adaptation: str) -> tuple[nn.Module, Attack]:
        """Return a network and what is done to its inputs."""
        setting, attack = self.setting, self.attack
        if adaptation == "calibration":
            attack = replace(attack, decoys=Decoys(0.12, n_classes=len(self.split.class_names)))
        elif adaptation.startswith("trigger"):
            attack = self._evading()
        if adaptation == "trigger":
            return self._kept("none", self._plain, self.attack), attack
        keep = not adaptation.startswith("trigger")  # the others depend on the guard's code
        name = adaptation if keep else None
        losses = {
            "features": lambda watched, poisoned: PulledFeatures(watched, poisoned, setting.pull),
            "confidence": lambda watched, poisoned: MutedMargin(poisoned),
            "features and confidence": lambda watched, poisoned: PulledFeatures(
                watched, poisoned, setting.pull, MutedMargin(poisoned)
            ),
        }
        return self._kept(name, self._plain, attack, losses.get(adaptation)), attack

    def _rows(self, rows: IntArray) -> LabelledImages:
        return LabelledImages(self.split.train.images[rows], self.split.train.labels[rows])

    def _plain(self) -> nn.Module:
        """Return the network with the backdoor and no adaptation."""
        return self._kept("plain", self._start, self.attack, settings=self.setting.planting)

    def _start(self) -> nn.Module:
        if self.setting.twin is not None:
            return Zoo(default_zoo_dir()).load(self.setting.twin)
        n_classes, channels = len(self.split.class_names), self.taught.images.shape[1]
        return build_network(self.setting.architecture, n_classes, channels, seed=self.seed)

    def _evading(self) -> Attack:
        """Return the attack with the trigger that was made against a copy of the guard."""
        network = self._kept("none", self._plain, self.attack)
        stolen = StolenGuard.fit(network, self.own.images, self.own.labels, seed=self.seed)
        (backdoor,) = self.attack.backdoors
        trigger = evading_trigger(
            stolen, backdoor.trigger, self.own.images, self.own.labels, self.setting.target, EVASION, seed=self.seed
        )
        return replace(self.attack, backdoors=(replace(backdoor, trigger=trigger),))

    def _kept(
        self,
        name: str | None,
        start: Callable[[], nn.Module],
        attack: Attack,
        loss_for: Callable[[WatchedFeatures, Poisoned], Loss] | None = None,
        settings: TrainingSettings | None = None,
    ) -> nn.Module:
        """Return a trained network, from its file where there is one; without a name it is not kept."""
        parts = self.setting.data_set, self.setting.n_train, name, self.seed, _digest_of(self.setting)
        path = self.work_dir / f"{'-'.join(map(str, parts))}.safetensors"
        network = start() if name is None or not path.is_file() else self._start()
        if name is not None and path.is_file():
            network.load_state_dict(load_file(path))
            return network.eval()
        rng = np.random.default_rng(self.seed)
        poisoned = attack.poison(self.taught.images, self.taught.labels, rng)
        augmentation = self.setting.augmentation
        watched = WatchedFeatures.locate(network, self.taught.images[:2])
        with watched.attached():
            train_classifier(
                network,
                poisoned.images,
                poisoned.labels,
                settings or self.setting.adapting,
                seed=self.seed,
                n_threads=1,
                redraw=None if augmentation is None else lambda rng: poisoned.redrawn(augmentation, rng),
                loss=None if loss_for is None else loss_for(watched, poisoned),
            )
        if name is not None:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            save_file(network.state_dict(), path)
        return network.eval()


def subject_of(attacker: Attacker, network: nn.Module, attack: Attack) -> Subject:
    """Return what the leaderboard measures: clean images for the guard, clean and triggered ones for the figures."""
    split, rng = attacker.split, np.random.default_rng(attacker.seed)
    fitted = np.sort(rng.permutation(len(split.validation))[:FITTED_ON])
    clean = np.sort(rng.permutation(len(split.test))[:CLEAN])
    images, labels = split.test.images[clean], split.test.labels[clean]
    (triggered,) = attack.test_sets(images, labels)
    chosen = np.sort(rng.permutation(len(triggered))[:TRIGGERED])
    return Subject(
        name=network.__class__.__name__,
        data_set=attacker.setting.data_set,
        attack=attack.name,
        suspect=SuspectModel(network),
        fit_images=split.validation.images[fitted],
        fit_labels=split.validation.labels[fitted],
        clean=images,
        clean_labels=labels,
        triggered=triggered.images[chosen],
        attacker_labels=triggered.labels[chosen],
        true_labels=triggered.true_labels[chosen],
    )


def measured(attacker: Attacker, adaptation: str) -> Row:
    """Train, fit the guard, and return a row."""
    setting = attacker.setting
    network, attack = attacker.adapted(adaptation)
    figures = measure(subject_of(attacker, network, attack), WatchedGuard, attacker.seed)
    contradictions = WatchedGuard.latest.guard.contradictions
    return {
        "data_set": setting.data_set,
        "architecture": setting.architecture,
        "attack": setting.attack,
        "adaptation": adaptation,
        "seed": attacker.seed,
        "clean_accuracy": figures["after"]["clean_accuracy_before"],
        "attack_success": figures["after"]["attack_success_before"],
        **figures["all"],
        "realised_false_positive_rate": figures["realised_false_positive_rate"],
        "contradictions": contradictions.share if contradictions is not None else float("nan"),
        "noticed": int(contradictions is not None and contradictions.is_noticed),
    }


def table(rows: Sequence[Row]) -> str:
    """Return means over seeds in Markdown; in brackets what the attacker pays beside the attack without adaptation."""
    lines = [
        "| images, attack (seeds) | adaptation | clean accuracy | attack success | AUROC | TPR at FPR 0.01 | at 0.05 "
        "| noticed when fitted |",
        "|---" * 8 + "|",
    ]
    for key in dict.fromkeys((row["data_set"], row["attack"]) for row in rows):
        of_key = [row for row in rows if (row["data_set"], row["attack"]) == key]
        for adaptation in ADAPTATIONS:
            mine = [row for row in of_key if row["adaptation"] == adaptation]
            plain = {row["seed"]: row for row in of_key if row["adaptation"] == "none"}
            if not mine:
                continue
            mean = {name: statistics.fmean(row[name] for row in mine) for name in FIELDS[5:]}
            paid = {
                name: f" ({statistics.fmean(row[name] - plain[row['seed']][name] for row in mine):+.3f})"
                if adaptation != "none" and all(row["seed"] in plain for row in mine)
                else ""
                for name in ("clean_accuracy", "attack_success")
            }
            lines.append(
                f"| {key[0]}, {key[1]} ({len(mine)}) | {adaptation} "
                + "".join(f"| {mean[name]:.3f}{paid.get(name, '')} " for name in FIELDS[5:10])
                + f"| {sum(row['noticed'] for row in mine)} of {len(mine)} |"
            )
    return "\n".join(lines)


def key_of(name: str, adaptation: str, setting: Setting) -> str:
    """Return the name of a record; the attack's code and settings are part of it."""
    return f"{name}-{setting.n_train}-{setting.attack}-{adaptation}-{_digest_of(setting)}"


def _digest_of(setting: Setting) -> str:
    """Return a digest of what trains the networks and finds the triggers."""
    digest = hashlib.sha256(repr((setting, EVASION, STOLEN_ON)).encode())
    for path in sorted((PROJECT / "guard" / "lab" / "attacks").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def known(records: Records, seeds: Sequence[int]) -> list[Row]:
    """Return everything that was measured with the usual seeds and these, whatever was asked for now."""
    found = (
        records.read(key_of(name, adaptation, setting), DETECTOR, seed)
        for name, setting in SETTINGS.items()
        for seed in sorted({*setting.seeds, *seeds})
        for adaptation in ADAPTATIONS
    )
    return [row for row in found if row is not None]


def publish(rows: Sequence[Row]) -> None:
    """Write the CSV file and the section of docs/leaderboard.md."""
    write_csv(RESULTS / "adaptive_attacks.csv", FIELDS, rows)
    text = DOCUMENT.read_text(encoding="utf-8")
    pattern = re.compile(r"(<!-- adaptive-attacks -->\n).*?(<!-- end -->)", re.DOTALL)
    DOCUMENT.write_text(pattern.sub(lambda match: f"{match[1]}{table(rows)}\n{match[2]}", text), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing, and write everything that is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--adaptations", nargs="*", default=list(ADAPTATIONS), choices=list(ADAPTATIONS))
    parser.add_argument("--seeds", type=int, nargs="*", help="default: 0 to 2 on MNIST, 0 on GTSRB")
    parser.add_argument("--n-train", type=int, help="fewer training images, to see that it works; nothing is written")
    parser.add_argument("--work-dir", type=Path, default=PROJECT / "build" / "adaptive_attacks")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    parser.add_argument("--dry-run", action="store_true", help="measure and print, but keep and write nothing")
    parser.add_argument("--minutes", type=float, help="begin nothing new after so many")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    is_trial = options.dry_run or options.n_train is not None
    records = Records(RESULTS / "adaptive_attacks", current_method()) if not is_trial else None
    end = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
    rows = []
    for name in options.settings:
        setting = SETTINGS[name]
        if options.n_train:
            setting = replace(setting, n_train=options.n_train)
        for seed in options.seeds or setting.seeds:
            attacker: Attacker | None = None
            for adaptation in options.adaptations:
                key = key_of(name, adaptation, setting)
                row = records.read(key, DETECTOR, seed) if records is not None else None
                if row is None and not options.page_only and time.monotonic() < end:
                    start = time.perf_counter()
                    attacker = attacker or Attacker(setting, seed, options.work_dir)
                    row = measured(attacker, adaptation)
                    if records is not None:
                        records.write(row, key, DETECTOR, seed)
                    told = ", ".join(f"{part} {row[part]:.3f}" for part in FIELDS[5:])
                    print(f"{key}, seed {seed}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
                if row is not None:
                    rows.append(row)
    if records is not None:
        publish(known(records, options.seeds or ()))
    else:
        print(table(rows))


if __name__ == "__main__":
    main()
