"""Who is asking: sessions of people, tokens of programs, the limit on failed log-ins, and forged requests refused."""

from __future__ import annotations

import hashlib
import hmac
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NoReturn
from urllib.parse import urlsplit

from fastapi import Depends, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData

from guard.relabel.reviewers import Reviewer
from guard.review.desk import Desk

COOKIE = "guard_session"
#: Names of one kind that the limit remembers; beyond, the oldest are forgotten.
_REMEMBERED = 10_000


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
    """Counts failed log-ins by key (an address, a name) over the last minute.

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

    def check(self, *keys: str) -> None:
        """Raise TooManyAttemptsError if any of the keys has used up its failures."""
        now = self._clock()
        with self._lock:
            for key in keys:
                times = self._failed.get(key, deque())
                while times and times[0] <= now - self._window:
                    times.popleft()
                if len(times) >= self._allowed:
                    raise TooManyAttemptsError(max(1, round(times[0] + self._window - now)))

    def failed(self, *keys: str) -> None:
        """Count one failure for each key."""
        with self._lock:
            for key in keys:
                self._failed.setdefault(key, deque(maxlen=self._allowed)).append(self._clock())
                self._failed.move_to_end(key)
            while len(self._failed) > _REMEMBERED:
                self._failed.popitem(last=False)


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


def desk_of(request: Request) -> Desk:
    """Return what the application works with."""
    desk: Desk = request.app.state.desk
    return desk


def limit_of(request: Request) -> LoginLimit:
    """Return the application's limit on failed log-ins."""
    limit: LoginLimit = request.app.state.login_limit
    return limit


def address_of(request: Request) -> str:
    """Return the address that a request came from."""
    return f"address {request.client.host if request.client else '?'}"


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
    secret = request.cookies.get(COOKIE, "")
    reviewer = desk_of(request).reviewers.find_session(secret) if secret else None
    if reviewer is None:
        raise NotSignedInError
    return Session(reviewer, csrf_token(secret))


def refuse_other_sites(request: Request) -> None:
    """Raise ForbiddenError if a browser says that another site sent this request."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise ForbiddenError("this request came from another site.")
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise ForbiddenError("this request came from another site.")


async def posted_form(request: Request) -> Posted:
    """Return a form together with who sent it, after the check that our own page did.

    Raises
    ------
    NotSignedInError, ForbiddenError
        If nobody is logged in, or the form does not carry the session's token.
    """
    refuse_other_sites(request)
    session = await run_in_threadpool(session_of, request)
    form = await request.form(max_files=1, max_fields=2000)
    sent = request.headers.get("x-csrf-token") or form.get("csrf")
    if not isinstance(sent, str) or not hmac.compare_digest(sent.encode(), session.csrf_token.encode()):
        raise ForbiddenError("the form has no valid token. Reload the page and try again.")
    return Posted(session, form)


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
    reviewer = desk_of(request).reviewers.check_token(token.strip())
    if reviewer is None:  # a good token passes, whatever others at that address have tried
        limit_of(request).check(address_of(request))
        limit_of(request).failed(address_of(request))
        raise NotSignedInError
    return reviewer


def need_admin(role: str) -> None:
    """Raise ForbiddenError unless the role is admin."""
    if role != "admin":
        _forbid("only an admin may do this.")


def _forbid(text: str) -> NoReturn:
    raise ForbiddenError(text)


SignedIn = Annotated[Session, Depends(session_of)]
Form = Annotated[Posted, Depends(posted_form)]
Program = Annotated[Reviewer, Depends(bearer)]
TheDesk = Annotated[Desk, Depends(desk_of)]
