"""What every answer carries, and how large a request may be: two small ASGI layers around the page."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: No script, style, picture or form of anybody else; nothing inline; in nobody's frame.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
#: Bytes of a request that carries no file.
SMALL_REQUEST = 2**20
#: Digits of a stated length; Python refuses to read a number of thousands.
_LONGEST_LENGTH = 19


class SecurityHeaders:
    """Adds `SECURITY_HEADERS` to every answer, and keeps it out of caches unless it says otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        await self._app(scope, receive, send_with_headers)


class BodyLimit:
    """Refuses a request whose body is too large, whether it says so or not.

    Parameters
    ----------
    large : dict of str to int
        Bytes allowed per path; `SMALL_REQUEST` for all others.
    """

    def __init__(self, app: ASGIApp, large: dict[str, int]) -> None:
        self._app = app
        self._large = large

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        allowed = self._large.get(scope["path"], SMALL_REQUEST)
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or len(stated) > _LONGEST_LENGTH or int(stated) > allowed:
            await self._refuse(allowed)(scope, receive, send)
            return
        seen, answered = 0, False

        async def counted_receive() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > allowed:
                raise _TooLarge
            return message

        async def watched_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, counted_receive, watched_send)
        except _TooLarge:
            if not answered:
                await self._refuse(allowed)(scope, receive, send)

    def _refuse(self, allowed: int) -> PlainTextResponse:
        return PlainTextResponse(f"The request is larger than the {allowed} bytes allowed.\n", status_code=413)


class _TooLarge(Exception):  # noqa: N818
    pass
