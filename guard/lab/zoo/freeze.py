"""The freeze: digests that say whether the guard's method has changed since the test zoo was trained and measured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from guard.config import FitSettings, GuardConfig
from guard.errors import ZooError
from guard.resources import checkout_root

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
    """

    commit: str
    date: str
    digest: str
    sources: Mapping[str, str]

    @classmethod
    def of_method(cls, commit: str, date: str, package: Path = PACKAGE) -> Self:
        """Return the freeze of the method as its files are now."""
        sources = method_digests(package)
        return cls(commit, date, method_digest(sources), sources)

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
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

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
            freeze = cls(document["commit"], document["date"], document["digest"], document["sources"])
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
        Folder of the package.

    Raises
    ------
    ZooError
        If there is no freeze, or the method has changed since; names the files.
    """
    path = default_freeze_path() if path is None else path
    freeze = Freeze.read(path)
    now = method_digests(package)
    if method_digest(now) != freeze.digest:
        changed = sorted(name for name in {*now, *freeze.sources} if now.get(name) != freeze.sources.get(name))
        raise ZooError(
            f"the method has changed since it was frozen on {freeze.date} (commit {freeze.commit[:12]}): "
            f"{', '.join(changed)}. The test zoo is for the frozen method only: restore these files, or freeze anew "
            "with `python benchmarks/test_zoo.py --freeze --force`, and say so beside the figures."
        )
    return freeze
