"""The status page: is it all right, and what the guard, its queue and its reviewers did lately."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from guard.errors import BundleError
from guard.relabel.items import State
from guard.review.access import Form, Number, Session, SignedIn, TheWorkspace, need_admin
from guard.review.pages import shared
from guard.review.rendering import render
from guard.review.status import numbers as status_numbers
from guard.review.status.bundles import BundleList
from guard.review.status.detection import bars
from guard.review.status.history import SPANS, History, Span, without_flagged
from guard.review.status.numbers import Numbers, read_queue
from guard.review.status.verdict import answer
from guard.review.workspace import Workspace, number_of

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
def ask_to_roll_back(request: Request, workspace: TheWorkspace, session: SignedIn, folder: Number = 0) -> Response:
    """Show what a roll-back in a folder of bundles would do, and ask."""
    need_admin(session.reviewer.role)
    chosen = _folder(workspace, folder)
    context = {
        "active": chosen.active(),
        "target": chosen.way_back(),
        "listed": {bundle.digest: bundle for bundle in chosen.newest()},
        "folder": folder,
        "of": chosen.of,
        **shared(workspace, session),
    }
    return render(request, "rollback.html", context)


@router.post("/rollback")
def roll_back(workspace: TheWorkspace, posted: Form) -> Response:
    """Make the bundle before the active one active again."""
    need_admin(posted.session.reviewer.role)
    chosen = _folder(workspace, number_of(posted.text("folder") or "0"))
    chosen.roll_back(posted.text("active"), posted.text("target"), posted.session.name)
    return RedirectResponse("/status", status_code=303)


def _folder(workspace: Workspace, place: int | None) -> BundleList:
    """Return the list of a folder of bundles by its place among them."""
    lists = workspace.bundle_lists
    if place is None or not 0 <= place < len(lists):
        raise BundleError(f"there is no such folder of bundles: the page knows {len(lists)}.")
    chosen: BundleList = lists[place]
    return chosen


def _context(workspace: Workspace, session: Session, span_name: str, model_name: str) -> dict[str, Any]:
    now = datetime.now(UTC)
    span = SPANS.get(span_name, SPANS["hour"])
    frame = shared(workspace, session)
    history, models = _history(workspace, span, model_name, now)
    model = model_name if model_name in models else None
    if frame["is_blind"]:
        history = without_flagged(history)
    rounds = workspace.rounds.all(20, model=model)
    lists = workspace.bundle_lists.of_model(model)
    sure = [found for found in (each.contradictions() for each in lists) if found is not None]
    numbers = Numbers(
        history,
        read_queue(workspace.activity, frame["counts"], history, model),
        _expected_rate(workspace, lists, span, models, now),
        next((entry for entry in rounds if entry.outcome is not None), None),
        tuple(digest for each in lists if (digest := each.active()) is not None),
        workspace.metrics is not None,
        next((found for found in sure if found.is_noticed), sure[0] if sure else None),
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
        "states": [
            (text, numbers.queue.counts.by_state[state])
            for state, text in _STATES.items()
            if not (frame["is_blind"] and state is State.TRAINED)
        ],
        "dropped": sum(numbers.queue.counts.dropped.values()),
        "people": people,
        "detectors": _fired(history),
        "detections": [(found, bars(found)) for found in workspace.detection.of(model)] if session.is_admin else None,
        "not_estimated": workspace.detection.failed(model) if session.is_admin else [],
        "bundles": [bundle for each in lists for bundle in each.newest(history.in_use)],
        "ways_back": [
            (place, each.of)
            for place, each in enumerate(workspace.bundle_lists)
            if session.is_admin and each in lists and each.way_back()
        ],
        "milliseconds": status_numbers.milliseconds,
        **frame,
    }


def _expected_rate(
    workspace: Workspace, lists: Sequence[BundleList], span: Span, models: Sequence[str], now: datetime
) -> float | None:
    """Return the share of clean requests that are flagged, as measured; of several folders, each by its requests."""
    rates = [each.expected_rate() for each in lists]
    if len(set(rates)) == 1:
        return rates[0]
    if workspace.metrics is None or None in rates:
        return None
    judged, expected = 0.0, 0.0
    for model in models:
        of_model = workspace.bundle_lists.of_model(model)
        verdicts = workspace.metrics.history(span, model, now.timestamp())
        n = sum(verdicts.total("guard_verdicts_total", verdict) for verdict in ("clean", "poisoned"))
        rate = of_model[0].expected_rate() if len(of_model) == 1 else None
        if n and rate is None:
            return None
        judged, expected = judged + n, expected + n * (rate or 0.0)
    return expected / judged if judged else None


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
