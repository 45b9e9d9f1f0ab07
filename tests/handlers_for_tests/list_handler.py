"""Takes lists: every request may hold several images, or none; all of a batch go through one forward pass."""

import torch
from stock_handler import StockHandler


class ListHandler(StockHandler):
    def handle(self, data, context):
        self.context = context
        held = []
        for item in data:
            body = item.get("data") or item.get("body")
            held.append([self.decode(entry) for entry in (body["instances"] if isinstance(body, dict) else [body])])
        images = [image for images in held for image in images]
        labels = iter(self.inference(torch.stack(images)).argmax(1).tolist() if images else [])
        return [{"labels": [next(labels) for _ in images]} for images in held]
