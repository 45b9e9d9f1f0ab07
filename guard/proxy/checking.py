"""Whether a server has the exported model: asked before the proxy starts, and again and again while it runs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from guard.errors import ServerError
from guard.export.record import INPUT, ExportRecord, difference
from guard.proxy.messages import read_answer, write_request
from guard.proxy.model import ProxiedModel
from guard.proxy.upstream import Upstream, UpstreamError
from guard.serving.event_log import EventLog
from guard.v2.protocol import ProtocolError
from guard.v2.rest import JSON_BYTES, json_bytes_of

#: Largest difference from what was exported, as a share of an output's greatest value: other hardware rounds otherwise,
#: another network is far beyond.
TOLERANCE = 1e-3
_POLL_S = 0.25
_BINARY = "binary_tensor_data"
_ANSWERS_OTHERWISE = "the upstream's model answers otherwise than the one that was exported"


@dataclass(frozen=True, slots=True)
class Found:
    """What a server says of the model.

    Attributes
    ----------
    more : tuple of str
        Outputs beside those that were exported.
    version : str or None
        The only one that it has; None if it has several, or tells none.
    binary : bool
        Whether it says that tensors may come as binary data.
    """

    more: tuple[str, ...]
    version: str | None
    binary: bool


async def find_model(
    upstream: Upstream, record: ExportRecord, name: str, version: str | None, ready_timeout_s: float
) -> Found:
    """Wait for the model, and return what the server says of it.

    Raises
    ------
    ServerError
        If it is not there in time, or lacks an output that was exported, or has one that the guard cannot take back.
    """
    path = f"/v2/models/{name}" + (f"/versions/{version}" if version else "")
    until = time.monotonic() + ready_timeout_s
    while True:
        try:
            answer = await upstream.whole("GET", path)
            if answer.status == 200:
                break
            problem = f"GET {path} got status {answer.status}"
        except UpstreamError as error:
            problem = str(error).rstrip(".")
        if time.monotonic() > until:
            raise ServerError(
                f"the upstream has no model {name!r} after {ready_timeout_s:g} s: {problem}. Is --upstream its address?"
            )
        await asyncio.sleep(_POLL_S)
    document = _object(answer.body)
    inputs, outputs = _tensors(document, "inputs"), _tensors(document, "outputs")
    if inputs and INPUT not in inputs:
        raise ServerError(f"model {name!r} of the upstream takes {', '.join(inputs)}, not {INPUT!r}. Export it again.")
    if outputs:
        if missing := [output for output in record.outputs if output not in outputs]:
            raise ServerError(
                f"model {name!r} of the upstream has no output {', '.join(missing)}. Let it serve what `guard export` "
                f"wrote; it has {', '.join(outputs)}."
            )
        for output in record.outputs:
            if outputs[output] != "FP32":
                raise ServerError(f"output {output!r} of the upstream is {outputs[output]}, and was exported as FP32.")
    more = tuple(output for output in outputs if output not in record.outputs)
    for output in more:
        if outputs[output] not in ("FP16", "FP32", "FP64"):
            raise ServerError(
                f"output {output!r} of the upstream is {outputs[output]}, of which no row can be withheld. Let the "
                "model have floating-point outputs alone."
            )
    versions = document.get("versions")
    only = str(versions[0]) if isinstance(versions, list) and len(versions) == 1 else None
    about = await upstream.whole("GET", "/v2")
    extensions = _object(about.body).get("extensions") if about.status == 200 else None
    return Found(more, version or only, isinstance(extensions, list) and _BINARY in extensions)


async def probe(upstream: Upstream, record: ExportRecord, path: str, *, binary: bool) -> str:
    """Send the inputs of the record, and return how the answer differs from what was exported; "" if it does not.

    Raises
    ------
    UpstreamError
        If there is no answer.
    """
    body, json_bytes = write_request({INPUT: record.probe_inputs()}, [*record.outputs], binary=binary, id="guard-probe")
    kind = "application/json" if json_bytes is None else "application/octet-stream"
    headers = [(b"content-type", kind.encode()), (b"accept-encoding", b"identity")]
    headers += [(JSON_BYTES.encode(), str(json_bytes).encode())] if json_bytes is not None else []
    answer = await upstream.whole("POST", f"{path}/infer", body, headers)
    if answer.status != 200:
        raise UpstreamError(f"the upstream answered the probe with status {answer.status}.")
    lower = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in answer.headers}
    try:
        outputs = read_answer(answer.body, json_bytes_of(lower)).outputs
    except (ProtocolError, ValueError) as error:
        return f"the upstream's answer to the probe cannot be read: {error}"
    if missing := [name for name in record.outputs if name not in outputs]:
        return f"the upstream gave no output {', '.join(missing)}, which was asked for."
    expected = record.probed()
    shapes = [list(array.shape) for _, array in expected.items()]
    if [list(outputs[name].shape) for name in record.outputs] != shapes:
        return f"{_ANSWERS_OTHERWISE}: its outputs have other shapes."
    where, most = difference(record.activations([outputs[name] for name in record.outputs]), expected)
    if most <= TOLERANCE:
        return ""
    return f"{_ANSWERS_OTHERWISE}: {where} differs by {most:.3g} of its greatest value, and {TOLERANCE:g} is allowed."


async def keep_probing(upstream: Upstream, model: ProxiedModel, *, binary: bool, every_s: float) -> None:
    """Probe the upstream for ever, and let no answer pass as judged while it runs another model."""
    log = EventLog(model.name)
    while True:
        await asyncio.sleep(every_s)
        try:
            trouble = await probe(upstream, model.record, model.path, binary=binary)
        except (UpstreamError, TimeoutError):
            continue  # clients see that for themselves
        except Exception as error:  # whatever it answers, the next probe must come
            trouble = f"the upstream's answer to the probe cannot be read: {type(error).__name__}."
        if trouble != model.trouble:
            model.trouble = trouble
            log.write("upstream_model", why=trouble or "it answers as it was exported")


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, dict):
        raise ServerError("the upstream's metadata are none of the open inference protocol. Is --upstream its address?")
    return document


def _tensors(document: Mapping[str, Any], which: str) -> dict[str, str]:
    """Return the datatype of every input or output by its name."""
    entries: Sequence[Any] = document.get(which) or ()
    return {
        str(entry.get("name")): str(entry.get("datatype"))
        for entry in (entries if isinstance(entries, list) else ())
        if isinstance(entry, dict)
    }
