"""The proxy before an upstream of this process: what it judges, what it lets through, and what nobody gets past it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
from conftest import Exported
from proxy_helpers import INFER, FakeUpstream, counted, in_thread, proxied, request_of

from guard import Guard, SuspectModel
from guard.export.record import ExportRecord
from guard.lab.attacks import Poisoned
from guard.proxy.model import ProxiedModel

Site = tuple[httpx.Client, ProxiedModel]
Make = Callable[..., Site]


@pytest.fixture(scope="session")
def record(exported: Exported) -> ExportRecord:
    return ExportRecord.read(exported.folder)


@pytest.fixture
def upstream(record: ExportRecord, suspect: SuspectModel, fitted_guard: Guard) -> FakeUpstream:
    return FakeUpstream(suspect, record)


@pytest.fixture
def make(upstream: FakeUpstream, exported: Exported) -> Iterator[Make]:
    with ExitStack() as opened:

        def build(serving: dict[str, Any] | None = None, **settings: Any) -> Site:
            behind = opened.enter_context(in_thread(upstream, lifespan="off"))
            port, model = opened.enter_context(proxied(behind, upstream.record, exported.bundles, serving, **settings))
            client = opened.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20))
            upstream.seen.clear()
            return client, model

        yield build


def outputs_of(reply: Any) -> dict[str, Any]:
    return {output["name"]: output["data"] for output in reply.json()["outputs"]}


def test_rows_are_judged_as_in_this_process(
    make: Make, upstream: FakeUpstream, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:3], clean_split.test.images[:5]])
    verdicts = fitted_guard.inspect(images)
    client, model = make()
    reply = client.post(INFER, json=request_of(images, id="seven", parameters={"priority": 3}))
    assert (reply.status_code, reply.json()["id"], reply.json()["model_version"]) == (200, "seven", "7")
    outputs = outputs_of(reply)
    assert [*outputs] == ["logits", "guard_verdict", "guard_p_value"]
    assert outputs["guard_verdict"] == ["poisoned" if verdict.is_poisoned else "clean" for verdict in verdicts]
    np.testing.assert_allclose(outputs["guard_p_value"], [verdict.p_value for verdict in verdicts], atol=1e-4)
    sent = json.loads(upstream.seen[-1][3])
    assert (sent["id"], sent["parameters"]) == ("seven", {"priority": 3})
    assert [entry["name"] for entry in sent["outputs"]] == [*upstream.record.outputs]
    assert reply.headers["x-upstream"] == "yes"
    assert "guard-verdict" not in reply.headers  # of several rows, and the upstream's is none
    assert sum(counted(model).values()) == 8
