"""The application that Ray Serve runs: replicas that answer, and one place that adds up their counts."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from contextlib import ExitStack, suppress
from os import getuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from guard.local.totals import ValuesCollector
from guard.ray.counts import Counts, Standing
from guard.ray.scratch import own_folder
from guard.ray.settings import COUNTS, DEPLOYMENTS, GUARDED, Settings

if TYPE_CHECKING:
    from guard.ray.shelf import Shelf

logger = logging.getLogger(__name__)
_REPORT_EVERY_S = 1.0
_LAST_REPORT_S = 5.0


class _Door:
    """The ASGI application of whatever replica runs it: one is made with its models, after Serve has taken this."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _no_lifespan(receive, send)
            return
        replica: Any = serve.get_replica_context().servable_object
        await replica.answer(scope, receive, send)


door = _Door()


async def _no_lifespan(receive: Receive, send: Send) -> None:
    """Agree to start and to stop."""
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


class Guarded:
    """One replica: the archives behind the open inference protocol, and `/metrics` for the whole application.

    Parameters
    ----------
    settings : Settings
    counts : DeploymentHandle
        Of `Counts`.
    """

    async def __init__(self, settings: Settings, counts: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve
        logging.getLogger("guard").setLevel(logging.WARNING)
        self._counts, self._standing = counts, Standing()
        self._replica = serve.get_replica_context().replica_id.unique_id
        self._closing = ExitStack()
        self._reporting: asyncio.Task[None] | None = None
        key = settings.key()
        self._shelf: Shelf
        try:
            scratch = settings.scratch or Path(tempfile.gettempdir(), f"guard-ray-{getuid()}")
            folder = self._closing.enter_context(own_folder(Path(scratch)))
            from guard.ray.shelf import Shelf  # here, as what deploys this and what counts do without torch

            self._shelf = Shelf(
                {name: Path(path) for name, path in settings.archives.items()},
                folder,
                max_open=settings.max_open_models,
                batch_size=settings.batch_size,
                max_delay_s=settings.max_batch_delay_ms / 1000,
            )
            self._closing.callback(self._shelf.close)
            await self._shelf.open_first()
        except BaseException:
            self._closing.close()
            raise
        self._app: ASGIApp = self._made_app(key)
        self._reporting = asyncio.get_running_loop().create_task(self._report())

    async def answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        await self._app(scope, receive, send)

    async def __del__(self) -> None:
        """Close the models, and say for the last time what was counted; Serve calls it once requests are answered."""
        if self._reporting is None:  # it did not start
            return
        self._reporting.cancel()
        await asyncio.to_thread(self._closing.close)
        with suppress(Exception):  # the whole application may be going
            await asyncio.wait_for(self._send(is_last=True), _LAST_REPORT_S)

    def _made_app(self, key: str | None) -> ASGIApp:
        from guard.v2.rest import create_app

        app = create_app(self._shelf, key=key)

        @app.get("/metrics")
        async def metrics() -> Response:
            registry = CollectorRegistry()
            registry.register(ValuesCollector(await self._counts.totals.remote()))
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        return app

    async def _report(self) -> None:
        complaint = ""
        while True:
            try:
                await self._send()
                complaint = ""
            except Exception as error:  # all of it goes with the next report
                if complaint != (complaint := type(error).__name__):  # once, and not every second
                    logger.error("counts could not be reported: %s", complaint)
            await asyncio.sleep(_REPORT_EVERY_S)

    async def _send(self, *, is_last: bool = False) -> None:
        await self._counts.report.remote(self._replica, self._standing.report(self._shelf.drain()), is_last)


def build(args: dict[str, Any]) -> Application:
    """Return the application; a Serve config file names this function as its `import_path`, with its `args`."""
    return application(Settings.model_validate(args))


def application(settings: Settings, **options: Any) -> Application:
    """Return the application with further options of its replicas, such as `num_replicas`."""
    counts = serve.deployment(name=COUNTS, **DEPLOYMENTS[COUNTS])(Counts)
    guarded = serve.deployment(name=GUARDED, **{**DEPLOYMENTS[GUARDED], **options})(serve.ingress(door)(Guarded))
    bound: Application = guarded.bind(settings, counts.bind())
    return bound
