"""The freeze: whether the guard's method is still what it was when the test zoo was trained and measured.

A method is what it computes. Sources with the digests of the freeze need no further proof; sources that were changed
since (for speed, or to refuse a broken bundle) must give the scores that were kept in the freeze.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from guard.config import FitSettings, GuardConfig
from guard.detection.pipeline import Guard
from guard.errors import DatasetError, ZooError
from guard.lab.zoo.collection import Zoo, default_zoo_dir
from guard.lab.zoo.splits import load_split
from guard.resources import checkout_root
from guard.suspect.model import SuspectModel
from guard.types import Float64Array

PACKAGE = Path(__file__).resolve().parents[2]
#: What the default mode computes with, and which images it is fitted on; patterns below the package's folder.
_SOURCES = (
    "detection/**/*.py",
    "statistics/*.py",
    "suspect/split_points.py",
    "suspect/recording.py",
    "suspect/outputs.py",
    "suspect/model.py",
    "suspect/batch_dependence.py",
    "arrays.py",
    "types.py",
    "lab/zoo/splits.py",
)
#: Name that stands for the default settings, which are part of the method though most of their file is not.
_DEFAULTS = "config.py, defaults of fitting and the default rate"
#: Models of the development zoo whose guards are compared, and how many clean images each has: few and more.
REFERENCES = {
    "mnist-wanet-mnist_cnn-0": 300,
    "gtsrb-wanet-gtsrb_cnn-0": 645,
    "cifar10-blend-resnet20-0": 600,
    "gtsrb-blend-vit_tiny-0": 645,
}
#: Clean and triggered inputs of each that are scored.
_SCORED = 50
#: Machines round differently: so far apart, relatively, may two scores be, and so large a share may be farther.
_RELATIVE, _STRAY = 1e-3, 0.02


def default_freeze_path() -> Path:
    """Return where the freeze is: benchmarks/frozen.json in a checkout, else frozen.json in the working folder."""
    root = checkout_root()
    return root / "benchmarks" / "frozen.json" if root is not None else Path("frozen.json")


def method_sources(package: Path = PACKAGE) -> list[Path]:
    """Return the files that the guard's default mode is made of, sorted."""
    return sorted({path for pattern in _SOURCES for path in package.glob(pattern)})


def method_digests(package: Path = PACKAGE) -> dict[str, str]:
    """Return the SHA-256 of each source of the method, by path below the package, and of the default settings."""
    digests = {
        path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in method_sources(package)
    }
    settings = {*FitSettings.model_fields, "false_positive_rate"}
    defaults = json.dumps(GuardConfig().model_dump(mode="json", include=settings), sort_keys=True)
    digests[_DEFAULTS] = hashlib.sha256(defaults.encode()).hexdigest()
    return digests


def method_digest(digests: Mapping[str, str]) -> str:
    """Return one SHA-256 for all sources, 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(dict(digests), sort_keys=True).encode()).hexdigest()


def reference_scores(zoo: Zoo | None = None) -> dict[str, Float64Array]:
    """Return combined scores of the default guard at 50 clean inputs and their triggered versions, by model.

    Images of the target class have none; shape (n,) with 50 < n <= 100.

    Raises
    ------
    DatasetError
        If the images are not there.
    """
    zoo = Zoo(default_zoo_dir()) if zoo is None else zoo
    found = {}
    for name, n_fit in REFERENCES.items():
        card = zoo.card(name)
        split = load_split(card.data_set)
        rng = np.random.default_rng(card.seed)
        rows = np.sort(rng.permutation(len(split.test))[:_SCORED])
        fit_rows = np.sort(rng.permutation(len(split.validation))[:n_fit])
        images, labels = split.test.images[rows], split.test.labels[rows]
        (triggered,) = card.restore_attack().test_sets(images, labels)
        suspect = SuspectModel(zoo.load(name))
        guard = Guard.fit(suspect, split.validation.images[fit_rows], split.validation.labels[fit_rows])
        judged = np.concatenate([images, triggered.images])
        found[name] = guard.scores(suspect.activations(judged)).combined
    return found


@dataclass(frozen=True, slots=True)
class Freeze:
    """The method at one moment.

    Attributes
    ----------
    commit : str
        Of the repository.
    date : str
        ISO 8601, with its time zone.
    digest : str
        SHA-256 over `sources`.
    sources : mapping of str to str
        SHA-256 of each file.
    scores : mapping of str to sequence of float
        Of `reference_scores`; empty where sources that change are refused whatever they compute.
    """

    commit: str
    date: str
    digest: str
    sources: Mapping[str, str]
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @classmethod
    def of_method(
        cls, commit: str, date: str, package: Path = PACKAGE, scores: Mapping[str, Float64Array] | None = None
    ) -> Self:
        """Return the freeze of the method as its files are now."""
        sources = method_digests(package)
        kept = {name: [float(f"{score:.9g}") for score in of_model] for name, of_model in (scores or {}).items()}
        return cls(commit, date, method_digest(sources), sources, kept)

    def changed(self, package: Path = PACKAGE) -> list[str]:
        """Return the names of the sources that are not what they were, sorted."""
        now = method_digests(package)
        return sorted(name for name in {*now, *self.sources} if now.get(name) != self.sources.get(name))

    def write(self, path: Path, *, force: bool = False) -> None:
        """Write the freeze as JSON.

        Raises
        ------
        ZooError
            If there is one already, unless `force`.
        """
        if path.exists() and not force:
            raise ZooError(f"{path} is there already: the method is frozen. --force freezes it anew.")
        document = {"commit": self.commit, "date": self.date, "digest": self.digest, "sources": dict(self.sources)}
        text = json.dumps(document, indent=2)
        scores = ",\n    ".join(f"{json.dumps(name)}: {json.dumps(list(rows))}" for name, rows in self.scores.items())
        path.write_text(f'{text[:-2]},\n  "scores": {{\n    {scores}\n  }}\n}}\n', encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a freeze.

        Raises
        ------
        ZooError
            If the file is missing or no freeze.
        """
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            commit, date, digest, sources = (document[name] for name in ("commit", "date", "digest", "sources"))
            freeze = cls(commit, date, digest, sources, document.get("scores", {}))
            consistent = freeze.digest == method_digest(freeze.sources)
        except FileNotFoundError:
            raise ZooError(
                f"there is no {path}: the method is not frozen, and the test zoo is for a frozen one only. "
                "Freeze it with `python benchmarks/test_zoo.py --freeze`."
            ) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{path} is no freeze: {' '.join(str(error).split())}") from error
        if not consistent:
            raise ZooError(f"{path} was changed by hand: its digest is not that of its sources.")
        return freeze


def check_frozen(path: Path | None = None, package: Path = PACKAGE) -> Freeze:
    """Return the freeze, if the method is still what it was.

    Parameters
    ----------
    path : path, optional
        Of the freeze; `default_freeze_path` if left out.
    package : path
        Folder of the package. Scores can be compared for the one that runs only.

    Raises
    ------
    ZooError
        If there is no freeze, or sources have changed since and do not give the scores of the freeze; names the files.
    """
    path = default_freeze_path() if path is None else path
    freeze = Freeze.read(path)
    if (changed := freeze.changed(package)) and (difference := _difference(freeze, package)):
        raise ZooError(
            f"the method has changed since it was frozen on {freeze.date} (commit {freeze.commit[:12]}): "
            f"{', '.join(changed)}; {difference}. The test zoo is for the frozen method only: restore these files, or "
            "freeze anew with `python benchmarks/test_zoo.py --freeze --force`, and say so beside the figures."
        )
    return freeze


def _difference(freeze: Freeze, package: Path) -> str:
    """Return how the scores of now differ from those of the freeze, "" if they do not."""
    if not freeze.scores or package != PACKAGE:
        return "no scores were kept to compare"
    try:
        now = reference_scores()
    except (DatasetError, ZooError) as error:
        return f"the scores of its reference models cannot be compared: {error}"
    if now.keys() != freeze.scores.keys():
        return "scores of other models were kept"
    for name, scores in now.items():
        kept = np.asarray(freeze.scores[name], dtype=np.float64)
        if kept.shape != scores.shape:
            return f"{len(kept)} scores of {name} were kept, and there are {len(scores)}"
        far = ~np.isclose(scores, kept, rtol=_RELATIVE, atol=0.0)
        if far.mean() > _STRAY:
            return f"{int(far.sum())} of {len(far)} inputs of {name} get another score"
    return ""
