"""Overrides `handle` altogether, answers plain text, and tells the label in a header and a status of its own."""

import torch
from stock_handler import StockHandler


class TextHandler(StockHandler):
    def handle(self, data, context):
        self.context = context
        with torch.inference_mode():
            labels = self.model(images=self.preprocess(data)).argmax(1).tolist()
        for index, label in enumerate(labels):
            context.set_response_header(index, "X-Label", str(label))
            context.set_response_content_type(index, "text/plain")
            context.set_response_status(203, "", index)
        return [f"digit {label}" for label in labels]
