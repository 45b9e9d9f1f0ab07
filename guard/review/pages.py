"""The pages of a reviewer: one item after the other, their own answers, and what these changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from guard.errors import DataError, ItemGone
from guard.relabel.items import Answer, Decision, QueueItem
from guard.relabel.rounds import Round
from guard.review import wording
from guard.review.access import ForbiddenError, Form, Number, Posted, Session, SignedIn, TheWorkspace
from guard.review.blinded_report import blinded_report
from guard.review.rendering import is_part, render
from guard.review.workspace import ORDERS, Order, Workspace, label_of, number_of

router = APIRouter()

#: Answers on one page of "My answers".
ANSWERS_PAGE = 50


@router.get("/")
def start(session: SignedIn) -> Response:
    """Go to the first page."""
    return RedirectResponse("/review", status_code=303)


@router.get("/favicon.ico")
def icon() -> Response:
    """Say where the icon is, to browsers that show a picture by itself."""
    return RedirectResponse("/static/icon.svg")


@router.get("/review")
def review(
    request: Request, workspace: TheWorkspace, session: SignedIn, order: str = "", group: Number | None = None
) -> Response:
    """Show the item that the reviewer holds, or the next one."""
    chosen = _order(order or request.cookies.get("guard_order", ""))
    item = workspace.take(session.name, chosen, group)
    response = render(request, "review.html", _work(workspace, session, item, chosen, group))
    response.set_cookie("guard_order", chosen, samesite="strict", httponly=True, path="/")
    return response


@router.post("/items/{item_id}/decision")
def decide(request: Request, workspace: TheWorkspace, posted: Form, item_id: Number) -> Response:
    """Save one answer, and show the next item (or this one again, if the reviewer goes on by hand)."""
    item = workspace.item(item_id)
    names = workspace.names(item.input)
    is_poisoned, true_label = read_answer(posted, item, names)
    decision = workspace.decide(
        posted.session.name, [Answer(item_id=item_id, is_poisoned=is_poisoned, true_label=true_label)]
    )[0]
    text = f"Saved: item {item_id} {answer_text(decision, names)}."
    if posted.text("advance", "1") == "1":
        return _next(request, workspace, posted, text)
    return _shown(request, workspace, posted, workspace.item(item_id), text, decision)


@router.post("/items/{item_id}/skip")
def skip(request: Request, workspace: TheWorkspace, posted: Form, item_id: Number) -> Response:
    """Give an item back, to come last for this reviewer, and show the next one."""
    workspace.skip(posted.session.name, item_id)
    return _next(request, workspace, posted, f"Item {item_id} went back to the queue.")


@router.post("/next")
def go_on(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """Show the next item after one that was answered."""
    return _next(request, workspace, posted, "")


@router.post("/undo")
def undo(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """Withdraw the last answer, and show its item again."""
    item = workspace.undo(posted.session.name)
    return _shown(request, workspace, posted, item, f"Undone: item {item.id} is open again.", None)


@router.post("/items/{item_id}/renew")
def renew(workspace: TheWorkspace, posted: Form, item_id: Number) -> Response:
    """Keep an item for longer; the page asks while somebody looks at it."""
    workspace.queue.renew(posted.session.name, [item_id])
    return Response(status_code=204)


@router.get("/items/{item_id}")
def item_page(request: Request, workspace: TheWorkspace, session: SignedIn, item_id: Number) -> Response:
    """Show an item to look at, without claiming it."""
    item = workspace.seen(session.reviewer, item_id)
    decisions = [decision for decision in workspace.log.newest(session.name, 500) if decision.item_id == item_id]
    context = {"view": workspace.view(item), "mine": decisions, **shared(workspace, session)}
    return render(request, "item.html", context)


@router.get("/answers")
def answers(request: Request, workspace: TheWorkspace, session: SignedIn, page: Number = 1) -> Response:
    """Show the reviewer's own answers, newest first, of all sessions."""
    total = workspace.log.count(session.name)
    pages = max(1, -(-total // ANSWERS_PAGE))
    page = min(max(1, page), pages)
    shown = workspace.log.newest(session.name, ANSWERS_PAGE, ANSWERS_PAGE * (page - 1))
    rows = [_answer_row(workspace, session, decision) for decision in shown]
    context = {"rows": rows, "page": page, "pages": pages, "total": total, **shared(workspace, session)}
    return render(request, "answers.html", context)


@router.post("/answers/{decision_id}/withdraw")
def withdraw(workspace: TheWorkspace, posted: Form, decision_id: Number) -> Response:
    """Take an answer back; its item is the reviewer's again."""
    workspace.withdraw(posted.session.name, decision_id, _own_decision(workspace, posted, decision_id).item_id)
    return RedirectResponse("/answers", status_code=303)


@router.post("/answers/{decision_id}/change")
def change(workspace: TheWorkspace, posted: Form, decision_id: Number) -> Response:
    """Put another answer in the place of an earlier one."""
    names = workspace.names(workspace.item(_own_decision(workspace, posted, decision_id).item_id).input)
    workspace.queue.supersede(
        posted.session.name,
        decision_id,
        is_poisoned=_is_poisoned(posted),
        true_label=label_of(posted.text("true_label"), names),
    )
    return RedirectResponse("/answers", status_code=303)


@router.get("/progress")
def progress(request: Request, workspace: TheWorkspace, session: SignedIn) -> Response:
    """Show how far the queue is, and what the answers changed after each retraining."""
    now = datetime.now(UTC)
    is_blind = workspace.is_blind(session.reviewer)
    context = {
        "mine": workspace.log.count_standing(session.name),
        "last_hour": workspace.log.count_standing(session.name, now - timedelta(hours=1)),
        "awaited": workspace.awaited(session.reviewer),
        "rounds": [_round(entry, is_blind) for entry in workspace.rounds.all(limit=50)],
        "dropped": sum(workspace.counts(session.reviewer).dropped.values()),
        **shared(workspace, session),
    }
    return render(request, "progress.html", context)


def shared(workspace: Workspace, session: Session) -> dict[str, Any]:
    """Return what the frame of every page shows."""
    counts = workspace.counts(session.reviewer)
    by_state = {state.value: number for state, number in counts.by_state.items()}
    since = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return {
        "session": session,
        "counts": counts,
        "is_blind": workspace.is_blind(session.reviewer),
        "by_state": by_state,
        "today": workspace.log.count_standing(session.name, since),
    }


def read_answer(posted: Posted, item: QueueItem, names: list[str]) -> tuple[bool, int | None]:
    """Return (is it poisoned, true label) from a form.

    Raises
    ------
    DataError
        If it says neither, or a poisoned input comes without its true label or "none".
    """
    is_poisoned, label = _is_poisoned(posted), posted.text("true_label")
    if label == "none":
        return is_poisoned, None
    true_label = label_of(label, names)
    if true_label is None and is_poisoned:
        raise DataError("choose the true label first, or say that it cannot be told.")
    if true_label is None:  # a false alarm without another label: the suspect is right
        true_label = item.input.suspect_label
    return is_poisoned, true_label


def _is_poisoned(posted: Posted) -> bool:
    verdict = posted.text("verdict")
    if verdict not in ("poisoned", "false_alarm"):
        raise DataError("say whether it is poisoned or a false alarm.")
    return verdict == "poisoned"


def answer_text(decision: Decision, names: list[str]) -> str:
    """Return an answer in words."""
    label = "true label unknown" if decision.true_label is None else f"true label {names[decision.true_label]}"
    return f"{'poisoned' if decision.is_poisoned else 'false alarm'}, {label}"


def _next(request: Request, workspace: Workspace, posted: Posted, text: str) -> Response:
    order, group = _order(posted.text("order")), _group(posted)
    if not is_part(request):
        return RedirectResponse(f"/review?order={order}" + (f"&group={group}" if group else ""), status_code=303)
    item = workspace.take(posted.session.name, order, group)
    context = _work(workspace, posted.session, item, order, group)
    return render(request, "_work.html", {**context, "text": text, "is_swap": True})


def _shown(
    request: Request, workspace: Workspace, posted: Posted, item: QueueItem, text: str, decision: Decision | None
) -> Response:
    if not is_part(request):
        return RedirectResponse("/review", status_code=303)
    context = _work(workspace, posted.session, item, _order(posted.text("order")), _group(posted), decision)
    return render(request, "_work.html", {**context, "text": text, "is_swap": True})


def _work(
    workspace: Workspace,
    session: Session,
    item: QueueItem | None,
    order: Order,
    group: int | None,
    decision: Decision | None = None,
) -> dict[str, Any]:
    return {
        "view": None if item is None else workspace.view(item, decision),
        "answer_text": answer_text,
        "order": order,
        "group": group,
        "orders": ORDERS,
        "has_occlusion": item is not None and workspace.occlusion_of(item.input) is not None,
        "quorum": workspace.queue.settings.quorum,
        "is_swap": False,
        **shared(workspace, session),
    }


def _answer_row(workspace: Workspace, session: Session, decision: Decision) -> dict[str, Any]:
    try:
        (item,) = workspace.queue.blind([workspace.seen(session.reviewer, decision.item_id)])
    except ItemGone:
        return {"decision": decision, "item": None, "names": [], "text": "", "suspect": ""}
    names = workspace.names(item.input)
    return {
        "decision": decision,
        "item": item,
        "names": names,
        "text": answer_text(decision, names),
        "suspect": names[item.input.suspect_label],
    }


def _round(entry: Round, is_blind: bool) -> dict[str, Any]:
    report = blinded_report(entry.report) if is_blind else entry.report
    return {
        "entry": entry,
        "figures": wording.before_and_after(report),
        "facts": wording.other_facts(report),
        "reasons": wording.reasons(report),
    }


def _order(text: str) -> Order:
    return next((order for order in ORDERS if order == text), "suspicion")


def _group(posted: Posted) -> int | None:
    return number_of(posted.text("group"))


def _own_decision(workspace: Workspace, posted: Posted, decision_id: int) -> Decision:
    decision = workspace.log.decision_of(posted.session.name, decision_id)
    if decision is None:
        raise ForbiddenError("that answer is not yours.")
    return decision
