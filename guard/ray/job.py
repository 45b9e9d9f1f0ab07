"""What the process of a Ray engine is to do, handed over in a private file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from guard.ray.settings import Settings


class Job(BaseModel):
    """A cluster to start or to join, and what to deploy there.

    Attributes
    ----------
    settings : Settings
    replicas : int
    port, metrics_port : int
        On loopback.
    address : str or None
        Of a cluster that runs; None = one of its own.
    folder : str
        Of Ray's own files, where the cluster is started here; short, as paths of sockets are.
    """

    model_config = ConfigDict(extra="forbid")

    settings: Settings
    replicas: int
    port: int
    metrics_port: int
    address: str | None
    folder: str
