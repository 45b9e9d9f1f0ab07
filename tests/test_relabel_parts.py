"""Small parts of the queue by themselves: tensors as bytes, the call thread, the rule of the quorum."""

from __future__ import annotations

import pickle
import threading
import time

import numpy as np
import pytest
from queue_helpers import START, flagged

from guard import Activations
from guard.errors import QueueError, QueueUnavailable
from guard.relabel.blobs import pack_activations, pack_inputs, unpack_activations, unpack_inputs
from guard.relabel.call_thread import CallThread
from guard.relabel.deciding import outcome
from guard.relabel.items import Decision

# --- tensors ---


def test_tensors_survive_packing_whatever_their_memory_looks_like():
    inputs = np.arange(24, dtype=np.float32).reshape(2, 3, 4)[:, ::2, ::-1]  # not contiguous
    np.testing.assert_array_equal(unpack_inputs(pack_inputs(inputs)), inputs)


def test_depths_keep_their_order_and_odd_names():
    names = ["layer.10", "layer.2", "depth.0.x", "logits", "é \n"]
    depths = {name: np.full((1, 2), place, np.float32) for place, name in enumerate(names)}
    given = Activations(np.ones((1, 3), np.float32), np.zeros((1, 4), np.float32), depths)
    got = unpack_activations(pack_activations(given))
    assert list(got.depths) == names
    for name, array in depths.items():
        np.testing.assert_array_equal(got.depths[name], array)
    np.testing.assert_array_equal(got.logits, given.logits)


@pytest.mark.parametrize("data", [b"", b"rubbish", pickle.dumps({"inputs": 1}), pack_inputs(flagged().inputs)[:-4]])
def test_damaged_tensors_are_refused_and_never_unpickled(data):
    for unpack in (unpack_inputs, unpack_activations):
        with pytest.raises(QueueError, match="a tensor of the queue is damaged"):
            unpack(data)


# --- the quorum ---


def vote(number: int, reviewer: str, label: int | None = None) -> Decision:
    """A vote for "poisoned" with a true label, or, without one, for a false alarm."""
    return Decision(
        id=number,
        item_id=1,
        reviewer=reviewer,
        is_poisoned=label is not None,
        true_label=label,
        decided_at=START,
        supersedes=None,
        withdrawn=False,
        note="",
    )


@pytest.mark.parametrize(
    ("votes", "quorum", "expected"),
    [
        ([], 1, None),
        ([vote(1, "ana", 5)], 1, 1),
        ([vote(1, "ana", 5)], 2, None),
        ([vote(1, "ana")], 2, 1),
        ([vote(1, "ana", 5), vote(2, "ana", 5)], 2, None),  # one reviewer is one vote
        ([vote(1, "ana", 5), vote(2, "ben", 6)], 2, None),
        ([vote(1, "ana", 5), vote(2, "ben", 6), vote(3, "cleo", 5)], 2, 3),
        ([vote(1, "ana", 5), vote(2, "ben")], 2, None),
        ([vote(1, "ana", 5), vote(2, "ben"), vote(3, "cleo")], 2, 3),
        ([vote(1, "ana", 5), vote(2, "ben", 6)], 1, 2),  # of two answers that would do, the later
    ],
)
def test_outcome_of_votes(votes, quorum, expected):
    assert outcome(votes, quorum) == expected


# --- the call thread ---


def test_call_thread_returns_and_raises_what_the_call_does():
    calls = CallThread()
    assert calls.run(lambda: 7, 5) == 7
    with pytest.raises(ZeroDivisionError):
        calls.run(lambda: 1 // 0, 5)
    calls.close()
    assert calls.run(lambda: 8, 5) == 8  # a new thread
    calls.close()


def test_call_thread_gives_up_in_time_and_drops_calls_that_wait_behind():
    calls, release, ran = CallThread(), threading.Event(), []
    began = time.monotonic()
    with pytest.raises(QueueUnavailable, match=r"did not answer within 0\.1 s"):
        calls.run(release.wait, 0.1)
    with pytest.raises(QueueUnavailable, match="still does not answer"):
        calls.run(lambda: ran.append(1), 60)
    assert time.monotonic() - began < 10
    release.set()
    for _ in range(100):
        try:
            assert calls.run(lambda: "back", 5) == "back"
            break
        except QueueUnavailable:
            time.sleep(0.01)
    else:
        pytest.fail("the call thread did not come back")
    assert ran == []
    calls.close()
