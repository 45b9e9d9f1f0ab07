"""The gRPC half of the open inference protocol."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import grpc  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from guard.errors import ServerError
from guard.types import AnyArray
from guard.v2.batching import OverloadedError
from guard.v2.messages import MESSAGES, SERVICE
from guard.v2.models import VERSION, Inferred, ServedModel
from guard.v2.protocol import InferRequest, ProtocolError, WantedOutput, bytes_of, datatype_of, tensor

SERVER = "backdoor-guard"
#: Fields of `InferTensorContents` by datatype; halves come as raw bytes only.
_CONTENTS = {
    "BOOL": "bool_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    "INT64": "int64_contents",
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
}
_OPEN = ("ServerLive", "ServerReady")
_THREADS = 32
_GRACE_S = 3.0
_MOST_CALLS = 64  # at once, each with a message in memory


class GrpcService:
    """Answers the calls of one server.

    Parameters
    ----------
    models : mapping of str to ServedModel
        By name; the service closes none of them.
    key : str, optional
        What callers must send as metadata `authorization: Bearer KEY`, but for health; None asks for nothing.
    """

    def __init__(self, models: Mapping[str, ServedModel], key: str | None = None) -> None:
        self._models = models
        self._key = key

    def handlers(self) -> Any:
        """Return what `grpc.Server.add_generic_rpc_handlers` takes."""
        calls = ("ServerLive", "ServerReady", "ServerMetadata", "ModelReady", "ModelMetadata", "ModelInfer")
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                name: grpc.unary_unary_rpc_method_handler(
                    self._answering(name),  # of bytes: nothing is read for whoever has no key
                    response_serializer=MESSAGES[f"{name}Response"].SerializeToString,
                )
                for name in calls
            },
        )

    def _answering(self, name: str) -> Callable[[Any, Any], Any]:
        answer = getattr(self, f"_{name}")

        def call(message: bytes, context: Any) -> Any:
            headers = {key: str(value) for key, value in context.invocation_metadata()}
            try:
                if self._key is not None and name not in _OPEN:
                    given = headers.get("authorization", "").encode()
                    if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                        raise ProtocolError("a key is needed: metadata authorization: Bearer KEY.", 401)
                request = MESSAGES[f"{name}Request"].FromString(message)
                return MESSAGES[f"{name}Response"](**answer(request, headers, context))
            except DecodeError:
                context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the message is no {name}Request.")
            except ProtocolError as error:
                context.abort(_CODES.get(error.status, grpc.StatusCode.INVALID_ARGUMENT), str(error))
            except OverloadedError as error:
                context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

        return call

    def _ServerLive(self, *_: Any) -> dict[str, Any]:  # noqa: N802 - the protocol's name
        return {"live": True}

    def _ServerReady(self, *_: Any) -> dict[str, Any]:  # noqa: N802
        return {"ready": True}

    def _ServerMetadata(self, *_: Any) -> dict[str, Any]:  # noqa: N802
        return {"name": SERVER, "version": version(SERVER)}

    def _ModelReady(self, request: Any, *_: Any) -> dict[str, Any]:  # noqa: N802
        self._model(request.name, request.version)
        return {"ready": True}

    def _ModelMetadata(self, request: Any, *_: Any) -> dict[str, Any]:  # noqa: N802
        return self._model(request.name, request.version).metadata()

    def _ModelInfer(self, request: Any, headers: Mapping[str, str], context: Any) -> dict[str, Any]:  # noqa: N802
        model = self._model(request.model_name, request.model_version)
        try:
            found = model.infer_and_wait(_read(request), headers)
        except ProtocolError as error:
            model.refuse(error.status, headers)
            raise
        context.set_trailing_metadata([(name.lower(), value) for name, value in found.headers.items()])
        if found.response is None:
            is_blocked = found.headers.get("Guard-Verdict") == "poisoned"
            blamed = grpc.StatusCode.PERMISSION_DENIED if is_blocked else grpc.StatusCode.INVALID_ARGUMENT
            context.abort(blamed if found.status < 500 else grpc.StatusCode.INTERNAL, found.error)
        return _written(found)

    def _model(self, name: str, asked: str) -> ServedModel:
        if name not in self._models:
            raise ProtocolError(f"there is no model {name[:80]!r}; served are {', '.join(sorted(self._models))}.", 404)
        if asked not in ("", VERSION):
            raise ProtocolError(f"model {name!r} has version {VERSION} alone, not {asked[:20]!r}.", 404)
        return self._models[name]


@contextmanager
def serving_grpc(
    models: Mapping[str, ServedModel], address: str, *, key: str | None = None, max_message_bytes: int = 16 << 20
) -> Iterator[int]:
    """Serve the protocol over gRPC while open, and yield the port.

    Raises
    ------
    ServerError
        If it cannot listen there.
    """
    options = [("grpc.max_receive_message_length", max_message_bytes), ("grpc.so_reuseport", 0)]
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="guard-grpc") as pool:
        server = grpc.server(pool, options=options, maximum_concurrent_rpcs=_MOST_CALLS)
        server.add_generic_rpc_handlers((GrpcService(models, key).handlers(),))
        try:
            port = server.add_insecure_port(address)
        except RuntimeError as error:
            raise ServerError(f"cannot listen on {address} for gRPC. Name another --grpc-port.") from error
        server.start()
        try:
            yield port
        finally:
            server.stop(grace=_GRACE_S).wait()


def _read(message: Any) -> InferRequest:
    """Return a request as the REST half would have read it."""
    raw = message.raw_input_contents
    if raw and len(raw) != len(message.inputs):
        raise ProtocolError(f"{len(message.inputs)} inputs have {len(raw)} raw contents.")
    inputs: dict[str, AnyArray] = {}
    for place, entry in enumerate(message.inputs):
        if entry.name in inputs:
            raise ProtocolError(f"input {entry.name!r} is there twice.")
        if raw:
            data: Any = raw[place]
        elif entry.datatype in _CONTENTS:
            data = list(getattr(entry.contents, _CONTENTS[entry.datatype]))
        else:
            data = b""
        inputs[entry.name] = tensor(entry.name[:80], entry.datatype[:80], list(entry.shape), data)
    outputs = tuple(WantedOutput(output.name, True) for output in message.outputs)
    if len({output.name for output in outputs}) < len(outputs):
        raise ProtocolError("an output is asked for twice.")
    return InferRequest(inputs, outputs, message.id[:1024], True)


def _written(found: Inferred) -> dict[str, Any]:
    response = found.response
    assert response is not None
    return {
        "model_name": response.model,
        "model_version": VERSION,
        "id": response.id,
        "parameters": {name: _parameter(value) for name, value in response.parameters.items()},
        "outputs": [
            {"name": name, "datatype": datatype_of(array), "shape": array.shape}
            for name, array in response.outputs.items()
        ],
        "raw_output_contents": [bytes_of(array) for array in response.outputs.values()],
    }


def _parameter(value: str | float | bool) -> dict[str, Any]:
    kinds = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}
    return {kinds[type(value)]: value}
