"""What a round tells people: what went in, what was measured, and what their answers changed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from guard.relabel.rounds import MEASURES
from guard.retrainer.candidate import Trial
from guard.retrainer.material import Material
from guard.retrainer.measuring import Measurement


@dataclass(frozen=True, slots=True)
class Finished:
    """What came of one round.

    Attributes
    ----------
    round_id : int
    outcome : {"promoted", "refused", "failed", "canary"}
    report : dict
        As kept in the queue.
    candidate : str or None
        Digest of the bundle; None if there is none.
    """

    round_id: int
    outcome: str
    report: dict[str, Any]
    candidate: str | None = None

    @property
    def line(self) -> str:
        """One line for a person."""
        name = f" {self.candidate[:12]}" if self.candidate else ""
        reasons = " ".join(self.report.get("reasons", []))
        return f"round {self.round_id}: {self.outcome}{name}{f': {reasons}' if reasons else ''}"


def about_material(material: Material) -> dict[str, Any]:
    """Return what a round learns from and is measured on, ready for JSON."""
    held = material.held_out
    return {
        "learned_from": material.training.counts._asdict(),
        "held_out": {
            "clean_images": int(material.clean_held_out.sum()),
            "poisoned_other_groups": int((held.other_group & ~held.is_miss).sum()),
            "poisoned_same_groups": int((~held.other_group & ~held.is_miss).sum()),
            "false_alarms": len(held.false_alarms),
            "misses": int(held.is_miss.sum()),
            "clean_audits": len(held.clean_audits),
        },
        "left_out": material.left_out,
        "reviewers": material.by_reviewer,
        "agreement": material.agreement._asdict(),
    }


def about_trial(trial: Trial) -> dict[str, Any]:
    """Return what was measured and what the gate says, ready for JSON."""
    return {
        "before": trial.before.as_dict(),
        "after": trial.after.as_dict(),
        "traffic": trial.traffic.as_dict(),
        "checks": trial.judgement.as_dicts(),
        "reasons": list(trial.judgement.reasons),
        "changes": changes(trial.before, trial.after),
    }


def changes(before: Measurement, after: Measurement) -> list[str]:
    """Return what the answers changed, in sentences for the people who gave them; all of it on hold-outs."""
    pairs = [(text, before.count(name), after.count(name)) for text, name in MEASURES]
    return [f"{text}: {old.hits} of {old.of} before, {new.hits} of {new.of} now" for text, old, new in pairs if new.of]
