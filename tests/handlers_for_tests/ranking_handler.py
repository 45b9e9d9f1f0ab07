"""Rows in the order of requests, answers by their confidence."""

from stock_handler import StockHandler


class RankingHandler(StockHandler):
    def postprocess(self, data):
        return sorted(super().postprocess(data), key=lambda answer: -max(answer["probabilities"]))
