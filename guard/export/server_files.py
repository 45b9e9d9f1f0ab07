"""What servers want to have beside a model: Triton's `config.pbtxt`, MLServer's `model-settings.json`."""

from __future__ import annotations

import json
from typing import Literal

from guard.export.record import INPUT, ExportRecord

#: Servers that a configuration can be written for.
ServerName = Literal["triton", "mlserver", "none"]
#: Rows that Triton may put into one call.
_MOST_ROWS = 64


def triton_config(record: ExportRecord) -> str:
    """Return `config.pbtxt` of a model repository, for the ONNX Runtime backend with dynamic batching."""
    lines = [
        f'name: "{record.model}"',
        'backend: "onnxruntime"',
        f"max_batch_size: {_MOST_ROWS}",
        "input [",
        f'  {{ name: "{INPUT}" data_type: TYPE_FP32 dims: {list(record.input_shape)} }}',
        "]",
        "output [",
        ",\n".join(f'  {{ name: "{name}" data_type: TYPE_FP32 dims: [{n}] }}' for name, n in record.outputs.items()),
        "]",
        "dynamic_batching { }",
    ]
    for name, digest in (("guard_bundle", record.bundle), ("guard_suspect", record.suspect)):
        lines.append(f'parameters {{ key: "{name}" value: {{ string_value: "{digest}" }} }}')
    return "\n".join(lines) + "\n"


def mlserver_settings(record: ExportRecord, uri: str, implementation: str) -> str:
    """Return `model-settings.json`: what MLServer tells of inputs and outputs, and which class runs the file.

    Parameters
    ----------
    record : ExportRecord
    uri : str
        The ONNX file, relative to the settings.
    implementation : str
        MLServer has no runtime of its own for ONNX: a class of the user's, as `module.Class`.
    """
    tensors = [{"name": name, "datatype": "FP32", "shape": [-1, n]} for name, n in record.outputs.items()]
    settings = {
        "name": record.model,
        "implementation": implementation,
        "platform": "onnx",
        "inputs": [{"name": INPUT, "datatype": "FP32", "shape": [-1, *record.input_shape]}],
        "outputs": tensors,
        "parameters": {"uri": uri, "extra": {"guard_bundle": record.bundle, "guard_suspect": record.suspect}},
    }
    return json.dumps(settings, indent=2) + "\n"
