"""Calls that share a forward pass: each gets its own rows, in order, whatever becomes of the others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from guard.serving.guarded_model import RowRequests
from guard.v2.batching import Batcher, OverloadedError


class Model:
    """Answers a row with its first value, its id and its header; held back until `go` is set."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.go = threading.Event()
        self.begun = threading.Event()

    def answer(self, rows: Any, requests: RowRequests) -> Any:
        self.begun.set()
        assert self.go.wait(10)
        self.sizes.append(len(rows))
        if (rows < 0).any():
            raise ValueError("a negative row")
        return [(row.ravel()[0], requests.request_id(n), requests.headers(n)["k"]) for n, row in enumerate(rows)]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def batcher(model: Model) -> Iterator[Batcher]:
    made = Batcher(lambda: model.answer, batch_size=4, max_delay_s=0.05, max_waiting_rows=10)
    yield made
    model.go.set()
    made.close()


def rows(*values: float, width: int = 2) -> Any:
    return np.repeat(np.float32(values)[:, None], width, axis=1)


def test_calls_that_wait_share_batches_and_get_their_own_rows(model: Model, batcher: Batcher) -> None:
    first = batcher.submit(rows(0), "a", {"k": "A"})
    assert model.begun.wait(10)
    later = [batcher.submit(rows(*range(n, n + n)), f"c{n}", {"k": str(n)}) for n in (1, 2, 3)]
    model.go.set()
    assert first.result(10) == [(0, "a", "A")]
    assert [future.result(10) for future in later] == [
        [(1, "c1", "1")],
        [(2, "c2/0", "2"), (3, "c2/1", "2")],
        [(3, "c3/0", "3"), (4, "c3/1", "3"), (5, "c3/2", "3")],
    ]
    assert model.sizes == [1, 4, 2]  # no more rows at once than a batch has


def test_calls_of_other_shapes_do_not_share_a_pass(model: Model, batcher: Batcher) -> None:
    batcher.submit(rows(0), "a", {"k": ""})
    assert model.begun.wait(10)
    narrow, wide = batcher.submit(rows(1), "n", {"k": ""}), batcher.submit(rows(2, width=3), "w", {"k": ""})
    model.go.set()
    assert (narrow.result(10)[0][0], wide.result(10)[0][0]) == (1, 2)
    assert model.sizes == [1, 1, 1]


def test_failure_reaches_the_calls_of_its_batch_and_no_other(model: Model, batcher: Batcher) -> None:
    model.go.set()
    failing = batcher.submit(rows(-1), "f", {"k": ""})
    with pytest.raises(ValueError, match="a negative row"):
        failing.result(10)
    assert batcher.submit(rows(3), "g", {"k": ""}).result(10)[0][0] == 3


def test_call_whose_sender_has_gone_costs_no_pass_and_gives_its_place_back(model: Model, batcher: Batcher) -> None:
    batcher.submit(rows(0), "a", {"k": ""})
    assert model.begun.wait(10)
    gone, there = batcher.submit(rows(1), "gone", {"k": ""}), batcher.submit(rows(2), "there", {"k": ""})
    assert gone.cancel()
    model.go.set()
    assert there.result(10)[0][1] == "there"
    assert model.sizes == [1, 1]
    for _ in range(5):  # ten rows may wait, and none does
        assert batcher.submit(rows(*range(10)), "full", {"k": ""}).result(10)[9][0] == 9


def test_more_rows_than_may_wait_are_refused(model: Model, batcher: Batcher) -> None:
    large = batcher.submit(rows(*range(10)), "large", {"k": ""})
    with pytest.raises(OverloadedError, match=r"^10 rows wait already\. Try again later\.$"):
        batcher.submit(rows(1), "b", {"k": ""})
    model.go.set()
    assert len(large.result(10)) == 10
    for _ in range(3):  # the place is given back
        assert batcher.submit(rows(1), "b", {"k": ""}).result(10)[0][1] == "b"


def test_close_answers_what_waits_and_refuses_what_comes(model: Model, batcher: Batcher) -> None:
    waiting = [batcher.submit(rows(n), str(n), {"k": ""}) for n in range(3)]
    model.go.set()
    batcher.close()
    assert [future.result(0)[0][0] for future in waiting] == [0, 1, 2]
    with pytest.raises(OverloadedError, match=r"^the server is stopping\.$"):
        batcher.submit(rows(1), "late", {"k": ""})
    batcher.close()
