"""Whether inputs that were called poisoned have something in common that clean inputs lack."""

from __future__ import annotations

import numpy as np

from guard.detectors.demarcation import Demarcation
from guard.types import Activations

#: Why poisoned inputs are not learned from, for the report.
SCATTERED = "poisoned inputs that have nothing in common"
#: Parts that anomalies are cut into, to see whether a line against the others finds those of one part.
_PARTS = 5
#: Share of clean inputs that may lie beyond that line.
_CLEAN_BEYOND = 0.02


def stand_together(clean: Activations, anomalies: Activations) -> bool:
    """Return whether a line drawn against some of the anomalies finds most of the others among clean inputs.

    Triggered inputs have something in common that clean ones lack. Clean inputs that somebody called poisoned have not:
    a line against them finds clean inputs like any other, and takes the place of detectors that find triggers.

    Parameters
    ----------
    clean : Activations
        The clean reference.
    anomalies : Activations
        Fewer than two show nothing: False.
    """
    if len(anomalies) < 2:
        return False
    rng = np.random.default_rng(0)
    parts = min(_PARTS, len(anomalies))
    of_clean, of_anomalies = (rng.permutation(len(one)) % parts for one in (clean, anomalies))
    found = 0
    for part in range(parts):
        line = Demarcation().fit(clean[of_clean != part], anomalies[of_anomalies != part])
        edge = np.quantile(line.score(clean[of_clean == part]), 1.0 - _CLEAN_BEYOND)
        found += int((line.score(anomalies[of_anomalies == part]) > edge).sum())
    return found > len(anomalies) / 2
