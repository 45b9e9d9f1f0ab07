"""How a batch is answered: together only where it is known whose row is whose, else one request after the other."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from guard.detection.pipeline import Guard
from guard.errors import ArchiveError, InputRejectedError, SuspectModelError
from guard.serving.bookkeeping import WITHDRAWN
from guard.serving.outcomes import Outcome, Record, merge
from guard.serving.runtime import GuardRuntime
from guard.serving.single_image import holds_one_image
from guard.serving.tap import Tap, is_same_row, tapped
from guard.torchserve.answers import excuse
from guard.torchserve.row_fidelity import answers_of, declares_one_row, is_same_answer, why_one_by_one
from guard.torchserve.user_handler import asked_in_probe
from guard.torchserve.worker import request_context

#: Request headers that make a BaseHandler skip its model.
EXPLAIN = "explain"
SWITCHES = ("describe", EXPLAIN)
#: Of so many batches that are answered together one is checked: about one request more in 256 batches.
CHECK_ONE_IN = 256

#: The body of one answer and what became of the request; None = it was no input at all.
Answered = tuple[Any, Outcome | None]


class Unreadable:
    """Stands in for a request that a service envelope could not turn into one input; its text says why."""

    def __init__(self, message: str) -> None:
        self.message = message


class Batches:
    """Runs a user's handler under guard.

    Parameters
    ----------
    handler : object
        With a method `handle(data, context)`, as TorchServe calls it.
    runtime : GuardRuntime
    """

    def __init__(self, handler: Any, runtime: GuardRuntime) -> None:
        self._handler = handler
        self._module = runtime.module
        self._runtime = runtime
        self._is_declared = declares_one_row(handler)
        self._why_one_by_one = "" if self._is_declared else "it was not tried when the worker started"
        self._is_withdrawn = False
        self._answers_compare = False
        self._random = random.SystemRandom()  # a client must not guess which batch is checked

    def try_out(self, context: Any, examples: Sequence[bytes]) -> None:
        """Find out whether the handler keeps requests apart, before it serves, and write it to the log.

        Parameters
        ----------
        context : ts.context.Context
            As handed to `initialize`.
        examples : sequence of bytes
            Bodies of requests that clients may send; without one, noise of the network's size.
        """
        config, largest = self._runtime.current.config, int(context.system_properties.get("batch_size") or 1)
        if largest < 2 or config.rows_per_request == "any" or config.batching != "shown":
            why = self._why_not(self._runtime.current)
            self._runtime.bookkeeping.batching("batches of one" if largest < 2 else why)
            return
        if not self._is_declared:
            self._why_one_by_one = why_one_by_one(
                partial(asked_in_probe, self._handler, context),
                self._module,
                examples,
                self._runtime.current.input_shape,
                largest,
            )
            self._answers_compare = not self._why_one_by_one
        self._runtime.bookkeeping.batching(self._why_one_by_one)

    def answer(self, data: Sequence[Any], context: Any, guard: Guard) -> list[Answered]:
        """Return one answer per request, in order, all judged by the same guard; a bad one spoils only itself.

        Parameters
        ----------
        data : sequence
            The requests of a batch, as the server hands them over.
        context : ts.context.Context
            Statuses and headers of the answers are set in it.
        guard : Guard
        """
        if len(data) == 1:
            return [self._answer_alone(data[0], context, guard)]
        answered: dict[int, Answered] = {}
        shared = self._sharing(data, guard)
        if len(shared) == len(data):
            answered = dict(enumerate(self._answer_together(data, context, guard) or ()))
        elif len(shared) > 1:
            part = part_of(context, shared)
            together = self._answer_together([data[index] for index in shared], part, guard)
            if together is not None:
                answered = dict(zip(shared, together, strict=True))
                for place, index in enumerate(shared):
                    context.request_processor[index] = part.request_processor[place]
        for index, item in enumerate(data):
            if index not in answered:
                alone = part_of(context, [index])
                answered[index] = self._answer_alone(item, alone, guard)
                context.request_processor[index] = alone.request_processor[0]
        return [answered[index] for index in range(len(data))]

    def explain(self, item: Any, context: Any, index: int, judged: Answered) -> Answered:
        """Return the handler's explanation of a request in the place of its prediction; an error stays what it is.

        The network's own passes meanwhile are not judged: the request was, and its verdict goes with the explanation. A
        flagged request whose answer is replaced or blocked is not explained.
        """
        _, outcome = judged
        if outcome is None or outcome.kind in ("rejected", "failed") or context.get_response_status(index)[0] >= 400:
            return judged
        if outcome.verdict is not None and outcome.verdict.action in ("relabel", "block"):
            return judged  # the handler would say what the suspect answered
        alone = part_of(context, [index])
        alone.get_all_request_header(0)[EXPLAIN] = "True"
        try:
            with self._runtime.watching(None):
                (explanation,) = self._handler.handle([copied(item)], alone)
        except Exception as error:
            return None, excuse(error, model_ran=True)
        context.request_processor[index] = alone.request_processor[0]
        return explanation, outcome

    def _why_not(self, guard: Guard) -> str:
        """Return why this handler's batches are answered one by one; "" if they are not."""
        if self._is_withdrawn:
            return WITHDRAWN
        if guard.config.rows_per_request == "any":
            return "a request may make several rows (rows_per_request)"
        if guard.config.batching == "never":
            return "the setting batching says so"
        return "" if guard.config.batching == "declared" else self._why_one_by_one

    def _sharing(self, data: Sequence[Any], guard: Guard) -> list[int]:
        """Return which requests of a batch may share one call."""
        if self._why_not(guard) or any(map(is_empty, data)):
            return []
        if self._is_declared or guard.config.batching == "declared":
            return list(range(len(data)))
        return [index for index, item in enumerate(data) if holds_one_image(item)]

    def _answer_together(self, data: Sequence[Any], context: Any, guard: Guard) -> list[Answered] | None:
        """Run the handler once for all; None if that fails, or it is not sure whose row is whose."""
        checked, started, record = self.drawn(len(data)), time.perf_counter(), Record()
        headers = map(context.get_all_request_header, range(len(data)))
        try:
            with (
                self._runtime.watching(guard, headers) as record,
                nullcontext() if checked is None else tapped(self._module) as tap,
            ):
                bodies = self._handler.handle([*map(copied, data)], context)
        except Exception:
            return None
        self._runtime.bookkeeping.stages(time.perf_counter() - started, record.guard_seconds)
        if not isinstance(bodies, list) or len(bodies) != len(data):
            return None
        refused = any(context.get_response_status(index)[0] >= 400 for index in range(len(data)))
        if refused or record.forward_passes != 1 or len(record.rows) != len(data):
            return None
        if checked is not None and tap is not None:
            answers = answers_of(bodies, context, len(data)) or []
            holds = self._is_kept_apart(tap, checked, data[checked], answers[checked], part_of(context, [checked]))
            self._runtime.bookkeeping.batch_checked(holds)
            if not holds:
                self._is_withdrawn = True
                return None  # its answers have not left yet
        return list(zip(bodies, record.rows, strict=True))

    def drawn(self, n_requests: int) -> int | None:
        """Return which request of a batch is to be run again alone; mostly None."""
        return self._random.randrange(n_requests) if self._random.random() * CHECK_ONE_IN < 1 else None

    def _is_kept_apart(self, batch: Tap, place: int, item: Any, answer: Any, alone: Any) -> bool:
        """Run one request of a batch again, and compare what reaches the network, and its answer to the same logits."""
        if len(batch.inputs) != 1 or batch.inputs[0] is None or len(batch.inputs[0]) <= place:
            return False
        given = batch.logits[0][place : place + 1]
        try:
            with tapped(self._module, lambda logits: given.clone() if len(logits) == 1 else logits) as tap:
                again = answers_of(self._handler.handle([copied(item)], alone), alone, 1)
        except Exception:
            return False
        if len(tap.inputs) != 1 or tap.inputs[0] is None or len(tap.inputs[0]) != 1 or again is None:
            return False
        if not is_same_row(batch.inputs[0][place], tap.inputs[0][0]):
            return False
        return not self._answers_compare or is_same_answer(answer, again[0])

    def _answer_alone(self, item: Any, context: Any, guard: Guard, *, watch: bool = True) -> Answered:
        """Run the handler for one request, or for its question about the model."""
        empty = is_empty(item)
        asks = empty and any(context.get_request_header(0, name) == "True" for name in SWITCHES)
        started, record = time.perf_counter(), Record()
        try:
            if isinstance(item, Unreadable):
                raise InputRejectedError(item.message, 400)
            with self._runtime.watching(guard if watch else None, [context.get_all_request_header(0)]) as record:
                bodies = self._handler.handle([copied(item)], context) if asks or not empty else []
            if empty and (record.model_ran or not asks):
                raise InputRejectedError(_nothing_in(item), 400)
            if not isinstance(bodies, list) or len(bodies) != 1:
                raise ArchiveError("the handler must return a list with one answer per request (1).")
        except Exception as error:
            if watch and isinstance(error, SuspectModelError) and guard.config.failure_mode == "open":
                return self._answer_alone(item, context, guard, watch=False)  # nothing to see: answered as bypassed
            return None, excuse(error, record.model_ran)
        status = context.get_response_status(0)[0]
        if asks and status < 400:
            return bodies[0], None
        self._runtime.bookkeeping.stages(time.perf_counter() - started, record.guard_seconds)
        return bodies[0], merge(guard, record.rows, status)


def _nothing_in(item: Any) -> str:
    if isinstance(item, dict) and item.keys() - {"body", "data"}:  # so TorchServe reads what curl -d sends
        return (
            "the request has form fields without content, and no body. Send the input itself with another Content-Type "
            "than application/x-www-form-urlencoded, as curl -T does."
        )
    return "the request has no body."


def part_of(context: Any, indices: Sequence[int]) -> Any:
    """Return a context for some requests of a batch, as if they had come by themselves."""
    headers = [context.get_all_request_header(index) for index in indices]
    return request_context(context, [context.get_request_id(index) for index in indices], headers)


def copied(item: Any) -> Any:
    """Return a request for the handler to take apart: run again, or kept as evidence, it must still be whole."""
    return dict(item) if isinstance(item, dict) else item


def is_empty(item: Any) -> bool:
    """Return whether a request holds nothing; a service envelope hands over no mapping."""
    return not any(item.values() if isinstance(item, dict) else [item])
