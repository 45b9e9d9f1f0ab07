"""What a guard does with clean inputs of a class that it has not seen."""

from __future__ import annotations

import numpy as np

from guard.detection.pipeline import Guard
from guard.errors import DataError

#: Classes that are left out, one after the other.
_TRIALS = 3


def flagged_of_unseen_classes(guard: Guard) -> float:
    """Return the share of clean inputs of a class without clean images that a guard would flag, in [0, 1].

    Measured on classes that have some: each of up to three is left out, a guard is fitted on the others with the same
    settings, and asked about the class that it has not seen. Where too few images remain to do so, 1.

    Parameters
    ----------
    guard : Guard
        Fitted.
    """
    labels, reference = guard.reference_labels, guard.reference
    present = np.unique(labels)
    shares = []
    for label in present[np.unique(np.linspace(0, len(present) - 1, _TRIALS).astype(np.int64))]:
        seen = labels != label
        noisy = guard.noisy_reference[seen] if guard.noisy_reference is not None else None
        groups = guard.reference_groups[seen] if guard.reference_groups is not None else None
        try:
            other = Guard.fit_activations(
                reference[seen], labels[seen], guard.config.replace(anytime=False), noisy=noisy, groups=groups
            )
        except DataError:  # too few
            return 1.0
        shares.append(float(other.scores(reference[~seen]).is_poisoned.mean()))
    return float(np.mean(shares))
