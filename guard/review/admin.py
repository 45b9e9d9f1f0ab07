"""The page of an admin: reviewers and how good they are, retraining, files in and out."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from starlette.datastructures import UploadFile
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse

from guard.errors import DataError, GuardError
from guard.files import decoded
from guard.relabel import exchange
from guard.relabel.items import State
from guard.review.access import Form, Session, SignedIn, TheWorkspace, need_admin
from guard.review.pages import shared
from guard.review.pictures import picture_of_tensor
from guard.review.rendering import render
from guard.review.workspace import Workspace, number_of

IMPORT_PATH = "/admin/import"
#: What can be exported: name -> states.
EXPORTS: dict[str, tuple[State, ...]] = {
    "open": (State.PENDING, State.CLAIMED),
    "answered": (State.DECIDED, State.TRAINED),
    "all": (State.PENDING, State.CLAIMED, State.DECIDED, State.TRAINED),
}

router = APIRouter(prefix="/admin")


@router.get("")
def admin_page(request: Request, workspace: TheWorkspace, session: SignedIn) -> Response:
    """Show reviewers, gold results, retraining and exchange."""
    need_admin(session.reviewer.role)
    return render(request, "admin.html", _context(workspace, session))


@router.post("/reviewers")
def add_reviewer(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """Add a reviewer, and show the token this once."""
    need_admin(posted.session.reviewer.role)
    name = posted.text("name").strip()
    try:
        token = workspace.reviewers.add(name, "admin" if posted.text("role") == "admin" else "reviewer")
    except GuardError as error:
        context = {**_context(workspace, posted.session), "text": str(error), "is_error": True}
        return render(request, "admin.html", context, status=422)
    return render(request, "admin.html", {**_context(workspace, posted.session), "new_name": name, "new_token": token})


@router.post("/reviewers/disable")
def disable_reviewer(workspace: TheWorkspace, posted: Form) -> Response:
    """Shut a reviewer out; what they answered stays."""
    need_admin(posted.session.reviewer.role)
    if posted.text("name") == posted.session.name:
        raise DataError("you cannot shut yourself out. Ask another admin.")
    workspace.reviewers.disable(posted.text("name"))
    return RedirectResponse("/admin", status_code=303)


@router.post("/retrain")
def retrain_now(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """Ask for a retraining as soon as the retrainer looks."""
    need_admin(posted.session.reviewer.role)
    model = posted.text("model")
    workspace.ask_for_retraining(model, posted.session.name)
    text = f"Asked for a retraining of {model}. The retrainer takes it up when it next looks."
    return render(request, "admin.html", {**_context(workspace, posted.session), "text": text})


@router.post("/gold")
def add_gold(workspace: TheWorkspace, posted: Form) -> Response:
    """Copy an answered item as one whose answer is known, to measure reviewers with."""
    need_admin(posted.session.reviewer.role)
    item = workspace.item(number_of(posted.text("item")) or 0)
    if item.decision is None:
        raise DataError(f"item {item.id} is not answered yet.")
    workspace.queue.add_gold(item.input, item.decision.is_poisoned, item.decision.true_label, copy_of=item.id)
    return RedirectResponse(f"/items/{item.id}", status_code=303)


@router.get("/export")
def export(
    workspace: TheWorkspace,
    session: SignedIn,
    file_format: Literal["label-studio", "csv", "labelling-config"] = "label-studio",
    what: Literal["open", "answered", "all"] = "open",
) -> Response:
    """Return items as a file."""
    need_admin(session.reviewer.role)
    items = exchange.items_in(workspace.queue, EXPORTS[what])
    if file_format == "csv":
        return _download(exchange.write_csv(items, workspace.names), "guard-items.csv", "text/csv")
    if file_format == "labelling-config":
        first = next(items, None)
        if first is None:
            raise DataError("there is no item to take the classes from.")
        text = exchange.labelling_config(workspace.names(first.input))
        return PlainTextResponse(text, headers=_as_file("guard-labelling.xml"))
    text_parts = exchange.write_label_studio(items, workspace.names, lambda flagged: picture_of_tensor(flagged.inputs))
    return _download(text_parts, "guard-items.json", "application/json")


@router.post("/import")
def import_file(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """Save the answers of a file in a reviewer's name."""
    need_admin(posted.session.reviewer.role)
    upload, reviewer = posted.form.get("file"), posted.text("reviewer")
    try:
        if not isinstance(upload, UploadFile) or not upload.filename:
            raise DataError("choose a file.")
        if reviewer not in workspace.reviewers.names():
            raise DataError(f"there is no reviewer {reviewer!r}.")
        done = import_text(workspace, reviewer, decoded(upload.file.read()))
    except GuardError as error:
        context = {**_context(workspace, posted.session), "text": str(error), "is_error": True}
        return render(request, "admin.html", context, status=422)
    text = f"Imported: {done.saved} answers saved, {done.known} there already, {done.unanswered} rows unanswered."
    return render(request, "admin.html", {**_context(workspace, posted.session), "text": text})


def import_text(workspace: Workspace, reviewer: str, text: str) -> exchange.Imported:
    """Save the answers of a file's text, JSON or CSV, whichever it is."""
    is_json = text.lstrip("\ufeff \t\r\n")[:1] in ("[", "{")
    rows = exchange.read_label_studio(text) if is_json else exchange.read_csv(text)
    return exchange.import_answers(workspace.queue, reviewer, rows, workspace.names)


def _context(workspace: Workspace, session: Session) -> dict[str, Any]:
    rows = []
    for reviewer in workspace.reviewers.all():
        rows.append(
            {
                "reviewer": reviewer,
                "gold": workspace.queue.gold_results(reviewer.name),
                "answers": workspace.log.count(reviewer.name),
            }
        )
    known = {
        "new_name": "",
        "new_token": "",
        "rows": rows,
        "models": workspace.models(),
        "awaited": workspace.awaited(session.reviewer),
        "exports": list(EXPORTS),
    }
    return {**known, **shared(workspace, session)}


def _download(parts: Any, name: str, media_type: str) -> Response:
    return StreamingResponse(parts, media_type=media_type, headers=_as_file(name))


def _as_file(name: str) -> dict[str, str]:
    return {"Content-Disposition": f'attachment; filename="{name}"'}
