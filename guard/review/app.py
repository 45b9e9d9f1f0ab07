"""The application put together: pages, JSON interface, pictures, and what every answer goes through."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from guard.errors import (
    AlreadyDecided,
    BodyTooLarge,
    DataError,
    GuardError,
    ItemGone,
    LeaseExpired,
    NotYours,
    QueueUnavailable,
    TooManyHeld,
    UnknownLabel,
)
from guard.review import admin, api, groups, images, pages, signing_in
from guard.review.access import ForbiddenError, LoginLimit, NotSignedInError, TooManyAttemptsError
from guard.review.headers import BodyLimit, SecurityHeaders
from guard.review.rendering import STATIC, render
from guard.review.status import page
from guard.review.workspace import Workspace

LOOPBACK = ("localhost", "127.0.0.1", "::1")
#: First that fits.
_STATUS: tuple[tuple[type[GuardError], int], ...] = (
    (ItemGone, 410),
    (AlreadyDecided, 409),
    (LeaseExpired, 409),
    (TooManyHeld, 409),
    (NotYours, 403),
    (UnknownLabel, 422),
    (BodyTooLarge, 413),
    (QueueUnavailable, 503),
    (DataError, 422),
    (GuardError, 400),
)


def create_app(workspace: Workspace) -> FastAPI:
    """Return the ASGI application around a workspace.

    Parameters
    ----------
    workspace : Workspace
        Queue, reviewers and rounds, open; the application closes none of them.
    """
    app = FastAPI(title="Guard review", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.workspace = workspace
    app.state.login_limit = LoginLimit(workspace.settings.failed_logins)
    app.add_middleware(BodyLimit, large={admin.IMPORT_PATH: workspace.settings.max_upload_bytes})
    names = (*LOOPBACK, *workspace.settings.allowed_hosts)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[f"[{name}]" if ":" in name else name for name in names])
    app.add_middleware(SecurityHeaders)
    app.mount("/static", StaticFiles(directory=Path(STATIC)), name="static")
    for room in (signing_in, pages, groups, images, page, admin, api):
        app.include_router(room.router)
    app.include_router(api.open_router)
    app.add_exception_handler(NotSignedInError, _not_signed_in)
    app.add_exception_handler(TooManyAttemptsError, _refused)
    app.add_exception_handler(ForbiddenError, _refused)
    app.add_exception_handler(GuardError, _refused)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _refused)
    return app


def _not_signed_in(request: Request, error: Exception) -> Response:
    if _is_program(request):
        return JSONResponse(
            {"error": "send the header 'Authorization: Bearer TOKEN' with the token of a reviewer."},
            status_code=401,
            headers={"WWW-Authenticate": "Bearer"},
        )
    if request.headers.get("hx-request"):
        return Response(status_code=401, headers={"HX-Redirect": "/login"})
    if request.url.path.startswith("/images/"):
        return Response(status_code=401)
    return RedirectResponse("/login", status_code=303)


def _refused(request: Request, error: Exception) -> Response:
    status, text, headers = _reply_to(error)
    text = text.encode("utf-8", "backslashreplace").decode()  # it may name what a client sent: half a character
    if _is_program(request):
        return JSONResponse({"error": text}, status_code=status, headers=headers)
    if request.url.path.startswith("/images/") and not request.headers.get("hx-request"):
        return PlainTextResponse(text, status_code=status, headers=headers)
    template = "_notice.html" if request.headers.get("hx-request") else "error.html"
    return render(request, template, {"text": text, "is_error": True}, status=status, headers=headers)


def _reply_to(error: Exception) -> tuple[int, str, dict[str, str]]:
    """Status, one line, and headers for an error that a person or program is to see."""
    if isinstance(error, TooManyAttemptsError):
        return 429, str(error), {"Retry-After": str(error.retry_after)}
    if isinstance(error, ForbiddenError):
        return 403, str(error), {}
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return 422, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}.", {}
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), dict(error.headers or {})
    status = next((status for kind, status in _STATUS if isinstance(error, kind)), 400)
    return status, str(error), {"Retry-After": "5"} if status == 503 else {}


def _is_program(request: Request) -> bool:
    return request.url.path.startswith(("/api/", "/healthz"))
