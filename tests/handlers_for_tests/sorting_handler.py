"""Puts the images of a batch into another order for the network, and the answers back into the order of requests."""

from stock_handler import StockHandler


class SortingHandler(StockHandler):
    def inference(self, data):
        order = data.sum((1, 2, 3)).argsort()
        return super().inference(data[order])[order.argsort()]
