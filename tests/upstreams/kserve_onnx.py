"""A model of KServe's Python server that runs an ONNX file: `python kserve_onnx.py FILE NAME PORT`.

It imports nothing of the guard, as it runs in an environment of its own.
"""

from __future__ import annotations

import sys

import kserve
import numpy as np
import onnxruntime
from kserve import InferOutput, InferRequest, InferResponse


class OnnxModel(kserve.Model):
    """Answers with the outputs that are asked for, all if none is named."""

    def __init__(self, name: str, file: str) -> None:
        super().__init__(name)
        self._session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        self.ready = True

    async def get_input_types(self) -> list[dict[str, object]]:
        return [
            {"name": tensor.name, "datatype": "FP32", "shape": [-1, *tensor.shape[1:]]}
            for tensor in self._session.get_inputs()
        ]

    async def get_output_types(self) -> list[dict[str, object]]:
        return [
            {"name": tensor.name, "datatype": "FP32", "shape": [-1, *tensor.shape[1:]]}
            for tensor in self._session.get_outputs()
        ]

    def predict(
        self,
        payload: InferRequest,
        headers: dict[str, str] | None = None,
        response_headers: dict[str, str] | None = None,
    ) -> InferResponse:
        if isinstance(payload, dict):  # the older protocol, `v1/models/NAME:predict`
            images = np.asarray(payload["instances"], np.float32)
            return {"predictions": self._session.run(["logits"], {"input": images})[0].tolist()}
        names = [output.name for output in payload.request_outputs or ()]
        names = names or [tensor.name for tensor in self._session.get_outputs()]
        arrays = self._session.run(names, {tensor.name: tensor.as_numpy() for tensor in payload.inputs})
        outputs = []
        for name, array in zip(names, arrays, strict=True):
            outputs.append(InferOutput(name, list(array.shape), "FP32"))
            outputs[-1].set_data_from_numpy(array)
        return InferResponse(
            payload.id,
            self.name,
            outputs,
            use_binary_outputs=payload.use_binary_outputs,
            requested_outputs=payload.request_outputs,
        )


if __name__ == "__main__":
    file, name, port = sys.argv[1:]
    kserve.ModelServer(http_port=int(port), enable_grpc=False, workers=1).start([OnnxModel(name, file)])
