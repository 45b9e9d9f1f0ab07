"""Settings of the queue, the same for every process that opens it; and how long one process waits for it."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from guard.errors import ConfigError

#: What no clock and no database column goes beyond.
_MOST = {"retention_days": 36_500, "lease_s": 36_500 * 86_400}
#: Seconds that a server waits for the queue at most, where its environment says so.
TIMEOUT_VARIABLE = "GUARD_QUEUE_TIMEOUT_S"


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """How much a queue holds, how long, and when an answer counts. They are kept in the queue's own database.

    Raises
    ------
    ConfigError
        If a value breaks its rule; the text names key, rule and value.
    """

    #: Items whose images are kept at most.
    max_items: int = 100_000
    #: Bytes of bodies and tensors at most.
    max_bytes: int = 4 * 2**30
    #: Bytes of one request's body at most.
    max_body_bytes: int = 16 * 2**20
    #: Audits of one model that are taken within any hour at most; see the setting `audit_rate` of the server.
    max_audits_per_hour: int = 100
    #: Days after which the images of an item are removed, unless it was called poisoned and no guard learned from it.
    retention_days: float = 30.0
    #: Seconds for which a claimed item belongs to its reviewer.
    lease_s: float = 600.0
    #: Items that one reviewer holds at once at most.
    max_held: int = 100
    #: Reviewers who must say "poisoned", with the same true label, before an item counts as decided.
    quorum: int = 1

    def __post_init__(self) -> None:
        _check(self, whole=tuple(field.name for field in fields(self) if field.type == "int"))

    def changed(self, **changes: Any) -> Self:
        """Return the same with other values; those that are None stay.

        Raises
        ------
        ConfigError
            If there is no such setting, or a value breaks its rule.
        """
        known = [field.name for field in fields(self)]
        if unknown := sorted(changes.keys() - set(known)):
            raise ConfigError(f"the queue has no setting {unknown[0]!r}: it has {', '.join(known)}.")
        return replace(self, **{name: value for name, value in changes.items() if value is not None})

    @property
    def unusual(self) -> dict[str, Any]:
        """What is not as usual, by name."""
        usual = asdict(QueueSettings())
        return {name: value for name, value in asdict(self).items() if value != usual[name]}

    def to_json(self) -> str:
        """Return what is not as usual, for the database."""
        return json.dumps(self.unusual, sort_keys=True)

    @classmethod
    def from_json(cls, text: str | None) -> Self:
        """Return the settings that `to_json` wrote; the usual ones of None. Those of a later version are passed over.

        Raises
        ------
        ConfigError
            If it is something else.
        """
        known = {field.name for field in fields(cls)}
        try:
            return cls(**{name: value for name, value in json.loads(text or "{}").items() if name in known})
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(
                f"the queue's settings cannot be read: {error}. Set them anew with guard review settings."
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueWaits:
    """How long this process waits for the queue's database.

    Raises
    ------
    ConfigError
        If a value breaks its rule; the text names key, rule and value.
    """

    #: Seconds that a server waits for the queue at most.
    enqueue_timeout_s: float = 0.25
    #: Seconds that everybody else waits for the queue at most.
    wait_s: float = 10.0

    def __post_init__(self) -> None:
        _check(self, whole=())

    @classmethod
    def from_environment(cls) -> Self:
        """Return the usual ones, but for what `GUARD_QUEUE_TIMEOUT_S` says.

        Raises
        ------
        ConfigError
            If it is no number above 0.
        """
        text = os.environ.get(TIMEOUT_VARIABLE)
        if not text:
            return cls()
        try:
            return cls(enqueue_timeout_s=float(text))
        except ValueError as error:
            raise ConfigError(f"{TIMEOUT_VARIABLE} must be seconds above 0, got {text!r}.") from error


def _check(settings: QueueSettings | QueueWaits, whole: tuple[str, ...]) -> None:
    for name, value in asdict(settings).items():
        if isinstance(value, bool) or not isinstance(value, int if name in whole else (int, float)):
            raise ConfigError(f"{name} must be {'a whole number' if name in whole else 'a number'}, got {value!r}.")
        if not math.isfinite(value) or value <= 0:
            raise ConfigError(f"{name} must be above 0 and finite, got {value!r}.")
        if value > _MOST.get(name, 2**62):
            raise ConfigError(f"{name} must be <= {_MOST.get(name, 2**62):,}, got {value!r}.")
