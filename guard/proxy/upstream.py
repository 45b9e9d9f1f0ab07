"""The server behind the proxy: a pool of connections, and requests that leave as they came."""

from __future__ import annotations

import asyncio
import io
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass

import aiohttp
from yarl import URL

from guard.errors import ConfigError, GuardError

Headers = list[tuple[bytes, bytes]]
#: Headers of one connection, not of a request; and those that are written anew for the next one.
_OF_A_CONNECTION = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer transfer-encoding "
    b"upgrade expect http2-settings".split()
)
#: Idle connections are closed before servers close theirs (uvicorn: after 5 s), as a request may be on its way then.
_KEPT_IDLE_S = 4.0
_MOST_WHOLE = 1 << 20
_LARGE = 1 << 18
_LEAST_BYTES_PER_S = 1 << 20  # that a server must take
_TARGET = re.compile(rb"/[\x21\x22\x24-\x7e]*")  # no #


class UpstreamError(GuardError):
    """The server behind the proxy gave no answer that can be used; carries the HTTP status for the client."""

    def __init__(self, message: str, status: int = 502) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Whole:
    """A short answer."""

    status: int
    headers: Sequence[tuple[bytes, bytes]]
    body: bytes


class Upstream:
    """One server, asked over kept connections. Open it in the event loop that uses it.

    Parameters
    ----------
    url : str
        `http://` or `https://`, with a path if the server's routes are below one.
    connect_timeout_s, timeout_s : float
        Seconds until there is a connection, and without any byte of an answer after that.
    connections : int
        The most at once.

    Raises
    ------
    ConfigError
        If the URL is none.
    """

    def __init__(self, url: str, *, connect_timeout_s: float = 5.0, timeout_s: float = 30.0, connections: int = 64):
        try:
            self._url = URL(url)
            is_sound = self._url.scheme in ("http", "https") and bool(self._url.host) and self._url.port is not None
        except ValueError:
            is_sound = False
        if not is_sound or self._url.query_string or self._url.fragment or self._url.user:
            raise ConfigError("--upstream must be http://HOST:PORT or https://HOST:PORT, perhaps with a path.")
        self._origin, self._prefix = str(self._url.origin()), self._url.raw_path.rstrip("/")
        self.timeout_s = timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=None, connect=connect_timeout_s + timeout_s, sock_connect=connect_timeout_s, sock_read=timeout_s
        )
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Upstream:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=_KEPT_IDLE_S),
            timeout=self._timeout,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._session is not None
        await self._session.close()

    @asynccontextmanager
    async def request(
        self,
        method: str,
        path: bytes,
        query: bytes = b"",
        headers: Iterable[tuple[bytes, bytes]] = (),
        body: bytes | AsyncIterator[bytes] | None = None,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send one request, and yield the answer when its headers are there; redirections are not followed.

        Parameters
        ----------
        method : str
        path, query : bytes
            As they stand in a request, quoted.
        headers : iterable of (bytes, bytes)
            Without those of a connection, see `passed_on`.
        body : bytes or async iterator of bytes, optional

        Raises
        ------
        UpstreamError
            With status 400 if the request cannot be passed on, 502 if the server cannot be reached or breaks off, 504
            if it is too slow.
        """
        if not _TARGET.fullmatch(path) or not _TARGET.fullmatch(b"/" + query):
            raise UpstreamError("the target of a request must begin with / and be ASCII.", 400)
        target = (path + (b"?" + query if query else b"")).decode()
        url = URL(f"{self._origin}{self._prefix}{target}", encoded=True)  # as it is: dots and slashes, too
        try:
            texts = [(name.decode("ascii"), value.decode()) for name, value in headers]
        except UnicodeDecodeError:
            raise UpstreamError("headers must be UTF-8.", 400) from None
        data = io.BytesIO(body) if isinstance(body, bytes) and len(body) > _LARGE else body  # written in parts
        assert self._session is not None
        size = len(body) if isinstance(body, bytes) else 0
        with _told(self.timeout_s):
            async with asyncio.timeout(self.timeout_s + size / _LEAST_BYTES_PER_S) as limit:  # none of aiohttp's yet
                sent = data if isinstance(data, bytes | io.BytesIO | None) else self._prolonging(data, limit)
                response = await self._session.request(method, url, headers=texts, data=sent, allow_redirects=False)
        try:
            yield response
        finally:
            response.release()  # closes the connection if something of the answer is left

    async def _prolonging(self, body: AsyncIterator[bytes], limit: asyncio.Timeout) -> AsyncIterator[bytes]:
        """Yield parts as the server takes them; each gives it more time, until its answer is there."""
        async for part in body:
            with suppress(RuntimeError):  # the answer is there, and the limit over
                limit.reschedule(asyncio.get_running_loop().time() + 2 * self.timeout_s)
            yield part

    async def parts(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        """Yield an answer's body as it comes, as it is; UpstreamError if it breaks off."""
        with _told(self.timeout_s):
            async for part in response.content.iter_any():
                yield part

    async def whole(self, method: str, path: str, body: bytes | None = None, headers: Headers | None = None) -> Whole:
        """Return a short answer; UpstreamError if there is none."""
        async with self.request(method, path.encode(), headers=headers or (), body=body) as response:
            parts = []
            with _told(self.timeout_s):
                async with asyncio.timeout(self.timeout_s):
                    async for part in self.parts(response):
                        parts.append(part)
                        if sum(map(len, parts)) > _MOST_WHOLE:
                            raise UpstreamError("the upstream's answer is too long.")
            return Whole(response.status, response.raw_headers, b"".join(parts))


@contextmanager
def _told(timeout_s: float) -> Iterator[None]:
    """Say in one line, and without addresses, why a server gave no answer."""
    try:
        yield
    except TimeoutError as error:  # aiohttp's are of this kind, too
        raise UpstreamError(f"the upstream did not answer within {timeout_s:g} s.", 504) from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamError(f"the upstream cannot be reached, or broke off: {type(error).__name__}.") from error
    except ValueError as error:  # what no HTTP message can hold
        raise UpstreamError("the request cannot be passed on.", 400) from error


def passed_on(headers: Iterable[tuple[bytes, bytes]], *without: bytes) -> Headers:
    """Return the headers that belong to a message and not to its connection, as they came, without some more.

    Parameters
    ----------
    headers : iterable of (bytes, bytes)
    *without : bytes
        Names in lower case; one that ends with * stands for all that begin so.
    """
    pairs = list(headers)
    named = {
        part.strip().lower() for name, value in pairs if name.lower() == b"connection" for part in value.split(b",")
    }
    starts = tuple(name[:-1] for name in without if name.endswith(b"*"))
    out = _OF_A_CONNECTION | named | frozenset(without)
    return [
        (name, value)
        for name, value in pairs
        if (lower := name.lower()) not in out and not (starts and lower.startswith(starts))
    ]


def has_body(headers: Iterable[tuple[bytes, bytes]]) -> bool:
    """Return whether a request has a body.

    Raises
    ------
    UpstreamError
        With status 400 where two servers could read different requests from the same bytes: several lengths, a length
        beside a transfer coding, or a coding that is not `chunked` alone.
    """
    found: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        found.setdefault(name.lower(), []).append(value.strip())
    lengths, codings = found.get(b"content-length", []), found.get(b"transfer-encoding", [])
    is_plain = len(lengths) <= 1 and all(re.fullmatch(rb"[0-9]{1,18}", length) for length in lengths)
    if not is_plain or (lengths and codings) or (codings and [coding.lower() for coding in codings] != [b"chunked"]):
        raise UpstreamError("the length of the body is ambiguous.", 400)
    return bool(codings) or bool(lengths)
