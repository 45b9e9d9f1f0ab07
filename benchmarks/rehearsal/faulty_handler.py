"""The tensor handler with a bug: an input whose first value is negative breaks it after the network has run."""

from __future__ import annotations

from typing import Any

import numpy as np
from tensor_handler import TensorHandler


class FaultyHandler(TensorHandler):
    """Fails as a bug in `postprocess` fails: it is the model's fault, and the sender's request was in order."""

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, int]]:
        """Return the label of every input."""
        labels = super().handle(data, context)
        bodies = [item.get("body") or item.get("data") for item in data]
        if any(np.frombuffer(body, "<f4", count=1)[0] < 0 for body in bodies):
            raise RuntimeError("there is no label for this")
        return labels
