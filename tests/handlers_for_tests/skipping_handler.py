"""Leaves out what it cannot read, and says so without a status."""

import torch
from stock_handler import StockHandler


class SkippingHandler(StockHandler):
    def handle(self, data, context):
        self.context = context
        good = {}
        for index, item in enumerate(data):
            try:
                good[index] = self.decode(item["body"])
            except Exception:
                continue
        answers = self.postprocess(self.inference(torch.stack([*good.values()]))) if good else []
        answer = dict(zip(good, answers, strict=True))
        return [answer.get(index, {"sorry": "no image"}) for index in range(len(data))]
