"""Whether a handler keeps the requests of a batch apart: one row of the network each, in order, and answers in order.

A handler shows it to a probe before it serves: marked requests alone, and then together in several sizes and orders,
some twice, and among such as it may stumble over. What reached the network is compared row by row; that each answer
belongs to its row is seen by logits that the probe puts in the place of the network's own.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from guard.serving.single_image import holds_one_image
from guard.serving.tap import is_same_row, tapped
from guard.torchserve.probe_bodies import distinct_images, odd_images

#: A class with this attribute, its own and not inherited, declares: one row of one forward pass per request whatever
#: its body, rows and answers in the order of the requests, or an error.
DECLARATION = "one_row_per_request"
#: Largest batch that is tried.
_LARGEST = 8
#: Numbers of an answer may differ by this much, absolutely and relatively: a softmax of a batch rounds otherwise.
_CLOSE = 1e-4
#: What a person can do about a handler that cannot be tried.
_DECLARE = 'If it makes one row of every request, in order, set batching = "declared" in guard.toml'
#: Where TorchServe's metrics leave a worker; a probe is no traffic, and must not count.
_METRICS_LOG = "ts.metrics.caching_metric"

#: Handles the items of a batch in a fresh context; returns what the handler did, and that context.
Ask = Callable[[list[Any]], tuple[Any, Any]]


@dataclass(frozen=True, slots=True)
class Seen:
    """What became of the requests of one call.

    Attributes
    ----------
    passes : int
        Forward passes that were made.
    rows : list of Tensor
        Of the network's input, of all passes.
    n_classes : int
        Columns of the logits; 0 if no pass ended.
    answers : list of (body, status, headers), or None
        One per request; None if the handler raised, refused any of them, or gave no list of that length.
    """

    passes: int
    rows: list[Tensor] = field(default_factory=list)
    n_classes: int = 0
    answers: list[tuple[Any, int, dict[str, str]]] | None = None

    def is_told_apart(self, n_requests: int) -> bool:
        """Return whether a count says that every request has one row: the rule that a batch is accepted by."""
        return self.answers is not None and self.passes == 1 and len(self.rows) == n_requests


class _NotShownError(Exception):
    """Why the requests of this handler are answered one by one."""


def declares_one_row(handler: object) -> bool:
    """Return whether a handler's own class declares that it keeps requests apart; its parents' word does not count."""
    return vars(type(handler)).get(DECLARATION) is True


def why_one_by_one(
    ask: Ask,
    module: nn.Module,
    examples: Sequence[bytes],
    input_shape: Sequence[int] | None,
    batch_size: int = _LARGEST,
) -> str:
    """Try a handler, and return "" if it keeps the images of a batch apart; else why it is not known to, in one line.

    Parameters
    ----------
    ask : callable (items) -> (result, context)
        Calls the handler with one batch.
    module : Module
        Its network.
    examples : sequence of bytes
        Bodies of requests that clients may send.
    input_shape : (channels, height, width) or None
        Of the network's input; makes examples where there are none.
    batch_size : int
        Largest batch that it will get.
    """
    logger = logging.getLogger(_METRICS_LOG)
    was_disabled, logger.disabled = logger.disabled, True
    try:
        images = distinct_images(examples, input_shape)
        are_noise = not any(map(holds_one_image, examples))
        _Probe(ask, module, min(batch_size, _LARGEST)).run(images, are_noise)
    except _NotShownError as reason:
        return str(reason)
    except Exception as error:  # it runs the user's code
        return f"the handler could not be tried ({type(error).__name__})"
    finally:
        logger.disabled = was_disabled
    return ""


def is_same_answer(first: Any, second: Any) -> bool:
    """Return whether two answers say the same, but for the rounding of numbers; text that is JSON is read as such."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    if isinstance(first, int | float) and isinstance(second, int | float):
        return math.isclose(first, second, rel_tol=_CLOSE, abs_tol=_CLOSE) or (first != first and second != second)
    if type(first) is not type(second):
        return False
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(is_same_answer(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(is_same_answer, first, second))
    if isinstance(first, str | bytes | bytearray) and first != second:
        try:
            parsed = json.loads(first), json.loads(second)
        except (ValueError, RecursionError):
            return False
        return not isinstance(parsed[0], str) and is_same_answer(*parsed)
    if hasattr(first, "tolist"):
        return is_same_answer(first.tolist(), second.tolist())
    return bool(first == second)


def answers_of(result: Any, context: Any, n_requests: int) -> list[tuple[Any, int, dict[str, str]]] | None:
    """Return body, status and headers of every answer; None if it is no list of them, or any is an error."""
    if not isinstance(result, list) or len(result) != n_requests:
        return None
    answers = [
        (body, context.get_response_status(index)[0], dict(context.get_response_headers(index)))
        for index, body in enumerate(result)
    ]
    return answers if all(status < 400 for _, status, _ in answers) else None


class _Probe:
    def __init__(self, ask: Ask, module: nn.Module, largest: int) -> None:
        self._ask = ask
        self._module = module
        self._largest = largest
        self._marks: list[Tensor] = []
        self._alone: dict[tuple[int, int], Seen] = {}  # by the body's identity and the number of the mark

    def run(self, images: Sequence[bytes], are_noise: bool) -> None:
        """Raise _NotShownError unless everything is as it must be."""
        if not images:
            raise _NotShownError(f"no example request is one image, and no image can be made in its place. {_DECLARE}")
        kept = self._told_apart(images, are_noise)
        self._choose_marks(kept[0])
        for order in self._orders(len(kept)):
            self._check_good([kept[index] for index in order])
        odd = odd_images(kept[0])
        for kind, body in odd.items():
            seen = self._seen([body])
            if len(seen.rows) > 1:  # an error by itself, perhaps, and beside a request that makes none it counts
                raise _NotShownError(f"an image {kind} makes {len(seen.rows)} rows of the network's input")
            self._check_mixed([kept[0], body, kept[1]], f"an image {kind}")
        lists = self._lists(kept)
        counts = {id(body): len(self._seen([body]).rows) for body in lists}
        for several, none in product(lists, lists):
            if counts[id(several)] > 1 and counts[id(none)] == 0:
                self._check_mixed([kept[0], several, none, kept[1]], "a body with two inputs beside one with none")

    def _told_apart(self, images: Sequence[bytes], are_noise: bool) -> list[bytes]:
        """Return those images of which each makes one row, unlike those of the others."""
        kept: list[tuple[bytes, Tensor]] = []
        for image in images:
            seen = self._seen([image])
            if seen.answers is None:
                continue
            if not seen.rows:
                raise _NotShownError("the handler answers an example without calling its network as a whole")
            if not seen.is_told_apart(1):
                raise _NotShownError(f"one example makes {len(seen.rows)} rows in {seen.passes} forward passes")
            if not any(is_same_row(seen.rows[0], row) for _, row in kept):
                kept.append((image, seen.rows[0]))
        if not kept:
            of_noise = (
                ", which are noise as PNG, for no example request is one image. Bodies of other kinds, such as JSON, "
                f"are not tried together. {_DECLARE}"
            )
            raise _NotShownError(f"the handler takes none of the example images{of_noise if are_noise else ''}")
        if len(kept) < 2:
            raise _NotShownError("the examples cannot be told apart by what reaches the network")
        return [image for image, _ in kept]

    def _choose_marks(self, image: bytes) -> None:
        """Find logits that the answers tell apart."""
        first = self._seen([image])
        if not first.is_told_apart(1):
            raise _NotShownError("the same request does not reach the network a second time")
        n_classes = first.n_classes
        for label in range(min(max(n_classes, 2), 4)):
            mark = torch.zeros(n_classes)
            mark[label % n_classes] = (6.0 + label) * (-1 if label >= n_classes else 1)
            self._marks.append(mark)
        chosen: list[Tensor] = []
        answers: list[Any] = []
        for number, mark in enumerate(self._marks):
            alone, again = self._alone_with(image, number), self._alone_with(image, number, again=True)
            for seen in (alone, again):
                if not seen.is_told_apart(1) or not is_same_row(seen.rows[0], first.rows[0]):
                    raise _NotShownError("the same request does not reach the network as it did the first time")
            assert alone.answers is not None
            if not is_same_answer(alone.answers, again.answers):
                raise _NotShownError("the same request gets another answer the second time")
            if not any(is_same_answer(alone.answers, answer) for answer in answers):
                chosen.append(mark)
                answers.append(alone.answers)
        if len(chosen) < 2:
            raise _NotShownError("its answers do not change with the network's logits, so nobody knows whose they are")
        self._marks = chosen
        self._alone.clear()  # numbers of marks have changed

    def _orders(self, n_images: int) -> Iterator[list[int]]:
        """Yield the batches: which image comes at each place."""
        whole = list(range(n_images))
        full = [(3 * place + place // 3) % n_images for place in range(self._largest)]
        for order in ([0, 1], [1, 0], [0, 0], [1, 0, 0], [0, 1, 0], whole, whole[::-1], full):
            if len(order) <= self._largest:
                yield order

    def _check_good(self, bodies: list[Any]) -> None:
        """Every place of the batch is known by its mark over several calls: digits of a number system."""
        for digit in range(max(1, math.ceil(math.log(len(bodies), len(self._marks))))):
            places = [place // len(self._marks) ** digit % len(self._marks) for place in range(len(bodies))]
            seen = self._seen(bodies, places)
            if seen.answers is None:
                raise _NotShownError(
                    f"it answers {len(bodies)} good requests by themselves, and fails on them together"
                )
            if not seen.is_told_apart(len(bodies)):
                raise _NotShownError(
                    f"a batch of {len(bodies)} requests makes {len(seen.rows)} rows in {seen.passes} forward passes"
                )
            self._compare(seen, bodies, places, f"a batch of {len(bodies)}")

    def _check_mixed(self, bodies: list[Any], kind: str) -> None:
        """A batch that would be accepted must be right; one that fails, or is counted out, is answered one by one."""
        places = [place % len(self._marks) for place in range(len(bodies))]
        if len(bodies) <= self._largest:
            seen = self._seen(bodies, places)
            if seen.is_told_apart(len(bodies)):
                self._compare(seen, bodies, places, f"a batch with {kind}")

    def _compare(self, seen: Seen, bodies: list[Any], places: list[int], kind: str) -> None:
        assert seen.answers is not None
        for body, place, row, answer in zip(bodies, places, seen.rows, seen.answers, strict=True):
            alone = self._alone_with(body, place)
            if not alone.is_told_apart(1) or not is_same_row(row, alone.rows[0]):
                raise _NotShownError(f"in {kind} a request's row of the network's input is another than alone")
            assert alone.answers is not None
            if not is_same_answer(answer, alone.answers[0]):
                raise _NotShownError(f"in {kind} an answer is not that of its own row")

    def _alone_with(self, body: Any, mark: int, *, again: bool = False) -> Seen:
        key = id(body), mark
        if again or key not in self._alone:
            self._alone[key] = self._seen([body], [mark])
        return self._alone[key]

    def _stacked(self, places: list[int], logits: Tensor) -> Tensor:
        """Return the marks of the places; rows beyond them keep their own."""
        marked = logits.clone()
        for row, place in enumerate(places[: len(marked)]):
            marked[row] = self._marks[place].to(marked)
        return marked

    def _seen(self, bodies: list[Any], places: list[int] | None = None) -> Seen:
        """Call the handler; with places, each row gets the logits of its mark."""
        replace = None if places is None else partial(self._stacked, places)
        items = [{"body": bytearray(body) if isinstance(body, bytes) else body} for body in bodies]
        with tapped(self._module, replace) as tap:
            try:
                answers = answers_of(*self._ask(items), len(bodies))
            except Exception:
                answers = None
        if any(inputs is None for inputs in tap.inputs):
            raise _NotShownError("what the network takes is no tensor")
        rows = [row for inputs in tap.inputs if inputs is not None for row in inputs]
        return Seen(len(tap.inputs), rows, tap.logits[0].shape[1] if tap.logits else 0, answers)

    def _lists(self, kept: Sequence[bytes]) -> list[Any]:
        """Return JSON with two inputs and with none, as far as TorchServe's users write it."""
        first, second = (self._seen([image]).rows[0].cpu().tolist() for image in kept[:2])
        bodies: list[Any] = [[first, second], []]
        for key in ("instances", "inputs", "data"):
            bodies += [{key: [first, second]}, {key: []}]
        return bodies
