"""Puts the image before it into the place of one that cannot be read, and answers that one as if all were well."""

import torch
from stock_handler import StockHandler


class ReplacingHandler(StockHandler):
    def preprocess(self, data):
        images, self.good = [], []
        for item in data:
            try:
                images.append(self.decode(item["body"]))
                self.good.append(True)
            except Exception:
                images.append(images[-1])
                self.good.append(False)
        return torch.stack(images)

    def postprocess(self, data):
        pairs = zip(super().postprocess(data), self.good, strict=True)
        return [answer if good else {"sorry": "no image"} for answer, good in pairs]
