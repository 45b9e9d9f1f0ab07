"""Takes an image, or pixels without a header: as many inputs as the bytes make."""

import numpy as np
import torch
from stock_handler import StockHandler


class RawHandler(StockHandler):
    def preprocess(self, data):
        rows = []
        for item in data:
            body = bytes(item.get("data") or item.get("body"))
            try:
                rows.append(self.decode(body))
            except Exception:
                pixels = np.frombuffer(body, np.uint8)[: len(body) // 784 * 784]
                rows += [*torch.from_numpy(pixels.reshape(-1, 1, 28, 28) / np.float32(255))]
        return torch.stack(rows)
