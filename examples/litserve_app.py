"""A LitServe API around a guarded network: requests are put together, and each has its own verdict.

WEIGHTS=weights.safetensors ARCHITECTURE=my_net:make BUNDLES=bundles python litserve_app.py
"""

import os

import litserve
import numpy as np
from fastapi import HTTPException

from guard import GuardedModel, SuspectModel


class GuardedApi(litserve.LitAPI):
    """Takes `{"input": [...]}`, the numbers of one input as the network takes it."""

    def setup(self, device: str) -> None:
        suspect = SuspectModel.load(os.environ["WEIGHTS"], architecture=os.environ["ARCHITECTURE"])
        self.model = GuardedModel(suspect.module, bundles=os.environ["BUNDLES"], name="digits")

    def decode_request(self, request):
        try:
            return np.asarray(request["input"], np.float32).reshape(self.model.input_shape)
        except (KeyError, TypeError, ValueError):
            raise HTTPException(400, f"send an input of shape {self.model.input_shape}") from None

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, rows):
        return self.model.answer(rows)

    def unbatch(self, answers):
        return answers

    def encode_response(self, answer):
        if answer.logits is None:  # blocked, rejected or failed
            raise HTTPException(answer.response.status, answer.error)
        return {"label": int(answer.logits.argmax()), "verdict": answer.verdict, "action": answer.action}


if __name__ == "__main__":
    litserve.LitServer(GuardedApi(max_batch_size=8, batch_timeout=0.002)).run(port=8000, generate_client_file=False)
