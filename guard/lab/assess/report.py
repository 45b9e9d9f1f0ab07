"""What an assessment found: one trial per trigger and seed, and what they say together."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from guard.statistics.evaluation import Interval
from guard.types import Float32Array

#: Name under which the control is listed: the same fine-tuning without any trigger.
CONTROL = "none"

#: What every report says of itself.
CAVEAT = (
    "An estimate for these known triggers, planted by short fine-tuning in copies of the model. "
    "Real attackers may use others, or hide them better: what is caught here is no promise."
)


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """Images per seed: those that plant, that say whether it took, that fit the guard, that test; disjoint."""

    planting: int
    monitoring: int
    fitting: int
    testing: int


@dataclass(frozen=True, slots=True)
class Trial:
    """One trigger, planted once, or the control of one seed; rates are fractions, measured on test images.

    Attributes
    ----------
    attack : str
        Name of the trigger, or `"none"` for the control.
    seed : int
    clean_accuracy_before, clean_accuracy_after : float
        Of the user's model and of the copy, on the images that fit the guard and on those that test.
    epochs_run : int
        Of all attempts together.
    learning_rate : float
        Of the attempt that was kept; 0 if all of them diverged.
    seconds : float
        Planting, fitting and testing together.
    target_label : int, str or None
        What the trigger means; None for the control.
    planted : bool
        The attack took, at little cost in clean accuracy. If not, nothing is said of the guard.
    why_not : str
        Why it does not count as planted; empty if it does. Of the control: why it has no guard, empty if it has.
    clean_accuracy_guarded : float or None
        Of the copy, with flagged images counted as wrong.
    attack_success_unguarded, attack_success_guarded : float or None
    true_positive_rate, true_positive_interval : float and Interval, or None
        Share of triggered images flagged, and its 95 % interval.
    realised_false_positive_rate, false_positive_interval : float and Interval, or None
        Share of clean images flagged.
    auroc : float or None
    flagged_without_backdoor : float or None
        Share of the same triggered images flagged on the control, where the trigger means nothing: how much of the
        detection owes to odd pictures rather than to the backdoor. None as well where the control has no guard.
    """

    attack: str
    seed: int
    clean_accuracy_before: float
    clean_accuracy_after: float
    epochs_run: int
    learning_rate: float
    seconds: float
    target_label: int | str | None = None
    planted: bool = False
    why_not: str = ""
    clean_accuracy_guarded: float | None = None
    attack_success_unguarded: float | None = None
    attack_success_guarded: float | None = None
    true_positive_rate: float | None = None
    true_positive_interval: Interval | None = None
    realised_false_positive_rate: float | None = None
    false_positive_interval: Interval | None = None
    auroc: float | None = None
    flagged_without_backdoor: float | None = None

    @property
    def is_control(self) -> bool:
        """True if no trigger was planted on purpose."""
        return self.attack == CONTROL

    def row(self) -> dict[str, Any]:
        """Return the trial as one flat row of a table; intervals become two columns each."""
        row: dict[str, Any] = {}
        for key, value in asdict(self).items():
            if key.endswith("_interval"):
                row[f"{key}_lower"], row[f"{key}_upper"] = value or (None, None)
            else:
                row[key] = value
        return row


@dataclass(frozen=True, slots=True)
class Summary:
    """All trials of one trigger, or of the control; means and worst values are over those that were planted.

    Attributes
    ----------
    attack : str
    planted, trials : int
    attack_success_unguarded : float or None
        Where none was planted the mean over all trials: how far it came.
    attack_success_guarded, worst_attack_success_guarded : float or None
        Worst = highest.
    true_positive_rate, worst_true_positive_rate : float or None
    realised_false_positive_rate, worst_false_positive_rate : float or None
        Worst = highest.
    auroc, worst_auroc : float or None
    flagged_without_backdoor : float or None
    clean_accuracy_before, clean_accuracy_after : float
        Means over all trials.
    """

    attack: str
    planted: int
    trials: int
    attack_success_unguarded: float | None
    attack_success_guarded: float | None
    worst_attack_success_guarded: float | None
    true_positive_rate: float | None
    worst_true_positive_rate: float | None
    realised_false_positive_rate: float | None
    worst_false_positive_rate: float | None
    auroc: float | None
    worst_auroc: float | None
    flagged_without_backdoor: float | None
    clean_accuracy_before: float
    clean_accuracy_after: float

    @property
    def is_control(self) -> bool:
        """True if no trigger was planted on purpose."""
        return self.attack == CONTROL


@dataclass(frozen=True, slots=True, eq=False)
class AssessmentReport:
    """What the guard would catch on one model, as far as known triggers tell.

    Attributes
    ----------
    trials : tuple of Trial
        In the order of the triggers, then of the seeds; controls last.
    split : SplitSizes
    seeds : tuple of int
    mode : str
    requested_false_positive_rate : float
    clean_images : int
    clean_accuracy : float
        Share of all images that the user's model gets right.
    weights_digest : str
        Of the user's model; checked to be the same afterwards.
    skipped : mapping of str to str
        Triggers that cannot be put on such images, and why.
    warnings : tuple of str
        What a person should know before believing the numbers.
    samples : mapping of str to ndarray of shape (2, channels, height, width)
        For each trigger one test image without and with it, in [0, 1].
    """

    trials: tuple[Trial, ...]
    split: SplitSizes
    seeds: tuple[int, ...]
    mode: str
    requested_false_positive_rate: float
    clean_images: int
    clean_accuracy: float
    weights_digest: str
    skipped: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    samples: Mapping[str, Float32Array] = field(default_factory=dict, repr=False)

    def summaries(self) -> list[Summary]:
        """Return one summary per trigger, in order; the control's is last."""
        names = dict.fromkeys(trial.attack for trial in self.trials)
        return [_summary([trial for trial in self.trials if trial.attack == name]) for name in names]

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the sample images, ready for JSON."""
        return {
            "caveat": CAVEAT,
            "warnings": list(self.warnings),
            "mode": self.mode,
            "requested_false_positive_rate": self.requested_false_positive_rate,
            "seeds": list(self.seeds),
            "clean_images": self.clean_images,
            "split": asdict(self.split),
            "clean_accuracy": self.clean_accuracy,
            "weights_digest": self.weights_digest,
            "skipped": dict(self.skipped),
            "summaries": [asdict(summary) for summary in self.summaries()],
            "trials": [trial.row() for trial in self.trials],
        }


def _summary(trials: Sequence[Trial]) -> Summary:
    counted = [trial for trial in trials if trial.planted] or trials  # one that was not planted has no more to tell

    def over(take: Callable[[Sequence[float]], float], key: str) -> float | None:
        values = [value for value in (getattr(trial, key) for trial in counted) if value is not None]
        return take(values) if values else None

    mean = statistics.fmean
    return Summary(
        attack=trials[0].attack,
        planted=sum(trial.planted for trial in trials),
        trials=len(trials),
        attack_success_unguarded=over(mean, "attack_success_unguarded"),
        attack_success_guarded=over(mean, "attack_success_guarded"),
        worst_attack_success_guarded=over(max, "attack_success_guarded"),
        true_positive_rate=over(mean, "true_positive_rate"),
        worst_true_positive_rate=over(min, "true_positive_rate"),
        realised_false_positive_rate=over(mean, "realised_false_positive_rate"),
        worst_false_positive_rate=over(max, "realised_false_positive_rate"),
        auroc=over(mean, "auroc"),
        worst_auroc=over(min, "auroc"),
        flagged_without_backdoor=over(mean, "flagged_without_backdoor"),
        clean_accuracy_before=mean([trial.clean_accuracy_before for trial in trials]),
        clean_accuracy_after=mean([trial.clean_accuracy_after for trial in trials]),
    )
