"""When a round of retraining starts, what may go into it, and what its candidate must show."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from guard.errors import ConfigError, did_you_mean
from guard.files import decoded


class RetrainerSettings(BaseModel):
    """Settings of the retrainer; shares are fractions.

    Raises
    ------
    ConfigError
        If a key is unknown or a value breaks its rule; the text names key, rule and value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    #: A round starts when this many inputs were decided since the last one began; 0 = never for that reason.
    enough_decisions: int = Field(50, ge=0)
    #: A round starts when the last one began this many hours ago and something new was decided; 0 = no schedule.
    every_hours: float = Field(24.0, ge=0, allow_inf_nan=False)
    #: Fewer decided inputs than this start no round on a schedule or by the button.
    min_decisions: int = Field(10, ge=1)

    #: Whether a demarcation joins the candidate: `off`; `decided` = against poisoned inputs that a person named;
    #: `purified` = also against flagged ones that nobody has looked at, less most of the false alarms.
    demarcation: Literal["off", "decided", "purified"] = "decided"
    #: Fewer anomalies than this draw no line, and teach no head: too few to bear each other out.
    min_anomalies: int = Field(10, ge=1)
    #: With `purified` a round also starts when this many inputs were flagged since the last one began; 0 = never for
    #: that reason.
    enough_flagged: int = Field(200, ge=0)

    #: Share of the clean reference, of the false alarms, and of the poisoned inputs that is never trained on.
    holdout_share: float = Field(0.2, gt=0, le=0.5)
    #: Inputs that were not trained on before: at most this many join in one round; the others wait for the next.
    max_new_per_round: int = Field(500, ge=1)
    #: Share of the labelled inputs of a round that one reviewer may have decided, where there are several reviewers.
    max_reviewer_share: float = Field(0.5, gt=0, le=1)
    #: A reviewer's first so many inputs are taken whatever the share, or one who answers little would stop everybody.
    reviewer_allowance: int = Field(50, ge=0)
    #: Poisoned inputs with one true label that heads learn from, as a share of the clean images of that class, in all
    #: rounds together.
    max_class_share: float = Field(0.02, ge=0, le=1)
    #: False alarms of one class that novelty detectors learn from, in all rounds together; 0 = they are only measured
    #: on. A single triggered input that is called clean makes the others of its kind look less odd.
    max_false_alarms_per_class: int = Field(0, ge=0)
    #: Reviewers who must call an input a false alarm before the guard learns from it. None = 2 where two or more can
    #: decide, else 1.
    min_reviewers: int | None = Field(None, ge=1)
    #: Reviewers whose decisions are left out, of earlier rounds too.
    leave_out_reviewers: tuple[str, ...] = ()
    #: A reviewer who gets a smaller share of the hidden gold items right is left out.
    min_gold_share: float = Field(0.8, ge=0, le=1)
    #: Gold items that a reviewer must have answered before that counts.
    min_gold_items: int = Field(5, ge=1)

    #: Clean accuracy of the guarded model on the clean hold-out may fall by this.
    max_clean_accuracy_drop: float = Field(0.01, ge=0, lt=1)
    #: False-positive rate on the clean hold-out, in multiples of the requested one, that is too much if not chance.
    max_false_positive_factor: float = Field(1.5, ge=1, allow_inf_nan=False)
    #: Share of the held-out poisoned inputs that are flagged may fall by this. Not 0: these inputs were decided because
    #: an earlier guard flagged them, so some are borderline, and what is gained elsewhere never reached the queue.
    max_true_positive_drop: float = Field(0.1, ge=0, lt=1)
    #: Share of the held-out poisoned inputs that must be flagged, where there are at least ten.
    min_true_positive_rate: float = Field(0.5, ge=0, le=1)
    #: Share of inputs decided by several reviewers on which they must agree.
    min_agreement: float = Field(0.8, ge=0, le=1)
    #: Inputs decided by several reviewers that agreement is judged by; fewer say nothing.
    min_shared_decisions: int = Field(10, ge=1)
    #: Share of the flagged inputs without a decision that the candidate may let pass, where there are at least 20.
    max_released_share: float = Field(0.25, ge=0, le=1)

    #: Whether the candidate's p-values follow the clean traffic: false alarms and audits that people called clean.
    follow_traffic: bool = False
    #: Fewer clean audits than this move no p-value.
    min_clean_audits: int = Field(100, ge=20)

    #: A candidate that passed waits until this many further inputs were flagged, and both are compared; 0 = no canary.
    canary_inputs: int = Field(0, ge=0)
    #: A canary is judged by what there is after this many hours.
    canary_hours: float = Field(24.0, gt=0, allow_inf_nan=False)

    #: Requested false-positive rate; None = the one in the bundle.
    false_positive_rate: float | None = Field(None, gt=0, lt=1)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None


def load_retrainer_settings(file: Path | None = None, **flags: Any) -> RetrainerSettings:
    """Read the settings: a flag that is not None wins over the file, the file over defaults.

    Parameters
    ----------
    file : Path, optional
        A TOML file with the settings at its top level.
    **flags
        Settings by name; None means "not given".

    Raises
    ------
    ConfigError
        If the file cannot be read, a key is unknown, or a value breaks its rule.
    """
    values: dict[str, Any] = {}
    if file is not None:
        try:
            values = tomllib.loads(decoded(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise ConfigError(f"settings file {file} cannot be read: {error}. Is it TOML?") from error
    return RetrainerSettings(**{**values, **{name: value for name, value in flags.items() if value is not None}})


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(key.lower(), sorted(RetrainerSettings.model_fields))
        return f"unknown retrainer setting {key!r}. {hint}"
    return f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}."
