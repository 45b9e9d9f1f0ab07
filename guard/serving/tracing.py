"""The caller's trace (W3C Trace Context): its id for the log, and a span around the guard's decision."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_CARRIED = ("traceparent", "tracestate")


def trace_id(headers: Mapping[str, Any]) -> str | None:
    """Return the trace id in a request's `traceparent` header; None if there is none, or it is malformed."""
    match = _TRACEPARENT.fullmatch(_carrier(headers).get("traceparent", ""))
    return match[1] if match and match[1] != 32 * "0" else None


class DecisionSpans:
    """Reports a span named `guard.decide` per request that brings a trace, through the OpenTelemetry API.

    Where spans go is for the process to say: a handler, or `opentelemetry-instrument`, sets a tracer provider. Without
    one the API drops them.
    """

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._tracer = trace.get_tracer("guard")  # asks the provider that is set when a span begins
        self._propagator = TraceContextTextMapPropagator()

    def add(self, headers: Mapping[str, Any], span_ns: tuple[int, int], **attributes: Any) -> None:
        """Report one decision that is over; what goes wrong with tracing is no reason to fail a request.

        Parameters
        ----------
        headers : mapping
            Of the request; without a `traceparent` nothing is reported.
        span_ns : (int, int)
            Begin and end, in nanoseconds since 1970.
        **attributes
            Of the span, with `guard.` before their names; None is left out.
        """
        carrier = _carrier(headers)
        if "traceparent" not in carrier:
            return
        try:
            parent = self._propagator.extract(carrier)
            shown = {f"guard.{name}": value for name, value in attributes.items() if value is not None}
            span = self._tracer.start_span("guard.decide", parent, attributes=shown, start_time=span_ns[0])
            span.end(span_ns[1])
        except Exception as error:
            logger.warning("a span could not be reported: %s", type(error).__name__)


def decision_spans() -> DecisionSpans | None:
    """Return the reporter of spans; None where the extra `tracing` is not installed."""
    try:
        return DecisionSpans()
    except ImportError:
        return None


def _carrier(headers: Mapping[str, Any]) -> dict[str, str]:
    return {name.lower(): str(value) for name, value in headers.items() if name.lower() in _CARRIED}
