"""Ports on loopback: asked for, or free ones; the five of one TorchServe."""

from __future__ import annotations

import random
import socket
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass

from guard.errors import ServerError

LOOPBACK = "127.0.0.1"
#: The broadcast address of loopback. On Linux a server may listen there, and TCP to a broadcast address is refused to
#: everybody: a port there is open to nobody.
NOWHERE = "127.255.255.255"
#: Below the range from which Linux takes the ports of outgoing connections.
_FREE_PORTS = range(20_000, 32_000)


@dataclass(frozen=True, slots=True)
class Ports:
    """The five ports of one instance; gRPC cannot be switched off in TorchServe 0.12, see `grpc_address`."""

    inference: int
    management: int
    metrics: int
    grpc_inference: int
    grpc_management: int


def choose_ports(inference: int = 0, management: int = 0, metrics: int = 0) -> Ports:
    """Return the ports asked for, and free ones for 0 and for gRPC.

    Raises
    ------
    ServerError
        If a port is out of range, named twice, or taken.
    """
    requested = {"inference": inference, "management": management, "metrics": metrics}
    ports = Ports(**chosen_ports({**requested, "grpc_inference": 0, "grpc_management": 0}))
    assert len(set(astuple(ports))) == 5
    return ports


def chosen_ports(requested: Mapping[str, int]) -> dict[str, int]:
    """Return the ports asked for by name, and free ones for 0.

    Raises
    ------
    ServerError
        If a port is out of range, named twice, or taken.
    """
    named = [port for port in requested.values() if port]
    if len(set(named)) < len(named):
        raise ServerError(f"the ports must differ, got {named}. Give others, or 0 for free ones.")
    for name, port in requested.items():
        if not 0 <= port <= 65535:
            raise ServerError(f"{name} port must be in [0, 65535], got {port}. Give another, or 0 for a free one.")
        if port and not port_is_free(port):
            raise ServerError(f"{name} port {port} is taken by another program. Give another, or 0 for a free one.")
    chosen = dict(requested)
    for name, port in chosen.items():
        if not port:
            chosen[name] = free_port(chosen.values())
    return chosen


def grpc_address() -> str:
    """Return where TorchServe's gRPC servers shall listen: nowhere, if this system allows that, else on loopback.

    TorchServe 0.12 always starts them, and one call of `StreamPredictions` with the inference key ends a worker.
    Whether `NOWHERE` keeps its word is tried out: a port is opened there, and must not be reachable.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as server:
        try:
            server.bind((NOWHERE, 0))
            server.listen(1)
        except OSError:
            return LOOPBACK
        port = server.getsockname()[1]
        reachable = [is_reachable(address, port) for address in (NOWHERE, LOOPBACK)]
        return LOOPBACK if any(reachable) else NOWHERE


def is_reachable(address: str, port: int, timeout_seconds: float = 1.0) -> bool:
    """Return whether a TCP connection to this port can be opened."""
    try:
        socket.create_connection((address, port), timeout_seconds).close()
    except OSError:
        return False
    return True


def free_port(beside: Collection[int] = (), start: int = 0) -> int:
    """Return a port that nobody listens on now: any, or the first one from `start` on; none of `beside`.

    Raises
    ------
    ServerError
        If there is none within a hundred of `start`.
    """
    if not start:
        while (candidate := random.SystemRandom().choice(_FREE_PORTS)) in beside or not port_is_free(candidate):
            pass
        return candidate
    for candidate in range(start, min(start + 100, 65536)):
        if candidate not in beside and port_is_free(candidate):
            return candidate
    raise ServerError(f"there is no free port from {start} on. Give another --port, or 0 for free ones.")


def port_is_free(port: int) -> bool:
    """Return whether a server could listen on this port of loopback now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does: TIME_WAIT is no hindrance
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that is bound already, so that a port in use is a clear error.

    Raises
    ------
    ServerError
        If it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol's number matters: asyncio sends without delay (TCP_NODELAY) on sockets that bear it alone.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ServerError(f"cannot listen on {host}, port {port}: {error.strerror}. Name another --port.") from error
    return listening
