"""What the sender of one request sees of its outcome: status, headers, body. The same on every server."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any, Protocol

from PIL import Image

from guard.config import GuardConfig
from guard.errors import GuardError, InputRejectedError
from guard.serving.outcomes import Outcome
from guard.serving.review_queue import Receipt

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Response:
    """Status, extra headers and body of one answer; `is_error` says that the guard wrote the body itself, as JSON."""

    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)
    is_error: bool = False


class Responses(Protocol):
    """What a server lets be said of the requests of one batch."""

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """Return the headers of an answer so far, to be changed."""

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        """Set the status of an answer."""


def make_answer(
    outcome: Outcome | None,
    body: Any,
    digest: str,
    config: GuardConfig | None = None,
    receipt: Receipt | None = None,
    *,
    verdict_in_body: bool = False,
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
        What became of a flagged input in the queue of the reviewers; None = it was not sent there.
    verdict_in_body : bool
        For adapters in older archives, which name this setting alone; counts where there is no `config`.
    """
    if outcome is None:
        return Response(200, body)
    config = config or GuardConfig(verdict_in_body=verdict_in_body)
    verdict, is_full = outcome.verdict, config.verdict_detail == "full"
    if verdict is None:
        if outcome.kind == "bypassed":
            headers = {"Guard-Verdict": "bypassed", "Guard-Action": "none", "Guard-Bundle": digest}
            told: dict[str, Any] = {"verdict": "bypassed", "action": "none", "bundle": digest}
            told |= {"p_value": None} if is_full else {}
            return Response(200, _with_verdict(body, told) if config.verdict_in_body else body, headers)
        if not outcome.message:  # the user's handler refused it, in its own words
            return Response(outcome.status, body)
        kind = "InputRejected" if outcome.kind == "rejected" else "GuardFailed"
        return Response(outcome.status, error_body(outcome.status, kind, outcome.message), is_error=True)
    action = verdict.action if verdict.is_poisoned else "none"
    headers = {"Guard-Verdict": outcome.kind, "Guard-Action": action, "Guard-Bundle": digest}
    more: dict[str, Any] = {}
    because = ""
    if is_full:
        headers["Guard-P-Value"] = f"{verdict.p_value:.6g}"
        headers |= {"Guard-Depth": verdict.depth} if verdict.depth else {}
        headers |= {"Guard-Review": receipt} if receipt is not None else {}
        more, because = {"p_value": verdict.p_value}, f": {verdict.reason}"
    if action == "block":
        message = f"the input was judged poisoned and blocked{because}."
        return Response(422, error_body(422, "InputBlocked", message, **more), headers, is_error=True)
    if config.verdict_in_body:
        body = _with_verdict(body, {"verdict": outcome.kind, "action": action, "bundle": digest, **more})
    return Response(200, body, headers)


def set_answer(responses: Responses, index: int, answer: Response) -> None:
    """Set status and headers of one answer.

    Headers in the guard's name are the guard's alone: what the user's handler set under them goes. Where the guard
    wrote the body, all of the handler's headers go, as they may tell what the body must not.
    """
    headers = responses.get_response_headers(index)
    for name in [name for name in headers if answer.is_error or name.lower().startswith("guard-")]:
        del headers[name]
    if answer.is_error:
        responses.set_response_status(answer.status, "", index)
        headers["content-type"] = "application/json"
    headers |= answer.headers


def excuse(error: Exception, model_ran: bool) -> Outcome:
    """Return the outcome of a request whose handler raised: its own fault until the model runs, the model's after.

    An exception may bring a status of its own as `error_code`, as TorchServe's PredictionException does.
    """
    logger.warning("one request failed: %s", type(error).__name__)  # its text may quote the request: not for logs
    text = str(error)[:300]
    code = getattr(error, "error_code", None)
    if isinstance(error, InputRejectedError):
        return Outcome("rejected", status=error.status, message=text)
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return Outcome("rejected", status=413, message=f"the image is too large: {text}")
    if isinstance(code, int) and 400 <= code < 600:
        return Outcome("rejected" if code < 500 else "failed", status=code, message=text or "the handler refused it.")
    if isinstance(error, MemoryError):
        return Outcome("failed", status=507, message="out of memory.")
    if isinstance(error, GuardError):
        return Outcome("failed", status=500, message=text)
    if model_ran:
        return Outcome("failed", status=500, message=f"the model failed on this input: {type(error).__name__}.")
    return Outcome("rejected", status=400, message=f"the input was refused: {type(error).__name__}: {text}")


def error_body(status: int, kind: str, message: str, **more: Any) -> dict[str, Any]:
    """Return the JSON body of an error, in the form that TorchServe's own errors have."""
    return {"code": status, "type": kind, "message": message, **more}


def _with_verdict(body: Any, told: dict[str, Any]) -> Any:
    if isinstance(body, str | bytes | bytearray):
        try:
            parsed = json.loads(body)
        except (ValueError, RecursionError):
            return body
        text = json.dumps(_with_verdict(parsed, told), indent=2)
        return text if isinstance(body, str) else text.encode()
    if isinstance(body, dict):
        return {**body, "guard": told}
    if isinstance(body, list | int | float | None):
        return {"prediction": body, "guard": told}
    return body
