"""One frozen settings object, and the one loader that reads it: flags over GUARD_* over guard.toml over defaults."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from guard.errors import ConfigError, did_you_mean
from guard.files import decoded
from guard.types import Action

SETTINGS_FILE = "guard.toml"
ENVIRONMENT_PREFIX = "GUARD_"

#: Variables of other parts of the program: secrets, which no file keeps, and how long this machine waits for the queue.
OTHER_VARIABLES = frozenset({"GUARD_CACHE_DIR", "GUARD_QUEUE_KEY", "GUARD_QUEUE_TIMEOUT_S", "GUARD_QUEUE_URL_FILE"})
#: Largest file that `GUARD_QUEUE_URL_FILE` may name.
_MOST_URL_BYTES = 2**14

NormOrder = Literal["l0", "l1", "l2", "linf"]
#: Environment variables are text, and 1 is a number.
RowsPerRequest = Annotated[Literal[1, "any"], BeforeValidator(lambda value: 1 if value == "1" else value)]


class FitSettings(BaseModel):
    """What is fixed when a guard is fitted, and kept in its bundle."""

    #: `calibrated` combines all detectors at the requested rate; `paper` is eq. 13 of arXiv 2011.02526.
    mode: Literal["calibrated", "paper"] = "calibrated"
    #: Seeds the folds and the training of decision heads.
    seed: int = Field(0, ge=0, lt=2**63)
    #: Neighbours of the local outlier factor.
    n_neighbors: int = Field(20, ge=1)
    #: Parts for cross-fitting: each is scored by detectors fitted on the others. None: 10 in `calibrated` mode, 20 of
    #: fewer than 500 images; 5 in `paper` mode, and where a backup is trained for each.
    folds: int | None = Field(None, ge=2)
    #: Norms that summarise a feature vector in `paper` mode.
    norm_orders: tuple[NormOrder, ...] = Field(("l1", "l2", "linf"), min_length=1)
    #: A feature counts as non-zero for l0 above this share of the largest one.
    l0_tolerance: float = Field(1e-3, ge=0, lt=1)
    #: Standard deviation of Gaussian noise added to a second copy of the clean images while fitting; 0 = no copy.
    image_noise_std: float = Field(0.0, ge=0, allow_inf_nan=False)
    #: Gaussian noise on decision-head inputs while training, in standard deviations of each feature.
    feature_noise_std: float = Field(0.0, ge=0, allow_inf_nan=False)

    #: Also fit heads at all depths together, and calibrate verdicts that look at the first depths only.
    anytime: bool = False

    @property
    def fewest_folds(self) -> int:
        """The setting `folds`, or the least that stands for it."""
        return 5 if self.folds is None else self.folds


class ServingSettings(BaseModel):
    """What may change after a guard was fitted; bundles and archives keep it as a default."""

    #: Share of clean inputs that may be flagged, a fraction.
    false_positive_rate: float = Field(0.01, gt=0, lt=1)
    #: Where that rate holds: for all clean inputs together, or for those of each `class` that the network answers with.
    #: `class` lets the attacker's class set a threshold of its own.
    false_positive_rate_scope: Literal["all", "class"] = "all"
    #: What is done with a flagged input.
    action: Action = "flag"
    #: `closed`: an input that cannot be scored is an error. `open`: it is answered, and marked `bypassed`.
    failure_mode: Literal["closed", "open"] = "closed"
    #: 1 = one row of the forward pass per request; `any` = a request may make several, and is poisoned if any row is.
    rows_per_request: RowsPerRequest = 1
    #: When requests of a batch share one call of the handler. `shown`: its class declares, or it has shown to a probe,
    #: that it keeps them apart; `declared`: this setting declares it, for bodies of every kind; `never`: one by one.
    batching: Literal["shown", "declared", "never"] = "shown"
    #: Also put the verdict under the key `guard` of JSON answers.
    verdict_in_body: bool = False
    #: What an answer tells its sender: `flag` = flagged or not; `full` = p-value, depth, reason and receipt as well.
    verdict_detail: Literal["flag", "full"] = "flag"
    #: An image with more pixels than this is refused before it is decoded.
    max_image_pixels: int = Field(32_000_000, ge=1)
    #: How often the ACTIVE file is looked at, in seconds.
    bundle_poll_seconds: float = Field(0.25, gt=0, le=2)
    #: Attribute of the user's handler that holds the network.
    model_attribute: str = Field("model", min_length=1)
    #: Send flagged inputs to the queue for review, where the server has one (see `Places`).
    review: bool = True

    #: Share of unflagged inputs that go to the queue as well, drawn at random, so that misses are seen; five times as
    #: many of those near the threshold. 0 = none.
    audit_rate: float = Field(0.0, ge=0, le=1)
    #: Milliseconds that a verdict on one batch may take; then fewer depths are looked at. Needs `anytime`. None = any.
    max_guard_ms: float | None = Field(None, gt=0, allow_inf_nan=False)
    #: Request header with the same for one request. Clients can weaken verdicts with it: name it among friends only.
    deadline_header: str | None = Field(None, min_length=1)
    #: Layer of the shallowest verdict that a time limit may choose. None = the deepest of the early ones.
    min_depth: str | None = Field(None, min_length=1)


class Places(BaseModel):
    """Where things are on one machine; may hold a password, so no bundle and no archive keeps it."""

    #: Database of the queue that flagged inputs go to for review, `sqlite:///file` or `postgresql+psycopg://...`.
    queue_url: str | None = Field(None, repr=False)

    #: Folder of the image sets.
    data_dir: Path | None = None


#: Settings that may change after a guard was fitted; the others are fixed in its bundle.
SERVING_SETTINGS = frozenset(ServingSettings.model_fields)
#: Settings that bundles of the first version did not have.
_LATER = ("review", "folds", "audit_rate", "false_positive_rate_scope")
#: Settings that are no part of a guard; see `Places`.
PLACES = frozenset(Places.model_fields)


class GuardConfig(FitSettings, ServingSettings, Places):
    """Settings of one guard: how it is fitted, what it does with a flagged input, how it serves, and where things are.

    Raises
    ------
    ConfigError
        If a key is unknown or a value breaks its rule; the text names key, rule and value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(_one_line(error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false for a number, which Python would count as 1 and 0."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise PydanticCustomError("no_truth", "input should not be true or false")
        return value

    @model_validator(mode="after")
    def _published_rule_knows_no_rate(self) -> Self:
        if self.mode == "paper" and self.false_positive_rate_scope == "class":
            raise PydanticCustomError(
                "scope",
                "false_positive_rate_scope 'class' goes with mode 'calibrated': the published rule keeps no rate. "
                "Leave it out.",
            )
        return self

    def replace(self, **changes: Any) -> GuardConfig:
        """Return a copy with some settings changed, checked like new ones."""
        return GuardConfig(**{**self.model_dump(), **changes})

    def portable(self) -> dict[str, Any]:
        """Return the settings that may leave this machine, ready for JSON: all but `Places`.

        Settings that came later are left out where they have their defaults: so a version that does not know these can
        read the bundle.
        """
        defaults = {name for name in _LATER if getattr(self, name) == GuardConfig.model_fields[name].default}
        return self.model_dump(mode="json", exclude={*PLACES, *defaults})

    @classmethod
    def from_portable(cls, settings: Mapping[str, Any]) -> tuple[GuardConfig, list[str]]:
        """Return settings from what `portable` returned, and the names of places that an older version left in them.

        The places themselves are dropped.
        """
        left = sorted(name for name in PLACES if settings.get(name) is not None)
        return cls(**{name: value for name, value in settings.items() if name not in PLACES}), left


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "scope":
        return str(first["msg"])
    if first["type"] == "extra_forbidden":
        if isinstance(first["input"], dict):
            return (
                f"there is a table [{key}], and settings stand alone. Remove that line, and what else is not a setting."
            )
        return _unknown(key)
    if key == "false_positive_rate" and isinstance(first["input"], int | float):
        return f"false_positive_rate must be in (0, 1), got {first['input']}."
    if key in PLACES:  # the value may hold a password
        return f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, got another type."
    return f"{key}: {first['msg'][:1].lower()}{first['msg'][1:]}, got {first['input']!r}."


def _unknown(key: str) -> str:
    return f"unknown setting {key!r}. {did_you_mean(key.lower(), sorted(GuardConfig.model_fields))}"


class _Toml(TomlConfigSettingsSource):
    """A TOML file in the encoding of whatever editor saved it."""

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        return tomllib.loads(decoded(file_path.read_bytes()))


def load_config(settings_file: Path | None = None, **flags: Any) -> GuardConfig:
    """Read the settings: a flag that is not None wins over GUARD_* variables, these over guard.toml, it over defaults.

    Parameters
    ----------
    settings_file : Path, optional
        A TOML file; default is `guard.toml` in the working folder, if there is one.
    **flags
        Settings by name; None means "not given".

    Raises
    ------
    ConfigError
        If a key is unknown, a value breaks its rule, or the named file cannot be read.
    """
    return GuardConfig(**load_settings(settings_file, **flags))


def load_settings(settings_file: Path | None = None, **flags: Any) -> dict[str, Any]:
    """Read the settings as `load_config` does, and return those that were given; defaults are left out."""
    if settings_file is not None and not settings_file.is_file():
        what = "is a folder" if settings_file.is_dir() else "does not exist"
        raise ConfigError(f"settings file {settings_file} {what}. Name another with --settings.")
    toml = settings_file or Path(SETTINGS_FILE)
    for name in os.environ:
        key = name[len(ENVIRONMENT_PREFIX) :].lower()
        if name.upper() in OTHER_VARIABLES:
            continue
        if name.upper().startswith(ENVIRONMENT_PREFIX) and key not in GuardConfig.model_fields:
            raise ConfigError(f"environment variable {name}: {_unknown(key)}")

    class Sources(BaseSettings, GuardConfig):
        model_config = SettingsConfigDict(
            env_prefix=ENVIRONMENT_PREFIX, toml_file=toml, frozen=True, extra="forbid", env_ignore_empty=True
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, _Toml(settings_cls)

    try:
        sources = Sources(**{key: value for key, value in flags.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    except (ValueError, SettingsError) as error:  # TOML that does not parse, a GUARD_* value that is no JSON
        raise ConfigError(f"settings cannot be read: {error}. Look at {toml} and the GUARD_* variables.") from error
    found = {name: getattr(sources, name) for name in sources.model_fields_set}
    if flags.get("queue_url") is None and not os.environ.get("GUARD_QUEUE_URL") and (url := queue_url_from_file()):
        found["queue_url"] = url
    return found


def queue_url_from_file(environment: Mapping[str, str] | None = None) -> str | None:
    """Return the queue's URL from the file that `GUARD_QUEUE_URL_FILE` names; None if the variable is not set.

    Raises
    ------
    ConfigError
        If the file cannot be read, is empty, or others than its owner may read it.
    """
    name = (os.environ if environment is None else environment).get("GUARD_QUEUE_URL_FILE")
    if not name:
        return None
    file = Path(name)
    try:
        is_open = file.stat().st_mode & 0o077
        text = file.read_bytes()[:_MOST_URL_BYTES].decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"GUARD_QUEUE_URL_FILE names {file}, which cannot be read: {type(error).__name__}.") from None
    if is_open:
        raise ConfigError(f"GUARD_QUEUE_URL_FILE names {file}, which others may read. Run: chmod 600 {file}")
    if not text:
        raise ConfigError(f"GUARD_QUEUE_URL_FILE names {file}, which is empty. Write the queue's URL there.")
    return text
