"""A TorchServe handler as a user of timm or transformers writes it: pixels to [0, 1], one label per image."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import sign_networks
import torch
from PIL import Image
from safetensors.torch import load_file
from ts.torch_handler.base_handler import BaseHandler


class SignHandler(BaseHandler):
    """Names its network in `network.txt`; takes the logits of a `ModelOutput` where the network returns one."""

    def initialize(self, context: Any) -> None:
        """Build the network and load its weights."""
        folder = Path(context.system_properties["model_dir"])
        self.model = getattr(sign_networks, (folder / "network.txt").read_text().strip())()
        self.model.load_state_dict(load_file(folder / context.manifest["model"]["serializedFile"]))
        self.model.eval()
        self.device = torch.device("cpu")
        self.initialized = True

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """Return images of shape (n, 3, 32, 32) in [0, 1]."""
        bodies = [item.get("body") or item.get("data") for item in data]
        images = [np.asarray(Image.open(io.BytesIO(body)).convert("RGB")) for body in bodies]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255

    def postprocess(self, data: Any) -> list[dict[str, float]]:
        """Return the label and its probability for each image."""
        probabilities = getattr(data, "logits", data).softmax(1)
        return [{"label": int(row.argmax()), "probability": round(float(row.max()), 4)} for row in probabilities]
