"""Detectors: one file each. To add one, write the file and add its line here."""

from guard.detection.detectors.anytime import AnytimeDisagreement
from guard.detection.detectors.base import Detector
from guard.detection.detectors.demarcation import Demarcation
from guard.detection.detectors.disagreement import BackupDisagreement, HeadDisagreement
from guard.detection.detectors.lof import PerClassLof
from guard.detection.detectors.relative_distance import RelativeDistance
from guard.detection.detectors.residual import Residual

#: Name in bundles and reports -> class. Each says itself when it is part of a guard; in this order.
DETECTORS: dict[str, type[Detector]] = {
    "lof": PerClassLof,
    "disagreement": HeadDisagreement,
    "residual": Residual,
    "relative_distance": RelativeDistance,
    "demarcation": Demarcation,
    "anytime": AnytimeDisagreement,
    "backup": BackupDisagreement,
}

__all__ = ["DETECTORS", "Detector"]
