"""Pictures of items and of clean images, as PNG files of our own making."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, HTTPException, Request
from starlette.responses import Response

from guard.relabel.request_body import pictures_of
from guard.review.access import SignedIn, TheDesk
from guard.review.desk import Desk
from guard.review.occlusion import Occlusion
from guard.review.pictures import heat_picture, picture_of_body, picture_of_tensor
from guard.review.rendering import render

router = APIRouter(prefix="/images")

#: An item's pictures never change.
_CACHED = {"Cache-Control": "private, max-age=600, immutable"}


def picture_response(data: bytes) -> Response:
    """Return a PNG file, to be kept by this browser alone."""
    return Response(data, media_type="image/png", headers=_CACHED)


@router.get("/items/{item_id}.png")
def item_picture(
    desk: TheDesk, session: SignedIn, item_id: int, view: Literal["model", "sent"] = "model", place: int = 0
) -> Response:
    """Return an item as the model saw it, or one picture of its request, by its place among them."""
    flagged = desk.item(item_id).input
    if view == "model":
        return picture_response(picture_of_tensor(flagged.inputs))
    sent = pictures_of(flagged.body, flagged.content_type)
    if not sent:
        return picture_response(picture_of_body(flagged.body))  # says why it is none
    if not 0 <= place < len(sent):
        raise HTTPException(404, f"the request has {len(sent)} pictures.")
    return picture_response(picture_of_body(sent[place].data))


@router.get("/items/{item_id}/occlusion.png")
def occlusion_picture(desk: TheDesk, session: SignedIn, item_id: int) -> Response:
    """Return the occlusion map of an item, to lay over its picture."""
    image = desk.item(item_id).input.inputs
    found = _occlusion(desk).of(item_id, image)
    return picture_response(heat_picture(found.heat, *image.shape[1:]))


@router.get("/items/{item_id}/occlusion")
def occlusion_words(request: Request, desk: TheDesk, session: SignedIn, item_id: int) -> Response:
    """Make the occlusion map of an item, and say in words what it shows."""
    item = desk.item(item_id)
    found = _occlusion(desk).of(item_id, item.input.inputs)
    names = desk.names(item.input)
    other = None if found.other_label is None else names[found.other_label]
    context = {"item": item, "place": found.place, "name": names[found.label], "other": other}
    return render(request, "_occlusion.html", context)


@router.get("/clean/{row}.png")
def clean_picture(desk: TheDesk, session: SignedIn, row: int) -> Response:
    """Return one clean image."""
    if desk.clean is None or not 0 <= row < len(desk.clean.images):
        raise HTTPException(404, "there is no such clean image.")
    return picture_response(picture_of_tensor(desk.clean.images[row]))


def _occlusion(desk: Desk) -> Occlusion:
    if desk.occlusion is None:
        raise HTTPException(404, "the page was started without the suspect model (--weights, --architecture).")
    return desk.occlusion
