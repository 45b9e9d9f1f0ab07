"""Guarded models as the open inference protocol shows them: metadata, and inference with a verdict per row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np

from guard.serving.guarded_model import GuardedModel, RowAnswer, RowRequests, columns_of
from guard.serving.outcomes import GRAVITY, Outcome
from guard.types import AnyArray, Float32Array
from guard.v2.batching import Batcher, Batching
from guard.v2.protocol import InferRequest, InferResponse, ProtocolError, datatype_of, named

INPUT, LOGITS, VERDICT, P_VALUE = "input", "logits", "guard_verdict", "guard_p_value"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Inferred:
    """What one inference request is answered with.

    Attributes
    ----------
    response : InferResponse or None
        None where no row has an answer that may leave; then `error` and `status` say why.
    status : int
        HTTP status.
    error : str
    headers : dict of str to str
        Of a request of one row: the guard's own, as TorchServe's answers have them.
    """

    response: InferResponse | None
    status: int
    error: str
    headers: dict[str, str]


class ServedModel:
    """One guarded model behind the protocol.

    The model takes one input and gives its logits and, as outputs of their own, verdict and p-value of every row, so
    that a server which puts requests together cannot mix them up. Rows without an answer, as they are blocked,
    rejected or failed, are NaN; a request of nothing else is an error.

    Parameters
    ----------
    model : GuardedModel
    batch_size : int
        The most rows of one forward pass.
    max_delay_s : float
        How long a request waits for others, in seconds.
    make_batcher : callable
        What puts requests together; takes what `Batcher` takes.
    """

    def __init__(
        self,
        model: GuardedModel,
        *,
        batch_size: int = 8,
        max_delay_s: float = 0.001,
        make_batcher: Callable[..., Batching] = Batcher,
    ) -> None:
        self.model = model
        self.name = model.name
        # A request of many rows takes several forward passes, and they are judged by one guard.
        begin = lambda: partial(model.answer, guard=model.guard)  # noqa: E731
        self._batcher = make_batcher(begin, batch_size=batch_size, max_delay_s=max_delay_s)

    def metadata(self) -> dict[str, Any]:
        """Return what `GET v2/models/NAME` answers."""
        shape = self.model.input_shape
        row = [-1, -1, -1] if shape is None else list(shape)
        outputs = [
            {"name": LOGITS, "datatype": "FP32", "shape": [-1, self.model.n_classes]},
            {"name": VERDICT, "datatype": "BYTES", "shape": [-1]},
        ]
        if self._tells_p_values:
            outputs.append({"name": P_VALUE, "datatype": "FP64", "shape": [-1]})
        return {
            "name": self.name,
            "versions": [VERSION],
            "platform": "pytorch_backdoor_guard",
            "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *row]}],
            "outputs": outputs,
        }

    async def infer(self, request: InferRequest, headers: Mapping[str, str]) -> Inferred:
        """Answer one inference request.

        Raises
        ------
        ProtocolError
            If an input or output is not the model's.
        OverloadedError
            If too many rows wait.
        """
        answers = await asyncio.wrap_future(self._begun(request, headers))
        return self._inferred(request, answers)

    def infer_and_wait(self, request: InferRequest, headers: Mapping[str, str]) -> Inferred:
        """Answer one inference request as `infer` does, for callers with a thread of their own."""
        return self._inferred(request, self._begun(request, headers).result())

    def refuse(self, status: int, headers: Mapping[str, str]) -> None:
        """Count a request that never became an input: it is `rejected`, or `failed` if that is the server's fault."""
        requests = RowRequests(["unread"], [headers])
        bookkeeping = self.model.runtime.bookkeeping
        outcome = Outcome("rejected" if status < 500 else "failed", status=status)
        bookkeeping.request(outcome, status, self.model.guard, requests, 0)

    def close(self) -> None:
        """Answer what waits, and take the guard off the network."""
        self._batcher.close()
        self.model.close()

    @property
    def _tells_p_values(self) -> bool:
        return self.model.guard.config.verdict_detail == "full"

    def _begun(self, request: InferRequest, headers: Mapping[str, str]) -> Future[list[RowAnswer]]:
        named(request.outputs, self._outputs_told)
        request_id = request.id or headers.get("x-request-id") or str(uuid4())
        return self._batcher.submit(self._rows(request), request_id, headers)

    def _inferred(self, request: InferRequest, answers: Sequence[RowAnswer]) -> Inferred:
        return inferred(self.name, request, answers, self._outputs_told, self.model.n_classes)

    @property
    def _outputs_told(self) -> list[str]:
        return [LOGITS, VERDICT, *([P_VALUE] if self._tells_p_values else [])]

    def _rows(self, request: InferRequest) -> Float32Array:
        return rows_of(request, self.model.input_shape, self._batcher.max_waiting_rows)


def rows_of(request: InferRequest, shape: tuple[int, ...] | None, most: int) -> Float32Array:
    """Return the rows of a request, which has one input.

    Raises
    ------
    ProtocolError
        If it has another, of another type or shape than rows of this one, or has more than so many.
    """
    if [*request.inputs] != [INPUT]:
        raise ProtocolError(f"the model takes one input, {INPUT!r}, got {', '.join(request.inputs) or 'none'}.")
    rows = request.inputs[INPUT]
    if datatype_of(rows) != "FP32":
        raise ProtocolError(f"input {INPUT!r} must have datatype FP32, got {datatype_of(rows)}.")
    if rows.ndim < 2 or len(rows) == 0 or (shape is not None and rows.shape[1:] != shape):
        expected = "[-1, ...]" if shape is None else [-1, *shape]
        raise ProtocolError(f"input {INPUT!r} must have shape {expected}, got {list(rows.shape)}.")
    if len(rows) > most:
        raise ProtocolError(f"a request must have at most {most} rows, got {len(rows)}.", 413)
    return rows.astype(np.float32, copy=False)


def inferred(
    name: str,
    request: InferRequest,
    answers: Sequence[RowAnswer],
    told: Sequence[str],
    n_classes: int,
    more: Mapping[str, AnyArray] | None = None,
) -> Inferred:
    """Return what a request is answered with, from the answers to its rows.

    Parameters
    ----------
    name : str
        Of the model.
    request : InferRequest
    answers : sequence of RowAnswer
    told : sequence of str
        Outputs that a sender may ask for, and gets if it names none.
    n_classes : int
    more : mapping of str to ndarray, optional
        Outputs beside logits, verdict and p-value.
    """
    headers = answers[0].response.headers if len(answers) == 1 else {}
    if all(answer.logits is None for answer in answers):
        return Inferred(None, answers[0].response.status, answers[0].error, headers)
    wanted = {output.name: output.is_binary for output in request.outputs} or dict.fromkeys(told, request.is_binary)
    columns = columns_of(answers, n_classes)
    known: dict[str, AnyArray] = {LOGITS: columns.pop(LOGITS), **(more or {}), **columns}
    outputs = {name: array for name, array in known.items() if name in wanted}
    binary = frozenset(name for name in outputs if wanted[name])
    return Inferred(InferResponse(name, outputs, request.id, _parameters(answers), binary), 200, "", headers)


def _parameters(answers: Sequence[RowAnswer]) -> dict[str, str | float | bool]:
    gravest = min(answers, key=lambda answer: (GRAVITY[answer.verdict], answer.p_value))
    parameters: dict[str, str | float | bool] = {
        "guard_verdict": gravest.verdict,
        "guard_action": gravest.action,
        "guard_poisoned_rows": sum(answer.verdict == "poisoned" for answer in answers),
        "guard_bundle": next((answer.bundle for answer in answers if answer.bundle), ""),
    }
    if np.isfinite(gravest.p_value):
        parameters["guard_p_value"] = gravest.p_value
    return parameters
