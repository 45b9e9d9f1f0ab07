"""A flagged input as rows of the database, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from guard.errors import QueueKeyError
from guard.relabel.blobs import Blobs, pack_activations, pack_inputs, unpack_activations, unpack_inputs
from guard.relabel.encryption import KEY_VARIABLE, Cipher
from guard.relabel.items import Decision, FlaggedInput, QueueItem, State
from guard.types import Activations

#: Attributes of a flagged input that are columns of `items` under the same name.
_SAME = (
    "received_at",
    "request_id",
    "model",
    "bundle_digest",
    "suspect_label",
    "backup_label",
    "backup_confidence",
    "combined",
    "p_value",
    "false_positive_rate",
    "audit_probability",
    "is_counted",
    "reason",
    "content_type",
)


#: In place of a suspect label: audits of all labels share one room, so that a flood of one label takes none of theirs.
AUDITS_ROOM = -1


@dataclass(frozen=True, slots=True)
class Rows:
    """One flagged input as it will be stored, without its number."""

    item: dict[str, Any]
    blobs: dict[str, Any]

    @property
    def group_key(self) -> tuple[str, int]:
        """What counts as one group while the queue is full: model and suspect label; of audits only the model."""
        return self.item["model"], self.item["room"]

    @property
    def model(self) -> str:
        """Name of the model."""
        return str(self.item["model"])

    @property
    def is_audit(self) -> bool:
        """True if it was not flagged, and came as one of the audit sample."""
        return self.item["audit_probability"] is not None

    @property
    def size(self) -> int:
        """Bytes of body and tensors, as stored."""
        return int(self.item["size"])

    @property
    def spare(self) -> int:
        """Bytes of the body, if it is larger than the tensors: the item can do without it; else 0."""
        return int(self.item["spare_bytes"])

    def placed(self, rank: float, score: float) -> Rows:
        """Return the same at another place among those that reviewers are given."""
        return Rows(self.item | {"review_rank": rank, "review_score": score}, self.blobs)

    def without_body(self) -> Rows:
        """Return the same without a body that the item can do without."""
        left = {"size": self.size - self.spare, "spare_bytes": 0, "content_type": ""}
        return Rows(self.item | left, self.blobs | {"body": b""})


class Codec:
    """Turns flagged inputs into rows and back, encrypted if there is a cipher."""

    def __init__(self, cipher: Cipher | None) -> None:
        self._cipher = cipher

    def encode(self, flagged: FlaggedInput, ticket: float) -> Rows:
        """Return the rows of a new pending item; `ticket` is that of the schema."""
        blobs = Blobs(flagged.body, pack_inputs(flagged.inputs), pack_activations(flagged.activations))
        if self._cipher is not None:
            seal = self._cipher.seal
            blobs = Blobs(seal(blobs.body), seal(blobs.inputs), seal(blobs.activations))
        item: dict[str, Any] = {name: _storable(getattr(flagged, name)) for name in _SAME}
        item |= {
            "state": State.PENDING.value,
            "group_id": 0,
            "votes": 0,
            "ticket": ticket,
            "room": AUDITS_ROOM if flagged.is_audit else flagged.suspect_label,
            "review_rank": flagged.p_value,
            "review_score": flagged.combined,
            "size": blobs.size,
            "spare_bytes": len(blobs.body) if ticket < 1 and 2 * len(blobs.body) > blobs.size else 0,
            "n_classes": flagged.n_classes,
            "scores": json.dumps({"raw": dict(flagged.raw), "surprise": dict(flagged.surprise)}),
        }
        sealed = self._cipher is not None
        parts = {"body": blobs.body, "inputs": blobs.inputs, "activations": blobs.activations}
        return Rows(item, {"sealed": sealed} | parts)

    def decode(self, row: Mapping[Any, Any], decision: Decision | None) -> QueueItem:
        """Return the item of one row of `items` joined with `blobs`."""
        scores = json.loads(row["scores"])
        flagged = FlaggedInput(
            raw=scores["raw"],
            surprise=scores["surprise"],
            body=self._open(row, "body"),
            inputs=unpack_inputs(self._open(row, "inputs")),
            activations=self.decode_activations(row),
            **{name: row[name] for name in _SAME},
        )
        return QueueItem(
            id=row["id"],
            state=State(row["state"]),
            input=flagged,
            group=row["group_id"] or None,
            claimed_by=row["claimed_by"],
            lease_expires_at=row["lease_expires_at"],
            decision=decision,
        )

    def decode_activations(self, row: Mapping[Any, Any]) -> Activations:
        """Return the activations of one row of `blobs`."""
        return unpack_activations(self._open(row, "activations"))

    def _open(self, row: Mapping[Any, Any], column: str) -> bytes:
        data = bytes(row[column])
        if not row["sealed"] or not data:  # nothing is left of a body that gave way; what is sealed is never empty
            return data
        if self._cipher is None:
            raise QueueKeyError(f"the queue is encrypted. Set {KEY_VARIABLE} to the key that it was written with.")
        return self._cipher.open(data)


def _storable(value: Any) -> Any:
    """Return a value as both databases take it: what a client named itself may hold NUL or half characters."""
    if not isinstance(value, str):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def detectors_of(row: Mapping[Any, Any]) -> tuple[set[str], set[str]]:
    """Return the names of the detectors that gave a score, and of those that gave a surprise, of one row of `items`."""
    scores = json.loads(row["scores"])
    return set(scores["raw"]), set(scores["surprise"])


def decision_of(row: Mapping[Any, Any]) -> Decision:
    """Return the decision of one row of `statements.ANSWERS`."""
    replaced_by = row["replaced_by"]
    withdrawn = row["replaced_by_kind"] == "withdrawal"
    return Decision(
        id=row["id"],
        item_id=row["item_id"],
        reviewer=row["reviewer"],
        is_poisoned=row["is_poisoned"],
        true_label=row["true_label"],
        decided_at=row["decided_at"],
        supersedes=row["supersedes"],
        withdrawn=withdrawn,
        note=row["note"],
        superseded_by=None if withdrawn else replaced_by,
    )


def mappings(result: sa.CursorResult[Any]) -> Sequence[Mapping[Any, Any]]:
    """Return all rows of a result, each readable by column name."""
    return result.mappings().all()
