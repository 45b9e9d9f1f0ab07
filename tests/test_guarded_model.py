"""The public way to put a guard into any Python server: rows in, one answer per row out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from guard import Guard
from guard.errors import BundleError, DataError, SuspectModelError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.relabel.queue import Queue
from guard.serving.guarded_model import GuardedModel, RowRequests

Make = Callable[..., GuardedModel]


@pytest.fixture(scope="module")
def bundle(fitted_guard: Guard, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitted_guard.save(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def module(badnet: MnistCnn) -> MnistCnn:
    return copy.deepcopy(badnet)


@pytest.fixture
def make(bundle: Path, module: MnistCnn) -> Iterator[Make]:
    made: list[GuardedModel] = []

    def build(network: Any = module, **settings: Any) -> GuardedModel:
        for earlier in made:  # of the same network
            earlier.close()
        made.append(GuardedModel(network, bundle=bundle, name="m", **{"verdict_detail": "full", **settings}))
        return made[-1]

    yield build
    for model in made:
        model.close()


@pytest.fixture(scope="module")
def images(triggered: Poisoned, clean_split: Any, fitted_guard: Guard) -> Any:
    """Four clean images, which the guard passes, between three triggered ones."""
    passed = [
        row for row, verdict in enumerate(fitted_guard.inspect(clean_split.test.images[:20])) if not verdict.is_poisoned
    ]
    mixed = np.concatenate([triggered.images[:3], clean_split.test.images[passed[:4]]])
    return mixed[[0, 3, 1, 4, 5, 2, 6]]


def counted(model: GuardedModel) -> dict[tuple[str, ...], float]:
    samples = model.runtime.metrics.drain()
    return {s.labels[1:]: s.value for s in samples if s.name == "guard_verdicts_total" and s.value}


def test_answers_are_those_of_the_network_and_of_the_guard(
    make: Make, module: MnistCnn, images: Any, fitted_guard: Guard
) -> None:
    with torch.no_grad():
        logits = module(torch.from_numpy(images)).numpy()
    verdicts = fitted_guard.inspect(images)
    with make() as model:
        answers = model.answer(images)
    np.testing.assert_array_equal(np.stack([answer.logits for answer in answers]), logits)
    assert [answer.p_value for answer in answers] == [verdict.p_value for verdict in verdicts]
    assert [answer.verdict == "poisoned" for answer in answers] == [verdict.is_poisoned for verdict in verdicts]
    assert {answer.action for answer in answers if answer.verdict == "poisoned"} == {"flag"}
    assert {answer.bundle for answer in answers} == {model.guard.digest}
    assert (model.input_shape, model.n_classes) == ((1, 28, 28), 10)
    assert sum(counted(model).values()) == len(images)


def test_blocked_rows_have_no_logits_and_say_why(make: Make, images: Any) -> None:
    answers = make(action="block").answer(images)
    blocked = [answer for answer in answers if answer.verdict == "poisoned"]
    assert len(blocked) == 3
    for answer in blocked:
        assert answer.logits is None
        assert answer.error.startswith("the input was judged poisoned and blocked: ")
        assert answer.response.status == 422
    assert all(answer.logits is not None and answer.error == "" for answer in answers if answer.verdict == "clean")


@pytest.mark.parametrize(("mode", "expected"), [("closed", "rejected"), ("open", "bypassed")])
def test_row_that_cannot_be_scored_is_never_clean_and_spoils_no_other(
    make: Make, images: Any, mode: str, expected: str
) -> None:
    odd = images.copy()
    odd[1, 0, 3, 3] = np.nan
    model = make(failure_mode=mode)
    answers = model.answer(odd)
    assert answers[1].verdict == expected
    assert np.isnan(answers[1].p_value)
    assert (answers[1].logits is None) == (mode == "closed")
    others = [answer.verdict for row, answer in enumerate(answers) if row != 1]
    assert others == [answer.verdict for row, answer in enumerate(make().answer(images)) if row != 1]
    assert counted(model)[expected, "none"] == 1


def test_row_of_another_shape_is_rejected(make: Make) -> None:
    (answer,) = make().answer(np.zeros((1, 3, 28, 28), np.float32))
    assert (answer.verdict, answer.logits) == ("rejected", None)
    assert "the guard was fitted on (1, 28, 28)" in answer.error


def test_row_on_which_the_network_raises_fails_alone_and_tells_nothing_of_it(
    make: Make, module: MnistCnn, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = module.forward

    def fragile(inputs: torch.Tensor) -> torch.Tensor:
        if (inputs.flatten(1).sum(1) == 0).any():
            raise ArithmeticError("the secret pixel is 17")
        return forward(inputs)

    monkeypatch.setattr(module, "forward", fragile)
    dark = images.copy()
    dark[2] = 0
    answers = make().answer(dark)
    assert [answer.verdict == "failed" for answer in answers] == [row == 2 for row in range(len(images))]
    assert answers[2].error == "the model failed on this input: ArithmeticError."
    assert answers[2].response.status == 500


def test_network_that_answers_other_rows_than_it_was_given_fails(
    make: Make, module: MnistCnn, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make()
    forward = module.forward
    monkeypatch.setattr(module, "forward", lambda inputs: forward(inputs)[:-1])
    answers = model.answer(images)
    assert {answer.verdict for answer in answers} == {"failed"}
    assert all(answer.logits is None for answer in answers)


def test_settings_that_forbid_batches_answer_one_by_one(
    make: Make, module: MnistCnn, images: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    module.register_forward_pre_hook(lambda _module, args: sizes.append(len(args[0])))
    together = make().answer(images)
    alone = make(batching="never").answer(images)
    assert sizes == [7, *[1] * 7]
    assert [answer.verdict for answer in alone] == [answer.verdict for answer in together]


def test_sender_that_may_not_know_learns_no_p_value(make: Make, images: Any) -> None:
    answers = make(verdict_detail="flag").answer(images)
    assert all(np.isnan(answer.p_value) for answer in answers)
    assert sum(answer.verdict == "poisoned" for answer in answers) == 3


def test_flagged_rows_are_in_the_queue_with_id_and_what_was_sent(make: Make, images: Any, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'queue.db'}"
    requests = RowRequests([f"id-{row}" for row in range(7)], [{"Content-Type": "text/plain"}] * 7)
    answers = make(queue_url=url).answer(images, requests, [f"body {row}".encode() for row in range(7)])
    flagged = [row for row, answer in enumerate(answers) if answer.verdict == "poisoned"]
    with Queue.open(url) as queue:
        items = sorted(queue.items(), key=lambda item: item.input.request_id)
        assert [item.input.request_id for item in items] == [f"id-{row}" for row in flagged]
        assert [item.input.body for item in items] == [f"body {row}".encode() for row in flagged]
        assert {item.input.model for item in items} == {"m"}
        for item, row in zip(items, flagged, strict=True):
            np.testing.assert_array_equal(item.input.inputs, images[row])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            np.zeros((2, 1, 28, 28)),
            r"^inputs must be a float32 array of one row or more, got float64 \(2, 1, 28, 28\)\.$",
        ),
        (np.zeros((0, 1, 28, 28), np.float32), r"got float32 \(0, 1, 28, 28\)\.$"),
        (np.zeros(3, np.float32), r"got float32 \(3,\)\.$"),
        ([[1.0]], r"got list\.$"),
    ],
)
def test_what_is_no_array_of_rows_is_refused(make: Make, inputs: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make().answer(inputs)


def test_network_has_one_guard_at_a_time(make: Make, module: MnistCnn, bundle: Path, images: Any) -> None:
    first = make()
    with pytest.raises(SuspectModelError, match=r"^this network is guarded by another GuardedModel\. Close that first"):
        GuardedModel(module, bundle=bundle)
    first.close()
    with GuardedModel(module, bundle=bundle) as second:
        first.close()  # again: it does not let a third in
        with pytest.raises(SuspectModelError, match="is guarded by another"):
            GuardedModel(module, bundle=bundle)
        assert len(second.answer(images)) == len(images)


def test_ids_headers_and_bodies_are_one_per_row(make: Make, images: Any) -> None:
    model = make()
    with pytest.raises(DataError, match=r"^requests must be one per row, 7, got 2 ids and 0 headers\.$"):
        model.answer(images, RowRequests(["a", "b"]))
    with pytest.raises(DataError, match=r"^bodies must be one per row, 7, got 1\.$"):
        model.answer(images, None, [b""])


def test_model_without_network_or_bundle_is_refused(make: Make, module: MnistCnn) -> None:
    with pytest.raises(SuspectModelError, match="must be a torch"):
        make("weights.pt")
    with pytest.raises(BundleError, match="there is no bundle to serve"):
        GuardedModel(module)
