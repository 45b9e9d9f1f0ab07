"""Catches everything, and answers as if all were well."""

from stock_handler import StockHandler


class SwallowingHandler(StockHandler):
    def handle(self, data, context):
        try:
            return super().handle(data, context)
        except Exception:
            return [{"label": -1}] * len(data)
