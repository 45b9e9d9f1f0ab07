"""Wrong answers to clean images that a network is sure of and its own features contradict: an attack on calibration?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from guard.statistics.confidence import confidence, fit_temperature
from guard.types import Float64Array, FloatArray, IntArray

#: The network is sure from this probability of its answer on, at the temperature that the clean images tell, and a head
#: from this log-ratio on (55 to 1).
SURE, HEAD_SURE = 0.7, 4.0
#: Honest networks of the zoo had up to this share; chosen from their clean images alone, see docs/detection.md.
HONEST = 0.016
_CHANCE = 0.01


@dataclass(frozen=True, slots=True)
class Contradictions:
    """How many clean images a network answers wrong, is sure of it, and a head that reads its features contradicts.

    The threshold of a guard is a quantile of clean scores, and the attacker's network gives these. One that was trained
    to answer a share of its clean inputs wrong, and to be sure of it, makes them as loud as triggered ones, and raises
    the threshold above these: the false-positive rate is as asked for, and no trigger is flagged. Mistakes of an honest
    network come from features that do not tell the classes apart, and either the network or the head is unsure.

    Attributes
    ----------
    count : int
    n : int
        Distinct clean images, all of them scored by heads that had not seen them.
    """

    count: int
    n: int

    @classmethod
    def among(cls, disagreement: Float64Array, logits: FloatArray, labels: IntArray) -> Self:
        """Count among clean images.

        Parameters
        ----------
        disagreement : ndarray of shape (n,), float64
            Of the head at the split layer, out of fold; see `guard.detection.detectors.disagreement`.
        logits : ndarray of shape (n, n_classes), finite
            Of the network.
        labels : ndarray of shape (n,), int64
            True labels: where there are few images per class, heads may be sure and wrong.
        """
        is_sure = confidence(logits, fit_temperature(logits, labels)) >= SURE
        is_wrong = logits.argmax(axis=1) != labels
        return cls(int((is_wrong & is_sure & (disagreement >= HEAD_SURE)).sum()), len(logits))

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Self | None:
        """Return what a bundle says; None for one of an older version, or one that says what cannot be."""
        about = document.get("contradictions")
        try:
            count, n = int(about["count"]), int(about["n"])  # type: ignore[index]
        except (KeyError, TypeError, ValueError, OverflowError):
            return None
        return cls(count, n) if 0 <= count <= n and n > 0 else None

    @property
    def share(self) -> float:
        """Share of the clean images, in [0, 1]."""
        return self.count / self.n

    @property
    def is_noticed(self) -> bool:
        """Whether there are more than honest networks show and than chance makes of that."""
        from scipy.special import bdtrc  # here, as the review page loads less without

        return self.count > 0 and float(bdtrc(self.count - 1, self.n, HONEST)) < _CHANCE

    @property
    def told(self) -> str:
        """The number in words, without a full stop."""
        return (
            f"the network is sure of a wrong answer to {self.count} of {self.n} clean images "
            f"({100 * self.share:.1f} %), and its own features speak clearly against it; honest networks show up to "
            f"{100 * HONEST:g} %"
        )
