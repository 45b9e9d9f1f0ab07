"""Names and signatures that the adapters of older archives look for in `guard.serving`.

An archive carries the adapter of the version that made it. Every such adapter imports `guard.pipeline`, a name of
before modules had moved, and nothing else does: `guard/__init__.py` imports this module with it.
"""

from __future__ import annotations

from typing import Any

from guard.config import GuardConfig
from guard.serving import answers, outcomes, review_queue, runtime
from guard.torchserve import answers as in_torchserve


class _Answer:
    """A response as it was: with the body of an error in it."""

    def __init__(self, response: answers.Response) -> None:
        self.status, self.headers, self.is_error = response.status, response.headers, response.error is not None
        self.body = response.body
        if response.error is not None:
            self.body = in_torchserve.error_body(response.status, **response.error)


class _Bookkeeping:
    """Bookkeeping that takes TorchServe's context for the requests of a batch."""

    def __init__(self, bookkeeping: Any) -> None:
        self._bookkeeping = bookkeeping

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bookkeeping, name)

    def request(self, outcome: Any, status: int, guard: Any, context: Any, index: int) -> None:
        """Count one answered request."""
        self._bookkeeping.request(outcome, status, guard, in_torchserve.Requests(context), index)


def _make_answer(
    outcome: Any, body: Any, digest: str, config: Any = None, receipt: Any = None, *, verdict_in_body: bool = False
) -> _Answer:
    config = config or GuardConfig(verdict_in_body=verdict_in_body)
    return _Answer(answers.make_response(outcome, body, digest, config, receipt))


def _set_answer(context: Any, index: int, answer: _Answer) -> None:
    error = answer.body if answer.is_error else None
    response = answers.Response(answer.status, answer.body, answer.headers, error and _without_code(error))
    in_torchserve.set_answer(context, index, response)


def _without_code(error: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in error.items() if name != "code"}


def _flagged_request(context: Any, index: int, outcome: Any, item: Any) -> Any:
    is_new = callable(getattr(context, "request_id", None))  # where adapters of both kinds run in one process
    requests = context if is_new else in_torchserve.Requests(context)
    return _new_flagged_request(requests, index, outcome, item)


_new_flagged_request = review_queue.flagged_request
_OLD: dict[Any, dict[str, Any]] = {
    answers: {"make_answer": _make_answer, "set_answer": _set_answer, "excuse": in_torchserve.excuse},
    review_queue: {"flagged_request": _flagged_request},
    runtime: {"merge": outcomes.merge, "Outcome": outcomes.Outcome},
    runtime.GuardRuntime: {"books": property(lambda self: _Bookkeeping(self.bookkeeping))},
    # They took one pass with as many rows as requests for a row each, which it need not be. Without a single pass they
    # answer a batch one request after the other.
    outcomes.Record: {"passes": property(lambda _: 0)},
}
for _home, _names in _OLD.items():
    for _name, _value in _names.items():
        setattr(_home, _name, _value)
