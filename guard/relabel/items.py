"""The nouns of the queue: a flagged input, its item, and what reviewers said of it. Knows no database."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import NamedTuple

import numpy as np

from guard.errors import DataError
from guard.types import Activations, Float32Array


class State(StrEnum):
    """Where an item stands: pending -> claimed -> decided -> trained, or out of the queue."""

    #: Waits for a reviewer.
    PENDING = "pending"
    #: Shown to one reviewer until the lease ends.
    CLAIMED = "claimed"
    #: Answered, by as many reviewers as the quorum asks for.
    DECIDED = "decided"
    #: Answered, and a bundle was trained with the answer.
    TRAINED = "trained"
    #: Too old: its images were removed.
    EXPIRED = "expired"
    #: Gave way to another input while the queue was full: its images were removed.
    DISCARDED = "discarded"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FlaggedInput:
    """What the server hands over for one request that a person is to judge: a flagged one, or an audit.

    Raises
    ------
    DataError
        If a shape, a label, a number or a time breaks its rule.
    """

    #: Of the request, as in the answer's headers.
    request_id: str
    #: Name under which the model is served.
    model: str
    #: Digest of the bundle that flagged it, 64 hex digits.
    bundle_digest: str
    #: The suspect model's own answer, 0-based.
    suspect_label: int
    #: Second opinion of the guard's backup or replacement head, and its confidence in [0, 1]; None = there is none.
    backup_label: int | None
    backup_confidence: float | None
    #: Per detector: its score, and how unusual that score is; higher = more suspicious.
    raw: Mapping[str, float]
    surprise: Mapping[str, float]
    #: Combined score, no unit, higher = more suspicious.
    combined: float
    #: Share of clean inputs at least as suspicious, in (0, 1].
    p_value: float
    #: One line for a person.
    reason: str
    #: Of `body`, which is the request's body as the client sent it, or all its fields (`guard.relabel.request_body`).
    content_type: str
    body: bytes
    #: What the network saw, shape (channels, height, width).
    inputs: Float32Array
    #: One row, so that no retraining needs the model.
    activations: Activations
    #: Aware, UTC.
    received_at: datetime
    #: Rate that the server flagged at; None: of an earlier version, which did not say.
    false_positive_rate: float | None = None
    #: None: it was flagged. Else it is an audit: not flagged, and drawn at random with this probability, in (0, 1].
    audit_probability: float | None = None
    #: True if the server counted what it judged (`Queue.note_traffic`), as it does where there is an audit sample.
    is_counted: bool = False

    def __post_init__(self) -> None:
        if self.received_at.utcoffset() != timedelta(0):
            raise DataError(f"received_at must be a time with its zone, UTC, got {self.received_at!r}.")
        if len(self.activations) != 1:
            raise DataError(f"activations of a flagged input must have one row, got {len(self.activations)}.")
        if self.inputs.ndim != 3 or self.inputs.dtype != np.float32:
            raise DataError(
                "inputs must be float32 of shape (channels, height, width), "
                f"got {self.inputs.dtype} {self.inputs.shape}."
            )
        labels = [("suspect_label", self.suspect_label)]
        if self.backup_label is not None:
            labels.append(("backup_label", self.backup_label))
        for name, label in labels:
            if not 0 <= label < self.n_classes:
                raise DataError(f"{name} must be in [0, {self.n_classes}), got {label}.")
            object.__setattr__(self, name, operator.index(label))  # a database driver does not know NumPy's integers
        if self.audit_probability is not None and not 0 < self.audit_probability <= 1:
            raise DataError(f"audit_probability must be in (0, 1], got {self.audit_probability}.")
        for name, share in (("p_value", self.p_value), ("false_positive_rate", self.false_positive_rate)):
            if share is not None and not 0 <= share <= 1:
                raise DataError(f"{name} must be in [0, 1], got {share}.")
        names = ("combined", "p_value", "backup_confidence", "false_positive_rate", "audit_probability")
        numbers = {name: getattr(self, name) for name in names}
        for name, number in numbers.items():
            if number is not None:
                if not np.isfinite(number):
                    raise DataError(f"{name} must be finite, got {number}.")
                object.__setattr__(self, name, float(number))

    @property
    def n_classes(self) -> int:
        """Number of classes that the suspect model knows; a true label is below it."""
        return int(self.activations.logits.shape[1])

    @property
    def is_audit(self) -> bool:
        """True if it was not flagged, and came as one of the audit sample."""
        return self.audit_probability is not None


class Settled(NamedTuple):
    """An item whose answer counts, by its numbers alone."""

    id: int
    #: Decided or trained.
    state: State
    decision_id: int
    #: Of the bundle that flagged it.
    bundle_digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """One answer of one reviewer. Its row never changes; later rows may supersede or withdraw it."""

    id: int
    item_id: int
    #: Who signed it.
    reviewer: str
    is_poisoned: bool
    #: 0-based; None = the reviewer did not name it.
    true_label: int | None
    decided_at: datetime
    #: The decision that this one took the place of.
    supersedes: int | None
    #: True if a later row took it back.
    withdrawn: bool
    note: str
    #: The decision that took this one's place.
    superseded_by: int | None = None

    @property
    def stands(self) -> bool:
        """True if it was neither superseded nor withdrawn."""
        return not self.withdrawn and self.superseded_by is None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class QueueItem:
    """A flagged input and where it stands."""

    id: int
    state: State
    input: FlaggedInput
    #: Look-alike flagged inputs share this number; None = it looks like no other, or nobody looked yet.
    group: int | None
    #: Who sees it now, and until when; None unless it is claimed.
    claimed_by: str | None
    lease_expires_at: datetime | None
    #: The answer that counts; None until the quorum is met.
    decision: Decision | None
    #: True if `guard.relabel.blinding` took out what would tell an audit.
    is_blinded: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a reviewer says of one item."""

    item_id: int
    is_poisoned: bool
    true_label: int | None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Enqueued:
    """Outcome of one `Queue.enqueue`."""

    #: In the order of the inputs; None = dropped, because the queue is full.
    ids: tuple[int | None, ...]
    #: How many inputs were dropped by this call: new ones, and pending ones that gave way to new ones.
    dropped: int
    #: Where audits were among them: the share of `max_audits_per_hour` that is left to their model; else None.
    audit_share_left: float | None = None


@dataclass(frozen=True, slots=True)
class Swept:
    """Outcome of one `Queue.sweep`."""

    #: Leases that had ended; their items are pending again.
    returned: int
    #: Items older than the retention time; their images are gone.
    expired: int
    #: Rows of long gone items that nobody had answered, removed altogether.
    purged: int


@dataclass(frozen=True, slots=True)
class Counts:
    """How much there is of everything; gold items are left out."""

    #: Every state is there.
    by_state: Mapping[State, int]
    #: Time of the oldest pending input; None = nothing is pending.
    oldest_pending_at: datetime | None
    #: Inputs that were dropped, by group key: (model, suspect label).
    dropped: Mapping[tuple[str, int], int]
    #: Rows by kind: `poisoned`, `false_alarm`, and, of these, `superseded` and `withdrawn`.
    decisions: Mapping[str, int]
    #: Items whose images are kept, and their bytes; what the capacity settings bound.
    held_items: int = 0
    held_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """Look-alike flagged inputs: probably one trigger."""

    id: int
    size: int
    pending: int
    suspect_labels: tuple[int, ...]
    #: Some of its items, pending ones first.
    sample_ids: tuple[int, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class GoldResult:
    """How a reviewer answered items whose answer is known."""

    right: int
    answered: int
