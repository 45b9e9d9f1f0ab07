"""The status page: is it all right, and what the guard, its queue and its reviewers did lately."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from guard.relabel.items import State
from guard.review.access import Form, Session, SignedIn, TheWorkspace, need_admin
from guard.review.pages import shared
from guard.review.rendering import render
from guard.review.status import numbers as status_numbers
from guard.review.status.history import SPANS, History, Span
from guard.review.status.numbers import Numbers, read_queue
from guard.review.status.verdict import answer
from guard.review.workspace import Workspace

router = APIRouter(prefix="/status")

#: States of the queue, and their names on the page.
_STATES = {
    State.PENDING: "waiting",
    State.CLAIMED: "being looked at",
    State.DECIDED: "answered",
    State.TRAINED: "learned from",
    State.EXPIRED: "too old",
    State.DISCARDED: "gave way",
}


@router.get("")
def status_page(
    request: Request, workspace: TheWorkspace, session: SignedIn, span: str = "", model: str = ""
) -> Response:
    """Show the whole page."""
    return render(request, "status.html", _context(workspace, session, span, model))


@router.get("/now")
def now_part(request: Request, workspace: TheWorkspace, session: SignedIn, span: str = "", model: str = "") -> Response:
    """Return everything of the page that changes, for its script to put in place."""
    return render(request, "_status_now.html", {**_context(workspace, session, span, model), "is_swap": True})


@router.get("/rollback")
def ask_to_roll_back(request: Request, workspace: TheWorkspace, session: SignedIn) -> Response:
    """Show what a roll-back would do, and ask."""
    need_admin(session.reviewer.role)
    store, listed = workspace.bundle_list.store, {bundle.digest: bundle for bundle in workspace.bundle_list.newest()}
    context = {
        "active": store.known_active() if store is not None else None,
        "target": workspace.bundle_list.way_back(),
        "listed": listed,
        **shared(workspace, session),
    }
    return render(request, "rollback.html", context)


@router.post("/rollback")
def roll_back(workspace: TheWorkspace, posted: Form) -> Response:
    """Make the bundle before the active one active again."""
    need_admin(posted.session.reviewer.role)
    workspace.bundle_list.roll_back(posted.text("active"), posted.text("target"), posted.session.name)
    return RedirectResponse("/status", status_code=303)


def _context(workspace: Workspace, session: Session, span_name: str, model_name: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    span = SPANS.get(span_name, SPANS["hour"])
    frame = shared(workspace, session)
    history, models = _history(workspace, span, model_name, now)
    model = model_name if model_name in models else None
    rounds = workspace.rounds.all(20, model=model)
    store = workspace.bundle_list.store
    numbers = Numbers(
        history,
        read_queue(workspace.activity, frame["counts"], history, model),
        workspace.bundle_list.expected_rate(),
        next((entry for entry in rounds if entry.outcome is not None), None),
        store.known_active() if store is not None else None,
        workspace.metrics is not None,
        workspace.bundle_list.contradictions(),
    )
    charts = status_numbers.charts(numbers)
    middles = [round((begin + end) / 2) for begin, end in zip(history.edges, history.edges[1:], strict=False)]
    people = [
        (
            share,
            workspace.queue.gold_results(share.reviewer) if session.is_admin else None,
        )  # or they would tell known items
        for share in numbers.queue.by_reviewer
    ]
    since = None if history.since is None else datetime.fromtimestamp(history.since, UTC)
    return {
        "now": now,
        "span": span,
        "spans": list(SPANS),
        "model": model or "",
        "models": models,
        "numbers": numbers,
        "answer": answer(numbers, now),
        "charts": charts,
        "drawn": {"times": middles, "charts": [chart.as_dict() for chart in charts]},
        "since": since,
        "is_short": history.since is not None and history.since > history.edges[0] + span.step,
        "states": [(text, numbers.queue.counts.by_state[state]) for state, text in _STATES.items()],
        "dropped": sum(numbers.queue.counts.dropped.values()),
        "people": people,
        "detectors": _fired(history),
        "bundles": workspace.bundle_list.newest(history.in_use),
        "way_back": workspace.bundle_list.way_back() if session.is_admin else None,
        "milliseconds": status_numbers.milliseconds,
        **frame,
    }


def _history(workspace: Workspace, span: Span, model: str, now: datetime) -> tuple[History, list[str]]:
    """Return what the metrics say, and the models that there are."""
    seen = workspace.activity.models()
    if workspace.metrics is None:
        return History(span=span, edges=span.edges(now.timestamp())), seen
    whole = workspace.metrics.history(span, None, now.timestamp())
    models = sorted({*seen, *whole.models})
    if model not in models:  # sources remember what was asked: never a name that a browser made up
        return whole, models
    return workspace.metrics.history(span, model, now.timestamp()), models


def _fired(history: History) -> list[tuple[str, int]]:
    counts = [(name, round(count)) for name, count in history.parts("guard_detector_fired_total").items()]
    return sorted((entry for entry in counts if entry[1]), key=lambda entry: (-entry[1], entry[0]))
