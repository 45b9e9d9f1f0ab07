"""Log-in and log-out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from guard.review.access import (
    COOKIE,
    Form,
    NotSignedInError,
    TheDesk,
    TooManyAttemptsError,
    address_of,
    limit_of,
    refuse_other_sites,
    session_of,
)
from guard.review.rendering import render

router = APIRouter()


@router.get("/login")
def login_page(request: Request) -> Response:
    """Show the form, or go on if somebody is logged in."""
    try:
        session_of(request)
    except NotSignedInError:
        return render(request, "login.html", {"name": ""})
    return RedirectResponse("/review", status_code=303)


@router.post("/login")
async def log_in(request: Request, desk: TheDesk) -> Response:
    """Start a session for a name and its token."""
    refuse_other_sites(request)
    form = await request.form(max_files=0, max_fields=10)
    name, token = (str(form.get(field, "")).strip() for field in ("name", "token"))
    limit, keys = limit_of(request), (address_of(request), f"name {name}")
    try:
        limit.check(*keys)
    except TooManyAttemptsError as error:
        context = {"name": name, "text": str(error), "is_error": True}
        return render(request, "login.html", context, status=429, headers={"Retry-After": str(error.retry_after)})
    reviewer = await run_in_threadpool(desk.reviewers.check_token, token)
    if reviewer is None or reviewer.name != name:
        limit.failed(*keys)
        context = {"name": name, "text": "Name and token do not go together.", "is_error": True}
        return render(request, "login.html", context, status=401)
    secret = await run_in_threadpool(desk.reviewers.start_session, reviewer.name)
    response = RedirectResponse("/review", status_code=303)
    response.set_cookie(
        COOKIE, secret, httponly=True, samesite="strict", secure=request.url.scheme == "https", path="/"
    )
    return response


@router.post("/logout")
def log_out(request: Request, desk: TheDesk, posted: Form) -> Response:
    """End the session, and give back what the reviewer holds."""
    desk.release(posted.session.name)
    desk.reviewers.end_session(request.cookies.get(COOKIE, ""))
    response = RedirectResponse("/login", status_code=303)
    response.delete_cookie(COOKIE, path="/")
    return response
