"""Detectors: one file each. To add one, write the file and add its line here."""

from guard.detection.detectors.anytime import AnytimeDisagreement
from guard.detection.detectors.base import Detector
from guard.detection.detectors.demarcation import Demarcation
from guard.detection.detectors.disagreement import BackupDisagreement, HeadDisagreement
from guard.detection.detectors.lof import PerClassLof

#: Name in bundles and reports -> class. All of them join the `calibrated` mode.
DETECTORS: dict[str, type[Detector]] = {
    "lof": PerClassLof,
    "disagreement": HeadDisagreement,
}

#: Everything that a bundle may hold. Demarcation joins only where there are anomalies to learn from: never in `fit`.
#: A backup joins only where the activations hold its logits, and heads at several depths only if settings ask for them.
KINDS: dict[str, type[Detector] | type[Demarcation]] = {
    **DETECTORS,
    "demarcation": Demarcation,
    "backup": BackupDisagreement,
    "anytime": AnytimeDisagreement,
}

__all__ = ["DETECTORS", "KINDS", "AnytimeDisagreement", "BackupDisagreement", "Demarcation", "Detector"]
