"""Who takes part: the guard in both modes, and every rival, under the rivals' contract."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path

from guard.config import GuardConfig
from guard.detection.pipeline import Guard
from guard.lab.rivals import RIVALS, Rival
from guard.suspect.model import SuspectModel
from guard.types import Float32Array, Float64Array, IntArray


class CalibratedGuard(Rival):
    """The guard of this project in its default mode."""

    title = "guard (calibrated)"
    source = "docs/detection.md"
    mode = "calibrated"
    #: It needs no clean images beside those that it learns from.
    calibrates_itself = True

    def _fit(self, images: Float32Array, labels: IntArray) -> None:
        suspect = SuspectModel(self.network.module)
        config = GuardConfig(mode=self.mode, seed=self.seed, false_positive_rate=0.05)
        self.guard = Guard.fit(suspect, images, labels, config)

    def _score(self, images: Float32Array) -> Float64Array:
        suspect = self.guard.suspect
        assert suspect is not None
        return self.guard.scores(suspect.activations(images)).combined


class PaperGuard(CalibratedGuard):
    """The published rule of the Fusion paper; its score is the larger of novelty and disagreement."""

    title = "guard (paper)"
    source = "Fu et al. 2020, arXiv 2011.02526"
    mode = "paper"


OURS: dict[str, type[Rival]] = {"guard": CalibratedGuard, "guard-paper": PaperGuard}
#: Cheap ones first; what comes later is measured on fewer images (`benchmarks/leaderboard/measuring.py`).
CONTESTANTS: dict[str, type[Rival]] = {
    **OURS,
    **dict(sorted(RIVALS.items(), key=lambda item: item[0] in ("badexpert", "psbd", "strip"))),
}


def from_file(path: Path) -> dict[str, type[Rival]]:
    """Return the one class below `Rival` that a file defines, by the file's name; ValueError if there is not one."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Rival) and value.__module__ == path.stem
    ]
    if len(classes) != 1:
        raise ValueError(f"{path} must define one class below Rival, and defines {len(classes)}.")
    return {path.stem: classes[0]}
