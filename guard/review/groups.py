"""Groups of look-alike flagged inputs: the grid of all, and one group labelled in one go."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import RedirectResponse, Response

from guard.errors import AlreadyDecided, DataError, ItemGone, LeaseExpired
from guard.relabel.items import Answer, QueueItem
from guard.review import wording
from guard.review.access import Form, Number, Posted, SignedIn, TheWorkspace
from guard.review.pages import shared
from guard.review.rendering import render
from guard.review.workspace import Workspace, label_of, number_of

router = APIRouter(prefix="/groups")

#: What the true label of each item of a group is, where it has none of its own.
RULES = {
    "one": "the same for all",
    "backup": "each what its {opinion} says",
    "suspect": "each what the suspect says",
    "none": "cannot be told",
}


@router.get("")
def all_groups(request: Request, workspace: TheWorkspace, session: SignedIn) -> Response:
    """Show the groups that have something to do, those with most of it first."""
    groups = [listed for listed in workspace.queue.groups(seen_by=session.name) if listed.pending]
    shown = []
    for group in groups[:100]:
        names = workspace.names(workspace.item(group.sample_ids[0]).input) if group.sample_ids else []
        shown.append({"group": group, "suspects": [names[label] for label in group.suspect_labels if names]})
    return render(request, "groups.html", {"groups": shown, "total": len(groups), **shared(workspace, session)})


@router.get("/{group}")
def one_group(request: Request, workspace: TheWorkspace, session: SignedIn, group: Number) -> Response:
    """Show the items of a group, claimed for this reviewer."""
    items = workspace.take_group(session.name, group)
    return render(
        request, "group.html", {**_context(workspace, session.name, group, items), **shared(workspace, session)}
    )


@router.post("/{group}/decisions")
def decide_group(request: Request, workspace: TheWorkspace, posted: Form, group: Number) -> Response:
    """Save the answers for a group with its exceptions: all of them, or none and say why."""
    included = [number_of(value) for value in posted.form.getlist("include") if isinstance(value, str)]
    try:
        items = [workspace.item(item_id) for item_id in included if item_id is not None]
        if not items:
            raise DataError("no item is chosen.")
        answers = [_answer(posted, item, workspace) for item in items]
        workspace.decide(posted.session.name, answers)
    except (DataError, AlreadyDecided, ItemGone, LeaseExpired) as error:  # what was filled in stays for the others
        held = workspace.take_group(posted.session.name, group)
        text = str(error) if isinstance(error, DataError) else f"{error} Nothing was saved; the others are still here."
        context = {**_context(workspace, posted.session.name, group, held, posted), "text": text, "is_error": True}
        status = 422 if isinstance(error, DataError) else 409
        return render(request, "group.html", {**context, **shared(workspace, posted.session)}, status=status)
    rest = workspace.take_group(posted.session.name, group)
    text = f"Saved: {len(answers)} items."
    if not rest:
        return RedirectResponse("/groups", status_code=303)
    return render(
        request,
        "group.html",
        {**_context(workspace, posted.session.name, group, rest), **shared(workspace, posted.session), "text": text},
    )


@router.post("/{group}/leave")
def leave(workspace: TheWorkspace, posted: Form, group: Number) -> Response:
    """Give the items of a group back unanswered."""
    workspace.release(posted.session.name, group)
    return RedirectResponse("/groups", status_code=303)


def _verdict(posted: Posted, item: QueueItem) -> str:
    """Return the verdict of one item, its own or the group's."""
    return posted.text(f"verdict_{item.id}") or posted.text("verdict")


def _answer(posted: Posted, item: QueueItem, workspace: Workspace) -> Answer:
    """Return what the form says of one item: its own verdict and label, else those of the group."""
    verdict, names = _verdict(posted, item), workspace.names(item.input)
    if verdict not in ("poisoned", "false_alarm"):
        raise DataError("say whether the group is poisoned or a false alarm.")
    try:
        chosen_label = label_of(posted.text(f"label_{item.id}"), names)
    except DataError as error:
        raise DataError(f"item {item.id}: {error}") from error
    label = chosen_label if chosen_label is not None else _group_label(posted, item, workspace, verdict)
    return Answer(item_id=item.id, is_poisoned=verdict == "poisoned", true_label=label)


def _group_label(posted: Posted, item: QueueItem, workspace: Workspace, verdict: str) -> int | None:
    rule = posted.text("rule")
    if verdict == "false_alarm" and posted.text("verdict") != verdict:
        return item.input.suspect_label  # an exception in a poisoned group: the suspect is right there
    if rule == "backup":
        if doubt := wording.doubt(item.input, verdict == "poisoned"):
            opinion = workspace.opinion(item.input)
            raise DataError(f"item {item.id}: its {opinion} {doubt}. Give its own label, or leave it out.")
        return item.input.backup_label
    if rule == "suspect":
        return item.input.suspect_label
    if rule == "none":
        return None
    label = label_of(posted.text("group_label"), workspace.names(item.input))
    if rule != "one" or label is None:
        raise DataError("choose what the true label is.")
    return label


def _context(
    workspace: Workspace, reviewer: str, group: int, items: list[QueueItem], posted: Posted | None = None
) -> dict[str, Any]:
    """Return what the template shows; after an error with what the reviewer had filled in."""
    items = workspace.queue.blind(items)
    names = workspace.names(items[0].input) if items else []
    opinion = workspace.opinion(items[0].input) if items else ""
    pending = sum(listed.pending for listed in workspace.queue.groups(seen_by=reviewer) if listed.id == group)
    tiles = [_tile(workspace, item, posted) for item in items]
    suspects = {tile["names"][tile["item"].input.suspect_label] for tile in tiles}
    chosen = {name: posted.text(name) if posted is not None else "" for name in ("verdict", "rule", "group_label")}
    return {
        "group": group,
        "tiles": tiles,
        "names": names,
        "one_suspect": suspects.pop() if len(suspects) == 1 else None,
        "rules": {rule: text.format(opinion=opinion) for rule, text in RULES.items()},
        "opinion": opinion,
        "more": pending,
        "chosen": chosen,
    }


def _tile(workspace: Workspace, item: QueueItem, posted: Posted | None) -> dict[str, Any]:
    """Return one item of the form; where its second opinion is not to be taken unseen, with the reason."""

    def posted_text(name: str) -> str:
        return posted.text(name) if posted is not None else ""

    always, if_poisoned = (wording.doubt(item.input, is_poisoned) for is_poisoned in (False, True))
    is_poisoned = posted is None or _verdict(posted, item) == "poisoned"
    label, doubt = posted_text(f"label_{item.id}"), if_poisoned if is_poisoned else always
    applies = posted_text("rule") == "backup" and bool(doubt) and not label
    return {
        "item": item,
        "names": workspace.names(item.input),
        "included": (posted is None or str(item.id) in posted.form.getlist("include")) and not applies,
        "label": label,
        "verdict": posted_text(f"verdict_{item.id}"),
        "doubt": always or if_poisoned,
        "doubt_when": "always" if always else "poisoned",
        "applies": applies,
    }
