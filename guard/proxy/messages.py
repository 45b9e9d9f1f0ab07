"""The other side of the open inference protocol: requests written, and answers read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard.types import AnyArray
from guard.v2.protocol import ProtocolError, bytes_of, datatype_of, json_values, read_json, read_tensor

#: Parameters of a request that say how its tensors are written or read, which the proxy does anew.
_OURS = ("binary_data_output", "content_type", "headers")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server answered.

    Attributes
    ----------
    outputs : dict of str to ndarray
    parameters : mapping of str to (str, int, float or bool)
        Those of the response.
    version : str
        Of the model; "" if it tells none.
    """

    outputs: dict[str, AnyArray]
    parameters: Mapping[str, str | float | bool]
    version: str


def write_request(
    inputs: Mapping[str, AnyArray],
    outputs: Sequence[str],
    *,
    binary: bool,
    id: str = "",
    parameters: Mapping[str, Any] | None = None,
) -> tuple[bytes, int | None]:
    """Return the body of a request, and the length of its JSON if binary tensors follow, else None.

    Parameters
    ----------
    inputs : mapping of str to ndarray
        Finite where they go as JSON.
    outputs : sequence of str
        To ask for.
    binary : bool
        Whether tensors go, and shall come, as binary data.
    id : str
    parameters : mapping, optional
        Of the client's request; those that are about its form are left out.
    """
    entries, parts = [], []
    for name, array in inputs.items():
        entry: dict[str, Any] = {"name": name, "datatype": datatype_of(array), "shape": list(array.shape)}
        if binary:
            parts.append(bytes_of(array))
            entry["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            entry["data"] = json_values(array)
        entries.append(entry)
    wanted = [{"name": name, "parameters": {"binary_data": True}} if binary else {"name": name} for name in outputs]
    document: dict[str, Any] = {"inputs": entries, "outputs": wanted}
    document |= {"id": id} if id else {}
    kept = {name: value for name, value in (parameters or {}).items() if name not in _OURS and _is_plain(value)}
    document |= {"parameters": kept} if kept else {}
    text = json.dumps(document).encode()
    return b"".join([text, *parts]), len(text) if binary else None


def read_answer(body: bytes, json_bytes: int | None) -> Answer:
    """Read the body of an inference response.

    Raises
    ------
    ProtocolError
        If it breaks the protocol, or holds texts.
    """
    document, rest = read_json(body, json_bytes, "an inference response")
    entries = document.get("outputs")
    outputs: dict[str, AnyArray] = {}
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict):
            raise ProtocolError("an output must be an object of JSON.")
        told = {key: value for key, value in entry.items() if value is not None}  # KServe tells `null`
        if isinstance(data := told.get("data"), list) and None in data:  # what JSON has for NaN
            told["data"] = [math.nan if value is None else value for value in data]
        name, array, rest = read_tensor(told, rest)
        if name in outputs:
            raise ProtocolError(f"output {name!r} is there twice.")
        outputs[name] = array
    if len(rest):
        raise ProtocolError(f"{len(rest)} bytes follow the last output.")
    parameters = document.get("parameters")
    known = parameters if isinstance(parameters, dict) else {}
    plain = {name: value for name, value in known.items() if _is_plain(value)}
    return Answer(outputs, plain, str(document.get("model_version") or "")[:100])


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | bool) or (isinstance(value, float) and math.isfinite(value))
