"""Bodies of the open inference protocol: read and written by hand, and refused where they break it."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import numpy as np
import pytest

from guard.v2.protocol import (
    DTYPES,
    InferResponse,
    ProtocolError,
    WantedOutput,
    datatype_of,
    named,
    read_request,
    tensor,
    write_response,
)


def body(**changes: Any) -> bytes:
    """The body of a request for four numbers, with other values of its input."""
    entry = {"name": "input", "datatype": "FP32", "shape": [2, 2], "data": [1, 2.5, -3, 4], **changes}
    return json.dumps({"inputs": [{key: value for key, value in entry.items() if value is not None}]}).encode()


@pytest.mark.parametrize("data", [[1, 2.5, -3, 4], [[1, 2.5], [-3, 4]]])
def test_read_request_takes_flat_and_nested_numbers(data: list[Any]) -> None:
    request = read_request(body(data=data))
    array = request.inputs["input"]
    np.testing.assert_array_equal(array, np.float32([[1, 2.5], [-3, 4]]), strict=True)
    assert (request.id, request.outputs, request.is_binary) == ("", (), False)


@pytest.mark.parametrize("datatype", DTYPES)
def test_read_request_takes_every_datatype_as_json_and_as_bytes(datatype: str) -> None:
    values = np.array([0, 1, 1, 0], dtype=DTYPES[datatype]).reshape(2, 2)
    plain = read_request(body(datatype=datatype, data=values.ravel().tolist())).inputs["input"]
    text = body(datatype=datatype, data=None, parameters={"binary_data_size": values.nbytes})
    binary = read_request(text + values.tobytes(), len(text)).inputs["input"]
    for array in (plain, binary):
        assert array.dtype == values.dtype
        np.testing.assert_array_equal(array, values)
        assert datatype_of(array) == datatype


def test_read_request_tells_outputs_ids_and_how_they_are_wanted() -> None:
    document = json.loads(body())
    document |= {"id": "seven", "parameters": {"binary_data_output": True}}
    document["outputs"] = [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "guard_verdict"}]
    request = read_request(json.dumps(document).encode())
    assert request.outputs == (WantedOutput("logits", True), WantedOutput("guard_verdict", False))
    assert (request.id, request.is_binary) == ("seven", True)


def test_read_request_takes_several_binary_inputs_in_their_order() -> None:
    inputs = [
        {"name": name, "datatype": "UINT8", "shape": [size], "parameters": {"binary_data_size": size}}
        for name, size in (("a", 2), ("b", 0), ("c", 3))
    ]
    text = json.dumps({"inputs": inputs}).encode()
    arrays = read_request(text + bytes([1, 2, 3, 4, 5]), len(text)).inputs
    assert {name: array.tolist() for name, array in arrays.items()} == {"a": [1, 2], "b": [], "c": [3, 4, 5]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"^the body is no JSON"),
        (b"\xff\xfe", r"^the body is no JSON"),
        (b"[" * 100_000, r"^the body is no JSON"),
        (b"[]", r"^the request must be an object of JSON\.$"),
        (b"{}", r"^inputs must be a list of JSON\.$"),
        (b'{"inputs": [3]}', r"^an input must be an object"),
        (b'{"inputs": [{}]}', r"^the name of an input must be a text"),
        (b'{"inputs": [], "outputs": [{"name": "a"}, {"name": "a"}]}', r"^an output is asked for twice"),
        (b'{"inputs": [], "id": 7}', r"^id must be a text"),
        (b'{"inputs": [], "id": "%s"}' % (b"x" * 1025), r"^id must have at most 1024 characters"),
        (b'{"inputs": [], "parameters": 3}', r"^parameters must be an object"),
        (body(name=None), r"^the name of an input must be a text"),
        (body(datatype="FP31"), r"^input 'input' has datatype 'FP31'; known are BOOL, UINT8"),
        (body(datatype="BYTES"), r"datatype 'BYTES'; known are"),
        (body(shape=[2, -2]), r"^the shape of input 'input' must be at most 16 lengths >= 0\.$"),
        (body(shape=[True, 4]), r"^the shape of input"),
        (body(shape=4), r"^the shape of input 'input' must be a list of JSON\.$"),
        (body(shape=[1] * 17), r"^the shape of input"),
        (body(shape=[2**31, 2**31]), r"^the shape of input"),
        (body(shape=[2**30] * 16), r"^the shape of input 'input' is too large\.$"),
        (body(shape=[0, *[2**31 - 1] * 4], data=[]), r"^the shape of input 'input' is too large\.$"),
        (body(shape=[0, *[2**31 - 1] * 4], data=None, parameters={"binary_data_size": 0}), r"input' is too large\.$"),
        (body(shape=[2**20, 2**20], data=[1]), r"^input 'input' holds 1 elements, and its shape is \[1048576, 1048576"),
        (body(data=[1, [2, "x"], 3]), r"must be numbers that are FP32\.$"),
        (body(data=[[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]]), r"must be numbers that are FP32\.$"),
        (body(shape=[2, 3]), r"^input 'input' holds 4 elements, and its shape is \[2, 3\]\.$"),
        (body(data=[1, 2, 3]), r"^input 'input' holds 3 elements, and its shape is \[2, 2\]\.$"),
        (body(data=[[1, 2], [3]]), r"^data of input 'input' holds lists of unequal length\.$"),
        (body(data=["1", "2", "3", "4"]), r"^data of input 'input' must be numbers that are FP32\.$"),
        (body(data=[1, 2, 3, None]), r"must be numbers that are FP32\.$"),
        (body(data=[True, False, True, True]), r"must be numbers that are FP32\.$"),
        (body(data=[1, 2, 3, 10**400]), r"must be numbers that are FP32\.$"),
        (body(data={"0": 1}), r"^data of input 'input' must be a list"),
        (body(datatype="INT8", data=[1, 2, 3, 1.5]), r"must be numbers that are INT8\.$"),
        (body(datatype="UINT8", data=[1, 2, 3, 256]), r"^data of input 'input' does not fit into UINT8\.$"),
        (body(datatype="INT8", data=[1, 2, 3, -129]), r"does not fit into INT8\.$"),
        (body(datatype="UINT64", data=[1, 2, 3, -1]), r"does not fit into UINT64\.$"),
        (
            body(data=None, parameters={"binary_data_size": 16}),
            r"^binary_data_size of input 'input' is 16, and 0 bytes are there\.$",
        ),
        (body(data=None, parameters={"binary_data_size": -1}), r"^binary_data_size of input 'input' is -1, and"),
        (body(data=None, parameters={"binary_data_size": "16"}), r"^binary_data_size of input 'input' is '16', and"),
    ],
)
def test_read_request_refuses_what_breaks_the_protocol(data: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message) as answer:
        read_request(data)
    assert answer.value.status == 400


def test_texts_among_numbers_are_refused_before_they_take_memory() -> None:
    data = ["x" * 100_000, *[""] * 20_000]  # NumPy would make 8 GB of it
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="must be numbers"):
        tensor("input", "FP32", [20_001], data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_read_request_refuses_an_input_twice_and_bytes_that_belong_to_none() -> None:
    twice = json.loads(body())
    twice["inputs"] *= 2
    with pytest.raises(ProtocolError, match=r"^input 'input' is there twice\.$"):
        read_request(json.dumps(twice).encode())
    text = body()
    with pytest.raises(ProtocolError, match=r"^3 bytes follow the last input\. Is a binary_data_size missing\?$"):
        read_request(text + b"abc", len(text))
    with pytest.raises(ProtocolError, match=r"^Inference-Header-Content-Length is 9000, and the body has \d+ bytes\.$"):
        read_request(text, 9000)
    text = body(data=None, parameters={"binary_data_size": 12})
    with pytest.raises(ProtocolError, match=r"^input 'input' has 12 bytes, and is \[2, 2\] of FP32\.$"):
        read_request(text + bytes(12), len(text))
    with pytest.raises(ProtocolError, match=r"^the first 5 bytes of the body are no JSON"):
        read_request(text, 5)


def test_write_response_gives_json_without_nan_and_bytes_with_it() -> None:
    outputs = {
        "logits": np.float32([[1.5, np.nan], [np.inf, -2]]),
        "verdict": np.array(["clean", "ö"]),
        "p": np.array([0.25, 0.5]),
    }
    payload, json_bytes = write_response(InferResponse("m", outputs, "seven", {"guard_rows": 2}))
    assert json_bytes is None
    assert json.loads(payload) == {
        "model_name": "m",
        "model_version": "1",
        "id": "seven",
        "parameters": {"guard_rows": 2},
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [2, 2], "data": [1.5, None, None, -2.0]},
            {"name": "verdict", "datatype": "BYTES", "shape": [2], "data": ["clean", "ö"]},
            {"name": "p", "datatype": "FP64", "shape": [2], "data": [0.25, 0.5]},
        ],
    }
    payload, json_bytes = write_response(InferResponse("m", outputs, binary=frozenset(["logits", "verdict"])))
    document, rest = json.loads(payload[:json_bytes]), payload[json_bytes:]
    sizes = [output.get("parameters", {}).get("binary_data_size") for output in document["outputs"]]
    assert sizes == [16, 4 + 5 + 4 + 2, None]
    np.testing.assert_array_equal(np.frombuffer(rest[:16], "<f4").reshape(2, 2), outputs["logits"])
    assert rest[16:] == b"\x05\0\0\0clean\x02\0\0\0\xc3\xb6"


def test_named_outputs_are_all_or_those_asked_for() -> None:
    assert named([], ["a", "b"]) == ["a", "b"]
    assert named([WantedOutput("b", True)], ["a", "b"]) == ["b"]
    with pytest.raises(ProtocolError, match=r"^there is no output 'c'; known are a, b\.$"):
        named([WantedOutput("c", False)], ["a", "b"])
