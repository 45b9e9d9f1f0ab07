"""What would the guard catch on *this* model? Plant known triggers in copies of it, and try the guard on them."""

from guard.lab.assess.assessment import assess
from guard.lab.assess.known_triggers import DEFAULT_ATTACKS, KNOWN_ATTACKS, check_names
from guard.lab.assess.planting import PlantingSettings
from guard.lab.assess.report import CAVEAT, AssessmentReport, SplitSizes, Summary, Trial

__all__ = [
    "CAVEAT",
    "DEFAULT_ATTACKS",
    "KNOWN_ATTACKS",
    "AssessmentReport",
    "PlantingSettings",
    "SplitSizes",
    "Summary",
    "Trial",
    "assess",
    "check_names",
]
