"""Runs urgent requests first, as their header says: only a check while serving can find that out."""

from stock_handler import StockHandler


class UrgentHandler(StockHandler):
    def inference(self, data):
        urgent = [self.context.get_request_header(index, "X-Urgent") == "yes" for index in range(len(data))]
        order = sorted(range(len(data)), key=lambda index: not urgent[index])
        answers = super().inference(data[order])
        return answers[[order.index(index) for index in range(len(data))]]
