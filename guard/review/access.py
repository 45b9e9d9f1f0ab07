"""Who is asking: sessions of people, tokens of programs, the limit on failed log-ins, and forged requests refused."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from fastapi import Depends, Request
from pydantic import AfterValidator, Field
from python_multipart.multipart import parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException

from guard.relabel.reviewers import Reviewer
from guard.review.workspace import MOST, Workspace

#: Over https the prefix keeps other hosts and plain http from planting a session of theirs.
COOKIE, SECURE_COOKIE = "guard_session", "__Host-guard_session"
#: Keys that the limit remembers, and characters of each; beyond, the oldest are forgotten.
_REMEMBERED, _LONGEST_KEY = 10_000, 200


class NotSignedInError(Exception):
    """Nobody is logged in, or the token is none."""


class ForbiddenError(Exception):
    """The request is forged, or the role does not allow it; the text is for the person who asks."""


class TooManyAttemptsError(Exception):
    """Too many failed log-ins; `retry_after` is in seconds."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"too many failed log-ins. Try again in {retry_after} s.")
        self.retry_after = retry_after


class LoginLimit:
    """Counts failed log-ins by key (an address and a name) over the last minute.

    Only who fails is told to wait: a right token, 256 random bits that nobody guesses, is never locked out by what
    others try under the same name or from the same address.

    Parameters
    ----------
    failures : int
        Allowed per key within `window_s`.
    window_s : float
        Seconds after which a failure is forgotten.
    clock : callable
        Seconds that only grow.
    """

    def __init__(self, failures: int, window_s: float = 60.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._allowed = failures
        self._window = window_s
        self._clock = clock
        self._failed: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def failed(self, key: str) -> None:
        """Count one failure.

        Raises
        ------
        TooManyAttemptsError
            If the key had used up its failures before.
        """
        now, key = self._clock(), key[:_LONGEST_KEY]
        with self._lock:
            times = self._failed.setdefault(key, deque(maxlen=self._allowed))
            self._failed.move_to_end(key)
            while len(self._failed) > _REMEMBERED:
                self._failed.popitem(last=False)
            while times and times[0] <= now - self._window:
                times.popleft()
            if len(times) >= self._allowed:
                raise TooManyAttemptsError(max(1, round(times[0] + self._window - now)))
            times.append(now)


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who is logged in on the page.

    Attributes
    ----------
    reviewer : Reviewer
    csrf_token : str
        What forms and scripts of this session send back; made from the session's secret, which it does not reveal.
    """

    reviewer: Reviewer
    csrf_token: str

    @property
    def name(self) -> str:
        """Name of the reviewer."""
        return self.reviewer.name

    @property
    def is_admin(self) -> bool:
        """True for the role admin."""
        return self.reviewer.role == "admin"


@dataclass(frozen=True, slots=True)
class Posted:
    """A form of somebody who is logged in, sent from our own page."""

    session: Session
    form: FormData

    def text(self, name: str, default: str = "") -> str:
        """Return a field's text."""
        value = self.form.get(name, default)
        return value if isinstance(value, str) else default


def workspace_of(request: Request) -> Workspace:
    """Return what the application works with."""
    workspace: Workspace = request.app.state.workspace
    return workspace


def limit_of(request: Request) -> LoginLimit:
    """Return the application's limit on failed log-ins."""
    limit: LoginLimit = request.app.state.login_limit
    return limit


def address_of(request: Request) -> str:
    """Return the address that a request came from."""
    return f"address {request.client.host if request.client else '?'}"


def cookie_name(request: Request) -> str:
    """Return the name of the session's cookie."""
    return SECURE_COOKIE if request.url.scheme == "https" else COOKIE


def csrf_token(secret: str) -> str:
    """Return the token that goes with a session's secret."""
    return hashlib.sha256(f"guard review form {secret}".encode()).hexdigest()


def session_of(request: Request) -> Session:
    """Return the session that the cookie names.

    Raises
    ------
    NotSignedInError
        If there is none, or it has ended.
    """
    secret = request.cookies.get(cookie_name(request), "")
    reviewer = workspace_of(request).reviewers.find_session(secret) if secret else None
    if reviewer is None:
        raise NotSignedInError
    return Session(reviewer, csrf_token(secret))


def refuse_other_sites(request: Request) -> None:
    """Raise ForbiddenError if a browser says that another site sent this request."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ForbiddenError("this request came from another site.")
    origin = request.headers.get("origin")
    if origin is not None and _host_of(origin) != request.headers.get("host"):
        raise ForbiddenError("this request came from another site.")


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # half an IPv6 address
        return None


async def read_form(request: Request, *, max_files: int, max_fields: int) -> FormData:
    """Return a form in UTF-8, as browsers send it.

    Raises
    ------
    HTTPException
        400, if it says that it is in another encoding, or is no form.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise HTTPException(400, "a form must be in UTF-8.")
    return await request.form(max_files=max_files, max_fields=max_fields)


async def posted_form(request: Request) -> AsyncIterator[Posted]:
    """Yield a form together with who sent it, after the check that our own page did.

    Raises
    ------
    NotSignedInError, ForbiddenError
        If nobody is logged in, or the form does not carry the session's token.
    """
    refuse_other_sites(request)
    session = await run_in_threadpool(session_of, request)
    form = await read_form(request, max_files=1, max_fields=2000)
    try:
        sent = request.headers.get("x-csrf-token") or form.get("csrf")
        if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(), session.csrf_token.encode()):
            raise ForbiddenError("the form has no valid token. Reload the page and try again.")
        yield Posted(session, form)
    finally:
        await form.close()  # an uploaded file is a temporary one


def bearer(request: Request) -> Reviewer:
    """Return whose token a program sent.

    Raises
    ------
    NotSignedInError, TooManyAttemptsError
        If it sent none, a wrong one, or too many wrong ones.
    """
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        raise NotSignedInError
    reviewer = workspace_of(request).reviewers.check_token(token.strip())
    if reviewer is None:  # a good token passes, whatever others at that address have tried
        limit_of(request).failed(address_of(request))
        raise NotSignedInError
    return reviewer


def need_admin(role: str) -> None:
    """Raise ForbiddenError unless the role is admin."""
    if role != "admin":
        _forbid("only an admin may do this.")


def _forbid(text: str) -> NoReturn:
    raise ForbiddenError(text)


def _whole_characters(text: str) -> str:
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must be text without NUL and half characters (surrogates)")
    return text


#: A number of a row, as the database takes it; of a query, a path or JSON.
Number = Annotated[int, Field(ge=-MOST, le=MOST)]
#: A text that the database takes.
Text = Annotated[str, AfterValidator(_whole_characters)]
SignedIn = Annotated[Session, Depends(session_of)]
Form = Annotated[Posted, Depends(posted_form)]
Program = Annotated[Reviewer, Depends(bearer)]
TheWorkspace = Annotated[Workspace, Depends(workspace_of)]
