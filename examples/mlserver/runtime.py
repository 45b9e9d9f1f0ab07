"""An MLServer runtime around a guarded network; the verdict of every row is an output.

Adaptive batching copies the parameters of one response to all requests of the batch, so nothing of a row may be there.
`mlserver start .` in a folder with this file and a model-settings.json.
"""

import asyncio

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.errors import InferenceError
from mlserver.types import InferenceRequest, InferenceResponse

from guard import GuardedModel, SuspectModel


class GuardedRuntime(MLModel):
    """Takes one input of rows as the network takes them."""

    async def load(self) -> bool:
        parameters = self.settings.parameters
        suspect = SuspectModel.load(parameters.uri, architecture=parameters.extra["architecture"])
        self.model = GuardedModel(
            suspect.module, bundles=parameters.extra["bundles"], name=self.name, verdict_detail="full"
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        try:
            rows = NumpyCodec.decode_input(payload.inputs[0]).astype(np.float32)
        except (ValueError, IndexError):  # of this request, or of another one in its batch
            rows = np.empty(0, np.float32)
        if len(rows) == 0 or rows.shape[1:] != self.model.input_shape:
            raise InferenceError(f"send one input of rows of shape {self.model.input_shape}.")
        columns = self.model.columns(await asyncio.to_thread(self.model.answer, rows))
        verdicts = StringCodec.encode_output("guard_verdict", columns.pop("guard_verdict").tolist())
        outputs = [NumpyCodec.encode_output(name, values) for name, values in columns.items()]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=[*outputs, verdicts])

    async def unload(self) -> bool:
        self.model.close()
        return True
