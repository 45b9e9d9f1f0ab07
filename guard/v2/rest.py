"""The REST half of the open inference protocol, as an ASGI application."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from importlib.metadata import version
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from guard.v2.batching import OverloadedError
from guard.v2.description import describe
from guard.v2.models import VERSION, Inferred, ServedModel
from guard.v2.protocol import InferRequest, ProtocolError, read_request, write_response

logger = logging.getLogger(__name__)

SERVER = "backdoor-guard"
JSON_BYTES = "Inference-Header-Content-Length"
_OPEN = (b"/v2/health/live", b"/v2/health/ready")
RETRY_AFTER_S = 1
_SHORT_BYTES = 64 << 10
_Result = TypeVar("_Result")


class Models(Protocol):
    """Models that are lent for one request each: they may be opened when they are asked for, and closed between."""

    def names(self) -> Collection[str]:
        """Return the names of all models, open or not."""

    def lent(self, name: str) -> AbstractAsyncContextManager[ServedModel]:
        """Lend a model of this name; it stays open inside the block.

        Raises
        ------
        OverloadedError
            If it cannot be opened now.
        """


class OpenModels:
    """Models that are all open, as long as the application is.

    Parameters
    ----------
    models : mapping of str to ServedModel
        By name.
    """

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = models

    def names(self) -> Collection[str]:
        """Return the names of all models."""
        return self._models.keys()

    @asynccontextmanager
    async def lent(self, name: str) -> AsyncIterator[ServedModel]:
        """Lend a model."""
        yield self._models[name]


def create_app(
    models: Mapping[str, ServedModel] | Models,
    *,
    key: str | None = None,
    max_body_bytes: int = 64 << 20,
    max_json_bytes: int = 8 << 20,
    max_held_bytes: int = 256 << 20,
    body_timeout_s: float = 30.0,
) -> FastAPI:
    """Return the application.

    Parameters
    ----------
    models : mapping of str to ServedModel, or Models
        By name; the application closes none of them.
    key : str, optional
        What callers must send as `Authorization: Bearer KEY`, but for health; None asks for nothing.
    max_body_bytes : int
        Larger bodies are refused with status 413 before they are held in memory.
    max_json_bytes : int
        Of a body that is JSON, and of the JSON before binary tensors: reading it holds up all others.
    max_held_bytes : int
        Of all bodies together; what comes beyond is refused with status 503.
    body_timeout_s : float
        Seconds until a body must be there; then status 408.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    description = describe("Backdoor Guard, open inference protocol", version(SERVER), has_key=key is not None)
    bodies = Bodies(max_body_bytes, max_held_bytes, body_timeout_s)

    if key is not None:
        app.add_middleware(KeyCheck, key=key)

    @app.exception_handler(ProtocolError)
    async def breaks_protocol(_request: Request, error: ProtocolError) -> Response:
        return error_response(error.status, str(error))

    @app.exception_handler(OverloadedError)
    async def is_overloaded(_request: Request, error: OverloadedError) -> Response:
        return error_response(503, str(error), {"Retry-After": str(RETRY_AFTER_S)})

    @app.exception_handler(HTTPException)
    async def not_there(_request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, str(error.detail), dict(error.headers or {}))

    shelf: Models = OpenModels(models) if isinstance(models, Mapping) else models

    def checked(name: str, asked_version: str | None = None) -> str:
        if name not in shelf.names():
            raise ProtocolError(f"there is no model {name[:80]!r}; served are {', '.join(sorted(shelf.names()))}.", 404)
        if asked_version not in (None, VERSION):
            raise ProtocolError(f"model {name!r} has version {VERSION} alone, not {str(asked_version)[:20]!r}.", 404)
        return name

    async def refuse(name: str, status: int, headers: Mapping[str, str]) -> None:
        async with shelf.lent(name) as model:
            model.refuse(status, headers)

    @app.get("/openapi.json")
    async def describe_routes() -> dict[str, object]:
        return description

    @app.get("/v2/health/live")
    async def is_live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def is_ready() -> dict[str, bool]:
        return {"ready": True}  # models are loaded before the port opens

    @app.get("/v2")
    async def about_server() -> dict[str, object]:
        return {"name": SERVER, "version": version(SERVER), "extensions": ["binary_tensor_data"]}

    @app.get("/v2/models/{name}")
    @app.get("/v2/models/{name}/versions/{asked}")
    async def about_model(name: str, asked: str | None = None) -> dict[str, object]:
        async with shelf.lent(checked(name, asked)) as model:
            return model.metadata()

    @app.get("/v2/models/{name}/ready")
    @app.get("/v2/models/{name}/versions/{asked}/ready")
    async def is_model_ready(name: str, asked: str | None = None) -> dict[str, object]:
        async with shelf.lent(checked(name, asked)):
            return {"name": name, "ready": True}

    @app.post("/v2/models/{name}/infer")
    @app.post("/v2/models/{name}/versions/{asked}/infer")
    async def infer(request: Request, name: str, asked: str | None = None) -> Response:
        checked(name, asked)
        try:
            async with bodies.held(request) as body:
                wanted = await wanted_of(body, request.headers, max_json_bytes)
                async with shelf.lent(name) as model:
                    found = await model.infer(wanted, request.headers)
        except ProtocolError as error:
            await refuse(name, error.status, request.headers)
            raise
        except ClientDisconnect:
            await refuse(name, 400, request.headers)
            return error_response(400, "the body ended before it was whole.")  # to nobody
        except OverloadedError:
            raise
        except Exception as error:
            logger.error("a request could not be answered: %s", type(error).__name__)  # no content of requests in logs
            await refuse(name, 500, request.headers)
            return error_response(500, "the server failed on this request.")
        return await written(found)

    return app


class KeyCheck:
    """Lets nobody through who has no key, but to health; no `BaseHTTPMiddleware`, which costs half a request."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope.get("raw_path", scope["path"].encode()) not in _OPEN:
            scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self._key):
                text = "a key is needed: Authorization: Bearer KEY."
                await error_response(401, text, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def wanted_of(body: bytes, headers: Mapping[str, str], max_json_bytes: int) -> InferRequest:
    """Read the body of an inference request; ProtocolError if it breaks the protocol, or its JSON is too long."""
    json_bytes = json_bytes_of(headers)
    if (size := len(body) if json_bytes is None else min(json_bytes, len(body))) > max_json_bytes:
        raise ProtocolError(f"JSON must have at most {max_json_bytes} bytes, got {size}. Send binary data.", 413)
    return await off_loop(len(body), read_request, body, json_bytes)


async def written(found: Inferred) -> Response:
    """Return what an inference request is answered with."""
    if found.response is None:
        return error_response(found.status, found.error, found.headers)
    n_numbers = sum(array.size for array in found.response.outputs.values())
    payload, written_json = await off_loop(8 * n_numbers, write_response, found.response)
    if written_json is None:
        return Response(payload, headers=found.headers, media_type="application/json")
    headers = {**found.headers, JSON_BYTES: str(written_json)}
    return Response(payload, headers=headers, media_type="application/octet-stream")


async def off_loop(n_bytes: int, work: Callable[..., _Result], *arguments: Any) -> _Result:
    """Do work on so many bytes: at once if it is short, else in a thread, so that others are answered meanwhile."""
    if n_bytes <= _SHORT_BYTES:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


class Bodies:
    """Bodies of requests in memory, each and all together bounded."""

    def __init__(self, most_each: int, most_held: int, timeout_s: float) -> None:
        self._most_each, self._most_held, self._timeout_s = most_each, most_held, timeout_s
        self._held = 0

    @asynccontextmanager
    async def held(self, request: Request) -> AsyncIterator[bytes]:
        """Read the body of a request, and count it as long as the block lasts.

        Raises
        ------
        ProtocolError
            With status 413 as soon as it is too large, 408 if it does not come in time, or 415 if it is packed.
        OverloadedError
            If all bodies together are too large.
        """
        encoding = request.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ProtocolError(f"bodies must come as they are, without content-encoding {encoding[:40]!r}.", 415)
        announced = request.headers.get("content-length", "0")
        if announced.isdecimal() and int(announced[:20]) > self._most_each:
            raise self._too_large
        async with self.collected(request.stream()) as body:
            yield body

    @asynccontextmanager
    async def collected(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """Put the parts of a body together, and count it as long as the block lasts; raises as `held` does."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self._timeout_s):
                async for part in stream:
                    size += len(part)
                    self._held += len(part)
                    if size > self._most_each:
                        raise self._too_large
                    if self._held > self._most_held:
                        raise OverloadedError("too many bytes are held already. Try again later.")
                    parts.append(part)
        except TimeoutError:
            self._held -= size
            raise ProtocolError(f"the body must be whole within {self._timeout_s:g} s.", 408) from None
        except BaseException:
            self._held -= size
            raise
        try:
            yield b"".join(parts)
        finally:
            self._held -= size

    @property
    def _too_large(self) -> ProtocolError:
        return ProtocolError(f"the body must have at most {self._most_each} bytes.", 413)


def json_bytes_of(headers: Mapping[str, str]) -> int | None:
    """Return how many bytes of a body are JSON, where binary tensors follow; ProtocolError if that is no number.

    Parameters
    ----------
    headers : mapping of str to str
        By names in lower case, or in any.
    """
    text = headers.get(JSON_BYTES.lower())
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 12):
        raise ProtocolError(f"{JSON_BYTES} must be a number of bytes, got {text[:40]!r}.")
    return int(text)


def error_response(status: int, message: str, headers: Mapping[str, str] | None = None) -> Response:
    """Return an error in the protocol's form."""
    text = json.dumps({"error": message})  # in ASCII: a text of JSON may hold what UTF-8 cannot
    return Response(text, status, headers=dict(headers or {}), media_type="application/json")
