"""The page served by uvicorn: on the command line until Ctrl-C, or in a thread beside something else."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import uvicorn

from guard.errors import ServerError
from guard.processes.ports import listening_socket
from guard.review.app import create_app
from guard.review.housekeeping import Housekeeping
from guard.review.workspace import Workspace

LOOPBACK_ADDRESSES = ("127.0.0.1", "::1", "localhost")


def serve_until_stopped(
    workspace: Workspace,
    host: str,
    port: int,
    *,
    certificate: str | None = None,
    key: str | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until SIGINT or SIGTERM.

    Parameters
    ----------
    workspace : Workspace
    host, port
        Where to listen.
    certificate, key : str or None
        PEM files for https.
    on_ready : callable, optional
        Called with the page's URL once it can be asked for.

    Raises
    ------
    ServerError
        If it cannot listen there.
    """
    with listening_socket(host, port) as listening, Housekeeping(workspace), _collecting(workspace):
        port = listening.getsockname()[1]
        server = _server(workspace, host, port, certificate, key)
        listening.listen()  # from here on, a browser that comes early waits
        if on_ready is not None:
            on_ready(_url(host, port, is_https=certificate is not None))
        with contextlib.suppress(KeyboardInterrupt):  # raised again by uvicorn after an orderly end
            server.run(sockets=[listening])


@contextlib.contextmanager
def serving_in_thread(workspace: Workspace, host: str = "127.0.0.1", port: int = 0) -> Iterator[str]:
    """Serve the page in a thread while open, and yield its URL; port 0 = any free one.

    Raises
    ------
    ServerError
        If it cannot listen there, or does not start within 10 s.
    """
    with listening_socket(host, port) as listening:
        port = listening.getsockname()[1]
        server = _server(workspace, host, port, None, None)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            _wait_until_started(server)
            yield _url(host, port, is_https=False)
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def _collecting(workspace: Workspace) -> Iterator[None]:
    """Collect the numbers of the status page while open."""
    if workspace.metrics is None:
        yield
        return
    workspace.metrics.start()
    try:
        yield
    finally:
        workspace.metrics.stop()


def _url(host: str, port: int, *, is_https: bool) -> str:
    return f"{'https' if is_https else 'http'}://{f'[{host}]' if ':' in host else host}:{port}"


def _server(workspace: Workspace, host: str, port: int, certificate: str | None, key: str | None) -> uvicorn.Server:
    return uvicorn.Server(
        uvicorn.Config(
            create_app(workspace),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_graceful_shutdown=3,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
    )


def _wait_until_started(server: uvicorn.Server) -> None:
    limit = time.monotonic() + 10
    while not server.started:
        if time.monotonic() > limit:
            raise ServerError("the review page did not start within 10 s.")
        time.sleep(0.02)
