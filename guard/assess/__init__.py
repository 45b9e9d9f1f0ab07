"""What would the guard catch on *this* model? Plant known triggers in copies of it, and try the guard on them."""

from guard.assess.assessment import assess
from guard.assess.known_triggers import DEFAULT_ATTACKS, KNOWN_ATTACKS, check_names
from guard.assess.planting import PlantingSettings
from guard.assess.report import CAVEAT, AssessmentReport, SplitSizes, Summary, Trial

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
