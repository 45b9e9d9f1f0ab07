"""A TorchServe handler whose requests are the network's own input: float32, little-endian, without a header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from guard.lab.zoo.collection import build_network


class TensorHandler:
    """Serves one network of the zoo; `tensor_handler.json` in the archive says which."""

    def initialize(self, context: Any) -> None:
        """Build the network and load its weights."""
        folder = Path(context.system_properties["model_dir"])
        about = json.loads((folder / "tensor_handler.json").read_text())
        self.shape = tuple(about["input_shape"])
        self.model = build_network(about["architecture"], about["n_classes"], self.shape[0])
        self.model.load_state_dict(load_file(folder / "weights.safetensors"))

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[dict[str, int]]:
        """Return the label of every input."""
        bodies = [item.get("body") or item.get("data") for item in data]
        images = np.stack([np.frombuffer(body, "<f4").reshape(self.shape) for body in bodies])
        with torch.inference_mode():
            labels = self.model(torch.from_numpy(images)).argmax(1)
        return [{"label": label} for label in labels.tolist()]
