"""The REST interface of the open inference protocol, held to its OpenAPI document by schemathesis.

Schemathesis is imported where it is used: the other processes of a run collect this file, too, and run none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient
from torch import nn

from guard import Guard, GuardConfig, SuspectModel
from guard.serving.guarded_model import GuardedModel
from guard.v2.description import describe
from guard.v2.models import ServedModel
from guard.v2.rest import create_app

KEY = "k" * 20
CALLER = {"Authorization": f"Bearer {KEY}"}
#: No document can say that numbers must fill their shape: so 400 may answer what it allows.
CONFIG = {
    "checks": {
        "positive_data_acceptance": {"expected-statuses": ["2xx", "400", "404", "413", "422"]},
        "negative_data_rejection": {"expected-statuses": ["400", "401", "404", "405", "413", "415"]},
    }
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedModel]:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    images = np.random.default_rng(0).random((120, 1, 2, 2), dtype=np.float32)
    suspect = SuspectModel(network)
    labels = suspect.activations(images).logits.argmax(axis=1)
    guard = Guard.fit(suspect, images, labels, GuardConfig(mode="paper", folds=5))
    bundle = guard.save(tmp_path_factory.mktemp("bundles"))
    with GuardedModel(network, bundle=bundle, name="m", verdict_detail="full") as model:
        yield ServedModel(model)


@pytest.fixture(scope="module")
def app(served: ServedModel) -> Any:
    return create_app({"m": served}, key=KEY)


def schema_of(app: Any) -> Any:
    import schemathesis
    from schemathesis.config import SchemathesisConfig

    config = SchemathesisConfig.from_dict(CONFIG)
    return schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=CALLER)


@pytest.fixture
def described(app: Any) -> Any:
    schema = schema_of(app)
    schema.hook(map_path_parameters)
    return schema


def map_path_parameters(context: Any, path_parameters: dict[str, Any] | None) -> dict[str, Any]:
    """Name the model that is there, three times of four; others are 404 before anything else is looked at."""
    known = {"name": "m", "version": "1"}
    return {
        name: known[name] if isinstance(value, str) and len(value) % 4 else value
        for name, value in (path_parameters or {}).items()
    }


OPERATIONS = [
    (path, method) for path, methods in describe("", "1", has_key=True)["paths"].items() for method in methods
]


@pytest.mark.parametrize("mode", ["positive", "negative"], ids=["fitting", "broken"])
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda value: value.replace("/", "."))
def test_every_answer_is_as_the_document_says(described: Any, path: str, method: str, mode: str) -> None:
    """Status, headers, type and schema of the answer; what fits is taken, what is broken refused, no key is ignored."""
    from hypothesis import HealthCheck, given, settings
    from schemathesis import GenerationMode

    calls = settings(
        max_examples=25 if method == "post" else 3,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )

    @calls
    @given(case=described[path][method.upper()].as_strategy(generation_mode=GenerationMode(mode)))
    def ask(case: Any) -> None:
        case.call_and_validate(headers=CALLER)

    ask()


def test_document_names_every_route_and_no_other(app: Any) -> None:
    routes = {route.path for route in app.routes if route.path.startswith("/v2")}
    paths = {path.replace("{version}", "{asked}") for path in describe("", "1", has_key=True)["paths"]}
    assert routes == paths


def test_an_answer_is_what_the_document_says(app: Any) -> None:
    """The generated requests hardly ever hold an input that fits."""
    tensor = {"name": "input", "datatype": "FP32", "shape": [2, 1, 2, 2], "data": [0.5] * 8}
    document = {"inputs": [tensor], "outputs": [{"name": "logits"}, {"name": "guard_verdict"}]}
    case = schema_of(app)["/v2/models/{name}/infer"]["POST"].Case(
        path_parameters={"name": "m"}, body=document, headers=CALLER, media_type="application/json"
    )
    assert case.call_and_validate().status_code == 200


def test_document_without_a_key_asks_for_none(served: ServedModel) -> None:
    document = TestClient(create_app({"m": served})).get("/openapi.json").json()
    assert "security" not in document
