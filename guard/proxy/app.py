"""The proxy as an ASGI application: inference by the guarded model is judged, everything else goes through."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from uuid import uuid4

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from guard.proxy.model import Proxied, ProxiedModel
from guard.proxy.routes import Routes
from guard.proxy.upstream import Headers, Upstream, UpstreamError, has_body, passed_on
from guard.v2.batching import OverloadedError
from guard.v2.models import P_VALUE, VERDICT
from guard.v2.protocol import ProtocolError
from guard.v2.rest import RETRY_AFTER_S, Bodies, error_response, wanted_of, written

_Result = TypeVar("_Result")
_REFUSED = {
    "unguarded": "this route to the guarded model does not go through the guard. Use POST v2/models/NAME/infer.",
    "closed": "this route is not open.",
}


class _BrokenOff(Exception):  # noqa: N818
    """An answer that has begun cannot be ended, because the upstream or the client does not go on."""


class Proxy:
    """Stands before one server.

    Parameters
    ----------
    upstream : Upstream
        Opened and closed by whoever made it.
    model : ProxiedModel
    routes : Routes
    bodies : Bodies
        Bounds what is held of inference requests; other bodies are not held.
    known_version : str, optional
        The only one of the model, which clients may name; None: they may name none.
    max_json_bytes : int
        Of a request's JSON.
    max_requests : int
        At once, but for health; what comes beyond is refused with status 503.
    idle_timeout_s : float
        Seconds in which a client must send or take something.
    keeps_authorization : bool
        Whether the client's `Authorization` goes on; False where it is the proxy's own key.
    """

    def __init__(
        self,
        upstream: Upstream,
        model: ProxiedModel,
        routes: Routes,
        bodies: Bodies,
        *,
        known_version: str | None = None,
        max_json_bytes: int = 8 << 20,
        max_requests: int = 64,
        idle_timeout_s: float = 30.0,
        keeps_authorization: bool = True,
    ) -> None:
        self._upstream, self._model, self._routes, self._bodies = upstream, model, routes, bodies
        self._max_json_bytes, self._max_requests, self._idle_timeout_s = max_json_bytes, max_requests, idle_timeout_s
        self._dropped = () if keeps_authorization else (b"authorization",)
        self._known_version = known_version
        self._running = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        send = self._in_time(send)
        with suppress(ClientDisconnect, _BrokenOff):  # the server closes the connection of an answer that is not whole
            try:
                await self._answer(scope, receive, send)
            except (ProtocolError, UpstreamError) as error:
                await error_response(error.status, str(error))(scope, receive, send)
            except OverloadedError as error:
                later = {"Retry-After": str(RETRY_AFTER_S)}
                await error_response(503, str(error), later)(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope.get("raw_path") or scope["path"].encode()
        route = self._routes.of(path)
        has_body(scope["headers"])  # raises where that is not clear
        if route.is_health:
            if method not in ("GET", "HEAD", "OPTIONS") or has_body(scope["headers"]):  # anybody may ask
                raise ProtocolError("health is asked for with GET and without a body.", 405)
            await self._passed_through(scope, receive, send, path)
            return
        if route.kind in ("closed", "unguarded"):
            raise ProtocolError(_REFUSED[route.kind], 403)
        with self._place():
            if route.version not in (None, self._known_version):
                raise ProtocolError(f"the guard is for another version of the model, not {route.version!r}.", 404)
            if route.kind == "plain" or method == "OPTIONS":  # a browser that asks whether it may
                await self._passed_through(scope, receive, send, path)
            elif method != ("POST" if route.kind == "infer" else "GET"):
                raise ProtocolError(f"method {method[:20]!r} is not for this route.", 405)
            elif route.kind == "infer":
                response = await self._inferred(scope, receive)
                await response(scope, receive, send)
            elif route.kind == "metadata":
                response = await self._metadata(scope, path)
                await response(scope, receive, send)
            else:
                await self._passed_through(scope, receive, send, path)

    async def _inferred(self, scope: Scope, receive: Receive) -> Response:
        request, is_read = Request(scope, receive), False
        try:
            async with self._bodies.held(request) as body:
                is_read = True
                wanted = await wanted_of(body, request.headers, self._max_json_bytes)
                id = wanted.id or request.headers.get("x-request-id") or str(uuid4())
                raw = [(name, value) for name, value in scope["headers"] if name not in self._dropped]
                proxied = await _while_there(
                    _gone(receive), self._model.infer(wanted, request.headers, raw, scope["query_string"], id)
                )
        except ProtocolError as error:
            self._model.refuse(error.status, request.headers)
            raise
        except ClientDisconnect:
            if not is_read:
                self._model.refuse(400, request.headers)
            raise
        return await _written(proxied)

    async def _metadata(self, scope: Scope, path: bytes) -> Response:
        """Tell of the model as the upstream does, with the guard's outputs in place of the features."""
        headers = passed_on(scope["headers"], b"host", b"accept-encoding", *self._dropped)
        answer = await self._upstream.whole("GET", path.decode(), headers=[*headers, (b"accept-encoding", b"identity")])
        try:
            document = json.loads(answer.body)
            outputs = [entry for entry in document["outputs"] if entry["name"] not in self._model.record.features]
        except (ValueError, KeyError, TypeError, RecursionError):
            if answer.status == 200:
                raise UpstreamError("the upstream's metadata of the model cannot be read.") from None
            return _raw(answer.status, answer.body, passed_on(answer.headers, b"content-length"))
        kinds = {VERDICT: "BYTES", P_VALUE: "FP64"}
        told = [name for name in self._model.outputs_told if name in kinds]
        outputs += [{"name": name, "datatype": kinds[name], "shape": [-1]} for name in told]
        body = json.dumps({**document, "outputs": outputs}).encode()
        return _raw(answer.status, body, passed_on(answer.headers, b"content-length"))

    async def _passed_through(self, scope: Scope, receive: Receive, send: Send, path: bytes) -> None:
        """Send a request on and its answer back, part by part as they come."""
        headers = passed_on(scope["headers"], b"host", *self._dropped)
        body = _Body(receive, self._idle_timeout_s, is_there=has_body(scope["headers"]))
        is_begun = False

        async def passing() -> None:
            nonlocal is_begun
            parts = body.parts() if body.is_there else None
            async with self._upstream.request(scope["method"], path, scope["query_string"], headers, parts) as response:
                start: Message = {"type": "http.response.start", "status": response.status}
                is_begun = True
                await send({**start, "headers": passed_on(response.raw_headers)})
                async for part in self._upstream.parts(response):
                    await send({"type": "http.response.body", "body": part, "more_body": True})
                await send({"type": "http.response.body", "body": b""})

        try:
            await _while_there(body.gone(), passing())
        except UpstreamError as error:
            if is_begun:
                raise _BrokenOff from error
            raise body.fault or error from error

    @contextmanager
    def _place(self) -> Iterator[None]:
        if self._running >= self._max_requests:
            raise OverloadedError(f"{self._running} requests are on their way already. Try again later.")
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    def _in_time(self, send: Send) -> Send:
        async def sent(message: Message) -> None:
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    await send(message)
            except TimeoutError:
                raise _BrokenOff from None

        return sent


class _Body:
    """The body of a request that goes on as it comes.

    Attributes
    ----------
    is_there : bool
    fault : Exception or None
        Why it did not end.
    """

    def __init__(self, receive: Receive, idle_timeout_s: float, *, is_there: bool) -> None:
        self.is_there = is_there
        self.fault: ProtocolError | ClientDisconnect | None = None
        self._receive, self._idle_timeout_s = receive, idle_timeout_s
        self._ended = asyncio.Event()
        if not is_there:
            self._ended.set()

    async def parts(self) -> AsyncIterator[bytes]:
        """Yield it; an exception breaks the upstream's request off."""
        more = True
        while more:
            try:
                async with asyncio.timeout(self._idle_timeout_s):
                    message = await self._receive()
            except TimeoutError:
                self.fault = ProtocolError(f"the body must go on within {self._idle_timeout_s:g} s.", 408)
                raise self.fault from None
            if message["type"] == "http.disconnect":
                self.fault = ClientDisconnect()
                raise self.fault
            more = message.get("more_body", False)
            if part := message.get("body", b""):
                yield part
        self._ended.set()

    async def gone(self) -> None:
        """Return when the client has gone after it has sent everything."""
        await self._ended.wait()
        await _gone(self._receive)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _while_there(gone: Coroutine[Any, Any, None], work: Coroutine[Any, Any, _Result]) -> _Result:
    """Return what work returns; cancel it and raise ClientDisconnect as soon as its client is gone."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(gone)
    try:
        await asyncio.wait((working, watching), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in (working, watching):
            task.cancel()
        await asyncio.gather(working, watching, return_exceptions=True)


async def _written(proxied: Proxied) -> Response:
    """Return the client's answer, with the upstream's headers."""
    if proxied.found is None:
        status, kind, body = proxied.error
        return _raw(status, body, [*proxied.headers, (b"content-type", kind)])
    response = await written(proxied.found)
    known = {name for name, _ in response.raw_headers}
    response.raw_headers += [(name, value) for name, value in proxied.headers if name.lower() not in known]
    return response


def _raw(status: int, body: bytes, headers: Headers) -> Response:
    response = Response(body, status)
    response.raw_headers = [*headers, (b"content-length", str(len(body)).encode())]
    return response
