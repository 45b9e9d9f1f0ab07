"""Settings of the queue: how much it holds, how long, and how long anybody waits for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from guard.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """Settings of one queue; a setting must be a finite number above 0.

    Raises
    ------
    ConfigError
        If a value breaks its rule; the text names key, rule and value.
    """

    #: Items whose images are kept at most.
    max_items: int = 100_000
    #: Bytes of bodies and tensors at most.
    max_bytes: int = 4 * 2**30
    #: Days after which the images of an item are removed, unless it is decided and not yet trained.
    retention_days: float = 30.0
    #: Seconds for which a claimed item belongs to its reviewer.
    lease_s: float = 600.0
    #: Items that one reviewer holds at once at most.
    max_held: int = 100
    #: Reviewers who must say "poisoned", with the same true label, before an item counts as decided.
    quorum: int = 1
    #: Seconds that a server waits for the queue at most.
    enqueue_timeout_s: float = 0.25
    #: Seconds that everybody else waits for the queue at most.
    wait_s: float = 10.0
    #: Bytes of one request's body at most.
    max_body_bytes: int = 16 * 2**20

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            is_whole = name in ("max_items", "max_bytes", "quorum", "max_held", "max_body_bytes")
            if isinstance(value, bool) or not isinstance(value, int if is_whole else (int, float)):
                raise ConfigError(f"{name} must be {'a whole number' if is_whole else 'a number'}, got {value!r}.")
            if not math.isfinite(value) or value <= 0:
                raise ConfigError(f"{name} must be above 0 and finite, got {value!r}.")
