"""Log-in and log-out."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import RedirectResponse, Response

from guard.review.access import (
    Form,
    NotSignedInError,
    TheWorkspace,
    TooManyAttemptsError,
    address_of,
    cookie_name,
    limit_of,
    read_form,
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
async def log_in(request: Request, workspace: TheWorkspace) -> Response:
    """Start a session for a name and its token."""
    refuse_other_sites(request)
    form = await read_form(request, max_files=0, max_fields=10)
    name, token = (str(form.get(field, "")).strip() for field in ("name", "token"))
    reviewer = await run_in_threadpool(workspace.reviewers.check_token, token)
    if reviewer is None or reviewer.name != name:  # a right token passes, whatever others have tried
        context = {"name": name, "is_error": True}
        try:
            limit_of(request).failed(f"{address_of(request)}, name {name}")
        except TooManyAttemptsError as error:
            headers = {"Retry-After": str(error.retry_after)}
            return render(request, "login.html", {**context, "text": str(error)}, status=429, headers=headers)
        text = "Name and token do not go together."
        return render(request, "login.html", {**context, "text": text}, status=401)
    if old := request.cookies.get(cookie_name(request)):  # a session that was there before is nobody's any more
        await run_in_threadpool(workspace.reviewers.end_session, old)
    secret = await run_in_threadpool(workspace.reviewers.start_session, reviewer.name)
    response = RedirectResponse("/review", status_code=303)
    is_secure = request.url.scheme == "https"
    response.set_cookie(cookie_name(request), secret, httponly=True, samesite="strict", secure=is_secure, path="/")
    return response


@router.post("/logout")
def log_out(request: Request, workspace: TheWorkspace, posted: Form) -> Response:
    """End the session, and give back what the reviewer holds."""
    workspace.release(posted.session.name)
    workspace.reviewers.end_session(request.cookies.get(cookie_name(request), ""))
    response = RedirectResponse("/login", status_code=303)
    is_secure = request.url.scheme == "https"
    response.delete_cookie(cookie_name(request), path="/", secure=is_secure, httponly=True, samesite="strict")
    response.headers["Clear-Site-Data"] = '"cache"'  # also what an earlier version of the page let browsers keep
    return response
