"""The guard's log: one line of JSON per request that was not clean, and per change of the bundle; nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from typing import Any, TextIO

import structlog

#: Request ids that are logged as they are; they come from the caller, who may write anything.
_PLAIN_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class EventLog:
    """Writes to the worker's standard error, where the server picks it up.

    A server may read both of a worker's streams for lines that begin with `[METRICS]`. A line of this log begins with
    `{"log": "guard"`, and is one line whatever it is told: JSON in ASCII has no line breaks of any kind. What a
    client sent is never told; its request id only if it is made of harmless characters, else the id's digest.

    Parameters
    ----------
    model : str
        Name under which the model is served.
    stream : text file, optional
        Default is standard error.
    """

    def __init__(self, model: str, stream: TextIO | None = None) -> None:
        self._logger = structlog.wrap_logger(
            structlog.WriteLogger(stream or sys.stderr),
            processors=[structlog.processors.TimeStamper(fmt="iso", key="time"), structlog.processors.JSONRenderer()],
            log="guard",  # comes first in the line
            model=model,
        )

    def write(self, event: str, **fields: Any) -> None:
        """Write one line; a stream that is gone is no reason to fail a request."""
        with contextlib.suppress(OSError, ValueError):
            self._logger.msg(event, **fields)


def loggable_id(request_id: object) -> str:
    """Return a request id for the log: as it is, or `sha256:` and 16 digits where it is long or unusual."""
    text = str(request_id)
    if _PLAIN_ID.fullmatch(text):
        return text
    return f"sha256:{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
