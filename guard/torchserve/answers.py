"""Answers in TorchServe's words: its context, the form of its errors, and what an exception of a handler means."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

from PIL import Image

from guard.errors import GuardError, InputRejectedError
from guard.serving.answers import Response
from guard.serving.outcomes import Outcome

logger = logging.getLogger(__name__)


class Requests:
    """The requests of one batch, for `guard.serving`.

    Parameters
    ----------
    context : ts.context.Context
        Of the batch.
    """

    def __init__(self, context: Any) -> None:
        self._context = context

    def request_id(self, index: int) -> Any:
        """Return the id that the caller gave a request, or TorchServe."""
        return self._context.get_request_id(index)

    def headers(self, index: int) -> Mapping[str, Any]:
        """Return the headers of a request."""
        headers: Mapping[str, Any] = self._context.get_all_request_header(index)
        return headers


class Responses(Protocol):
    """What TorchServe's context lets be said of the requests of one batch."""

    def get_response_headers(self, idx: int) -> dict[str, str]:
        """Return the headers of an answer so far, to be changed."""

    def set_response_status(self, code: int, phrase: str, idx: int) -> None:
        """Set the status of an answer."""


def set_answer(responses: Responses, index: int, response: Response) -> Any:
    """Set status and headers of one answer, and return its body.

    Headers in the guard's name are the guard's alone: what the user's handler set under them goes. Where the guard
    wrote the body, all of the handler's headers go, as they may tell what the body must not.
    """
    headers = responses.get_response_headers(index)
    for name in [name for name in headers if response.error is not None or name.lower().startswith("guard-")]:
        del headers[name]
    headers |= response.headers
    if response.error is None:
        return response.body
    responses.set_response_status(response.status, "", index)
    headers["content-type"] = "application/json"
    return error_body(response.status, **response.error)


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


def error_body(code: int, type: str, message: str, **more: Any) -> dict[str, Any]:
    """Return the JSON body of an error, in the form that TorchServe's own errors have."""
    return {"code": code, "type": type, "message": message, **more}
