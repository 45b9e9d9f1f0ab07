"""Runs one forward pass per item, last item first."""

from stock_handler import StockHandler


class ReversingHandler(StockHandler):
    def handle(self, data, context):
        self.context = context
        answers = [self.postprocess(self.inference(self.preprocess([item])))[0] for item in reversed(data)]
        return answers[::-1]
