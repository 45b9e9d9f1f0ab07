"""Requests and responses of the open inference protocol as bytes: JSON, and its binary tensor extension.

https://github.com/kserve/open-inference-protocol (REST), and Triton's "Binary Tensor Data Extension".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from guard.errors import GuardError
from guard.types import AnyArray

#: NumPy's type of every datatype of the protocol with elements of one size; all little-endian.
DTYPES: dict[str, str] = {
    "BOOL": "?",
    **{f"UINT{8 * size}": f"<u{size}" for size in (1, 2, 4, 8)},
    **{f"INT{8 * size}": f"<i{size}" for size in (1, 2, 4, 8)},
    **{f"FP{8 * size}": f"<f{size}" for size in (2, 4, 8)},
}
#: What a JSON value must look like for a datatype, as NumPy's kinds.
_KINDS = {"BOOL": "b", "UINT": "iu", "INT": "iu", "FP": "iuf"}
_JSON_NAMES: dict[type[Any], str] = {dict: "an object", list: "a list", str: "a text"}
_MOST_AXES = 16
_MOST_ELEMENTS = 2**48
_LONGEST_TEXT = 1024


class ProtocolError(GuardError):
    """A request that breaks the protocol, or asks for what is not there; carries the HTTP status for its sender."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class WantedOutput:
    """One output that a request asks for, and whether as binary data; `parameters` are all that came with it."""

    name: str
    is_binary: bool
    parameters: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True, slots=True)
class InferRequest:
    """One inference request.

    Attributes
    ----------
    inputs : dict of str to ndarray
        By name.
    outputs : tuple of WantedOutput
        Empty: all.
    id : str
        "" if the sender gave none.
    is_binary : bool
        Whether outputs that are not named are wanted as binary data.
    parameters : mapping of str to value of JSON
        All that came with the request.
    """

    inputs: dict[str, AnyArray]
    outputs: tuple[WantedOutput, ...] = ()
    id: str = ""
    is_binary: bool = False
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferResponse:
    """One inference response.

    Attributes
    ----------
    model : str
    outputs : dict of str to ndarray
        In the order in which they are written; texts as object or str arrays.
    id : str
    parameters : mapping of str to (str, float, int or bool)
    binary : frozenset of str
        Outputs that go as binary data.
    version : str
        Of the model.
    """

    model: str
    outputs: dict[str, AnyArray]
    id: str = ""
    parameters: Mapping[str, str | float | bool] = field(default_factory=dict)
    binary: frozenset[str] = frozenset()
    version: str = "1"


def read_request(body: bytes, json_bytes: int | None = None) -> InferRequest:
    """Read the body of an inference request.

    Parameters
    ----------
    body : bytes
    json_bytes : int, optional
        Length of the JSON at its beginning, where binary tensors follow (`Inference-Header-Content-Length`).

    Raises
    ------
    ProtocolError
        If anything in it breaks the protocol.
    """
    document, rest = read_json(body, json_bytes, "an inference request")
    inputs: dict[str, AnyArray] = {}
    for entry in _of_type(document.get("inputs"), list, "inputs"):
        name, array, rest = read_tensor(_of_type(entry, dict, "an input"), rest)
        if name in inputs:
            raise ProtocolError(f"input {name!r} is there twice.")
        inputs[name] = array
    if len(rest):
        raise ProtocolError(f"{len(rest)} bytes follow the last input. Is a binary_data_size missing?")
    wanted = [
        WantedOutput(_name(entry, "an output"), bool(_parameters(entry).get("binary_data", False)), _parameters(entry))
        for output in _of_type(document.get("outputs", []), list, "outputs")
        for entry in [_of_type(output, dict, "an output")]
    ]
    if len({output.name for output in wanted}) < len(wanted):
        raise ProtocolError("an output is asked for twice.")
    return InferRequest(
        inputs,
        tuple(wanted),
        _text(document.get("id", ""), "id"),
        bool(_parameters(document).get("binary_data_output", False)),
        _parameters(document),
    )


def read_json(body: bytes, json_bytes: int | None, what: str) -> tuple[dict[str, Any], memoryview]:
    """Return the JSON at the beginning of a body, and the binary data behind it.

    Raises
    ------
    ProtocolError
        If it is no object of JSON, or shorter than announced.
    """
    if json_bytes is not None and not 0 <= json_bytes <= len(body):
        raise ProtocolError(f"Inference-Header-Content-Length is {json_bytes}, and the body has {len(body)} bytes.")
    rest = memoryview(body)[len(body) if json_bytes is None else json_bytes :]
    try:
        document = json.loads(body[:json_bytes])
    except (ValueError, RecursionError) as error:
        part = "the body is" if json_bytes is None else f"the first {json_bytes} bytes of the body are"
        raise ProtocolError(f"{part} no JSON of {what}.") from error
    return _of_type(document, dict, "the request"), rest


def write_response(response: InferResponse) -> tuple[bytes, int | None]:
    """Return the body of a response, and the length of its JSON if binary tensors follow, else None.

    NaN and infinities are `null` in JSON, which knows none.
    """
    outputs, parts = [], []
    for name, array in response.outputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if name in response.binary:
            parts.append(bytes_of(array))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = json_values(array)
        outputs.append(entry)
    document: dict[str, Any] = {"model_name": response.model, "model_version": response.version, "outputs": outputs}
    document |= {"id": response.id} if response.id else {}
    document |= {"parameters": dict(response.parameters)} if response.parameters else {}
    text = json.dumps(document, allow_nan=False).encode()
    return b"".join([text, *parts]), len(text) if parts else None


def datatype_of(array: AnyArray) -> str:
    """Return the protocol's name of an array's type."""
    if array.dtype.kind in "OSU":
        return "BYTES"
    plain = array.dtype.newbyteorder("<").str.replace("|", "<")
    return next(name for name, dtype in DTYPES.items() if np.dtype(dtype).str.replace("|", "<") == plain)


def tensor(name: str, datatype: str, shape: Sequence[Any], data: Any) -> AnyArray:
    """Return one tensor of a request.

    Parameters
    ----------
    name, datatype, shape
        As the request says.
    data : bytes, memoryview, or list of numbers
        Little-endian and row-major; a list may be nested.

    Raises
    ------
    ProtocolError
        If they do not fit together, or the datatype is not known.
    """
    if datatype not in DTYPES:
        raise ProtocolError(f"input {name!r} has datatype {datatype!r}; known are {', '.join(DTYPES)}.")
    if len(shape) > _MOST_AXES or not all(type(length) is int and 0 <= length < 2**31 for length in shape):
        raise ProtocolError(f"the shape of input {name!r} must be at most {_MOST_AXES} lengths >= 0.")
    if math.prod(length or 1 for length in shape) > _MOST_ELEMENTS:  # a length of 0 hides the others
        raise ProtocolError(f"the shape of input {name!r} is too large.")
    dtype = np.dtype(DTYPES[datatype])
    if not isinstance(data, list):
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ProtocolError(f"input {name!r} has {len(data)} bytes, and is {list(shape)} of {datatype}.")
        return np.frombuffer(data, dtype).reshape(shape)
    if not _holds_numbers(data, _MOST_AXES):  # NumPy makes all texts as long as the longest
        raise ProtocolError(f"data of input {name!r} must be numbers that are {datatype}.")
    try:
        values = np.asarray(data)
    except ValueError as error:
        raise ProtocolError(f"data of input {name!r} holds lists of unequal length.") from error
    if values.size != math.prod(shape):
        raise ProtocolError(f"input {name!r} holds {values.size} elements, and its shape is {list(shape)}.")
    if values.size and values.dtype.kind not in _KINDS[datatype.rstrip("0123456789")]:
        raise ProtocolError(f"data of input {name!r} must be numbers that are {datatype}.")
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if int(values.min()) < limits.min or int(values.max()) > limits.max:
            raise ProtocolError(f"data of input {name!r} does not fit into {datatype}.")
    with np.errstate(over="ignore"):
        return values.astype(dtype).reshape(shape)


def _holds_numbers(data: list[Any], most_axes: int) -> bool:
    """Return whether a list, or its lists, hold numbers and truth values alone."""
    return most_axes > 0 and all(
        _holds_numbers(value, most_axes - 1) if type(value) is list else type(value) in (float, int, bool)
        for value in data
    )


def read_tensor(entry: dict[str, Any], rest: memoryview) -> tuple[str, AnyArray, memoryview]:
    """Return name and array of one tensor, and the binary data that is left; ProtocolError calls it an input."""
    name = _name(entry, "an input")
    datatype, shape = _text(entry.get("datatype"), f"datatype of {name!r}"), entry.get("shape")
    shape = _of_type(shape, list, f"the shape of input {name!r}")
    n_bytes = _parameters(entry).get("binary_data_size")
    if n_bytes is None:
        data = _of_type(entry.get("data"), list, f"data of input {name!r}")
        return name, tensor(name, datatype, shape, data), rest
    if type(n_bytes) is not int or not 0 <= n_bytes <= len(rest):
        raise ProtocolError(f"binary_data_size of input {name!r} is {n_bytes!r}, and {len(rest)} bytes are there.")
    return name, tensor(name, datatype, shape, rest[:n_bytes]), rest[n_bytes:]


def bytes_of(array: AnyArray) -> bytes:
    """Return an array as the binary extension has it; texts each with their length before them."""
    if array.dtype.kind not in "OSU":
        return array.astype(array.dtype.newbyteorder("<")).tobytes()
    texts = [str(text).encode() for text in array.ravel().tolist()]
    return b"".join(len(text).to_bytes(4, "little") + text for text in texts)


def json_values(array: AnyArray) -> list[Any]:
    """Return an array's values one after the other; NaN and infinities as None."""
    values: list[Any] = array.ravel().tolist()
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return [value if math.isfinite(value) else None for value in values]
    return values


def _of_type(value: Any, kind: type[Any], what: str) -> Any:
    if not isinstance(value, kind):
        name = _JSON_NAMES[kind]
        raise ProtocolError(f"{what} must be {name} of JSON.")
    return value


def _name(entry: Mapping[str, Any], what: str) -> str:
    return _text(entry.get("name"), f"the name of {what}")


def _text(value: Any, what: str) -> str:
    text = _of_type(value, str, what)
    if len(text) > _LONGEST_TEXT:
        raise ProtocolError(f"{what} must have at most {_LONGEST_TEXT} characters.")
    return str(text)


def _parameters(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    parameters: Mapping[str, Any] = _of_type(entry.get("parameters", {}), dict, "parameters")
    return parameters


def named(outputs: Sequence[WantedOutput], known: Sequence[str]) -> list[str]:
    """Return the names of the outputs that are wanted, all that are known if none is named.

    Raises
    ------
    ProtocolError
        If one is not known.
    """
    for output in outputs:
        if output.name not in known:
            raise ProtocolError(f"there is no output {output.name!r}; known are {', '.join(known)}.")
    return [output.name for output in outputs] or list(known)
