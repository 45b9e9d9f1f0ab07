"""Messages of the open inference protocol's gRPC half, from a table of their fields: no code is generated.

https://github.com/kserve/open-inference-protocol, `inference.GRPCInferenceService`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf import (  # type: ignore[import-untyped]
    descriptor_pb2,
    descriptor_pool,
    message_factory,
)

PACKAGE = "inference"
SERVICE = f"{PACKAGE}.GRPCInferenceService"
#: Per message its fields in the order of their numbers: name, and type. `[]` after it means repeated, `{}` a map from
#: text, and what is no type of protobuf is a message of this table.
_FIELDS: Mapping[str, tuple[str, ...]] = {
    "ServerLiveRequest": (),
    "ServerLiveResponse": ("live bool",),
    "ServerReadyRequest": (),
    "ServerReadyResponse": ("ready bool",),
    "ModelReadyRequest": ("name string", "version string"),
    "ModelReadyResponse": ("ready bool",),
    "ServerMetadataRequest": (),
    "ServerMetadataResponse": ("name string", "version string", "extensions string[]"),
    "ModelMetadataRequest": ("name string", "version string"),
    "ModelMetadataResponse": (
        "name string",
        "versions string[]",
        "platform string",
        "inputs ModelMetadataResponse.TensorMetadata[]",
        "outputs ModelMetadataResponse.TensorMetadata[]",
    ),
    "ModelMetadataResponse.TensorMetadata": ("name string", "datatype string", "shape int64[]"),
    "InferParameter": (
        "bool_param bool",
        "int64_param int64",
        "string_param string",
        "double_param double",
        "uint64_param uint64",
    ),
    "InferTensorContents": (
        "bool_contents bool[]",
        "int_contents int32[]",
        "int64_contents int64[]",
        "uint_contents uint32[]",
        "uint64_contents uint64[]",
        "fp32_contents float[]",
        "fp64_contents double[]",
        "bytes_contents bytes[]",
    ),
    "ModelInferRequest": (
        "model_name string",
        "model_version string",
        "id string",
        "parameters InferParameter{}",
        "inputs ModelInferRequest.InferInputTensor[]",
        "outputs ModelInferRequest.InferRequestedOutputTensor[]",
        "raw_input_contents bytes[]",
    ),
    "ModelInferRequest.InferInputTensor": (
        "name string",
        "datatype string",
        "shape int64[]",
        "parameters InferParameter{}",
        "contents InferTensorContents",
    ),
    "ModelInferRequest.InferRequestedOutputTensor": ("name string", "parameters InferParameter{}"),
    "ModelInferResponse": (
        "model_name string",
        "model_version string",
        "id string",
        "parameters InferParameter{}",
        "outputs ModelInferResponse.InferOutputTensor[]",
        "raw_output_contents bytes[]",
    ),
    "ModelInferResponse.InferOutputTensor": (
        "name string",
        "datatype string",
        "shape int64[]",
        "parameters InferParameter{}",
        "contents InferTensorContents",
    ),
}
#: Messages of which one field at most is set, and what protobuf calls the choice.
_CHOICES = {"InferParameter": "parameter_choice"}
_Field = descriptor_pb2.FieldDescriptorProto


def _messages() -> dict[str, type[Any]]:
    """Return the class of every message by its name, in a pool of its own: another package may know the same names."""
    file = descriptor_pb2.FileDescriptorProto(name="open_inference.proto", package=PACKAGE, syntax="proto3")
    made: dict[str, Any] = {}
    for name in _FIELDS:
        outer, _, inner = name.rpartition(".")
        made[name] = (made[outer].nested_type if outer else file.message_type).add(name=inner)
    for name, fields in _FIELDS.items():
        message = made[name]
        if name in _CHOICES:
            message.oneof_decl.add(name=_CHOICES[name])
        for number, text in enumerate(fields, start=1):
            _add_field(message, f".{PACKAGE}.{name}", number, *text.split())
            if name in _CHOICES:
                message.field[-1].oneof_index = 0
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in _FIELDS}


def _add_field(message: Any, path: str, number: int, name: str, kind: str) -> None:
    plain = kind.removesuffix("[]").removesuffix("{}")
    field = message.field.add(name=name, number=number, label=_Field.LABEL_OPTIONAL)
    if kind != plain:
        field.label = _Field.LABEL_REPEATED
    if kind.endswith("{}"):
        entry = message.nested_type.add(name=f"{name.capitalize()}Entry")
        entry.options.map_entry = True
        _add_field(entry, path, 1, "key", "string")
        _add_field(entry, path, 2, "value", plain)
        field.type, field.type_name = _Field.TYPE_MESSAGE, f"{path}.{entry.name}"
    elif plain[0].isupper():
        field.type, field.type_name = _Field.TYPE_MESSAGE, f".{PACKAGE}.{plain}"
    else:
        field.type = getattr(_Field, f"TYPE_{plain.upper()}")


MESSAGES = _messages()
