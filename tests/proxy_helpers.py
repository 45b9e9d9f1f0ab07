"""Servers in threads for tests of the proxy: an upstream that does as it is told, and a proxy before it."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn

from guard import SuspectModel
from guard.export.record import ExportRecord
from guard.processes.ports import LOOPBACK, listening_socket
from guard.proxy.model import ProxiedModel
from guard.proxy.serving import UVICORN, ProxySettings, opened_proxy
from guard.v2.heads import bounded_protocol
from guard.v2.protocol import InferResponse, datatype_of, read_request, write_response

MODEL = "/v2/models/digits"
INFER = f"{MODEL}/infer"


@contextmanager
def in_thread(app: Any, **settings: Any) -> Iterator[int]:
    """Serve an ASGI application on loopback, and yield the port."""
    with listening_socket(LOOPBACK, 0) as listening:
        listening.listen()
        usual = {"log_level": "critical", "access_log": False, "timeout_graceful_shutdown": 1}
        usual |= {"http": bounded_protocol()}
        server = uvicorn.Server(uvicorn.Config(app, **{**usual, **settings}))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield listening.getsockname()[1]
        server.should_exit = True
        thread.join()


@dataclass
class FakeUpstream:
    """An ASGI application that serves the exported model in this process, and lies where a test wants it to.

    Attributes
    ----------
    suspect : SuspectModel
    record : ExportRecord
    extensions : list of str
    lie : callable, optional
        Changes the outputs before they are sent.
    instead : callable, optional
        Answers inference in its place.
    seen : list of (str, bytes, list of headers, bytes)
        Method, target, headers and body of every request.
    """

    suspect: SuspectModel
    record: ExportRecord
    extensions: list[str] = field(default_factory=list)
    lie: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    instead: Callable[[Any, Any, Any], Awaitable[None]] | None = None
    seen: list[tuple[str, bytes, list[tuple[bytes, bytes]], bytes]] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    is_broken_off: bool = False
    peers: set[Any] = field(default_factory=set)
    plain: tuple[int, bytes, list[tuple[bytes, bytes]]] = (200, b"", [])

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.is_broken_off = True
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        self.peers.add(tuple(scope["client"]))
        self.seen.append((scope["method"], target, scope["headers"], body))
        path = scope["raw_path"].decode()
        if path.startswith("/stream"):
            await self._streamed(receive, send)
        elif path.startswith("/plain"):
            await self._plainly(receive, send)
        elif path.startswith("/echo"):
            await reply(send, 200, body, [(b"x-twice", b"1"), (b"X-Twice", b"2"), (b"content-encoding", b"gzip")])
        elif path.endswith("/infer") and path.startswith(MODEL):
            if self.instead is not None:
                await self.instead(scope, receive, send)
            else:
                await self._infer(scope, body, send)
        elif path == MODEL:
            await reply(send, 200, json.dumps(self.metadata()).encode())
        elif path == "/v2":
            about = {"name": "fake", "version": "1", "extensions": self.extensions}
            await reply(send, 200, json.dumps(about).encode())
        else:
            await reply(send, 404, b'{"error": "not here"}')

    def metadata(self) -> dict[str, Any]:
        outputs = [{"name": n, "datatype": "FP32", "shape": [-1, w]} for n, w in self.record.outputs.items()]
        kinds = {name: datatype_of(make(1)) for name, make in self.more.items()}
        outputs += [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in kinds.items()]
        return {
            "name": "digits",
            "versions": ["7"],
            "platform": "fake",
            "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 1, 28, 28]}],
            "outputs": outputs,
        }

    async def _infer(self, scope: Any, body: bytes, send: Any) -> None:
        headers = dict(scope["headers"])
        length = headers.get(b"inference-header-content-length")
        request = read_request(body, int(length) if length else None)
        arrays = [array for _, array in self.suspect.activations(request.inputs["input"]).items()]
        known: dict[str, Any] = dict(zip(self.record.outputs, arrays, strict=True))
        known |= {name: make(len(arrays[0])) for name, make in self.more.items()}
        wanted = {output.name: output.is_binary for output in request.outputs} or dict.fromkeys(known, False)
        outputs = {name: known[name] for name in wanted}
        if self.lie is not None:
            outputs = self.lie(outputs)
        binary = frozenset(name for name in outputs if wanted.get(name))
        response = InferResponse("digits", outputs, request.id, self.parameters, binary, "7")
        payload, json_bytes = write_response(response)
        more = [(b"inference-header-content-length", str(json_bytes).encode())] if json_bytes else []
        await reply(send, 200, payload, [*more, (b"x-upstream", b"yes"), (b"guard-verdict", b"clean")])

    async def _plainly(self, receive: Any, send: Any) -> None:
        status, body, headers = self.plain
        gone = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for start in range(0, len(body), 1 << 16):
            await send({"type": "http.response.body", "body": body[start : start + (1 << 16)], "more_body": True})
        await send({"type": "http.response.body", "body": b""})
        await asyncio.sleep(0)
        self.is_broken_off = len(body) > 0 and gone.done()
        gone.cancel()

    async def _streamed(self, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 203, "headers": [(b"content-type", b"text/event-stream")]})
        gone = asyncio.ensure_future(receive())
        for number in range(1000):
            if gone.done():
                self.is_broken_off = True
                return
            await send({"type": "http.response.body", "body": b"%d;" % number, "more_body": True})
            await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b""})


async def reply(send: Any, status: int, body: bytes, headers: Any = ()) -> None:
    """Send one whole answer."""
    length = (b"content-length", str(len(body)).encode())
    kind = [] if any(name == b"content-type" for name, _ in headers) else [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": [length, *kind, *headers]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def proxied(
    upstream_port: int, record: ExportRecord, bundles: Path, serving: dict[str, Any] | None = None, **settings: Any
) -> Iterator[tuple[int, ProxiedModel]]:
    """Serve a proxy before a port of loopback, and yield its own port, and the model."""
    usual = {
        "upstream": f"http://{LOOPBACK}:{upstream_port}",
        "model": "digits",
        "ready_timeout_s": 1.0,
        "probe_s": 0.0,
    }
    chosen = ProxySettings(**{**usual, **settings})
    detail = {"verdict_detail": "full", **(serving or {})}
    with ThreadPoolExecutor(1) as elsewhere, ExitStack() as opened:  # a browser's event loop may run in this thread
        proxy = opened_proxy(record, bundles, chosen, detail)
        app, model = elsewhere.submit(proxy.__enter__).result()
        opened.callback(lambda: elsewhere.submit(proxy.__exit__, None, None, None).result())
        yield opened.enter_context(in_thread(app, **UVICORN)), model


def request_of(images: Any, **more: Any) -> dict[str, Any]:
    """Return the JSON of an inference request."""
    data = np.asarray(images, np.float64).ravel().tolist()
    entry = {"name": "input", "datatype": "FP32", "shape": list(np.shape(images)), "data": data}
    return {"inputs": [entry], **more}


def counted(model: ProxiedModel) -> dict[str, float]:
    """Return what has been counted since the last time, by verdict."""
    samples = [s for s in model.active.metrics.drain() if s.name == "guard_verdicts_total" and s.value]
    return {sample.labels[1]: sample.value for sample in samples}
