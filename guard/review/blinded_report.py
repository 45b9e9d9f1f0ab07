"""What of a retraining's report reviewers see where audits are mixed in: nothing that counts or tells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Figures that no audit has a part in, each told as a share alone: numbers of flagged inputs would tell the rest.
_FIGURES = ("clean_right", "clean_flagged", "other_groups_flagged", "same_groups_flagged", "false_alarms_flagged")
_FACTS = ("why", "model", "seconds")
#: Checks of the gate that are made on clean images alone, or on answers of all kinds alike.
_CHECKS = ("clean accuracy", "false-positive rate", "agreement of reviewers")
_HIDDEN = "An admin sees why: it would tell what the audit sample shows."


def blinded_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the part of a round's report that reviewers see; what is not known to be harmless is left out.

    Shares are texts in whole percent. Reasons that are left out have one sentence in their place.
    """
    harmless = {check["text"] for check in report.get("checks", ()) if check.get("name") in _CHECKS}
    given = list(report.get("reasons", ()))
    reasons = [reason for reason in given if reason in harmless]
    if len(reasons) < len(given):
        reasons.append(_HIDDEN)
    return {
        **{name: report[name] for name in _FACTS if name in report},
        **{moment: _shares(report.get(moment, {})) for moment in ("before", "after")},
        "reasons": reasons,
    }


def _shares(figures: Mapping[str, Any]) -> dict[str, str]:
    rates = {name: figures[name].get("rate") for name in _FIGURES if name in figures}
    return {name: f"{100 * rate:.0f} %" for name, rate in rates.items() if rate is not None}
