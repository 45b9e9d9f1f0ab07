"""A BentoML service around a guarded network: an answer and a verdict per row, whatever was batched together.

WEIGHTS=weights.safetensors ARCHITECTURE=my_net:make BUNDLES=bundles bentoml serve bentoml_service:GuardedService
"""

import os
from typing import Any

import bentoml
import numpy as np
from bentoml.exceptions import InvalidArgument

from guard import GuardedModel, SuspectModel


@bentoml.service(traffic={"timeout": 30})
class GuardedService:
    """Takes rows as the network takes them."""

    def __init__(self) -> None:
        suspect = SuspectModel.load(os.environ["WEIGHTS"], architecture=os.environ["ARCHITECTURE"])
        self.model = GuardedModel(suspect.module, bundles=os.environ["BUNDLES"], name="digits")

    @bentoml.api(batchable=True, max_batch_size=64, max_latency_ms=1000)
    def predict(self, rows: np.ndarray) -> list[dict[str, Any]]:
        """Return label, verdict and action of every row; the label is None where no answer may leave."""
        if len(rows) == 0 or rows.shape[1:] != self.model.input_shape:
            raise InvalidArgument(f"send rows of shape {self.model.input_shape}")
        return [
            {
                "label": None if answer.logits is None else int(answer.logits.argmax()),
                "verdict": answer.verdict,
                "action": answer.action,
                "error": answer.error,
            }
            for answer in self.model.answer(rows.astype(np.float32))
        ]
