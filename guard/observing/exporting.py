"""A metrics endpoint of one process, on loopback, beside whatever else it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.registry import Collector

from guard.errors import ObservingError

LOOPBACK = "127.0.0.1"


@contextmanager
def exporting(port: int, collector: Collector) -> Iterator[str]:
    """Serve one collector's metrics in a thread while open, and yield their address.

    Parameters
    ----------
    port : int
        0 = any free one.
    collector : Collector

    Raises
    ------
    ObservingError
        If the port is out of range, or taken.
    """
    if not 0 <= port <= 65535:
        raise ObservingError(f"--metrics-port must be in [0, 65535], got {port}. Give another, or 0 for a free one.")
    registry = CollectorRegistry()
    registry.register(collector)
    try:
        server, thread = start_http_server(port, LOOPBACK, registry)
    except OSError as error:
        raise ObservingError(
            f"metrics cannot be served on port {port}: {error.strerror}. Name another --metrics-port, or 0."
        ) from error
    try:
        yield f"http://{LOOPBACK}:{server.server_port}/metrics"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
