"""A suspect network behind its guard, for any server that runs Python: arrays in, one answer per row out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self
from weakref import WeakSet

import numpy as np
import torch
from torch import nn

from guard.detection.pipeline import Guard
from guard.errors import DataError, InputRejectedError, SuspectModelError
from guard.serving.active_guard import ActiveGuard
from guard.serving.answers import Response, make_response
from guard.serving.outcomes import Outcome, OutcomeKind, Record, Requests, merge
from guard.serving.review_queue import flagged_request
from guard.serving.runtime import GuardRuntime
from guard.suspect.outputs import logits_of, output_place
from guard.suspect.recording import device_of
from guard.types import AnyArray, Float32Array


@dataclass(frozen=True, slots=True)
class RowRequests:
    """Who sent the rows of one call, as far as a server knows; without any, rows have their place as id.

    Attributes
    ----------
    ids : sequence of str
        One per row.
    sent : sequence of mapping
        The headers of the request that brought each row.
    """

    ids: Sequence[str] = ()
    sent: Sequence[Mapping[str, str]] = ()

    def request_id(self, index: int) -> str:
        """Return the id of a row."""
        return self.ids[index] if self.ids else str(index)

    def headers(self, index: int) -> Mapping[str, str]:
        """Return the headers of the request that brought a row."""
        return self.sent[index] if self.sent else {}


@dataclass(frozen=True, slots=True)
class RowAnswer:
    """What one row is answered with, as far as its sender may know.

    Attributes
    ----------
    logits : ndarray of shape (n_classes,), float32, or None
        None where the guard lets no answer out: the row is blocked, rejected or failed.
    verdict : {"clean", "poisoned", "bypassed", "rejected", "failed"}
    p_value : float
        In (0, 1]; NaN where the row was not scored, or its sender may not know (`verdict_detail`).
    response : Response
        Status, headers and error, for servers that speak HTTP.
    """

    logits: Float32Array | None
    verdict: OutcomeKind
    p_value: float
    response: Response

    @property
    def action(self) -> str:
        """What was done about it: `none`, `flag`, `block` or `relabel`."""
        return self.response.headers.get("Guard-Action", "none")

    @property
    def bundle(self) -> str:
        """Digest of the bundle that judged it; "" where none did."""
        return self.response.headers.get("Guard-Bundle", "")

    @property
    def error(self) -> str:
        """One line where there are no logits, else ""."""
        return "" if self.logits is not None else str((self.response.error or {}).get("message", "the input failed."))


class GuardedModel:
    """One suspect network, watched: every row gets one answer, is counted, and goes to the reviewers if flagged.

    Calls may come from several threads; they take turns.

    Parameters
    ----------
    module : Module
        The network, with the weights that the bundle was fitted for.
    bundles : path-like, optional
        Folder whose ACTIVE is followed while serving, or its URL in an object store (`s3://...`).
    bundle : path-like, optional
        Folder of one bundle, to start with where `bundles` does not exist, or cannot be reached.
    name : str
        Label of the metrics, and name of the model in the queue.
    **settings
        Serving settings that override those in the bundle: `action`, `failure_mode`, `false_positive_rate`, ..., and
        `queue_url`.

    Raises
    ------
    SuspectModelError, BundleError
        If there is no network, no bundle that was fitted for it, or another open `GuardedModel` of the same network.
    """

    _guarded: ClassVar[WeakSet[nn.Module]] = WeakSet()
    _turn: ClassVar[threading.Lock] = threading.Lock()

    def __init__(
        self,
        module: nn.Module,
        *,
        bundles: str | Path | None = None,
        bundle: str | Path | None = None,
        name: str = "model",
        **settings: Any,
    ) -> None:
        with self._turn:
            if isinstance(module, nn.Module):
                if module in self._guarded:
                    raise SuspectModelError(
                        "this network is guarded by another GuardedModel. Close that first, or load the network again."
                    )
                module.eval()
            self.runtime = GuardRuntime(
                module,
                settings,
                bundles=bundles,
                embedded=Path(bundle) if bundle is not None else None,
                model_name=name,
            )
            self._guarded.add(module)
        self.name = name
        self._is_closed = False

    @property
    def guard(self) -> Guard:
        """The guard in use; another one after a swap."""
        return self.runtime.current

    @property
    def input_shape(self) -> tuple[int, ...] | None:
        """Shape of a row without its batch axis; None if the bundle does not know."""
        return self.guard.input_shape

    @property
    def n_classes(self) -> int:
        """Columns of the logits."""
        return int(self.guard.reference.logits.shape[1])

    def answer(
        self,
        inputs: Float32Array,
        requests: Requests | None = None,
        bodies: Sequence[Any] = (),
        *,
        guard: Guard | None = None,
    ) -> list[RowAnswer]:
        """Let the network answer, judge every row, and return one answer each, in order. Does not raise for a bad row.

        Parameters
        ----------
        inputs : ndarray of shape (n, ...), float32
            What the network takes: preprocessing has been done.
        requests : Requests, optional
            Ids and headers, for logs, traces, deadlines and the queue.
        bodies : sequence, optional
            What the sender of each row sent, for the reviewers; without it they see what the network saw.
        guard : Guard, optional
            The one to judge by, for several calls that belong together: `guard` of this model as it was at the first.
            Default: the one in use.

        Raises
        ------
        DataError
            If `inputs` is no array of at least one row of float32, or there are not as many bodies, or ids, as rows.
        """
        if not isinstance(inputs, np.ndarray) or inputs.dtype != np.float32 or inputs.ndim < 2 or len(inputs) == 0:
            kind = f"{inputs.dtype} {inputs.shape}" if isinstance(inputs, np.ndarray) else type(inputs).__name__
            raise DataError(f"inputs must be a float32 array of one row or more, got {kind}.")
        images = torch.from_numpy(np.require(inputs, requirements=["C", "W"]))
        if bodies and len(bodies) != len(inputs):
            raise DataError(f"bodies must be one per row, {len(inputs)}, got {len(bodies)}.")
        if isinstance(requests, RowRequests) and not {len(requests.ids), len(requests.sent)} <= {0, len(inputs)}:
            sizes = f"{len(requests.ids)} ids and {len(requests.sent)} headers"
            raise DataError(f"requests must be one per row, {len(inputs)}, got {sizes}.")
        guard = guard or self.guard  # once: no call mixes two bundles
        known = requests or RowRequests()
        started = time.perf_counter()
        answered, guard_seconds = self._answered(guard, images, known)
        self.runtime.bookkeeping.stages(time.perf_counter() - started, guard_seconds)
        return row_answers(self.runtime, guard, answered, known, bodies)

    def columns(self, answers: Sequence[RowAnswer]) -> dict[str, AnyArray]:
        """Return answers as arrays with a row each, for servers that answer with named outputs.

        Returns
        -------
        columns : dict of str to ndarray
            `logits` of shape (n, n_classes), float32, NaN where no answer may leave; `guard_verdict` of shape (n,),
            str; `guard_p_value` of shape (n,), float64, NaN where it is not told.
        """
        return columns_of(answers, self.n_classes)

    def close(self) -> None:
        """Take the guard off the network, and close the way to the queue. Safe to call twice."""
        self.runtime.close()
        with self._turn:
            if not self._is_closed:
                self._guarded.discard(self.runtime.module)
            self._is_closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answered(
        self, guard: Guard, images: torch.Tensor, requests: Requests
    ) -> tuple[list[tuple[Float32Array | None, Outcome]], float]:
        """Return logits and outcome of every row, and the seconds that the guard took."""
        if guard.config.batching == "never" and len(images) > 1:
            return self._one_by_one(guard, images, requests)
        headers = [requests.headers(row) for row in range(len(images))]
        record = Record()
        try:
            with torch.inference_mode(), self.runtime.watching(guard, headers) as record:
                output = self.runtime.module(images.to(device_of(self.runtime.module)))
                logits = logits_of(output, output_place(self.runtime.module)).float().cpu().numpy()
        except Exception as error:  # it runs the user's network
            if len(images) > 1:  # a bad row spoils only itself
                return self._one_by_one(guard, images, requests)
            return [(None, _refused(error, record))], record.guard_seconds
        if len(logits) != len(images) or len(record.rows) != len(images):
            outcomes = [merge(guard, [])] * len(images)
            return [(None, outcome) for outcome in outcomes], record.guard_seconds
        return list(zip(logits, record.rows, strict=True)), record.guard_seconds

    def _one_by_one(
        self, guard: Guard, images: torch.Tensor, requests: Requests
    ) -> tuple[list[tuple[Float32Array | None, Outcome]], float]:
        answered, seconds = [], 0.0
        for row in range(len(images)):
            of_row = RowRequests([str(requests.request_id(row))], [requests.headers(row)])
            found, took = self._answered(guard, images[row : row + 1], of_row)
            answered += found
            seconds += took
        return answered, seconds


def row_answers(
    active: ActiveGuard,
    guard: Guard,
    answered: Sequence[tuple[Float32Array | None, Outcome]],
    requests: Requests,
    bodies: Sequence[Any] = (),
) -> list[RowAnswer]:
    """Queue what is flagged, count every row, and return what its sender gets, from the logits and outcome of each.

    Parameters
    ----------
    active : ActiveGuard
        Whose books and queue they go to.
    guard : Guard
        The one that judged them.
    answered : sequence of (ndarray of shape (n_classes,) or None, Outcome)
        One per row.
    requests, bodies
        As for `GuardedModel.answer`.
    """
    flagged = {
        row: flagged_request(requests, row, outcome, bodies[row] if bodies else b"")
        for row, (_, outcome) in enumerate(answered)
        if outcome.evidence is not None
    }
    receipts = dict(zip(flagged, active.send_to_review([*flagged.values()], guard), strict=True))
    answers = []
    for row, (logits, outcome) in enumerate(answered):
        response = make_response(outcome, logits, str(guard.digest), guard.config, receipts.get(row))
        active.bookkeeping.request(outcome, response.status, guard, requests, row)
        told = outcome.verdict if guard.config.verdict_detail == "full" else None
        p_value = told.p_value if told is not None else math.nan
        answers.append(RowAnswer(logits if response.status < 400 else None, outcome.kind, p_value, response))
    return answers


def columns_of(answers: Sequence[RowAnswer], n_classes: int) -> dict[str, AnyArray]:
    """Return answers as `GuardedModel.columns` does."""
    nothing = np.full(n_classes, np.nan, dtype=np.float32)
    return {
        "logits": np.stack([nothing if answer.logits is None else answer.logits for answer in answers]),
        "guard_verdict": np.array([answer.verdict for answer in answers]),
        "guard_p_value": np.array([answer.p_value for answer in answers]),
    }


def _refused(error: Exception, record: Record) -> Outcome:
    """Return the outcome of a row on which the network raised; the text of an error may quote the input."""
    if isinstance(error, InputRejectedError):
        return Outcome("rejected", status=error.status, message=str(error)[:300])
    if isinstance(error, MemoryError):
        return Outcome("failed", status=507, message="out of memory.")
    return Outcome("failed", status=500, message=f"the model failed on this input: {type(error).__name__}.")
