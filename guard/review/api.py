"""The same queue for programs: JSON over HTTP, with a reviewer's token as bearer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from guard.relabel.items import Answer, Decision, QueueItem
from guard.review.access import Number, Program, Text, TheWorkspace, need_admin
from guard.review.images import picture_response
from guard.review.pictures import picture_of_tensor
from guard.review.workspace import Order, Workspace

#: What every call may answer instead; the body is `{"error": TEXT}`.
_ERRORS: dict[int | str, dict[str, Any]] = {
    401: {"description": "No token of a reviewer."},
    403: {"description": "The role or the item does not allow it."},
    409: {"description": "The item was answered, or is somebody else's."},
    410: {"description": "The item is gone."},
    422: {"description": "The request breaks a rule, which the text names."},
    429: {"description": "Too many wrong tokens; see Retry-After."},
    503: {"description": "The queue does not answer; see Retry-After."},
}
_ERROR_BODY = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
for _error in _ERRORS.values():
    _error["content"] = {"application/json": {"schema": _ERROR_BODY}}

router = APIRouter(prefix="/api/v1", responses=_ERRORS)
#: For everybody, without a token.
open_router = APIRouter()


class OneAnswer(BaseModel):
    """What a program says of one item."""

    model_config = ConfigDict(extra="forbid")

    is_poisoned: bool
    #: 0-based; None = it cannot be told.
    true_label: int | None = None
    note: Text = Field("", max_length=2000)


class ItemAnswer(OneAnswer):
    """An answer that names its item."""

    item: Number


class ManyAnswers(BaseModel):
    """Answers that are saved together, all or none."""

    model_config = ConfigDict(extra="forbid")

    answers: list[ItemAnswer] = Field(min_length=1, max_length=1000)


class RetrainRequest(BaseModel):
    """Which model to retrain."""

    model_config = ConfigDict(extra="forbid")

    model: Text = Field(min_length=1, max_length=200)


@open_router.get("/healthz")
def healthy(workspace: TheWorkspace) -> dict[str, str]:
    """Say that the page runs and its queue answers; 503 if the queue does not."""
    workspace.rounds.models()
    return {"status": "ok"}


@open_router.get("/api/v1/openapi.json")
def description() -> dict[str, Any]:
    """Return the OpenAPI description of this interface."""
    described = get_openapi(title="Guard review", version="1", routes=router.routes)
    described["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    described["security"] = [{"token": []}]
    return described


@router.get("/items/next")
def next_items(
    workspace: TheWorkspace,
    reviewer: Program,
    n: Annotated[int, Query(ge=1, le=200)] = 1,
    order: Order = "suspicion",
    group: Number | None = None,
) -> dict[str, Any]:
    """Claim up to n items for the caller."""
    claimed = workspace.queue.claim(reviewer.name, n, order=order, group=group)
    return {"items": [_item(workspace, item) for item in workspace.queue.blind(claimed)]}


@router.get("/items/{item_id}")
def one_item(workspace: TheWorkspace, reviewer: Program, item_id: Number) -> dict[str, Any]:
    """Return one item."""
    return _item(workspace, workspace.queue.blind([workspace.seen(reviewer, item_id)])[0])


@router.get("/items/{item_id}/image.png")
def item_image(workspace: TheWorkspace, reviewer: Program, item_id: Number) -> Response:
    """Return what the model saw as a PNG file."""
    return picture_response(picture_of_tensor(workspace.shown(reviewer, item_id).inputs))


@router.post("/items/{item_id}/decision")
def decide(workspace: TheWorkspace, reviewer: Program, item_id: Number, answer: OneAnswer) -> dict[str, Any]:
    """Save one answer."""
    return _decision(workspace.decide(reviewer.name, [_answer(item_id, answer)])[0])


@router.post("/decisions")
def decide_many(workspace: TheWorkspace, reviewer: Program, body: ManyAnswers) -> dict[str, Any]:
    """Save several answers, all or none."""
    done = workspace.decide(reviewer.name, [_answer(answer.item, answer) for answer in body.answers])
    return {"decisions": [_decision(decision) for decision in done]}


@router.post("/items/{item_id}/skip")
def skip(workspace: TheWorkspace, reviewer: Program, item_id: Number) -> dict[str, Any]:
    """Give one item back."""
    workspace.skip(reviewer.name, item_id)
    return {"skipped": item_id}


@router.post("/undo")
def undo(workspace: TheWorkspace, reviewer: Program) -> dict[str, Any]:
    """Withdraw the caller's last answer that stands."""
    done = workspace.undo(reviewer.name)
    return {"item": done.id, "state": done.state.value}


@router.get("/counts")
def counts(workspace: TheWorkspace, reviewer: Program) -> dict[str, Any]:
    """Return how much there is of everything."""
    found = workspace.counts(reviewer)
    return {
        "by_state": {state.value: number for state, number in found.by_state.items()},
        "oldest_pending_at": found.oldest_pending_at.isoformat() if found.oldest_pending_at else None,
        "dropped": sum(found.dropped.values()),
        "decisions": dict(found.decisions),
    }


@router.post("/retrain")
def retrain(workspace: TheWorkspace, reviewer: Program, body: RetrainRequest) -> dict[str, Any]:
    """Ask for a retraining; for admins."""
    need_admin(reviewer.role)
    workspace.ask_for_retraining(body.model, reviewer.name)
    return {"requested": body.model}


def _answer(item_id: int, answer: OneAnswer) -> Answer:
    return Answer(item_id=item_id, is_poisoned=answer.is_poisoned, true_label=answer.true_label, note=answer.note)


def _item(workspace: Workspace, item: QueueItem) -> dict[str, Any]:
    flagged, is_blinded = item.input, item.is_blinded
    return {
        "id": item.id,
        "state": item.state.value,
        "group": item.group,
        "request_id": flagged.request_id,
        "model": flagged.model,
        "bundle": flagged.bundle_digest,
        "suspect_label": flagged.suspect_label,
        "backup_label": flagged.backup_label,
        "backup_confidence": flagged.backup_confidence,
        "second_opinion": workspace.opinion(flagged),
        "class_names": workspace.names(flagged),
        "p_value": None if is_blinded else flagged.p_value,
        "score": None if is_blinded else flagged.combined,
        "detectors": None if is_blinded else {"raw": dict(flagged.raw), "surprise": dict(flagged.surprise)},
        "reason": None if is_blinded else flagged.reason,
        "received_at": flagged.received_at.isoformat(),
        "lease_expires_at": item.lease_expires_at.isoformat() if item.lease_expires_at else None,
        "image": f"/api/v1/items/{item.id}/image.png",
        "decision": _decision(item.decision) if item.decision is not None else None,
    }


def _decision(decision: Decision) -> dict[str, Any]:
    return {
        "id": decision.id,
        "item": decision.item_id,
        "reviewer": decision.reviewer,
        "is_poisoned": decision.is_poisoned,
        "true_label": decision.true_label,
        "decided_at": decision.decided_at.isoformat(),
        "supersedes": decision.supersedes,
        "note": decision.note,
    }
