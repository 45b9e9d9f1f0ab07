"""The guarded model of another server: its features are asked for with every request, judged, and kept here."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

import aiohttp
import numpy as np
import torch

from guard.detection.pipeline import Guard
from guard.export.record import ExportRecord
from guard.proxy.exported_guard import ExportedGuard
from guard.proxy.messages import Answer, read_answer, write_request
from guard.proxy.upstream import Headers, Upstream, UpstreamError, passed_on
from guard.serving.active_guard import relabelled
from guard.serving.guarded_model import RowAnswer, RowRequests, row_answers
from guard.serving.outcomes import Outcome, OutcomeKind, unscored
from guard.types import Activations, AnyArray, Float32Array
from guard.v2.batching import Batcher, OverloadedError
from guard.v2.models import INPUT, LOGITS, P_VALUE, VERDICT, Inferred, inferred, rows_of
from guard.v2.protocol import InferRequest, ProtocolError, named
from guard.v2.rest import JSON_BYTES, Bodies, json_bytes_of, off_loop

logger = logging.getLogger(__name__)

MOST_ROWS = 1024
#: Rows that are judged at once, where several requests wait.
_JUDGED_TOGETHER = 64
_MOST_ERROR = 64 << 10  # bytes of an upstream's error that are passed on
#: Headers of a client's request that are about its body, or about what the proxy reads itself.
_REQUEST_HEADERS = (b"host", b"content-*", b"accept-encoding", JSON_BYTES.lower().encode())
_ANSWER_HEADERS = (b"content-*", b"guard-*", JSON_BYTES.lower().encode())
_GONE = "the upstream's answer lacks the outputs that the guard looks at."


@dataclass(frozen=True, slots=True)
class Proxied:
    """What one inference request is answered with.

    Attributes
    ----------
    found : Inferred or None
        None where the upstream refused the request, or failed on it: then `error` is its own answer.
    headers : list of (bytes, bytes)
        The upstream's, without those of its connection and its body.
    error : (int, bytes, bytes)
        Status, content type and body.
    """

    found: Inferred | None
    headers: Headers
    error: tuple[int, bytes, bytes] = (200, b"", b"")


class ProxiedModel:
    """One model of another server, guarded.

    Parameters
    ----------
    record : ExportRecord
    upstream : Upstream
    active : ExportedGuard
        The caller closes it.
    name : str
        Of the model there.
    version : str, optional
        The one to ask; None = the server's choice.
    more : sequence of str
        Outputs of floating-point numbers beside those that were exported.
    binary : bool
        Whether tensors go there and back as binary data.
    replies : Bodies
        Bounds what is held of answers.
    """

    def __init__(
        self,
        record: ExportRecord,
        upstream: Upstream,
        active: ExportedGuard,
        *,
        name: str,
        version: str | None = None,
        more: Sequence[str] = (),
        binary: bool = False,
        replies: Bodies,
    ) -> None:
        self.record, self.active, self.name, self.version = record, active, name, version
        self.trouble = ""  # why no answer of the upstream can be judged now
        self._upstream, self._more, self._binary, self._replies = upstream, tuple(more), binary, replies
        self._batcher = Batcher(
            lambda: partial(self._judged, self.active.current),
            batch_size=_JUDGED_TOGETHER,
            max_delay_s=0.0,
            max_waiting_rows=4 * MOST_ROWS,
        )

    @property
    def outputs_told(self) -> list[str]:
        """Names of the outputs that clients may ask for."""
        p_values = [P_VALUE] if self.active.current.config.verdict_detail == "full" else []
        return [LOGITS, *self._more, VERDICT, *p_values]

    @property
    def path(self) -> str:
        """Where the upstream has the model."""
        return f"/v2/models/{self.name}" + (f"/versions/{self.version}" if self.version else "")

    def refuse(self, status: int, headers: Mapping[str, str]) -> None:
        """Count a request that never became an input."""
        requests = RowRequests(["unread"], [headers])
        self.active.bookkeeping.request(Outcome("rejected", status=status), status, self.active.current, requests, 0)

    async def infer(
        self,
        request: InferRequest,
        headers: Mapping[str, str],
        raw: Sequence[tuple[bytes, bytes]],
        query: bytes,
        id: str,
    ) -> Proxied:
        """Ask the upstream, judge every row of its answer, and return what the client gets.

        Parameters
        ----------
        request : InferRequest
        headers, raw : mapping, sequence of (bytes, bytes)
            Of the client's request; `raw` is passed on.
        query : bytes
            Of the client's request, passed on.
        id : str
            For log, trace and queue.

        Raises
        ------
        ProtocolError
            If an input or output is not the model's.
        OverloadedError
            If too much is held or waits already.
        """
        told = self.outputs_told
        wanted = named(request.outputs, told)
        _check_forms(request)
        rows = rows_of(request, self.record.input_shape, MOST_ROWS)
        guard, started = self.active.current, time.perf_counter()
        ids = [id] if len(rows) == 1 else [f"{id}/{row}" for row in range(len(rows))]
        requests = RowRequests(ids, [headers] * len(rows))
        more = [name for name in self._more if name in wanted]
        outputs = [*self.record.outputs, *more]
        try:
            async with self._asked(request, rows, outputs, raw, query, id) as (status, answer_headers, body):
                if status != 200:
                    self._count(guard, requests, status)
                    kind = dict(answer_headers).get(b"content-type", b"application/json")
                    return Proxied(None, passed_on(answer_headers, *_ANSWER_HEADERS), (status, kind, body))
                lower = {name.decode("latin-1"): value.decode("latin-1") for name, value in answer_headers}
                try:
                    answer = await off_loop(len(body), read_answer, body, json_bytes_of(lower))
                except (ProtocolError, ValueError) as error:
                    raise UpstreamError("the upstream's answer cannot be read.") from error
        except UpstreamError as error:
            self._count(guard, requests, error.status)
            return Proxied(Inferred(None, error.status, str(error), {}), [])
        except asyncio.CancelledError:  # the client is gone, and got nothing
            self._count(guard, requests, 400)
            raise
        except OverloadedError:
            raise
        except Exception as error:
            return self._failed(error, guard, requests)
        upstream_seconds = time.perf_counter() - started
        try:
            answers = await self._answers(rows, answer, more, requests, id)
        except OverloadedError:
            raise
        except Exception as error:
            return self._failed(error, guard, requests)
        seconds = time.perf_counter() - started
        self.active.bookkeeping.stages(seconds, seconds - upstream_seconds)
        known = {name: answer.outputs[name] for name in more if _is_by_row(answer.outputs.get(name), len(rows))}
        found = inferred(self.name, request, answers, told, self.record.widths[0], _withheld(known, answers))
        if found.response is not None:
            own = {name: value for name, value in answer.parameters.items() if not name.startswith("guard_")}
            parameters = {**own, **found.response.parameters}
            version = answer.version or self.version or "1"
            found = replace(found, response=replace(found.response, parameters=parameters, version=version))
        return Proxied(found, passed_on(answer_headers, *_ANSWER_HEADERS))

    def close(self) -> None:
        """Answer what waits."""
        self._batcher.close()

    @asynccontextmanager
    async def _asked(
        self,
        request: InferRequest,
        rows: Float32Array,
        outputs: Sequence[str],
        raw: Sequence[tuple[bytes, bytes]],
        query: bytes,
        id: str,
    ) -> AsyncIterator[tuple[int, Headers, bytes]]:
        """Yield status, headers by names in lower case, and body of the upstream's answer, held as long as it lasts."""
        finite = np.isfinite(rows).reshape(len(rows), -1).all(axis=1)
        if not finite.all():  # the others are answered; zeros stand for what JSON has no word for
            rows = rows.copy()
            rows[~finite] = 0.0
        body, json_bytes = await off_loop(
            rows.nbytes,
            lambda: write_request({INPUT: rows}, outputs, binary=self._binary, id=id, parameters=request.parameters),
        )
        sent = passed_on(raw, *_REQUEST_HEADERS)
        sent.append((b"accept-encoding", b"identity"))
        sent.append((b"content-type", b"application/json" if json_bytes is None else b"application/octet-stream"))
        if json_bytes is not None:
            sent.append((JSON_BYTES.encode(), str(json_bytes).encode()))
        async with self._upstream.request("POST", f"{self.path}/infer".encode(), query, sent, body) as response:
            headers = [(name.lower(), value) for name, value in response.raw_headers]
            if 200 < response.status < 400:
                raise UpstreamError(f"the upstream answered with status {response.status}.")
            if dict(headers).get(b"content-encoding", b"identity") != b"identity":
                raise UpstreamError("the upstream's answer is packed, and was asked not to be.")
            try:
                async with self._replies.collected(self._parts(response)) as reply:
                    yield response.status, headers, reply
            except ProtocolError as error:  # too slow, or too long
                status = 504 if error.status == 408 else 502
                raise UpstreamError("the upstream's answer is too slow, or too long.", status) from error

    async def _parts(self, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
        left = _MOST_ERROR
        async for part in self._upstream.parts(response):
            if response.status != 200:
                part = part[:left]
                left -= len(part)
            yield part

    async def _answers(
        self, rows: Float32Array, answer: Answer, more: Sequence[str], requests: RowRequests, id: str
    ) -> Sequence[RowAnswer]:
        """Judge rows by the upstream's answer, together with those of other requests."""
        problem, reason = self._problem(answer, more, len(rows))
        if not problem:
            arrays = [answer.outputs[name] for name in self.record.outputs]
            columns = np.concatenate([rows.reshape(len(rows), -1), *arrays], axis=1)
            judged = asyncio.wrap_future(self._batcher.submit(columns, id, requests.sent[0]))
            return await asyncio.shield(judged)  # what has been judged is counted, whether its client waits or not
        guard, logits = self.active.current, answer.outputs.get(LOGITS)
        outcome = unscored(guard, reason, 502, problem)
        if logits is None or not _fits(logits, len(rows), self.record.widths[0]):
            outcome = Outcome("failed", status=502, reason=reason, message=problem)
        told = [None] * len(rows) if outcome.kind == "failed" or logits is None else list(logits)
        answered = [(row, self._own_fault(image) or outcome) for row, image in zip(told, rows, strict=True)]
        return row_answers(self.active, guard, answered, requests)

    @staticmethod
    def _own_fault(row: Float32Array) -> Outcome | None:
        """Return the outcome of a row that the upstream never saw; an answer to it is no answer."""
        if np.isfinite(row).all():
            return None
        return Outcome("rejected", status=422, reason="not_finite", message="the input holds NaN or infinity.")

    def _problem(self, answer: Answer, more: Sequence[str], n_rows: int) -> tuple[str, str]:
        """Return why an answer is not what the guard was fitted on, and a word of `UNSCORED_REASONS`; "" if it is."""
        if self.trouble:
            return self.trouble, "not_observed"
        for name, width in self.record.outputs.items():
            array = answer.outputs.get(name)
            if array is None:
                return _GONE, "not_observed"
            if array.shape[:1] != (n_rows,):
                return "the upstream's answer is of another number of rows.", "rows"
            if not _fits(array, n_rows, width):
                return f"output {name!r} of the upstream has another type or shape than was exported.", "not_observed"
        for name in more:
            array = answer.outputs.get(name)
            if not _is_by_row(array, n_rows):
                return (
                    f"output {name!r} of the upstream is missing, or is no longer numbers row by row.",
                    "not_observed",
                )
        return "", ""

    def _judged(self, guard: Guard, columns: Float32Array, requests: RowRequests) -> list[RowAnswer]:
        """Judge rows that are inputs, logits and features side by side."""
        record = self.record
        n_numbers = int(np.prod(record.input_shape))
        inputs = torch.from_numpy(columns[:, :n_numbers].reshape(len(columns), *record.input_shape))
        observed = np.ascontiguousarray(columns[:, n_numbers:])
        activations = Activations.from_columns(observed, record.widths, record.split_points.depths)
        allowed_ms = self.active.allowed_ms(guard, requests.sent)
        outcomes = self.active.judge_in_time(guard, activations, inputs, allowed_ms)
        if not torch.isfinite(inputs).all():
            outcomes = [self._own_fault(row) or outcome for row, outcome in zip(inputs.numpy(), outcomes, strict=True)]
        replaced = relabelled(guard, activations, inputs, outcomes)
        logits = activations.logits if replaced is None else replaced
        return row_answers(self.active, guard, list(zip(logits, outcomes, strict=True)), requests)

    def _failed(self, error: Exception, guard: Guard, requests: RowRequests) -> Proxied:
        """Let nothing leave without a verdict, whatever went wrong here; no content of requests in logs."""
        logger.error("the guard failed on a request: %s", type(error).__name__)
        self._count(guard, requests, 500)
        return Proxied(Inferred(None, 500, "the guard failed on this input.", {}), [])

    def _count(self, guard: Guard, requests: RowRequests, status: int) -> None:
        """Count rows without a verdict: `failed`, or `rejected` where the upstream blames them, or nobody waits."""
        kind: OutcomeKind = "rejected" if status < 500 else "failed"
        for row in range(len(requests.ids)):
            self.active.bookkeeping.request(Outcome(kind, status=status), status, guard, requests, row)


def _is_by_row(array: AnyArray | None, n_rows: int) -> bool:
    return array is not None and array.dtype.kind == "f" and array.shape[:1] == (n_rows,)


def _fits(array: AnyArray, n_rows: int, width: int) -> bool:
    return array.dtype == np.float32 and array.shape == (n_rows, width)


def _withheld(outputs: Mapping[str, AnyArray], answers: Sequence[RowAnswer]) -> dict[str, AnyArray]:
    """Return outputs with NaN in the rows whose answer does not leave, or is another one."""
    hidden = [row for row, answer in enumerate(answers) if answer.logits is None or answer.action == "relabel"]
    if not hidden:
        return dict(outputs)
    copies = {name: array.copy() for name, array in outputs.items()}
    for array in copies.values():
        array[hidden] = np.nan
    return copies


def _check_forms(request: InferRequest) -> None:
    """Refuse forms of an answer in which it would leave the upstream by another way, or could not be read."""
    for output in request.outputs:
        for name in output.parameters:
            if name == "classification" or name.startswith("shared_memory"):
                raise ProtocolError(f"output {output.name!r}: parameter {name!r} does not go through the guard.")
