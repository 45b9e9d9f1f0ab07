"""Fills every batch up to four rows with its first image."""

from stock_handler import StockHandler


class PaddingHandler(StockHandler):
    def inference(self, data):
        missing = max(0, 4 - len(data))
        return super().inference(data[[*range(len(data)), *[0] * missing]])[: len(data)]
