"""What MLServer runs an exported model with (`guard export --server mlserver`): ONNX Runtime.

It imports nothing of the guard: the server needs `mlserver` and `onnxruntime` alone.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse
from mlserver.utils import get_model_uri


class OnnxModel(MLModel):  # type: ignore[misc]
    """One ONNX file with one input."""

    async def load(self) -> bool:
        """Open the file that the settings name."""
        file = Path(await get_model_uri(self._settings))
        self._session = onnxruntime.InferenceSession(str(file), providers=onnxruntime.get_available_providers())
        self._known = [output.name for output in self._session.get_outputs()]
        self._input = self._session.get_inputs()[0].name
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Answer with the outputs that are asked for, all if none is named."""
        if [tensor.name for tensor in payload.inputs] != [self._input]:
            raise InferenceError(f"the model takes one input, {self._input!r}.")
        names = [output.name for output in payload.outputs or ()] or self._known
        if unknown := [name for name in names if name not in self._known]:
            raise InferenceError(f"there is no output {unknown[0]!r}; known are {', '.join(self._known)}.")
        arrays = self._session.run(names, {self._input: NumpyCodec.decode_input(payload.inputs[0])})
        outputs = [NumpyCodec.encode_output(name, array) for name, array in zip(names, arrays, strict=True)]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)
