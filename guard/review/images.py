"""Pictures of items and of clean images, as PNG files of our own making."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from guard.errors import DataError
from guard.relabel.items import FlaggedInput
from guard.relabel.request_body import pictures_of
from guard.review.access import Number, SignedIn, TheWorkspace
from guard.review.occlusion import Occlusion
from guard.review.pictures import heat_picture, picture_of_body, picture_of_tensor
from guard.review.rendering import render
from guard.review.workspace import Workspace

router = APIRouter(prefix="/images")


def picture_response(data: bytes) -> Response:
    """Return a PNG file; as every answer, it is kept in no cache, and so gone after the log-out."""
    return Response(data, media_type="image/png")


@router.get("/items/{item_id}.png")
def item_picture(
    workspace: TheWorkspace,
    session: SignedIn,
    item_id: Number,
    view: Literal["model", "sent"] = "model",
    place: Number = 0,
) -> Response:
    """Return an item as the model saw it, or one picture of its request, by its place among them."""
    flagged = workspace.shown(session.reviewer, item_id)
    if view == "model":
        return picture_response(picture_of_tensor(flagged.inputs))
    if not flagged.body:
        raise DataError("the body was not kept: it was too large, or the queue had no room for it.")
    sent = pictures_of(flagged.body, flagged.content_type)
    if not sent:
        return picture_response(picture_of_body(flagged.body))  # says why it is none
    if not 0 <= place < len(sent):
        raise HTTPException(404, f"the request has {len(sent)} pictures.")
    return picture_response(picture_of_body(sent[place].data))


@router.get("/items/{item_id}/occlusion.png")
def occlusion_picture(workspace: TheWorkspace, session: SignedIn, item_id: Number) -> Response:
    """Return the occlusion map of an item, to lay over its picture."""
    flagged = workspace.shown(session.reviewer, item_id)
    found = _occlusion(workspace, flagged).of(item_id, flagged.inputs)
    return picture_response(heat_picture(found.heat, *flagged.inputs.shape[1:]))


@router.get("/items/{item_id}/occlusion")
def occlusion_words(request: Request, workspace: TheWorkspace, session: SignedIn, item_id: Number) -> Response:
    """Make the occlusion map of an item, and say in words what it shows."""
    flagged = workspace.shown(session.reviewer, item_id)
    found = _occlusion(workspace, flagged).of(item_id, flagged.inputs)
    names = workspace.names(flagged)
    other = None if found.other_label is None else names[found.other_label]
    context = {"item_id": item_id, "place": found.place, "name": names[found.label], "other": other}
    return render(request, "_occlusion.html", context)


@router.get("/clean/{row}.png")
def clean_picture(workspace: TheWorkspace, session: SignedIn, row: Number, of: Number = 0) -> Response:
    """Return one clean image, of one of the page's sets by its place among them."""
    sets = workspace.clean_sets
    clean = sets[of] if 0 <= of < len(sets) else None
    if clean is None or not 0 <= row < len(clean.images):
        raise HTTPException(404, "there is no such clean image.")
    return picture_response(picture_of_tensor(clean.images[row]))


def _occlusion(workspace: Workspace, flagged: FlaggedInput) -> Occlusion:
    if (occlusion := workspace.occlusion_of(flagged)) is None:
        raise HTTPException(
            404, f"the page was started without the network of {flagged.model} (--archive, or --weights)."
        )
    return occlusion
