"""What became of an input: the outcome that every input gets, and how several rows make one of a request."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from guard.detection.pipeline import Guard
from guard.serving.evidence import Evidence
from guard.types import Verdict

_random = random.SystemRandom()

OutcomeKind = Literal["clean", "poisoned", "bypassed", "rejected", "failed"]
#: Which row speaks for a request that made several. Errors come first: their answers show nothing of the model's.
GRAVITY = {"failed": 0, "rejected": 1, "poisoned": 2, "bypassed": 3, "clean": 4}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one input: every input gets exactly one.

    Attributes
    ----------
    kind : {"clean", "poisoned", "bypassed", "rejected", "failed"}
        `rejected`: the input's own fault; `failed`: ours, or the model's.
    verdict : Verdict or None
        For `clean` and `poisoned`.
    status : int
        HTTP status that the sender should see.
    reason : str
        One word of `telemetry.UNSCORED_REASONS` where there is no verdict, else "".
    message : str
        One line for the sender where there is no verdict, else "".
    evidence : Evidence or None
        For `poisoned`, where flagged inputs are queued for review, and for what is drawn for the audit sample.
    decided_ns : (int, int) or None
        When the decision began and ended, in nanoseconds since 1970; only where decisions are traced.
    """

    kind: OutcomeKind
    verdict: Verdict | None = None
    status: int = 200
    reason: str = ""
    message: str = ""
    evidence: Evidence | None = None
    decided_ns: tuple[int, int] | None = None

    def within(self, decided_ns: tuple[int, int]) -> Outcome:
        """Return the same outcome with the time of its decision; `dataclasses.replace` takes three times as long."""
        return Outcome(self.kind, self.verdict, self.status, self.reason, self.message, self.evidence, decided_ns)


@dataclass(slots=True)
class Record:
    """What the guard saw while a server ran the model.

    Attributes
    ----------
    rows : list of Outcome
        One per row of the forward passes, in order.
    forward_passes : int
        Those that were judged.
    model_ran : bool
        Whether the model began to work on an input of the right shape.
    guard_seconds : float
        What the guard itself took.
    allowed_ms : float or None
        Milliseconds that a verdict on one batch may take; None = any.
    """

    rows: list[Outcome] = field(default_factory=list)
    forward_passes: int = 0
    model_ran: bool = False
    guard_seconds: float = 0.0
    allowed_ms: float | None = None


def judged(verdict: Verdict, evidence: Evidence | None = None) -> Outcome:
    """Return the outcome of an input that was scored."""
    return Outcome("poisoned" if verdict.is_poisoned else "clean", verdict, evidence=evidence)


def unscored(guard: Guard, reason: str, status: int, message: str) -> Outcome:
    """Return the outcome of an input that cannot be scored, as the guard's `failure_mode` has it."""
    if guard.config.failure_mode == "open":
        return Outcome("bypassed", reason=reason, message=message)
    return Outcome(_error_kind(status), status=status, reason=reason, message=message)


def merge(guard: Guard, rows: list[Outcome], status: int = 200) -> Outcome:
    """Return the outcome of one request from all its rows; poisoned if any row is.

    Parameters
    ----------
    guard : Guard
        The one that judged the rows.
    rows : list of Outcome
        Of every forward pass that the request made.
    status : int
        What the user's own handler says. Where it answers an error, the request is `rejected` or `failed` in its own
        words, whatever it let the model see; only `poisoned` is told all the same.
    """
    if not rows:
        if status >= 400:
            return Outcome(_error_kind(status), status=status)
        return unscored(guard, "not_observed", 500, "the model's forward pass was not seen for this request.")
    if len(rows) > 1 and guard.config.rows_per_request == 1:
        message = f"the forward pass made {len(rows)} rows for this request. Set rows_per_request to 'any'."
        rows = [*rows, unscored(guard, "rows", 500, message)]
    outcome = min(rows, key=lambda row: (GRAVITY[row.kind], row.verdict.p_value if row.verdict else 1.0))
    if outcome.kind == "clean" and any(row.evidence is not None for row in rows):
        # An audit shows a random row: a sender could point at another.
        outcome = replace(outcome, evidence=_random.choice(rows).evidence)
    if status >= 400 and outcome.kind in ("clean", "bypassed"):
        return Outcome(_error_kind(status), status=status)
    return outcome


def _error_kind(status: int) -> OutcomeKind:
    return "rejected" if status < 500 else "failed"


class Requests(Protocol):
    """What a server knows of the requests of one batch."""

    def request_id(self, index: int) -> Any:
        """Return the id that the caller gave a request, or the server."""

    def headers(self, index: int) -> Mapping[str, Any]:
        """Return the headers of a request."""
