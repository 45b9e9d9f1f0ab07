"""What is measured of one zoo model, kept as small records so that tables can share them.

A record holds rates only (fractions), in groups: `unguarded` (the suspect model alone), `novelty` and `head` (the two
detectors of the paper each alone), `paper` (both, eq. 13), `calibrated` (our combination), `calibrated_usual` (the same
at a rate that has nothing to do with the paper), `strip` (a rival). Attack success, false negatives and false
acceptance are lists, one rate per trigger.

Guards see clean validation images only. The rate that `calibrated` asks for is the one that `paper` shows on the
validation images, out of fold; test images, clean or poisoned, are looked at when both guards are fitted.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from last_layer import RetrainedLastLayer
from subjects import (
    Record,
    Request,
    Subject,
    rates_on_rest,
)

import guard
from guard.config import GuardConfig
from guard.detection.detectors.lof import PerClassLof
from guard.detection.fusion import NOVELTY_OFFSET
from guard.detection.pipeline import Guard
from guard.lab.attacks.poisoning import Poisoned
from guard.lab.rivals.strip import Strip, detection_boundary
from guard.lab.zoo.card import ZooCard
from guard.lab.zoo.collection import Zoo
from guard.statistics.calibration import stratified_folds
from guard.statistics.evaluation import attack_success_rate, clean_accuracy
from guard.types import Activations, BoolArray, IntArray

#: Standard deviation of the Gaussian noise of table 7, for images in [0, 1]; the paper's is lost. This is the largest
#: of `NOISE_CHOICES` at which no benign model of the zoo loses more than 10 points of accuracy on validation images:
#: chosen without any backdoored model. `side_studies.py` shows the figures.
NOISE_STD = 0.02
#: What somebody who does not compare with the paper may ask for; table 4 shows it too.
USUAL_RATE = 0.05
#: Share of the test images that a person has seen before retraining; the paper says that 10-20 % are enough.
SEEN_SHARE = 0.2
#: Seed of the images that are seen first; the guards take the seed of their model.
STREAM_SEED = 0

#: Of STRIP: the share of clean inputs that its boundary may reject, as in its paper, and how many validation images it
#: is fitted on, and triggered images per trigger it is measured on, as each takes a hundred forward passes.
STRIP_FALSE_REJECTION = 0.01
STRIP_IMAGES = 100

#: Files of `guard` that decide the numbers: a record made by other code is not used again.
_DECIDING = (
    *(f"lab/attacks/{name}.py" for name in ("attack", "networks", "poisoning", "targets")),
    "lab/attacks/triggers/*.py",
    *("detection/*.py", "detection/detectors/*.py", "detection/heads/*.py"),
    *("statistics/*.py", "suspect/*.py"),
)

#: The same of some kinds of requests, and scripts of this folder.
_DECIDING_MORE = {
    "online": ("relabel/*.py", "retrainer/*.py", "serving/*.py", "torchserve/*.py"),
    "strip": ("lab/rivals/base.py", "lab/rivals/strip.py"),
}
_SCRIPTS_MORE = {"online": ("online",)}

PLAIN = Request("guard")
AUGMENTED = Request("guard", noise_std=NOISE_STD)
HALF = Request("guard", validation_quarters=2)
THREE_QUARTERS = Request("guard", validation_quarters=3)
LAST_LAYER = Request("last_layer")
ONLINE = Request("online", noise_std=NOISE_STD)
STRIP = Request("strip")
RETRAINED_PLAIN = Request("retraining")
NORM_STUDY = Request("norm_orders")
NOISE_STUDY = Request("noise_std")
BENIGN_NOISE = Request("benign_noise")

#: Choices of the side studies. Empty = the features themselves, no norms.
NORM_CHOICES: tuple[tuple[str, ...], ...] = (
    ("l1", "l2", "linf"),
    ("l0", "l1", "l2"),
    ("l0", "l1", "linf"),
    ("l0", "l2", "linf"),
    ("l0", "l1", "l2", "linf"),
    (),
)
NOISE_CHOICES = (0.01, 0.02, 0.05, 0.1)


def measured(
    clean: Activations,
    labels: IntArray,
    clean_flags: BoolArray,
    triggered: Sequence[tuple[Activations, Poisoned]],
    triggered_flags: Sequence[BoolArray],
) -> dict[str, Any]:
    """Return the four rates of a table, fractions: flagged inputs count as not answered."""
    return {
        "true_negative": float((~clean_flags).mean()),
        "false_negative": [float((~flags).mean()) for flags in triggered_flags],
        "clean_accuracy": clean_accuracy(clean.predicted_labels, labels, clean_flags),
        "attack_success": [
            attack_success_rate(activations.predicted_labels, entry.labels, entry.true_labels, flags)
            for (activations, entry), flags in zip(triggered, triggered_flags, strict=True)
        ],
    }


def study_guard(subject: Subject, request: Request) -> Record:
    """Measure both guards, the two detectors of the published one, and the model without a guard."""
    guards = subject.guards(request.noise_std, request.validation_quarters)
    clean, labels, triggered = subject.clean, subject.split.test.labels, subject.triggered
    record: Record = {}

    def put(part: str, flag: Callable[[Activations], BoolArray], **more: float) -> None:
        flags = [flag(activations) for activations, _ in triggered]
        record[part] = {**measured(clean, labels, flag(clean), triggered, flags), **more}

    put("unguarded", lambda activations: np.zeros(len(activations), dtype=bool))
    put("novelty", lambda activations: guards.paper.scores(activations).raw[:, 0] > NOVELTY_OFFSET)
    put("head", lambda activations: guards.paper.scores(activations).raw[:, 1] > 0)
    for mode, fitted in guards._asdict().items():
        put(
            mode,
            lambda activations, fitted=fitted: fitted.scores(activations).is_poisoned,
            validation_false_positive=fitted.realised_false_positive_rate,
        )
    record["calibrated"]["requested_false_positive"] = guards.calibrated.config.false_positive_rate
    usual = guards.calibrated.with_config(false_positive_rate=USUAL_RATE)
    put("calibrated_usual", lambda activations: usual.scores(activations).is_poisoned)
    return record


def study_last_layer(subject: Subject, request: Request) -> Record:
    """Measure the model after its last fully connected layer was retrained on the validation images; no guard."""
    validation = subject.split.validation
    model = RetrainedLastLayer(subject.suspect.module, seed=subject.card.seed)
    model.fit(validation.images, validation.labels)
    test = subject.split.test
    return {
        "rtll": {
            "clean_accuracy": clean_accuracy(model.predict(test.images), test.labels),
            "attack_success": [
                attack_success_rate(model.predict(entry.images), entry.labels, entry.true_labels)
                for _, entry in subject.triggered
            ],
        }
    }


def study_retraining(subject: Subject, request: Request) -> Record:
    """Let both guards learn from what they flagged among the first test images; measure on the others.

    A test image and its triggered copies are seen together, so that the others are new in both forms. Every flagged
    input is given its true label and, false alarms included, whether it is poisoned.
    """
    from guard.detection.retraining import Labelled, retrain

    guards = subject.guards(request.noise_std, request.validation_quarters)
    labels = subject.split.test.labels
    order = np.random.default_rng(STREAM_SEED).permutation(len(labels))
    is_seen = np.zeros(len(labels), dtype=bool)
    is_seen[order[: round(SEEN_SHARE * len(labels))]] = True
    seen = [(subject.clean[is_seen], labels[is_seen], False)]
    seen += [
        (activations[is_seen[entry.source_rows]], entry.true_labels[is_seen[entry.source_rows]], True)
        for activations, entry in subject.triggered
    ]
    record: Record = {}
    for mode, fitted in guards._asdict().items():
        flags = [fitted.scores(activations).is_poisoned for activations, _, _ in seen]
        reviewed = Labelled(
            Activations.concatenate([part[0][flagged] for part, flagged in zip(seen, flags, strict=True)]),
            np.concatenate([part[1][flagged] for part, flagged in zip(seen, flags, strict=True)]),
            np.concatenate([np.full(int(flagged.sum()), part[2]) for part, flagged in zip(seen, flags, strict=True)]),
        )
        again = retrain(fitted, reviewed)
        record[mode] = {"inputs": len(reviewed.true_labels), "poisoned_inputs": int(reviewed.is_poisoned.sum())}
        for state, guarded in (("not_retrained", fitted), ("retrained", again)):
            rest = rates_on_rest(subject, guarded, ~is_seen)
            record[mode] |= {f"{state}_{measure}": value for measure, value in rest.items()}
    return record


def study_online(subject: Subject, request: Request) -> Record:
    """Let both guards learn in service: from a real server, through the queue, with the retrainer and its gate."""
    from online import learn_in_service  # the other studies need no server

    return learn_in_service(subject, request)


def study_strip(subject: Subject, request: Request) -> Record:
    """Measure STRIP: the share of triggered images whose entropy is above the boundary that clean images tell."""
    rng = np.random.default_rng(subject.card.seed)
    validation = subject.split.validation
    rows = rng.permutation(len(validation))[:STRIP_IMAGES]
    rival = Strip(seed=subject.card.seed).fit(subject.suspect, validation.images[rows], validation.labels[rows])
    boundary = detection_boundary(rival.score(validation.images[rows]), STRIP_FALSE_REJECTION)
    triggered = [entry.images[rng.permutation(len(entry.images))[:STRIP_IMAGES]] for entry in subject.triggered_sets]
    return {"strip": {"false_acceptance": [float((rival.score(images) <= boundary).mean()) for images in triggered]}}


def study_norm_orders(subject: Subject, request: Request) -> Record:
    """Measure the novelty detector alone under several summaries of the features.

    What clean images tell, out of fold: the share that every class calls novel, and how many classes accept an image
    on average. The fewer, the tighter the detector.
    """
    validation, labels = subject.validation, subject.split.validation.labels
    config = GuardConfig(seed=subject.card.seed)
    part = stratified_folds(labels, config.fewest_folds, config.seed)
    record: Record = {}
    for orders in NORM_CHOICES:
        accepting = np.empty(len(labels))
        for fold in range(config.fewest_folds):
            learn = part != fold
            neighbors = round(config.n_neighbors * float(learn.mean()))
            detector = PerClassLof(n_neighbors=neighbors, summary=orders or None, compare="any")
            factors = detector.fit(validation[learn], labels[learn]).score_all(validation[~learn])
            accepting[~learn] = (factors <= NOVELTY_OFFSET).sum(axis=1)
        detector = PerClassLof(n_neighbors=config.n_neighbors, summary=orders or None, compare="any")
        detector.fit(validation, labels)
        record[" ".join(orders) or "all features"] = {
            "validation_false_positive": float((accepting == 0).mean()),
            "accepting_classes": float(accepting.mean()),
            "true_negative": float((~detector.is_novel(subject.clean)).mean()),
            "false_negative": [float((~detector.is_novel(acts)).mean()) for acts, _ in subject.triggered],
        }
    return record


def study_noise_std(subject: Subject, request: Request) -> Record:
    """Measure the published guard under several strengths of noise, and what the noise does to the suspect model."""
    labels, seed = subject.split.validation.labels, subject.card.seed
    record: Record = {}
    for std in NOISE_CHOICES:
        noisy = subject.noisy(std)
        config = GuardConfig(mode="paper", seed=seed, image_noise_std=std)
        fitted = Guard.fit_activations(subject.validation, labels, config, noisy=noisy)
        flags = [fitted.scores(activations).is_poisoned for activations, _ in subject.triggered]
        rates = measured(
            subject.clean, subject.split.test.labels, fitted.scores(subject.clean).is_poisoned, subject.triggered, flags
        )
        record[f"{std:g}"] = {
            **rates,
            "noisy_validation_accuracy": clean_accuracy(noisy.predicted_labels, labels),
            "validation_false_positive": fitted.realised_false_positive_rate,
        }
    return record


def study_benign_noise(subject: Subject, request: Request) -> Record:
    """Measure what noise does to a model on validation images."""
    labels = subject.split.validation.labels
    clean = clean_accuracy(subject.validation.predicted_labels, labels)
    record: Record = {}
    for std in NOISE_CHOICES:
        noisy = clean_accuracy(subject.noisy(std).predicted_labels, labels)
        record[f"{std:g}"] = {"clean_accuracy": clean, "noisy_accuracy": noisy, "loss": clean - noisy}
    return record


STUDIES: Mapping[str, Callable[[Subject, Request], Record]] = {
    "guard": study_guard,
    "last_layer": study_last_layer,
    "retraining": study_retraining,
    "online": study_online,
    "strip": study_strip,
    "norm_orders": study_norm_orders,
    "noise_std": study_noise_std,
    "benign_noise": study_benign_noise,
}


class Records:
    """Measured rates on disk: one JSON file per model and request, named by a digest of all that they depend on.

    Parameters
    ----------
    folder : path
    zoo : Zoo
    fresh : bool
        Measure again what is there.
    """

    def __init__(self, folder: Path, zoo: Zoo, fresh: bool = False) -> None:
        self.folder = folder
        self.zoo = zoo
        self.fresh = fresh
        self._read: dict[tuple[str, Request], Record] = {}

    def require(self, wanted: Mapping[str, Iterable[Request]], workers: int) -> None:
        """Measure what is missing; models that the zoo lacks are left out, and `get` returns None for them."""
        tasks: dict[str, dict[Request, Path]] = {}
        for name, requests in wanted.items():
            if not self.zoo.has(name):
                continue
            for request in dict.fromkeys(requests):
                path = record_path(self.folder, self.zoo.card(name), request)
                if (name, request) in self._read:
                    continue
                if path.is_file() and not self.fresh:
                    self._read[name, request] = read_record(path)
                else:
                    tasks.setdefault(name, {})[request] = path
        if workers == 1 or len(tasks) == 1:
            for name, paths in tasks.items():
                print(_measure_model(self.zoo.folder, name, paths), flush=True)
        elif tasks:
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
                running = [pool.submit(_measure_model, self.zoo.folder, *task) for task in tasks.items()]
                for done in as_completed(running):
                    print(done.result(), flush=True)
        for name, paths in tasks.items():
            self._read |= {(name, request): read_record(path) for request, path in paths.items()}

    def has(self, name: str) -> bool:
        """True if the zoo holds the model."""
        return self.zoo.has(name)

    def get(self, name: str, request: Request | None) -> Record | None:
        """Return a record that `require` made sure of; None if the zoo lacks the model or no record was asked for."""
        return None if request is None else self._read.get((name, request))


def record_path(folder: Path, card: ZooCard, request: Request) -> Path:
    """Return where a record is or belongs; another model, attack, setting or code gives another file."""
    depends_on = {
        "weights": card.weights_sha256,
        "images": card.split_digest,
        "attack": card.parameters,
        "request": asdict(request),
        "constants": [SEEN_SHARE, STREAM_SEED, USUAL_RATE, card.seed, NORM_CHOICES, NOISE_CHOICES],
        "config": GuardConfig().model_dump(mode="json", exclude={"data_dir"}),
        "code": code_digest(request.kind),
    }
    digest = hashlib.sha256(json.dumps(depends_on, sort_keys=True).encode()).hexdigest()
    return folder / f"{card.name}.{request.label}.{digest[:16]}.json"


@functools.cache
def code_digest(kind: str) -> str:
    """Return a digest of the code that decides the numbers: what `guard` computes with, and this folder's studies."""
    package, folder = Path(guard.__file__).parent, Path(__file__).parent
    patterns = (*_DECIDING, *_DECIDING_MORE.get(kind, ()))
    files = [path for pattern in patterns for path in package.glob(pattern)]
    scripts = ("studies", "subjects", "last_layer", *_SCRIPTS_MORE.get(kind, ()))
    files += [folder / f"{name}.py" for name in scripts]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()


def read_record(path: Path) -> Record:
    """Read one record."""
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def _measure_model(zoo_folder: Path, name: str, paths: Mapping[Request, Path]) -> str:
    """Write the records of one model; may run in a worker process. Returns a line for people, in CPU seconds."""
    start, cpu = time.perf_counter(), time.process_time()
    subject = Subject(Zoo(zoo_folder), name)
    spent = []
    for request, path in paths.items():
        began = time.process_time()
        record = STUDIES[request.kind](subject, request)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".writing")
        unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
        spent.append(f"{request.label} {time.process_time() - began:.0f}")
    took = f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    return f"{name}: {took} ({', '.join(spent)})"
