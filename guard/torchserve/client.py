"""A client for predictions of a server on loopback: one request, or a bounded load from keep-alive connections."""

from __future__ import annotations

import http.client
import ipaddress
import itertools
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote, urlsplit

from guard.errors import ServerError

#: Status of a reply that never came: refused, cut off, or too late. `Reply.error` says which.
NO_REPLY = 0

_LARGEST_REPLY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back for one request.

    Attributes
    ----------
    status : int
        HTTP status, or 0 (`NO_REPLY`) if no whole answer came.
    body : bytes
        The answer's body.
    headers : mapping of str to str
        The answer's headers, names in lower case.
    seconds : float
        From the first byte sent to the last byte received.
    error : str
        Why there is no answer; empty if there is one.
    """

    status: int
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    error: str = ""


class Client:
    """One keep-alive connection to a server on this machine; not to be shared between threads.

    Parameters
    ----------
    url : str
        Such as `http://127.0.0.1:8080`. Anything but loopback is refused: requests carry a token in clear.
    token : str, optional
        Key for the `Authorization` header.
    timeout_seconds : float
        Longest wait for the connection, and for each next part of an answer.

    Raises
    ------
    ServerError
        If the address is not plain HTTP on loopback.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_seconds: float = 30.0) -> None:
        self._connection = http.client.HTTPConnection(*_loopback_address(url), timeout=timeout_seconds)
        self._headers = {"Authorization": f"Bearer {_checked(token)}"} if token else {}

    def predict(
        self,
        model: str,
        body: bytes | str,
        *,
        content_type: str = "application/octet-stream",
        request_id: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Ask a model for one prediction.

        Parameters
        ----------
        model : str
            Name of a served model.
        body : bytes or str
            The request's body, such as the bytes of a PNG; text is sent as UTF-8.
        content_type : str
            `application/json` lets the server parse the body, `text/plain` decode it.
        request_id : str, optional
            Sent as `X-Request-Id`.
        headers : mapping of str to str, optional
            Further headers.

        Returns
        -------
        reply : Reply
            Never raises for what the network or the server does: such a reply has status 0 and an `error`.
        """
        more = {"Content-Type": content_type, **(headers or {})}
        if request_id is not None:
            more["X-Request-Id"] = request_id
        return self.request("POST", f"/predictions/{quote(model, safe='')}", body, headers=more)

    def request(
        self, method: str, path: str, body: bytes | str = b"", *, headers: Mapping[str, str] | None = None
    ) -> Reply:
        """Send any request and read the answer; failures become replies with status 0, as in `predict`.

        Nothing is sent twice, so that what the server counts can be compared with what was sent.
        """
        payload = body.encode() if isinstance(body, str) else body
        sent = {**self._headers, **(headers or {}), "Content-Length": str(len(payload))}
        for name, value in sent.items():
            _checked(name + value)
        start = time.perf_counter()
        try:
            self._connection.request(method, path, payload, sent)
            answer = self._connection.getresponse()
            if answer.length is None and not answer.chunked:
                raise ValueError("the answer has no Content-Length, which TorchServe always sends")
            if answer.length is not None and answer.length > _LARGEST_REPLY_BYTES:
                raise ValueError(f"the answer has {answer.length} bytes, at most {_LARGEST_REPLY_BYTES} are read")
            content = answer.read(_LARGEST_REPLY_BYTES)
        except (OSError, ValueError, http.client.HTTPException) as error:
            self.close()
            text = str(error) or type(error).__name__
            return Reply(NO_REPLY, seconds=time.perf_counter() - start, error=text)
        seconds = time.perf_counter() - start
        received = {name.lower(): value.strip() for name, value in answer.getheaders()}
        return Reply(answer.status, content, received, seconds)

    def close(self) -> None:
        """Close the connection; the next request opens a new one."""
        self._connection.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def predict(
    url: str,
    model: str,
    body: bytes | str,
    *,
    token: str | None = None,
    content_type: str = "application/octet-stream",
    request_id: str | None = None,
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 30.0,
) -> Reply:
    """Ask for one prediction over a connection of its own; see `Client.predict`."""
    with Client(url, token=token, timeout_seconds=timeout_seconds) as client:
        return client.predict(model, body, content_type=content_type, request_id=request_id, headers=headers)


def run_load(
    url: str,
    model: str | Sequence[str],
    bodies: Sequence[bytes | str],
    *,
    token: str | None = None,
    clients: int = 1,
    content_type: str = "application/octet-stream",
    headers: Mapping[str, str] | None = None,
    timeout_seconds: float = 30.0,
    limit_seconds: float = 600.0,
    client_class: type[Client] = Client,
) -> list[Reply]:
    """Send every body once, from a fixed number of threads with one keep-alive connection each.

    Parameters
    ----------
    url : str
        Inference address on loopback.
    model : str or sequence of str
        One model for all bodies, or one per body: so that two models can be measured interleaved.
    bodies : sequence of bytes or str
        One request each.
    token, content_type, headers, timeout_seconds
        As for `Client`.
    clients : int
        Requests under way at the same time.
    limit_seconds : float
        No request starts after this time; those left over get status 0.
    client_class : type
        What each thread sends with.

    Returns
    -------
    replies : list of Reply
        One per body, in the order of `bodies`, also for requests that failed.
    """
    if clients < 1:
        raise ServerError(f"clients must be >= 1, got {clients}.")
    models = [model] * len(bodies) if isinstance(model, str) else list(model)
    if len(models) != len(bodies):
        raise ServerError(f"models must be one, or one per body: got {len(models)} for {len(bodies)} bodies.")
    Client(url, token=token)  # a bad address or token is told here, once, and not by every thread
    for name, value in {"Content-Type": content_type, **(headers or {})}.items():
        _checked(name + value)
    replies: list[Reply] = [Reply(NO_REPLY, error="not sent before the time limit")] * len(bodies)
    turns = itertools.count()  # next() on it is atomic
    deadline = time.monotonic() + limit_seconds

    def work() -> None:
        with client_class(url, token=token, timeout_seconds=timeout_seconds) as client:
            while (turn := next(turns)) < len(bodies) and time.monotonic() < deadline:
                replies[turn] = client.predict(models[turn], bodies[turn], content_type=content_type, headers=headers)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(clients, len(bodies)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def _loopback_address(url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback or parts.scheme != "http":
        raise ServerError(
            f"the server's address must be plain http on loopback, got {url!r}. Try http://127.0.0.1:8080."
        )
    return host, port


def _checked(text: str) -> str:
    if "\r" in text or "\n" in text:
        raise ServerError("a header must not hold a line break.")
    return text


def curl_line(url: str, model: str, token: str | None, file: str = "image.png") -> str:
    """Return a command that asks for one prediction and shows the verdict's headers."""
    key = f' -H "Authorization: Bearer {token}"' if token else ""
    return f"curl -i{key} {url}/predictions/{model} -T {file}"
