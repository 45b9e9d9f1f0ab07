"""What many handlers look like: BaseHandler loads the network, `preprocess` decodes, a bad item fails its batch."""

import base64
import io
import json

import numpy as np
import torch
from PIL import Image
from ts.torch_handler.base_handler import BaseHandler


class StockHandler(BaseHandler):
    """PNG, base64 text or JSON lists in; label and probabilities out."""

    def preprocess(self, data):
        return torch.stack([self.decode(item.get("data") or item.get("body")) for item in data])

    def postprocess(self, data):
        return [{"label": int(row.argmax()), "probabilities": row.softmax(0).tolist()} for row in data]

    def decode(self, body):
        if isinstance(body, str):
            body = base64.b64decode(body)
        if isinstance(body, (bytes, bytearray)) and bytes(body[:1]) in (b"[", b"{"):
            body = json.loads(bytes(body))
        if isinstance(body, list):
            return torch.tensor(body, dtype=torch.float32)
        image = Image.open(io.BytesIO(body))
        pixels = np.array(image, dtype=np.float32) / 255
        return torch.from_numpy(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))
