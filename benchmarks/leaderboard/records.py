"""Measured figures on disk: what an interrupted run goes on with, as long as what they measured is what it was."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from guard.errors import ZooError
from guard.lab.rivals import RIVALS, Rival
from guard.lab.zoo.freeze import check_frozen, method_digest, method_digests

PROJECT = Path(__file__).resolve().parent.parent.parent
Figures = dict[str, Any]


def current_method() -> str:
    """Return the digest that names the guard's method: of the freeze while it holds, else of the sources."""
    try:
        return check_frozen().digest
    except ZooError:
        return method_digest(method_digests())


class Records:
    """Measured figures, a line of JSON each, in one file per detector; those of other code are passed over.

    Parameters
    ----------
    folder : path
        Made if it is not there.
    method : str
        Of the guard, from `current_method`. A rival is named by its own file and those it builds on.
    """

    def __init__(self, folder: Path, method: str) -> None:
        self._folder, self._method = folder, method
        folder.mkdir(parents=True, exist_ok=True)
        self._known: dict[str, dict[tuple[Any, ...], Figures]] = {}

    def read(self, model: str, detector: str, seed: int, n_fit: int | None = None) -> Figures | None:
        """Return what was measured, or None."""
        if detector not in self._known:
            path = self._path(detector)
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            entries = [json.loads(line) for line in lines]
            code = self._code(detector)
            self._known[detector] = {
                (entry["model"], entry["seed"], entry["n_fit"]): entry["figures"]
                for entry in entries
                if entry["code"] == code
            }
        return self._known[detector].get((model, seed, n_fit))

    def write(self, figures: Figures, model: str, detector: str, seed: int, n_fit: int | None = None) -> None:
        """Keep what was measured."""
        self.read(model, detector, seed, n_fit)
        self._known[detector][model, seed, n_fit] = figures
        entry = {"model": model, "seed": seed, "n_fit": n_fit, "code": self._code(detector), "figures": figures}
        with self._path(detector).open("a", encoding="utf-8") as file:
            file.write(json.dumps(_rounded(entry)) + "\n")

    def _path(self, detector: str) -> Path:
        return self._folder / f"{detector}.jsonl"

    def _code(self, detector: str) -> str:
        """Return the digest of what was measured and of what measures it, 10 hexadecimal digits."""
        digest = hashlib.sha256(self._method.encode() if detector.startswith("guard") else b"")
        for path in _sources(detector):
            digest.update(path.read_bytes())
        return digest.hexdigest()[:10]


def _sources(detector: str) -> Iterator[Path]:
    here = Path(__file__).parent
    yield here / "measuring.py"
    if detector.startswith("guard"):
        yield here / "contestants.py"
    elif detector in RIVALS:
        yield from (Path(inspect.getfile(part)) for part in RIVALS[detector].__mro__ if issubclass(part, Rival))


def _rounded(value: Any) -> Any:
    """Return the same with six significant digits, so that files stay small."""
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value
