"""The proxy of one model in this process: checked, opened, served until a signal, closed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from guard.errors import ServerError
from guard.export.record import ExportRecord
from guard.local.totals import Totals
from guard.observing.exporting import exporting
from guard.processes.ports import LOOPBACK, listening_socket
from guard.proxy.app import Proxy
from guard.proxy.checking import Found, find_model, keep_probing, probe
from guard.proxy.exported_guard import ExportedGuard
from guard.proxy.model import ProxiedModel
from guard.proxy.routes import Routes
from guard.proxy.upstream import Upstream, UpstreamError
from guard.storage.places import BundlePlace
from guard.v2.process import Stopping
from guard.v2.rest import Bodies, KeyCheck

#: Settings of the server: no header of its own beside the upstream's, and nothing but HTTP.
UVICORN: Mapping[str, Any] = {"lifespan": "on", "date_header": False, "ws": "none"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProxySettings:
    """How one model of another server is served.

    Attributes
    ----------
    upstream : str
        Address of the server.
    model : str
        Name of the model there.
    version : str or None
        The one to ask; None = the server's choice.
    binary : bool or None
        Whether tensors go there and back as binary data; None = if the server says that it takes them.
    only : bool
        Let nothing through but health, the server's metadata, and this model.
    key : str or None
        What callers must send; None asks for nothing.
    port, metrics_port : int
        On loopback; 0 = any free one.
    connect_timeout_s, timeout_s, ready_timeout_s, probe_s : float
        Until there is a connection; without a word of the upstream, or of a client; until the model must be there;
        between two probes (0 = one, before the start).
    max_requests, max_body_bytes, max_held_bytes, max_json_bytes : int
        At once; of one request; of all requests, and again of all answers; of a request's JSON.
    """

    upstream: str
    model: str
    version: str | None = None
    binary: bool | None = None
    only: bool = False
    key: str | None = None
    port: int = 0
    metrics_port: int = 0
    connect_timeout_s: float = 5.0
    timeout_s: float = 30.0
    ready_timeout_s: float = 60.0
    probe_s: float = 60.0
    max_requests: int = 64
    max_body_bytes: int = 64 << 20
    max_held_bytes: int = 256 << 20
    max_json_bytes: int = 8 << 20

    def new_upstream(self) -> Upstream:
        """Return the server, not yet opened."""
        return Upstream(
            self.upstream,
            connect_timeout_s=self.connect_timeout_s,
            timeout_s=self.timeout_s,
            connections=self.max_requests + 2,  # and health, and probes
        )


@contextmanager
def opened_proxy(
    record: ExportRecord, bundles: BundlePlace, settings: ProxySettings, serving: Mapping[str, Any]
) -> Iterator[tuple[ASGIApp, ProxiedModel]]:
    """Check the upstream, and yield the application of its proxy, and the guarded model; at the end all is closed.

    The application opens its connections when its server starts (ASGI's lifespan). Parameters and errors are those of
    `serve_proxy`.
    """
    with ExitStack() as opened:
        active = ExportedGuard(record, serving, bundles=bundles, model_name=settings.model)
        opened.callback(active.close)
        found, binary = asyncio.run(_checked(record, settings))
        upstream = settings.new_upstream()
        model = ProxiedModel(
            record,
            upstream,
            active,
            name=settings.model,
            version=settings.version,
            more=found.more,
            binary=binary,
            replies=Bodies(settings.max_body_bytes, settings.max_held_bytes, settings.timeout_s),
        )
        opened.callback(model.close)
        app: ASGIApp = Proxy(
            upstream,
            model,
            Routes(settings.model, only=settings.only),
            Bodies(settings.max_body_bytes, settings.max_held_bytes, settings.timeout_s),
            known_version=found.version,
            max_json_bytes=settings.max_json_bytes,
            max_requests=settings.max_requests,
            idle_timeout_s=settings.timeout_s,
            keeps_authorization=settings.key is None,
        )
        if settings.key is not None:
            app = KeyCheck(app, key=settings.key)
        yield _Living(app, upstream, model, binary, settings.probe_s), model


def serve_proxy(
    record: ExportRecord,
    bundles: BundlePlace,
    settings: ProxySettings,
    serving: Mapping[str, Any],
    tell: Callable[[str, str], None],
) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Parameters
    ----------
    record : ExportRecord
    bundles : str or Path
        Folder whose ACTIVE is followed.
    settings : ProxySettings
    serving : mapping
        Settings of the guard that override those in the bundle, and `queue_url`.
    tell : callable (address, address of the metrics)
        Called when the port is open.

    Raises
    ------
    ServerError, BundleError
        If the upstream has no such model, or answers otherwise than was exported; if the bundle does not go with it.
    """
    stopping = Stopping()
    with ExitStack() as opened:
        app, model = opened.enter_context(opened_proxy(record, bundles, settings, serving))
        metrics = opened.enter_context(exporting(settings.metrics_port, Totals([model.active.metrics])))
        listening = opened.enter_context(listening_socket(LOOPBACK, settings.port))
        listening.listen()
        tell(f"http://{LOOPBACK}:{listening.getsockname()[1]}", metrics)
        stopping.serve(app, listening, **UVICORN)


async def _checked(record: ExportRecord, settings: ProxySettings) -> tuple[Found, bool]:
    async with settings.new_upstream() as upstream:
        found = await find_model(upstream, record, settings.model, settings.version, settings.ready_timeout_s)
        binary = found.binary if settings.binary is None else settings.binary
        path = f"/v2/models/{settings.model}" + (f"/versions/{settings.version}" if settings.version else "")
        try:
            trouble = await probe(upstream, record, path, binary=binary)
        except UpstreamError as error:
            trouble = str(error)
        if trouble:
            raise ServerError(f"{trouble.rstrip('.')}. Let the upstream serve what `guard export` wrote.")
        return found, binary


class _Living:
    """Opens the upstream in the event loop of the server, and probes it there."""

    def __init__(self, app: ASGIApp, upstream: Upstream, model: ProxiedModel, binary: bool, probe_s: float) -> None:
        self._app, self._upstream, self._model = app, upstream, model
        self._binary, self._probe_s = binary, probe_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        async with self._upstream:
            probing = asyncio.ensure_future(self._probing())
            await send({"type": "lifespan.startup.complete"})
            await receive()
            probing.cancel()
            with suppress(asyncio.CancelledError):
                await probing
        await send({"type": "lifespan.shutdown.complete"})

    async def _probing(self) -> None:
        if self._probe_s > 0:
            await keep_probing(self._upstream, self._model, binary=self._binary, every_s=self._probe_s)
