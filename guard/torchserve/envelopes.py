"""TorchServe's service envelopes, one request at a time: they join a batch's inputs, and then nobody can part them.

The JSON envelope answers a batch by slices of lengths that one wrong request shifts for all; those of KServe read the
first request only, and a batch of two fails.
"""

from __future__ import annotations

from typing import Any

from guard.torchserve.answers import error_body
from guard.torchserve.batches import Unreadable, part_of


def handle_each(envelope: Any, data: list[Any], context: Any) -> list[Any]:
    """Do what `BaseEnvelope.handle` does, for every request by itself.

    A request that the envelope cannot read, or that holds anything but one input, is answered 400; its neighbours get
    their answers.

    Parameters
    ----------
    envelope : ts.torch_handler.request_envelope.base.BaseEnvelope
    data : list of dict
        The requests of a batch, as TorchServe hands them over.
    context : ts.context.Context
    """
    if type(envelope).__name__ == "BodyEnvelope":  # takes fields out, and joins nothing
        envelope.context = context
        return list(envelope.format_output(envelope._handle_fn(envelope.parse_input(data), context)))
    answers = []
    for index, item in enumerate(data):
        alone = part_of(context, [index])
        answers.append(_answer(envelope, item, alone))
        context.request_processor[index] = alone.request_processor[0]
    return answers


def _answer(envelope: Any, item: Any, context: Any) -> Any:
    envelope.context = context
    try:
        inputs = envelope.parse_input([item])
        problem = "" if isinstance(inputs, list) and len(inputs) == 1 else _count(inputs)
    except Exception as error:  # its text may be anything
        problem = f"the request cannot be read as the service envelope has it: {type(error).__name__}."
    if problem:
        (answer,) = envelope._handle_fn([Unreadable(problem)], context)
        return answer
    results = envelope._handle_fn(inputs, context)
    try:
        (answer,) = envelope.format_output(results)
    except Exception as error:
        context.get_response_headers(0).clear()
        context.set_response_status(500, "", 0)
        context.set_response_content_type(0, "application/json")
        answer = error_body(500, "GuardFailed", f"the service envelope failed on the answer: {type(error).__name__}.")
    return answer


def _count(inputs: Any) -> str:
    held = f"{len(inputs)} inputs" if isinstance(inputs, list) else "no list of inputs"
    return f"a request must hold one input, as it gets one verdict; this one holds {held}. Send each by itself."
