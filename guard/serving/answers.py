"""What the sender of one request sees of its outcome: status, headers, body. The same on every server."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from guard.config import GuardConfig
from guard.serving.outcomes import Outcome
from guard.serving.review_queue import Receipt


@dataclass(frozen=True, slots=True)
class Response:
    """What one request is answered with.

    Attributes
    ----------
    status : int
        HTTP status.
    body : object
        The handler's own, perhaps with the verdict in it; None where `error` takes its place.
    headers : dict of str to str
        The guard's own.
    error : mapping or None
        What the guard says in place of a body, with `type` and `message`; a server gives it the form of its errors.
    """

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    error: Mapping[str, Any] | None = None


def make_response(
    outcome: Outcome | None, body: Any, digest: str, config: GuardConfig, receipt: Receipt | None = None
) -> Response:
    """Combine what the model's own handler answered with what the guard says, as far as its sender may know.

    Parameters
    ----------
    outcome : Outcome or None
        The guard's; None: this was no input, and there is nothing to say.
    body : object
        The handler's own answer, passed on untouched unless the input is blocked, rejected or failed.
    digest : str
        Digest of the bundle that judged it.
    config : GuardConfig
        `verdict_detail`: `flag` tells whether the input was flagged and what was done about it, and nothing that
        differs between two flagged inputs or two clean ones. `verdict_in_body`: also add the verdict to a JSON body,
        under the key `guard` of an object; any other JSON value becomes `{"prediction": value, "guard": ...}`. A body
        that is no JSON is left alone.
    receipt : str, optional
        What became of a flagged input in the queue of the reviewers; None = it was not sent there. That an
        unflagged one was drawn for the audit sample is not told.
    """
    if outcome is None:
        return Response(200, body)
    verdict, is_full = outcome.verdict, config.verdict_detail == "full"
    if verdict is None:
        if outcome.kind == "bypassed":
            headers = {"Guard-Verdict": "bypassed", "Guard-Action": "none", "Guard-Bundle": digest}
            verdict_fields: dict[str, Any] = {"verdict": "bypassed", "action": "none", "bundle": digest}
            verdict_fields |= {"p_value": None} if is_full else {}
            return Response(200, _with_verdict(body, verdict_fields) if config.verdict_in_body else body, headers)
        if not outcome.message:  # the user's handler refused it, in its own words
            return Response(outcome.status, body)
        kind = "InputRejected" if outcome.kind == "rejected" else "GuardFailed"
        return Response(outcome.status, None, error={"type": kind, "message": outcome.message})
    action = verdict.action if verdict.is_poisoned else "none"
    headers = {"Guard-Verdict": outcome.kind, "Guard-Action": action, "Guard-Bundle": digest}
    more: dict[str, Any] = {}
    because = ""
    if is_full:
        headers["Guard-P-Value"] = f"{verdict.p_value:.6g}"
        headers |= {"Guard-Depth": verdict.depth} if verdict.depth else {}
        headers |= {"Guard-Review": receipt} if receipt is not None and verdict.is_poisoned else {}
        more, because = {"p_value": verdict.p_value}, f": {verdict.reason}"
    if action == "block":
        message = f"the input was judged poisoned and blocked{because}."
        return Response(422, None, headers, {"type": "InputBlocked", "message": message, **more})
    if config.verdict_in_body:
        body = _with_verdict(body, {"verdict": outcome.kind, "action": action, "bundle": digest, **more})
    return Response(200, body, headers)


def _with_verdict(body: Any, verdict_fields: dict[str, Any]) -> Any:
    if isinstance(body, str | bytes | bytearray):
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body
        text = json.dumps(_with_verdict(parsed, verdict_fields), indent=2)
        return text if isinstance(body, str) else text.encode()
    if isinstance(body, dict):
        return {**body, "guard": verdict_fields}
    if isinstance(body, list | int | float | None):
        return {"prediction": body, "guard": verdict_fields}
    return body
