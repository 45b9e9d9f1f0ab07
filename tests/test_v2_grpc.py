"""The gRPC service, asked with messages that a client of another maker has made."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from guard import Guard
from guard.errors import ServerError
from guard.lab.attacks import MnistCnn, Poisoned
from guard.serving.guarded_model import GuardedModel
from guard.v2.grpc_service import serving_grpc
from guard.v2.messages import MESSAGES
from guard.v2.models import ServedModel

KEY = (("authorization", "Bearer secret-of-the-test"),)


class Place:
    """A service with one model, and a stub for it."""

    def __init__(self, served: ServedModel, port: int, stub: Any) -> None:
        self.served, self.port, self.stub = served, port, stub

    def infer(self, request: Any) -> Any:
        return self.stub.ModelInfer(request, metadata=KEY)

    def refusal(self, request: Any) -> tuple[str, str]:
        with pytest.raises(grpc.RpcError) as error:
            self.infer(request)
        return error.value.code().name, error.value.details()


@pytest.fixture(scope="module", params=["flag", "block"])
def place(
    request: pytest.FixtureRequest,
    fitted_guard: Guard,
    badnet: MnistCnn,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    bundle: Path = fitted_guard.save(tmp_path_factory.mktemp("bundles"))
    model = GuardedModel(
        copy.deepcopy(badnet), bundle=bundle, name="m", verdict_detail="full", action=str(request.param)
    )
    served = ServedModel(model)
    with (
        serving_grpc({"m": served}, "127.0.0.1:0", key="secret-of-the-test", max_message_bytes=1 << 20) as port,
        grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
    ):
        yield Place(served, port, service_pb2_grpc.GRPCInferenceServiceStub(channel))
    served.close()


def request_of(images: Any, *, typed: bool = False, **changes: Any) -> Any:
    request = service_pb2.ModelInferRequest(model_name="m", id="seven")
    tensor = {"name": "input", "datatype": "FP32", "shape": images.shape, **changes}
    entry = request.inputs.add(**tensor)
    if typed:
        entry.contents.fp32_contents.extend(images.ravel().tolist())
    else:
        request.raw_input_contents.append(images.astype("<f4").tobytes())
    return request


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_those_of_the_protocol(name: str) -> None:
    outer, *inner = name.split(".")
    theirs = service_pb2.DESCRIPTOR.message_types_by_name[outer]
    for part in inner:
        theirs = theirs.nested_types_by_name[part]

    def fields(descriptor: Any) -> list[tuple[Any, ...]]:
        return [
            (
                field.name,
                field.number,
                field.type,
                field.is_repeated,
                field.message_type and field.message_type.full_name,
                field.containing_oneof and field.containing_oneof.name,
            )
            for field in descriptor.fields
        ]

    assert fields(MESSAGES[name].DESCRIPTOR) == fields(theirs)


@pytest.mark.parametrize("typed", [False, True])
def test_infer_tells_every_row_its_verdict(
    place: Place, typed: bool, triggered: Poisoned, clean_split: Any, fitted_guard: Guard
) -> None:
    images = np.concatenate([triggered.images[:2], clean_split.test.images[:3]])
    reply = place.infer(request_of(images, typed=typed))
    assert (reply.model_name, reply.model_version, reply.id) == ("m", "1", "seven")
    assert [output.name for output in reply.outputs] == ["logits", "guard_verdict", "guard_p_value"]
    logits, verdicts, p_values = reply.raw_output_contents
    expected = fitted_guard.inspect(images)
    np.testing.assert_allclose(np.frombuffer(p_values, "<f8"), [verdict.p_value for verdict in expected], atol=1e-3)
    assert verdicts.count(b"poisoned") == sum(verdict.is_poisoned for verdict in expected)
    gone = np.isnan(np.frombuffer(logits, "<f4").reshape(5, 10)).all(axis=1)
    blocks = place.served.model.guard.config.action == "block"
    assert gone.tolist() == [blocks and verdict.is_poisoned for verdict in expected]


def test_single_row_has_the_headers_as_metadata_and_a_code_if_it_is_blocked(place: Place, triggered: Poisoned) -> None:
    request = request_of(triggered.images[:1])
    if place.served.model.guard.config.action == "block":
        code, details = place.refusal(request)
        assert (code, details.startswith("the input was judged poisoned and blocked")) == ("PERMISSION_DENIED", True)
        return
    _, call = place.stub.ModelInfer.with_call(request, metadata=KEY)
    told = dict(call.trailing_metadata())
    assert (told["guard-verdict"], told["guard-action"], len(told["guard-bundle"])) == ("poisoned", "flag", 64)


def test_outputs_are_those_asked_for(place: Place, clean_split: Any) -> None:
    request = request_of(clean_split.test.images[:1])
    request.outputs.add(name="guard_verdict")
    assert [output.name for output in place.infer(request).outputs] == ["guard_verdict"]
    request.outputs.add(name="guard_verdict")
    assert place.refusal(request) == ("INVALID_ARGUMENT", "an output is asked for twice.")
    request.outputs[1].name = "other"
    assert "there is no output 'other'" in place.refusal(request)[1]


IMAGE = np.zeros((1, 1, 28, 28), np.float32)


@pytest.mark.parametrize(
    ("request_", "code", "details"),
    [
        (request_of(IMAGE, name="image"), "INVALID_ARGUMENT", "the model takes one input, 'input', got image."),
        (request_of(IMAGE, shape=[1, 784]), "INVALID_ARGUMENT", "must have shape [-1, 1, 28, 28], got [1, 784]."),
        (request_of(IMAGE, shape=[-1, 784]), "INVALID_ARGUMENT", "the shape of input 'input' must be"),
        (request_of(IMAGE, shape=[2, 1, 28, 28]), "INVALID_ARGUMENT", "has 3136 bytes, and is [2, 1, 28, 28] of FP32"),
        (request_of(IMAGE, datatype="FP31"), "INVALID_ARGUMENT", "has datatype 'FP31'; known are"),
        (request_of(IMAGE, datatype="FP16"), "INVALID_ARGUMENT", "has 3136 bytes, and is [1, 1, 28, 28] of FP16"),
        (request_of(IMAGE, typed=True, datatype="FP16"), "INVALID_ARGUMENT", "has 0 bytes"),
        (request_of(IMAGE * np.nan), "INVALID_ARGUMENT", "the input holds NaN or infinity."),
        (request_of(np.zeros((400, 1, 28, 28), np.float32)), "RESOURCE_EXHAUSTED", "larger than max"),
        (service_pb2.ModelInferRequest(model_name="m"), "INVALID_ARGUMENT", "takes one input, 'input', got none."),
        (service_pb2.ModelInferRequest(model_name="x"), "NOT_FOUND", "there is no model 'x'; served are m."),
        (service_pb2.ModelInferRequest(model_name="m", model_version="2"), "NOT_FOUND", "has version 1 alone"),
        (service_pb2.ModelInferRequest(model_name="m", raw_input_contents=[b"a"]), "INVALID_ARGUMENT", "have 1 raw"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_infer_refuses_what_breaks_the_protocol(place: Place, request_: Any, code: str, details: str) -> None:
    found = place.refusal(request_)
    assert found[0] == code
    assert details in found[1]


def test_input_twice_is_refused(place: Place) -> None:
    request = request_of(IMAGE)
    request.inputs.add(name="input", datatype="FP32", shape=[0])
    request.raw_input_contents.append(b"")
    assert place.refusal(request) == ("INVALID_ARGUMENT", "input 'input' is there twice.")


def test_key_is_asked_for_everywhere_but_health(place: Place) -> None:
    assert place.stub.ServerLive(service_pb2.ServerLiveRequest()).live
    assert place.stub.ServerReady(service_pb2.ServerReadyRequest()).ready
    for metadata in ((), (("authorization", "Bearer wrong"),)):
        for call, request in (
            (place.stub.ServerMetadata, service_pb2.ServerMetadataRequest()),
            (place.stub.ModelReady, service_pb2.ModelReadyRequest(name="m")),
            (place.stub.ModelInfer, request_of(IMAGE)),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call(request, metadata=metadata)
            assert error.value.code() == grpc.StatusCode.UNAUTHENTICATED


def test_message_that_is_none_is_refused_and_read_for_nobody_without_a_key(place: Place) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{place.port}") as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for metadata, code in (((), "UNAUTHENTICATED"), (KEY, "INVALID_ARGUMENT")):
            with pytest.raises(grpc.RpcError) as error:
                call(b"\xff\xff", metadata=metadata)
            assert error.value.code().name == code


def test_port_that_is_taken_is_refused(place: Place) -> None:
    with (
        pytest.raises(ServerError, match=rf"^cannot listen on 127\.0\.0\.1:{place.port} for gRPC\."),
        serving_grpc({}, f"127.0.0.1:{place.port}"),
    ):
        pass
